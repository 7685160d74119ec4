"""Errors that a user can fix, with their exit codes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

INTERRUPTED = 130
"""The exit code of a run that was interrupted and can be resumed."""


class RetortError(Exception):
    """An error whose message is printed without a traceback."""

    exit_code = 1


class StageFailed(RetortError):
    """A stage failed."""


class UsageError(RetortError):
    """A command, a manifest or a path is invalid."""

    exit_code = 2


class ManifestError(UsageError):
    """All problems of a manifest, each with its position in the file."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Locked(RetortError):
    """Another process carries out the same run, or makes or uses the same artifact."""

    exit_code = 3


def suggest(given: str, allowed: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the most similar allowed name, and all allowed names."""
    close = get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(map(str, allowed))})" if allowed else hint
