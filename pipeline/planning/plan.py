"""Makes plans: compares a manifest with the store and says for each stage what has to be done, and why.

Planning changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import Loaded
from pipeline.manifest.fields import inputs_of, is_artifact_path, marked
from pipeline.manifest.problems import by_place
from pipeline.planning.content import Contents, Unknown
from pipeline.planning.fingerprint import changes, fingerprint, identity, pool_fingerprint
from pipeline.store import Store, load_artifact
from stages.base import Artifact, Content, Input

State = Literal["reuse", "resume", "run", "blocked"]
"""What has to be done for a stage.

reuse: nothing, because its artifact is sealed and undamaged. resume: continue an unfinished attempt, or add to the
parts in the pool. run: make the artifact from the start. blocked: the stage cannot run, because the identity of a
content is unknown or an input is blocked."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan."""

    name: str
    state: State
    why: str
    """The reason for `state`, in words."""
    artifact: Artifact
    identity: Mapping[str, Any]
    """Everything that decides the artifact's content; see `fingerprint.identity`."""
    pool: Path
    """The folder of parts. Artifacts that differ only in `Extent` settings share it."""
    reads: Sequence[str]
    """The names of the stages in this plan whose artifacts this stage reads."""
    files: Mapping[str, str]
    """Field path -> path or repository of each content that the stage reads."""
    contents: Mapping[str, str]
    """Field path -> identity of each content."""
    forced: bool
    """Whether the artifact is made again even if it is sealed and undamaged."""

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of this stage in plan.json and in the output of --json."""
        return {
            "state": self.state,
            "why": self.why,
            "kind": self.artifact.kind,
            "fingerprint": self.artifact.fingerprint,
            "pool": self.pool.name,
            "reads": list(self.reads),
            "inputs": {field: str(artifact.folder) for field, artifact in self.artifact.inputs.items()},
            "files": dict(self.files),
            "identity": self.identity,
        }


Plan = Sequence[PlannedStage]
"""The stages of a manifest, ordered so that each stage comes after the stages that it reads."""


def make_plan(
    loaded: Loaded,
    contents: Contents,
    store: Store,
    previous: Mapping[str, Any] | None = None,
    force: Collection[str] = (),
) -> Plan:
    """Plan every stage of the manifest.

    `previous` maps stage names to their entries in the run's last plan. The reasons in the new plan name the changes
    since then. Stages in `force`, and all stages that depend on them, are made again.

    Raises ManifestError with all problems: those of `loaded`, inputs that cannot be used, and settings that contradict
    those of other stages.
    """
    planned: dict[str, PlannedStage] = {}
    problems = list(loaded.problems)
    for name in loaded.order:
        stage = loaded.manifest.stages[name]
        inputs: dict[str, Artifact] = {}
        for field in marked(stage, Input):
            try:
                if field.value in planned:
                    inputs[field.path] = planned[field.value].artifact
                elif is_artifact_path(field.value):
                    inputs[field.path] = _artifact_at(Path(field.value), field.marker.kind, store)
            except UsageError as error:
                problems.append(loaded.problem(name, field.path, str(error)))
        if len(inputs) < len(inputs_of(stage)):
            continue  # a stage with wrong inputs cannot be checked further
        problems += [loaded.problem(name, field, text) for field, text in stage.check(inputs)]
        before = (previous or {}).get(name)
        planned[name] = _plan_stage(name, loaded, inputs, contents[name], store, planned, before, name in force)
    if problems:
        raise ManifestError(by_place(problems))
    return list(planned.values())


def _artifact_at(folder: Path, kind: str, store: Store) -> Artifact:
    """Load the sealed artifact in `folder`. Raises UsageError if it is not of kind `kind`, or if it is damaged."""
    artifact = load_artifact(folder)
    if artifact.kind != kind:
        raise UsageError(f"needs an artifact of kind {kind}; {folder} is of kind {artifact.kind}")
    if (damage := store.damage(artifact)) is not None:
        raise UsageError(f"{folder} cannot be used: {damage or 'it is not sealed'}")
    return artifact


def _plan_stage(
    name: str,
    loaded: Loaded,
    inputs: Mapping[str, Artifact],
    contents: Mapping[str, str],
    store: Store,
    planned: Mapping[str, PlannedStage],
    before: Mapping[str, Any] | None,
    force: bool,
) -> PlannedStage:
    stage, seed = loaded.manifest.stages[name], loaded.manifest.seed_of(name)
    its_identity = identity(stage, seed, {field: a.fingerprint for field, a in inputs.items()}, contents)
    its_fingerprint = fingerprint(its_identity)
    artifact = Artifact(stage, its_fingerprint, store.folder(stage.kind, its_fingerprint), inputs, seed)
    pool = store.pool(stage.kind, pool_fingerprint(stage, its_identity))
    unknown = [text for text in contents.values() if isinstance(text, Unknown)]
    upstream = [planned[r] for r in dict.fromkeys(inputs_of(stage).values()) if r in planned]
    forced_input = next((p.name for p in upstream if p.forced), None)
    files = {f.path: str(f.value) for f in marked(stage, Content)}
    state: State
    if unknown:
        state, why = "blocked", str(unknown[0])
    elif any(p.state == "blocked" for p in upstream):
        state, why = "blocked", f"waits for {next(p.name for p in upstream if p.state == 'blocked')}"
    elif force or forced_input:
        state, why = "run", "forced" if force else f"{forced_input} is made again"
    elif (damage := store.damage(artifact)) is None:
        state, why = "reuse", "sealed"
    else:
        changed = "; ".join(changes(before["identity"], its_identity, files)) if before else "never made"
        progress = None if store.outdated(artifact) else stage.progress_in(store.work(artifact), pool)
        why = "; ".join(filter(None, [damage or changed or "not finished yet", progress]))
        state = "resume" if progress else "run"
    reads, forced = [p.name for p in upstream], force or forced_input is not None
    return PlannedStage(name, state, why, artifact, its_identity, pool, reads, files, contents, forced)
