"""Times `plan` of 500 stages, and `status` of a run of 500 stages and 100,000 shards, as whole commands with imports.

    python -m tests.benchmarks.large

No stage of the run is computed. Its store has records, lists and events as a real run writes them, and empty files in
place of shards.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.manifest.fields import plain
from pipeline.manifest.model import examine
from pipeline.planning import PlannedStage, make_plan, read_contents
from pipeline.runs import Run
from pipeline.store import Store
from tests.support.cli import retort

PAIRS, STUDENTS, SHARDS = 100, 398, 1000
REPEATS = 5


def manifest(folder: Path) -> Path:
    lines = ["name: large", "stages:", "  teacher: {kind: teacher, from: digit_scenes}"]
    for i in range(PAIRS):
        lines.append(
            f"  pairs{i}: {{kind: pairs, teacher: teacher, prompts: digit_scenes, count: 64000, shard_size: 64,"
        )
        lines.append(f"    seed: {i}, sampler: {{name: ddim, steps: 20, guidance_scale: 3.0}}}}")
    for i in range(STUDENTS):
        lines.append(f"  student{i}: {{kind: distill, pairs: pairs{i % PAIRS}, seed: {i}, training: {{steps: 500}},")
        lines.append("    method: {name: knowledge_distillation, loss: l1}}")
    lines.append("  quality: {kind: evaluate, student: student0, samples: 1000}")
    path = folder / "large.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def swept(folder: Path) -> Path:
    """The same number of stages, made by a matrix."""
    path = folder / "swept.yaml"
    path.write_text(f"""name: swept
stages:
  teacher: {{kind: teacher, from: digit_scenes}}
  pairs: {{kind: pairs, teacher: teacher, prompts: digit_scenes, count: 1000}}
  student:
    kind: distill
    matrix: {{seed: [{", ".join(map(str, range(249)))}]}}
    pairs: pairs
    training: {{steps: 500}}
    method: knowledge_distillation
  quality: {{kind: evaluate, student: student, samples: 1000}}
""")
    return path


def lay_out(run: Run, planned: PlannedStage) -> None:
    """Write the files and events that the stage would have written."""
    artifact = planned.artifact
    artifact.folder.mkdir(parents=True)
    record: dict[str, Any] = {
        "kind": artifact.kind, "fingerprint": artifact.fingerprint, "settings": plain(artifact.stage),
        "seed": planned.seed, "inputs": {f: f"../../{a.kind}/{a.fingerprint}" for f, a in artifact.inputs.items()},
        "identity": planned.identity, "device_seconds": 10.0, "files": {},
    }  # fmt: skip
    (artifact.folder / "artifact.json").write_text(json.dumps(record))
    run.event("stage_started", planned.name, fingerprint=artifact.fingerprint, why="never made", workers=8)
    if artifact.kind == "pairs":
        planned.pool.mkdir(parents=True)
        for i in range(SHARDS):
            (planned.pool / f"{i:05d}.tar").touch()
            (planned.pool / f"{i:05d}.parquet").touch()
        (planned.pool / "prompts.arrow").touch()
        hashed = {"bytes": 0, "sha256": "0" * 64}
        shards = [{"tar": f"{i:05d}.tar", "count": 64, **hashed} for i in range(SHARDS)]
        listed = {"pool": planned.pool.name, "prompts": {"file": "prompts.arrow", **hashed}, "shards": shards}
        (artifact.folder / "receipts.json").write_text(json.dumps(listed))
        for i in range(0, SHARDS, 10):  # an event every five seconds at two shards a second
            about = {"done": i * 64, "total": SHARDS * 64, "unit": "pairs", "seconds": i / 2, "per_second": 128.0}
            run.event("progress", planned.name, fingerprint=artifact.fingerprint, **about)
    run.event("stage_done", planned.name, fingerprint=artifact.fingerprint, seconds=10.0)


def timed(*command: object) -> str:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        done = retort(*command)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Store(Path(name) / "store")
        for what, path in (("written out", manifest(folder)), ("by a matrix", swept(folder))):
            count = len(examine(path).order)
            print(f"plan of {count} stages, {what}, empty store: {timed('plan', path, '--store', folder / 'none')}")
        store.create()
        loaded = examine(folder / "large.yaml")
        run = Run(store, "large")
        plan = make_plan(loaded, read_contents(loaded, store.root / "contents.json"), store)
        run.folder.mkdir()
        run.freeze(loaded.manifest, plan)
        for stage in plan:
            lay_out(run, stage)
        shards = f"{PAIRS * SHARDS:,} shards"
        print(f"status of {len(plan)} stages, {shards}: {timed('status', 'large', '--store', store.root)}")
        print(f"runs: {timed('runs', '--store', store.root)}")
        print(f"plan with all of it sealed: {timed('plan', folder / 'large.yaml', '--store', store.root)}")


if __name__ == "__main__":
    main()
