"""Remake damaged parts of a sealed artifact, such as shards of pairs, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.manifest import Loaded, Manifest, dump, loads
from pipeline.manifest.fields import replaced
from pipeline.manifest.model import Resources
from pipeline.planning import make_plan, read_contents
from pipeline.planning.content import HashCache
from pipeline.planning.fingerprint import changes
from pipeline.runs.run import REPAIR_PREFIX, Run
from pipeline.store import RECORD, Store, hold, load_artifact, read_record
from pipeline.store.artifacts import damaged_input, remade_input
from stages.base import Artifact, StageError


@dataclass(frozen=True)
class Repair:
    """A planned repair: the artifact, its pool, the manifest of the run that will do it, and the damaged parts."""

    artifact: Artifact
    pool: Path
    store: Store
    loaded: Loaded
    damaged: Sequence[str]
    """Paths below the pool."""
    before: Mapping[str, str]
    """Path below the pool -> sha256, of all parts that the artifact lists."""

    @property
    def needed(self) -> bool:
        """Whether a part is damaged, or the artifact is still unsealed after an earlier repair."""
        return bool(self.damaged) or not self.store.is_sealed(self.artifact)

    def unseal(self, waiting: Callable[[str], None] | None) -> None:
        """Unseal the artifact, then remove its damaged parts. If this is killed at any moment, the repair can be
        started again.

        Raises Locked while a run makes or reads the artifact or its pool.
        """
        run = Run(self.store, self.loaded.manifest.name)
        with (
            run.making(self.artifact, self.pool, waiting),
            hold(self.store.garbage_lock, "a plan is being made", run.name, waiting),
        ):
            run.check_not_in_use(self.artifact, self.pool, f"{self.artifact.kind}/{self.artifact.fingerprint}")
            self.store.unseal(self.artifact)
            self.artifact.stage.discard(self.pool, self.damaged)

    def changed(self) -> list[str]:
        """Parts that were made again with other bytes, as on other hardware or with other versions."""
        now = self.artifact.stage.parts(self.artifact.folder)
        return [path for path, sha256 in now.items() if self.before[path] != sha256]


def plan_repair(folder: Path) -> Repair:
    """Find the damaged parts of a sealed artifact, and plan how to make them again.

    Nothing is changed, except that a repair that was killed while it sealed the artifact is finished. Raises UsageError
    for an artifact without parts, or if its inputs or Retort's version changed, so that the parts would differ.
    """
    folder = folder.absolute()
    store = Store(folder.parent.parent)
    _finish_killed(store, folder)
    artifact = load_artifact(folder, unsealed=True)
    record = read_record(folder)
    try:
        before, damaged = artifact.stage.parts(folder), artifact.stage.damaged_parts(folder)
    except StageError as error:
        raise UsageError(str(error)) from None
    if not before:
        raise UsageError(f"{folder} is of kind {artifact.kind}; only pairs have shards")
    inputs = {field: str(source.folder) for field, source in artifact.inputs.items()}
    wanted = Manifest(
        name=f"{REPAIR_PREFIX}{artifact.fingerprint}",
        seed=record["seed"],
        store=str(store.root),
        stages={artifact.kind: replaced(artifact.stage, inputs)},
        resources={artifact.kind: Resources(**record["resources"])},
    )
    loaded = loads(dump(wanted), str(folder / RECORD))
    (planned,) = make_plan(loaded, read_contents(loaded, store.hashes), store)
    if planned.state == "blocked" or planned.artifact.fingerprint != artifact.fingerprint:
        changed = "; ".join(changes(record["identity"], planned.identity, planned.files))
        why = planned.why if planned.state == "blocked" else changed
        raise UsageError(f"{folder} cannot be made again as it was: {why}")
    if remade := remade_input(artifact, record):
        raise UsageError(
            f"{folder} cannot be made again as it was: its input {remade} was made again with different bytes; "
            "resume the run that made the artifact to make all of it again"
        )
    if damage := damaged_input(artifact, HashCache(store.hashes).sha256_of):
        raise UsageError(f"{folder} cannot be made again as it was: {damage}")
    return Repair(artifact, planned.pool, store, loaded, [path for path in damaged if path in before], before)


def _finish_killed(store: Store, folder: Path) -> None:
    """Finish a seal that was killed between moving the old artifact away and moving the new one into place."""
    work = store.root / "work" / f"{folder.parent.name}-{folder.name}"
    if folder.exists() or not (work / RECORD).exists():
        return
    artifact = load_artifact(work)
    pool = store.pool(artifact.kind, artifact.record["pool"] or artifact.fingerprint)
    with Run(store, f"{REPAIR_PREFIX}{artifact.fingerprint}").making(artifact, pool):
        if not folder.exists():
            store.finish(folder, work)
