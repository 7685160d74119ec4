"""Callbacks of click that complete words when TAB is pressed in a shell.

They import nothing slow at the top. They ignore files that cannot be read, because an error message would appear in the
middle of the user's line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from click import Context, Parameter
from click.shell_completion import CompletionItem

from pipeline import DEFAULT_STORE


def complete_runs(context: Context, parameter: Parameter, incomplete: str) -> list[str]:
    """Complete names of the runs in the store."""
    return _fitting(incomplete, _runs(context))


def complete_runs_or_paths(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of runs, files and folders."""
    runs = [CompletionItem(name) for name in complete_runs(context, parameter, incomplete)]
    return [*runs, CompletionItem(incomplete, type="file")]


def complete_stages(context: Context, parameter: Parameter, incomplete: str) -> list[str]:
    """Complete stages of the run in parameter `run_name` or `target`, or of all runs if it is not known.

    It is not known while an option has no value yet, because click does not pass the earlier parameters then.
    """
    named, existing = context.params.get("run_name") or context.params.get("target"), _runs(context)
    runs = existing if named is None else [named] if named in existing else []
    return _fitting(incomplete, dict.fromkeys(stage for run in runs for stage in _stages(context, run)))


def _stages(context: Context, run: str) -> Iterable[str]:
    try:
        plan = json.loads((_store(context) / "runs" / run / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return plan if isinstance(plan, dict) else ()


def complete_explained(context: Context, parameter: Parameter, incomplete: str) -> list[str]:
    """Complete the names that `retort explain` knows."""
    from pipeline.reference.explain import names

    return _fitting(incomplete, (name for group in names().values() for name in group))


def complete_published(context: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of published perceptual networks, and files."""
    from stages.perceptual.importing import PUBLISHED

    return [*map(CompletionItem, _fitting(incomplete, PUBLISHED)), CompletionItem(incomplete, type="file")]


def complete_methods(context: Context, parameter: Parameter, incomplete: str) -> list[str]:
    """Complete distillation methods, including those of plug-ins."""
    from stages.methods import METHODS

    return _fitting(incomplete, METHODS)


def _store(context: Context) -> Path:
    """Return the store: that of --store or RETORT_STORE, which click reads, or the default one."""
    return Path(context.params.get("store") or DEFAULT_STORE).expanduser()


def _runs(context: Context) -> list[str]:
    return sorted(plan.parent.name for plan in (_store(context) / "runs").glob("*/plan.json"))


def _fitting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
