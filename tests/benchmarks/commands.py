"""Measures the seconds of commands that should take no noticeable time: medians over several new processes.

python -m tests.benchmarks.commands STORE      (a store in which the digits run is done)
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

LIMITS = {"--help": 0.4, "plan": 1.5, "status": 1.5, "resume": 2.0}


def main() -> None:
    store = sys.argv[1]
    arguments = {
        "--help": ["--help"],
        "plan": ["plan", "manifests/digits.yaml", "--store", store],
        "status": ["status", "digits", "--store", store],
        "resume": ["resume", "digits", "--store", store],
    }
    result = {}
    for name, words in arguments.items():
        times = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "pipeline.cli", *words], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        result[name] = {"seconds": round(statistics.median(times), 3), "limit": LIMITS[name]}
    print(json.dumps(result, indent=2))
    sys.exit(any(entry["seconds"] > entry["limit"] for entry in result.values()))


if __name__ == "__main__":
    main()
