"""Ray, for real: warm workers, lost workers, the same bytes as inline. One embedded Ray for the module."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline.cluster import RayEngine
from pipeline.engine import InlineEngine, WorkerShape
from stages.base import Progress, StageError
from stages.data.files import sha256_of
from tests.conftest import GAUSSIAN, ROOT, command, execute, retort

ONE, TWO = WorkerShape(1, 0.0), WorkerShape(2, 0.0)


@pytest.fixture(scope="module")
def ray():
    engine = RayEngine()
    yield engine
    engine.close()


class ProcessOf:
    def __call__(self, item: int) -> int:
        time.sleep(0.05)
        return os.getpid()


def where(steps: int):
    for step in range(steps):
        yield Progress(step + 1, steps, "steps")
    return os.getpid()


def finish(steps):
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def test_progress_comes_as_it_is_made_and_the_result_last(ray):
    for engine in (ray, InlineEngine()):
        seen, process = finish(engine.run(where, (3,), ONE))
        assert [p.done for p in seen] == [1, 2, 3] and isinstance(process, int)


def test_stages_share_warm_workers(ray):
    _, trained_in = finish(ray.run(where, (1,), ONE))
    processes = {process for _, process in ray.map("stage", ProcessOf, range(4), ONE)}
    assert processes == {trained_in} != {os.getpid()}
    two = {process for _, process in ray.map("stage", ProcessOf, range(8), TWO)}
    assert len(two) == 2 and trained_in in two


class Suicidal:
    """Kills its own process at item 2, twice in all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        deaths = len(list(self.folder.glob("death*")))
        if item == 2 and deaths < 2:
            (self.folder / f"death{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * 10


class Maker:
    def __init__(self, kind, *arguments):
        self.kind, self.arguments = kind, arguments

    def __call__(self):
        return self.kind(*self.arguments)


def test_items_of_a_killed_worker_are_tried_again(ray, tmp_path):
    done = dict(ray.map("suicidal", Maker(Suicidal, tmp_path), range(6), TWO))
    assert done == {i: i * 10 for i in range(6)}
    assert len(list(tmp_path.glob("death*"))) == 2


class Deadly:
    def __call__(self, item: str) -> str:
        if item == "shard 7":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return item


class Failing:
    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, item: str) -> None:
        raise self.error


def test_an_item_that_always_kills_its_worker_is_named_and_its_neighbours_are_not(ray):
    with pytest.raises(StageError, match="shard 7 failed 3 times, the last time with: its worker process died"):
        list(ray.map("deadly", Deadly, [f"shard {k}" for k in (6, 7, 8, 9)], ONE))


def test_more_gpus_than_there_are_is_a_sentence_and_no_waiting(ray):
    with pytest.raises(StageError, match="2 workers with 9 GPUs each need 18 GPUs; Ray found"):
        list(ray.map("many", ProcessOf, range(2), WorkerShape(2, 9.0)))


@pytest.mark.parametrize("kind", ["ray", "inline"])
def test_what_cannot_be_mended_is_not_tried_again(ray, kind):
    engine = ray if kind == "ray" else InlineEngine()
    with pytest.raises(StageError, match=r"^shard 7: a sentence$"):
        list(engine.map("final", Maker(Failing, StageError("a sentence")), ["shard 7"], ONE))
    with pytest.raises(StageError, match="shard 7 failed 3 times, the last time with: ValueError: odd"):
        list(engine.map("odd", Maker(Failing, ValueError("odd")), ["shard 7"], ONE))


def die_once(folder: Path):
    yield Progress(1, 2, "steps")
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield Progress(2, 2, "steps")
    return "done"


def test_a_function_whose_worker_is_killed_is_started_again(ray, tmp_path):
    seen, result = finish(ray.run(die_once, (tmp_path,), ONE))
    assert result == "done" and seen[-1].done == 2


@pytest.mark.cluster
def test_an_address_in_the_environment_is_not_followed(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN)
    done = retort("submit", manifest, "--store", tmp_path / "s", RAY_ADDRESS="ray://nowhere:1")
    assert done.returncode == 0, done.stderr
    assert "RAY_ADDRESS is set and ignored: this run starts a Ray of its own" in done.stderr


def hashes(pool: Path) -> dict[str, str]:
    return {str(tar.relative_to(pool)): sha256_of(tar) for tar in sorted(pool.rglob("*.tar"))}


def test_ray_and_inline_make_the_same_bytes_also_with_workers_killed(ray, tiny, tmp_path):
    """A real U-Net's shards from two Ray workers, one of them killed on the way, against the inline engine's."""
    teacher = tiny[1]["teacher"].artifact.folder
    text = f"""
name: same
stages:
  pairs:
    kind: pairs
    teacher: {teacher}
    prompts: digits
    count: 80
    shard_size: 8
    sampler: {{steps: 20}}
    execution: {{micro_batch: 4, threads: 1}}
resources: {{pairs: {{workers: 2}}}}
"""
    inline = execute(text, tmp_path / "inline")["pairs"]
    victims = [process for _, process in ray.map("who", ProcessOf, range(8), TWO)]
    store = tmp_path / "ray"

    def kill_one_at_work() -> None:
        while not list(store.glob("pairs/pool/*/*.parquet")):
            time.sleep(0.001)
        os.kill(victims[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    parallel = execute(text, store, engine=ray)["pairs"]
    killer.join()
    assert hashes(parallel.pool) == hashes(inline.pool)
    assert "the worker process died" in (store / "runs/same/logs/pairs.log").read_text()


def working() -> set[int]:
    """Processes of our workers; Ray's own helpers, which hold no model, may take longer to notice."""
    names = subprocess.run(["ps", "-e", "-o", "pid=,stat=,args="], capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=2) for line in names.splitlines()]
    return {int(pid) for pid, state, *name in lines if not state.startswith("Z") and "ray::Host" in " ".join(name)}


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_takes_its_ray_along_and_is_resumed(tmp_path, number):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN.replace("delay: 0.0", "delay: 0.05"))
    store, others = tmp_path / "store", working()
    process = subprocess.Popen(
        command("submit", manifest, "--store", store),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(store.glob("pairs/pool/*/*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = working() - others
    assert workers
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("carry on with: retort resume" in stderr) == (number == signal.SIGTERM)
    deadline = time.monotonic() + 30
    while workers & working() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers & working()
    assert retort("resume", "--store", store, "--engine", "inline").returncode == 0
    whole = execute(manifest.read_text(), tmp_path / "whole")["pairs"]
    (pool,) = (store / "pairs" / "pool").iterdir()
    assert hashes(pool) == hashes(whole.pool)
