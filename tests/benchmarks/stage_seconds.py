"""Measures how long pairs and training take, to compare two commits on one machine.

    python -m tests.benchmarks.stage_seconds TEACHER

TEACHER is the folder of a sealed teacher, such as that of manifests/digits.yaml. Makes 512 pairs in 20 guided steps and
trains students for 100 steps of 64, on one thread, and prints the seconds of each stage. Run the two commits in turn, A
B A B, in separate checkouts, because the speed of a machine may drift.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support.pipelines import execute

MANIFEST = """
name: stage_seconds
stages:
  pairs:
    kind: pairs
    teacher: {teacher}
    prompts: digits
    count: 512
    sampler: {{steps: 20, guidance_scale: 3.0}}
    execution: {{threads: 1}}
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {{steps: 100}}
    held_out: 16
    execution: {{threads: 1}}
  halved:
    kind: distill
    pairs: pairs
    method: {{name: progressive, start_steps: 4, end_steps: 2}}
    training: {{steps: 30}}
    held_out: 16
    execution: {{threads: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    teacher = parser.parse_args().teacher.resolve()
    with tempfile.TemporaryDirectory() as store:
        made = execute(MANIFEST.format(teacher=teacher), Path(store))
        print(", ".join(f"{name} {stage.artifact.record['seconds']:.1f}" for name, stage in made.items()))


if __name__ == "__main__":
    main()
