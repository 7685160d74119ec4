"""Measures the time and the peak memory of an evaluation for several numbers of samples.

    python -m tests.benchmarks.evaluation [--store FOLDER] [--samples 2000 --samples 20000]

The teacher is the shipped `digits`, in 2 steps, and the student is trained for 10 steps: quality does not change time
or memory. Each evaluation runs in a process of its own, with the inline engine. Peak memory is that of the process, as
the system counts it (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MANIFEST = """
name: evaluation_{samples}
store: {store}
stages:
  teacher: {{kind: teacher, from: digits}}
  pairs: {{kind: pairs, teacher: teacher, prompts: digits, count: 256, sampler: {{steps: 2}}}}
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {{steps: 10, batch_size: 16}}
    held_out: 128
  probe: {{kind: probe, images: digits, steps: 100}}
  quality: {{kind: evaluate, student: student, real: probe, samples: {samples}, teacher_steps: [1]}}
"""
MEASURED = """
import json, resource, sys, time
from pipeline.cli import main
started = time.monotonic()
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.monotonic() - started, "mib": usage.ru_maxrss / 1024}))
"""


def run(*arguments: str) -> dict[str, float]:
    """Run `retort` with arguments in a process of its own. Return its seconds and its peak memory in MiB."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="default: a temporary folder")
    parser.add_argument("--samples", type=int, action="append", help="default: 2000 and 20000")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = arguments.store or Path(temporary) / "store"
        for samples in arguments.samples or [2000, 20000]:
            manifest = Path(temporary) / f"{samples}.yaml"
            manifest.write_text(MANIFEST.format(samples=samples, store=store))
            inline = ("--engine", "inline", "--json")
            run("submit", str(manifest), *inline, "--only", "teacher", "--only", "pairs")
            run("submit", str(manifest), *inline, "--only", "student", "--only", "probe")
            found = run("submit", str(manifest), *inline, "--only", "quality", "--force", "quality")
            print(f"{samples:,} samples: {found['seconds']:.0f} s, peak memory {found['mib']:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
