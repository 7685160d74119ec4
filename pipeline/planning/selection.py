"""Selects the stages of a plan that a command carries out (--only, --from) or makes again (--force)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError, suggest
from pipeline.manifest.matrix import base_of, chosen
from pipeline.planning.plan import Plan


@dataclass(frozen=True)
class Selection:
    """Stage names that the user gave on the command line. The name of a matrix or chain stands for all its stages."""

    only: Sequence[str] = ()
    """--only: carry out these stages and no others."""
    onward: Sequence[str] = ()
    """--from: carry out these stages and all stages that depend on them."""
    force: Sequence[str] = ()
    """--force: make these stages again, and all stages that depend on them."""

    @property
    def given(self) -> bool:
        """Whether --only or --from was given. Otherwise all stages are carried out."""
        return bool(self.only or self.onward)

    def forced(self, names: Sequence[str]) -> set[str]:
        """Return the names among `names` that --force selects. Raises UsageError if a name of --force matches none."""
        return _resolve(names, self.force)

    def of(self, plan: Plan) -> set[str]:
        """Return the names of the stages to carry out. Raises UsageError for a name that matches no stage of the plan,
        and for a selected stage that is blocked, or has an input that is neither sealed nor selected."""
        names = [stage.name for stage in plan]
        wanted = _resolve(names, self.only)
        onward = _resolve(names, self.onward)
        for stage in plan:
            if onward.intersection(stage.reads):
                onward.add(stage.name)
        found = wanted | onward if self.given else set(names)
        by_name = {stage.name: stage for stage in plan}
        for stage in (by_name[name] for name in names if name in found):
            if stage.state == "blocked":
                raise UsageError(f"stage {stage.name} is blocked: {stage.why}")
            missing = next((by_name[r] for r in stage.reads if r not in found and by_name[r].state != "reuse"), None)
            if missing:
                raise UsageError(
                    f"stage {stage.name} needs {missing.name}, which is not made yet ({missing.why}); "
                    f"choose {missing.name} too, or choose no stages to carry out all of them"
                )
        return found


def _resolve(names: Sequence[str], asked: Sequence[str]) -> set[str]:
    for one in asked:
        if not chosen(names, one):
            raise UsageError(f"no stage {one!r}{suggest(one, list(dict.fromkeys([*map(base_of, names), *names])))}")
    return {name for one in asked for name in chosen(names, one)}
