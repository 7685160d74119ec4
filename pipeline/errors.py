"""What can go wrong in a way that a user can mend, and the exit code of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

INTERRUPTED = 130
"""The exit code of a run that was interrupted and can be resumed."""


class RetortError(Exception):
    """Its message is all that is printed, without a traceback."""

    exit_code = 1


class StageFailed(RetortError):
    """A stage could not be carried out."""


class UsageError(RetortError):
    """A command, a manifest or a path is wrong."""

    exit_code = 2


class ManifestError(UsageError):
    """Everything that is wrong with a manifest, each problem with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Locked(RetortError):
    """Another process is making the same artifact."""

    exit_code = 3


def suggest(given: str, allowed: Collection[str]) -> str:
    """The end of a sentence about a name that is not known: what was probably meant, and all that may be."""
    close = get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(map(str, allowed))})" if allowed else hint
