"""Real components, made small: stores in temporary folders, a digits teacher trained for seconds, real Ray."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.commands.console import held
from pipeline.content import read_contents
from pipeline.engine import Engine, InlineEngine
from pipeline.manifest import loads
from pipeline.plan import PlannedStage, make_plan
from pipeline.report import Quiet, Reporter
from pipeline.runner import Runner
from pipeline.runs import Run
from pipeline.selection import Selection
from pipeline.store import Store

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in one process a core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # stages may take more threads: those that wait take no core
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and the command line would take it for a terminal's width

GAUSSIAN = """
name: gaussian
stages:
  teacher: {kind: teacher, gaussian: {mean: 0.5, std: 0.6, shape: [2, 4, 4], delay: 0.0}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: digits
    count: 40
    shard_size: 16
    sampler: {steps: 10}
    execution: {micro_batch: 8}
"""

TINY = """
name: tiny
stages:
  teacher:
    kind: teacher
    train:
      dataset: digits
      vae: {channels: [8, 16], max_mse: 1.0, training: {steps: 40, batch_size: 32, learning_rate: 4e-3}}
      denoiser: {channels: [16, 32], training: {steps: 30, batch_size: 16}}
    execution: {threads: 1}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: digits
    count: 96
    shard_size: 32
    sampler: {steps: 5, guidance_scale: 2.0}
    execution: {micro_batch: 16, threads: 1}
  student:
    kind: distill
    pairs: pairs
    method: {name: knowledge_distillation}
    training: {steps: 24, batch_size: 16}
    held_out: 32
    execution: {threads: 1, checkpoint_every: 7}
"""


def execute(
    text: str,
    store: Path,
    overrides: Sequence[str] = (),
    engine: Engine | None = None,
    only: Sequence[str] = (),
    name: str | None = None,
    force: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, PlannedStage]:
    """Submit a manifest's text as `retort submit` does, in this process; return the plan by stage."""
    loaded = loads(text, "test.yaml", [*overrides, f"store={store}"])
    run = Run(Store(store), name or loaded.manifest.name)
    with held(loaded, run, Selection(only, force=force), wait=False) as (plan, chosen):
        Runner(run, loaded.manifest, engine or InlineEngine(), reporter or Quiet()).execute(plan, chosen)
    return {stage.name: stage for stage in plan}


def plan_of(text: str, store: Path, overrides: Sequence[str] = (), name: str | None = None) -> dict[str, PlannedStage]:
    loaded = loads(text, "test.yaml", [*overrides, f"store={store}"])
    found = Store(store)
    run = Run(found, name or loaded.manifest.name)
    plan = make_plan(loaded, read_contents(loaded, store / "contents.json"), found, run.plan())
    return {stage.name: stage for stage in plan}


def flip(path: Path, place: int) -> None:
    """Flip a bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def retort(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line: in this process, where torch is imported already, or in one of its own where variables
    of an `environment` are given, since many are read as a process starts."""
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
        except Exception:  # what the interpreter would do
            traceback.print_exc()
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    printed = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(list(arguments), code, *printed)


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "manifest.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PlannedStage]]:
    """A store with a teacher, pairs and student trained for seconds, and the plan that made them.

    Tests read it, or write artifacts of their own into it; none removes anything.
    """
    store = tmp_path_factory.mktemp("tiny")
    return store, execute(TINY, store)
