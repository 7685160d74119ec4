"""Measures the main job from its start in an empty store to the finished page: seconds, peak memory of all processes,
and whether it meets its targets.

    python -m tests.benchmarks.main_job [--manifest manifests/digits.yaml] [--store FOLDER]

Memory is the sum of proportional set sizes (shared pages counted once) of the driver, Ray and its workers, read every
second from /proc. Prints JSON. Exits with 1 if the digits run misses a target.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {
    "seconds": ("at most", 600),
    "peak_gigabytes": ("at most", 4.0),
    "teacher_prompt_accuracy": ("at least", 0.97),
    "student_prompt_accuracy_gap": ("at most", 0.02),
    "student_latent_mse": ("at most", 0.1),
    "frechet_ratio": ("at most", 1.15),
}


def descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def proportional_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", default="manifests/digits.yaml")
    parser.add_argument("--store", default=None)
    arguments = parser.parse_args()
    store = arguments.store or tempfile.mkdtemp()
    command = [sys.executable, "-m", "pipeline.cli", "submit", arguments.manifest, "--store", store, "--json"]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, sum(proportional_bytes(pid) for pid in descendants(process.pid)))
        time.sleep(1.0)
    seconds = time.monotonic() - started
    assert process.returncode == 0 and process.stdout is not None
    stages = json.loads(process.stdout.read())["stages"]
    records = {name: json.loads((Path(s["artifact"]) / "artifact.json").read_text()) for name, s in stages.items()}
    metrics = next(r["metrics"] for r in records.values() if r["kind"] == "evaluate")
    teacher, student = next(iter(metrics["sides"].values())), metrics["sides"]["student"]
    result = {
        "seconds": round(seconds, 1),
        "stage_seconds": {name: r["seconds"] for name, r in records.items()},
        "peak_gigabytes": round(peak / 1e9, 2),
        "teacher_prompt_accuracy": teacher["prompt_accuracy"],
        "student_prompt_accuracy_gap": round(teacher["prompt_accuracy"] - student["prompt_accuracy"], 4),
        "student_latent_mse": round(student["latent_mse"], 4),
        "frechet_ratio": round(student["frechet_distance"] / teacher["frechet_distance"], 3),
        "page": str(next(Path(s["artifact"]) for s in stages.values() if s["kind"] == "evaluate") / "index.html"),
    }
    compare = {"at most": lambda value, limit: value <= limit, "at least": lambda value, limit: value >= limit}
    result["missed"] = [name for name, (how, limit) in TARGETS.items() if not compare[how](result[name], limit)]
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["missed"] else 0)


if __name__ == "__main__":
    main()
