"""Compares two plans, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.planning.fingerprint import changes

PlanRecord = Mapping[str, Mapping[str, Any]]
"""The content of a run's plan.json: stage name -> PlannedStage.as_dict()."""


def difference(before: PlanRecord, after: PlanRecord) -> dict[str, list[str]]:
    """Return stage name -> changes from `before` to `after`, in words. Unchanged stages are omitted."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            found[name] = ["removed"]
        elif name not in before:
            found[name] = ["added"]
        elif before[name]["kind"] != after[name]["kind"]:
            found[name] = [f"kind {before[name]['kind']} -> {after[name]['kind']}"]
        elif before[name]["fingerprint"] != after[name]["fingerprint"]:
            old, new = before[name]["identity"], after[name]["identity"]
            found[name] = list(changes(old, new, after[name]["files"]))
    return found
