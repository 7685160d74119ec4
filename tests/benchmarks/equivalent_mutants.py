"""Mutants that change no result, and why: (module, function, change) -> reason. See mutants.py."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
