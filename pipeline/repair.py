"""Remake damaged shards of a sealed `pairs` artifact, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.content import read_contents
from pipeline.errors import UsageError
from pipeline.fields import replaced
from pipeline.fingerprint import differences
from pipeline.plan import make_plan
from pipeline.runs import REPAIR, Run
from pipeline.store import Store, load_artifact, read_record
from stages.base import Artifact
from stages.data.pool import pool_of, read_list


@dataclass(frozen=True)
class Repair:
    """What is to be done: the artifact, the run that will do it, and the damaged parts, by path below the pool."""

    artifact: Artifact
    store: Store
    loaded: manifest.Loaded
    damaged: Sequence[str]

    @property
    def run_name(self) -> str:
        return f"{REPAIR}{self.artifact.fingerprint}"

    def unseal(self, waiting: Callable[[str], None] | None) -> None:
        """First the artifact stops existing for everyone; then the damaged parts do. Killed at any moment, the
        repair can be started again. Raises Locked while a run makes the artifact or its pool, or waits for it."""
        pool = pool_of(self.artifact.folder)
        with Run(self.store, self.run_name).making(self.artifact, pool, waiting):
            self.store.unseal(self.artifact)
            for path in self.damaged:
                (pool / path).with_suffix(".parquet").unlink(missing_ok=True)
                (pool / path).unlink(missing_ok=True)

    def changed(self, before: dict[str, str]) -> list[str]:
        """Shards whose bytes are not those that were sealed: on other hardware, or by other versions."""
        return [path for path, sha256 in hashes(self.artifact.folder).items() if before[path] != sha256]


def hashes(folder: Path) -> dict[str, str]:
    """Path below the pool -> sha256, as the artifact lists them."""
    pool = pool_of(folder)
    return {shard.tar.relative_to(pool).as_posix(): shard.sha256 for shard in read_list(folder)}


def plan_repair(folder: Path, report: dict[str, Any]) -> Repair:
    """How to mend what `report`, of `inspect_shards`, found in a sealed artifact. Nothing is changed.

    Raises UsageError for anything but a `pairs` artifact, and when its shards could not be the same again: prompts,
    teacher or Retort's own version have changed since.
    """
    artifact = load_artifact(folder.absolute(), unsealed=True)
    if artifact.kind != "pairs":
        raise UsageError(f"{folder} is of kind {artifact.kind}; shards are part of pairs")
    record = read_record(artifact.folder)
    store = Store(artifact.folder.parent.parent)
    stage = replaced(artifact.stage, {"teacher": str(artifact.inputs["teacher"].folder)})
    wanted = manifest.Manifest(
        name=f"{REPAIR}{artifact.fingerprint}",
        seed=record["seed"],
        store=str(store.root),
        stages={"pairs": stage},
        resources={"pairs": manifest.Resources(**record["resources"])},
    )
    loaded = manifest.loads(manifest.dump(wanted), str(folder / "artifact.json"))
    (planned,) = make_plan(loaded, read_contents(loaded, store.root / "contents.json"), store)
    if planned.state == "blocked" or planned.artifact.fingerprint != artifact.fingerprint:
        changes = "; ".join(differences(record["identity"], planned.identity, planned.files))
        why = planned.why if planned.state == "blocked" else changes
        raise UsageError(f"{folder} cannot be made again as it was: {why}")
    return Repair(artifact, store, loaded, [path for path in report["damaged"] if path != "noise"])
