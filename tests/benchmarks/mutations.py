"""Checks thousands of mutated manifests. Each must be valid, or refused with exit code 2 and the line of every problem.

python -m tests.benchmarks.mutations [COUNT]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from tests.support.mutations import Mutation, check, mutations


def main(count: int) -> None:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(0)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(mutations())
        def run(mutation: Mutation) -> None:
            outcomes["valid" if check(mutation, Path(folder)) else "refused with its place"] += 1

        started = time.monotonic()
        run()
    words = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.items())
    print(f"{sum(outcomes.values()):,} mutations in {time.monotonic() - started:.0f} s: {words}; no traceback")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
