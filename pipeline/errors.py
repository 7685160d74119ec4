"""What can go wrong in a way that a user can mend, and the exit code of each."""

from __future__ import annotations

from collections.abc import Sequence


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
