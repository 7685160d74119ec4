"""Fixtures that many tests use, and the environment of all tests."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.planning import PlannedStage
from tests.support.pipelines import TINY, execute

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process for each core
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # stages may use more threads, because waiting threads use no core
os.environ.pop("COLUMNS", None)  # set by pytest-xdist; the command line would use it as the width of a terminal


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

    Tests may read it and add artifacts of their own, but must not remove anything.
    """
    store = tmp_path_factory.mktemp("tiny")
    return store, execute(TINY, store)


@pytest.fixture(scope="module")
def quick_probes() -> Iterator[None]:
    """Trains probes on batches of 32 images instead of 128: four times as fast. They know less after as many steps."""
    from stages.networks import probe  # torch, which not all tests need

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "TRAINED_AT_ONCE", 32)
        yield
