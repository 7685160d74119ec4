"""Runs the command line, in this process or in a new one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.support.pipelines import SLOW

ROOT = Path(__file__).parents[2]
"""The repository."""

BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "ray", "diffusers", "transformers", "peft", "webdataset"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from pipeline.cli import main
main()
"""
"""Code for `python -c`: the command line, where importing a heavy library is an error."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def started(store: Path, *options: str, text: str = SLOW, shards: int = 1) -> subprocess.Popen[str]:
    """Write a manifest to m.yaml beside the store, and submit it in a new process. Return the process as soon as
    `shards` shards exist. Its whole output is in `stdout`."""
    manifest = store.parent / "m.yaml"
    manifest.write_text(text)
    process = subprocess.Popen(
        command("submit", manifest, "--store", store, "--engine", "inline", *options),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores SIGINT
    )  # fmt: skip
    while len(list(store.glob("pairs/pool/*/*.parquet"))) < shards:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)
    return process


def retort(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line: in this process, which has imported torch already; or in a new process if `environment` is
    given, because many variables are read when a process starts."""
    if environment:
        return subprocess.run(
            command(*arguments),
            cwd=cwd or ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd or ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["retort", *map(str, arguments)])
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except Exception:  # as the interpreter would
            traceback.print_exc()
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(list(arguments), code, *printed)
