"""Planning: from a manifest and what the store holds to what has to be done, and why. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.content import Contents, Unknown
from pipeline.errors import ManifestError, UsageError
from pipeline.fingerprint import differences, fingerprint, identity, pool_fingerprint
from pipeline.manifest import Loaded, inputs_of, marked
from pipeline.store import Store, load_artifact
from stages.base import Artifact, Input

State = Literal["reuse", "resume", "run", "blocked"]


@dataclass(frozen=True)
class PlannedStage:
    """What will be done for one stage, and why."""

    name: str
    state: State
    why: str
    artifact: Artifact
    identity: Mapping[str, Any]
    seed: int
    contents: Mapping[str, str]
    pool: Path

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "why": self.why,
            "kind": self.artifact.kind,
            "fingerprint": self.artifact.fingerprint,
            "identity": self.identity,
        }


Plan = Sequence[PlannedStage]
"""In an order in which each stage comes after its inputs."""


def make_plan(loaded: Loaded, contents: Contents, store: Store, previous: Mapping[str, Any] | None = None) -> Plan:
    """Plan every stage of the manifest. `previous` is the run's last plan, by stage, to say what changed.

    Raises ManifestError for settings that contradict each other across stages.
    """
    planned: dict[str, PlannedStage] = {}
    problems: list[str] = []
    for name in loaded.order:
        stage = loaded.manifest.stages[name]
        inputs: dict[str, Artifact] = {}
        for field, reference in inputs_of(stage).items():
            if reference in planned:
                inputs[field] = planned[reference].artifact
                continue
            try:
                kind = next(f.marker.kind for f in marked(stage, Input) if f.path == field)
                inputs[field] = _named(Path(reference), kind, store)
            except UsageError as error:
                problems.append(loaded.problem(name, field, str(error)))
        if len(inputs) < len(inputs_of(stage)):
            raise ManifestError(problems)
        problems += [loaded.problem(name, field, text) for field, text in stage.check(inputs)]
        planned[name] = _plan_stage(name, loaded, inputs, contents[name], store, planned, (previous or {}).get(name))
    if problems:
        raise ManifestError(problems)
    return list(planned.values())


def _named(folder: Path, kind: str, store: Store) -> Artifact:
    """A sealed artifact given by its path. Raises UsageError if it is of another kind, or damaged."""
    artifact = load_artifact(folder)
    if artifact.kind != kind:
        raise UsageError(f"needs an artifact of kind {kind}; {folder} is a {artifact.kind}")
    damage = store.damage(artifact)
    if damage:
        raise UsageError(f"{folder} is damaged: {damage}")
    return artifact


def _plan_stage(
    name: str,
    loaded: Loaded,
    inputs: Mapping[str, Artifact],
    contents: Mapping[str, str],
    store: Store,
    planned: Mapping[str, PlannedStage],
    before: Mapping[str, Any] | None,
) -> PlannedStage:
    stage, seed = loaded.manifest.stages[name], loaded.manifest.seed_of(name)
    of = identity(stage, seed, {field: a.fingerprint for field, a in inputs.items()}, contents)
    print_ = fingerprint(of)
    artifact = Artifact(stage, print_, store.folder(stage.kind, print_), inputs, seed)
    pool = store.pool(stage.kind, pool_fingerprint(stage, of))
    unknown = [text for text in contents.values() if isinstance(text, Unknown)]
    upstream = [planned[r] for r in inputs_of(stage).values() if r in planned]
    state: State
    if unknown:
        state, why = "blocked", str(unknown[0])
    elif any(p.state == "blocked" for p in upstream):
        state, why = "blocked", f"waits for {next(p.name for p in upstream if p.state == 'blocked')}"
    else:
        state, why = _state(artifact, store, pool, of, before)
    return PlannedStage(name, state, why, artifact, of, seed, contents, pool)


def _state(
    artifact: Artifact, store: Store, pool: Path, of: Mapping[str, Any], before: Mapping[str, Any] | None
) -> tuple[State, str]:
    damage = store.damage(artifact) if store.is_sealed(artifact) else None
    if store.is_sealed(artifact) and damage is None:
        return "reuse", "sealed"
    changed = "; ".join(differences(before["identity"], of)) if before else ""
    left = artifact.stage.progress_in(store.work(artifact), pool)
    why = damage or changed or ("not finished yet" if before else "never made")
    return ("resume", f"{why}; {left}") if left else ("run", why)
