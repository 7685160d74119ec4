"""Which stages of a plan a command is about: --only, --from, --force."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError, suggest
from pipeline.manifest.matrix import base_of, chosen
from pipeline.planning.plan import Plan


@dataclass(frozen=True)
class Selection:
    """Stages by name; the name of a matrix means all its members."""

    only: Sequence[str] = ()
    """These alone."""
    onward: Sequence[str] = ()
    """These, and all that depends on them."""
    force: Sequence[str] = ()
    """Make these again, and so all that depends on them."""

    @property
    def given(self) -> bool:
        """Whether stages were chosen at all."""
        return bool(self.only or self.onward)

    def forced(self, names: Sequence[str]) -> set[str]:
        return _resolve(names, self.force)

    def of(self, plan: Plan) -> set[str]:
        """The stages to carry out. Raises UsageError for a name that the plan does not have, a stage that is
        blocked, or one whose inputs neither are there nor are to be made."""
        names = [stage.name for stage in plan]
        wanted = _resolve(names, self.only)
        onward = _resolve(names, self.onward)
        for stage in plan:
            if onward.intersection(stage.reads):
                onward.add(stage.name)
        found = wanted | onward if self.given else set(names)
        _check(plan, found)
        return found


def _resolve(names: Sequence[str], asked: Sequence[str]) -> set[str]:
    for one in asked:
        if not chosen(names, one):
            raise UsageError(f"no stage {one!r}{suggest(one, list(dict.fromkeys([*map(base_of, names), *names])))}")
    return {name for one in asked for name in chosen(names, one)}


def _check(plan: Plan, found: Collection[str]) -> None:
    by_name = {stage.name: stage for stage in plan}
    for stage in plan:
        if stage.name not in found:
            continue
        if stage.state == "blocked":
            raise UsageError(f"stage {stage.name} is blocked: {stage.why}")
        missing = next((by_name[r] for r in stage.reads if r not in found and by_name[r].state != "reuse"), None)
        if missing:
            raise UsageError(
                f"stage {stage.name} needs {missing.name}, which is not made yet ({missing.why}); make it first, "
                "or leave the choice of stages away"
            )
