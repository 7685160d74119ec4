"""The Ray engine with a real Ray: warm workers, lost workers, the same bytes and figures as inline. All tests
share one Ray."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.engines import InlineEngine, WorkerShape, patience
from pipeline.engines import ray as cluster
from pipeline.engines.ray import RayEngine, fitting
from stages.base import Progress, StageError
from stages.data.files import sha256_of
from stages.evaluate import parts
from tests.support.cli import ROOT, command, retort
from tests.support.pipelines import GAUSSIAN, PARTS, TINY, execute, without_seconds

ONE, TWO = WorkerShape(1, 0.0), WorkerShape(2, 0.0)


THEIRS = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "a-token-of-another-cluster"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def ray(home):
    """A Ray engine with two GPUs that exist only in name. The environment has Ray's variables for another cluster."""
    engine = RayEngine()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**THEIRS, "HOME": str(home), "RAY_OVERRIDE_RESOURCES": '{"GPU": 2}'}.items():
            patch.setenv(name, value)
        list(engine.map("first", ProcessOf, [0], ONE))
        assert {name: os.environ[name] for name in THEIRS} == THEIRS
    yield engine
    engine.close()


class ProcessOf:
    def __call__(self, item: int) -> int:
        time.sleep(0.05)
        return os.getpid()


class Meeting:
    """Waits until `processes` processes have called it, then returns the process id."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes

    def __call__(self, item: int) -> int:
        (self.folder / str(os.getpid())).touch()
        until(lambda: len(list(self.folder.iterdir())) >= self.processes)
        return os.getpid()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def test_progress_arrives_at_once_and_the_result_last(ray):
    for engine in (ray, InlineEngine()):
        seen, process = finish(engine.run(where, (3,), ONE))
        assert [p.done for p in seen] == [1, 2, 3] and isinstance(process, int)


def test_stages_share_warm_workers(ray, tmp_path):
    _, trained_in = finish(ray.run(where, (1,), ONE))
    processes = {process for _, process in ray.map("stage", ProcessOf, range(4), ONE)}
    assert processes == {trained_in} != {os.getpid()}
    assert os.getpriority(os.PRIO_PROCESS, trained_in) == os.getpriority(os.PRIO_PROCESS, 0)
    two = {process for _, process in ray.map("meeting", Maker(Meeting, tmp_path, 2), range(4), TWO)}
    assert len(two) == 2 and trained_in in two


STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "ran").remote(), timeout=30))
"""


@pytest.mark.parametrize("credentials", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}], ids=["no", "a"])
def test_a_client_without_the_right_token_can_run_no_code(ray, tmp_path, credentials):
    address = ray.start().get_runtime_context().gcs_address
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray also looks for the cluster at the loopback address, and gives up after its second attempt.
    search = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "2", "HOME": str(tmp_path)}
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, address], env={**own, **search, **credentials}, capture_output=True, text=True
    )
    assert stranger.returncode != 0 and "ran" not in stranger.stdout
    assert "AuthenticationError" in stranger.stderr


def test_ray_listens_on_the_loopback_address_only(ray):
    (node,) = ray.start().nodes()
    gcs = ray.start().get_runtime_context().gcs_address.rpartition(":")[2]
    ports = [int(gcs), *(node[name] for name in ("NodeManagerPort", "ObjectManagerPort", "MetricsExportPort"))]
    for address in addresses():
        for port in ports:
            with socket.socket() as stranger:
                assert stranger.connect_ex((address, port)) != 0, f"{address}:{port} takes connections"
    with socket.socket() as own:
        assert own.connect_ex(("127.0.0.1", int(gcs))) == 0


def addresses() -> set[str]:
    """Return the addresses at which this machine can be reached, as far as it knows them, except the loopback
    address."""
    found = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(("192.0.2.1", 9)) == 0:  # an address reserved for documentation; nothing is sent
            found.add(probe.getsockname()[0])
    return {address for address in found if not address.startswith("127.")}


class Token:
    def __call__(self, item: int) -> str:
        return os.environ["RAY_AUTH_TOKEN"]


def test_the_token_is_in_no_file_and_no_argument(ray, home):
    ((_, token),) = ray.map("token", Token, [0], ONE)
    assert len(token) == 64 and token not in os.environ.values()
    assert not list(home.iterdir())
    session = Path("/tmp/ray") / ray.start().get_runtime_context().get_session_name()
    written = [path for path in session.rglob("*") if path.is_file()]
    assert written and not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True).stdout


class LogsALock:
    def __call__(self, item: int) -> int:
        logging.info("item %d", item, extra={"lock": threading.Lock()})
        return item


def test_log_records_arrive_even_if_they_hold_objects_that_cannot_be_pickled(ray, caplog):
    caplog.set_level(logging.INFO)
    assert sorted(item for item, _ in ray.map("logs", LogsALock, range(3), ONE)) == [0, 1, 2]
    assert sum(re.fullmatch(r"\[worker \d+\] item \d", message) is not None for message in caplog.messages) == 3


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


def test_items_of_a_killed_worker_are_retried(ray, tmp_path):
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


def test_only_the_item_that_kills_its_worker_is_named(ray):
    with pytest.raises(StageError, match="shard 7 failed 3 times, the last time with: its worker process died"):
        list(ray.map("deadly", Deadly, [f"shard {k}" for k in (6, 7, 8, 9)], ONE))


@pytest.mark.parametrize(("workers", "gpus", "fit"), [(2, 9.0, 0), (3, 0.6, 2), (5, 0.5, 4)])
def test_workers_that_do_not_fit_are_refused_at_once(ray, workers, gpus, fit):
    """Three workers of 0.6 GPU need less than 2 GPUs in sum, but two of them do not fit on one GPU."""
    says = f"{workers} workers with {gpus:g} GPUs each do not fit: Ray found 2 GPUs, enough for {fit} "
    with pytest.raises(StageError, match=re.escape(says)):
        list(ray.map("many", ProcessOf, range(workers), WorkerShape(workers, gpus)))


def test_workers_must_fit_on_single_nodes_and_gpus():
    assert [fitting([1, 1], gpus) for gpus in (2, 1, 0.6, 0.5, 1 / 3)] == [0, 2, 2, 4, 6]
    assert [fitting([3, 8, 0], gpus) for gpus in (2, 3, 4, 0.1)] == [5, 3, 2, 110]


class Holder:
    def ready(self) -> None: ...


@pytest.fixture
def taken(ray, monkeypatch):
    """A function that lets another process hold GPUs. Waiting times are short."""
    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(cluster, "PENDING_AFTER", 0.2)
    list(ray.map("free", ProcessOf, [0], ONE))  # ends the workers that hold GPUs
    held = []

    def take(gpus: int):
        held.append(ray.start().remote(Holder).options(num_cpus=0, num_gpus=gpus).remote())
        ray.start().get(held[0].ready.remote(), timeout=60)
        return held[0]

    yield take
    ray.start().kill(held[0])


def test_a_stage_runs_without_the_worker_whose_gpu_is_taken(ray, taken, tmp_path):
    holder, said, items = taken(1), [], range(30)
    done = list(ray.map("some", ProcessOf, items, WorkerShape(2, 1.0), said.append))
    assert sorted(item for item, _ in done) == [*items] and len({process for _, process in done}) == 1
    assert said[-1] == "worker 2 of 2 is waiting for 1 GPU; 1 is working"
    ray.start().kill(holder)
    both = {process for _, process in ray.map("both", Maker(Meeting, tmp_path, 2), range(4), WorkerShape(2, 1.0))}
    assert len(both) == 2


def test_a_stage_fails_if_none_of_its_workers_starts(ray, taken, monkeypatch):
    monkeypatch.setattr(cluster, "START_WITHIN", 1.0)
    taken(2)
    said, says = [], "no worker started within 1 s: Ray found 2 GPUs, enough for 2 .* change `workers`"
    with pytest.raises(StageError, match=says):
        list(ray.map("none", ProcessOf, range(9), WorkerShape(2, 1.0), said.append))
    assert "workers 1, 2 of 2 are waiting for 1 GPU each; none are working" in said
    with pytest.raises(StageError, match=says):
        finish(ray.run(where, (1,), WorkerShape(1, 1.0), said.append))


class Hanging:
    """Does nothing for a minute at item 7, the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: int) -> int:
        if item == 7 and not (self.folder / "seven").exists():
            (self.folder / "seven").touch()
            time.sleep(60)
        return os.getpid()


def test_a_slow_call_is_reported_and_a_hanging_call_is_given_up(ray, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(patience, "SLOW", patience.Limit(times=10, least=0.5, first=60))
    monkeypatch.setattr(patience, "STUCK", patience.Limit(times=100, least=2, first=60))
    done = dict(ray.map("hanging", Maker(Hanging, tmp_path), range(9), ONE))
    assert [*sorted(done)] == [*range(9)] and done[6] != done[7]
    host = f"process {done[6]} on node {os.uname().nodename}"
    named = [m for m in caplog.messages if "no answer for" in m]
    assert re.fullmatch(rf"7: no answer for \d s \(the median is \d+\.\d s\) from {host}", named[0])
    assert any(re.match(rf"7: given up after \d s without an answer from {host}", m) for m in caplog.messages)


@pytest.mark.parametrize("kind", ["ray", "inline"])
def test_only_errors_that_may_be_temporary_are_retried(ray, kind):
    engine = ray if kind == "ray" else InlineEngine()
    with pytest.raises(StageError, match=r"^shard 7: a sentence$"):
        list(engine.map("final", Maker(Failing, StageError("a sentence")), ["shard 7"], ONE))
    with pytest.raises(StageError, match="shard 7 failed 3 times, the last time with: ValueError: odd"):
        list(engine.map("odd", Maker(Failing, ValueError("odd")), ["shard 7"], ONE))


def test_only_calls_of_equal_work_are_given_up_by_the_median():
    now, hour = time.monotonic(), 3600
    for alike in (True, False):
        watch = patience.Watch(alike)
        first = patience.Call("first", None, "here", started=now - hour)
        assert watch.look([first]) == [] and first.named
        assert watch.look([patience.Call("ever", None, "here", started=now - 49 * hour)]) != []
        for _ in range(3):
            watch.finished(patience.Call("quick", None, "here"))
        quick, slow, stuck = (patience.Call("later", None, "here", started=now - s) for s in (50, 70, 2 * hour))
        assert watch.look([quick, slow, stuck]) == ([stuck] if alike else [])
        assert (quick.named, slow.named) == (False, True)


def killed_at(deaths: list[int], folder: Path):
    """Run six steps, continuing the last attempt. An attempt is killed as soon as the test has seen the next step in
    `deaths`."""
    attempt = len(list(folder.glob("attempt*")))
    (folder / f"attempt{attempt}").touch()
    for step in range(deaths[attempt - 1] if attempt else 1, 7):
        yield Progress(step, 6, "steps")
        if attempt < len(deaths) and step == deaths[attempt]:
            until((folder / f"seen {step} in attempt {attempt}").exists)
            os.kill(os.getpid(), signal.SIGKILL)
    return attempt


def watched(ray, deaths: list[int], folder: Path) -> int:
    """Return the attempts that were lost."""
    steps = ray.run(killed_at, (deaths, folder), ONE)
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            return end.value
        attempt = len(list(folder.glob("attempt*"))) - 1
        (folder / f"seen {progress.done} in attempt {attempt}").touch()


def test_a_function_that_makes_progress_between_losses_is_always_restarted(ray, tmp_path):
    assert watched(ray, [1, 2, 3, 4], tmp_path) == 4


def test_a_function_that_is_lost_three_times_without_progress_fails(ray, tmp_path):
    says = r"^the work at 2 of 6 steps failed 3 times, the last time with: its worker process died"
    with pytest.raises(StageError, match=says):
        watched(ray, [1, 2, 2, 2], tmp_path)
    assert len(list(tmp_path.glob("attempt*"))) == 4


@pytest.mark.cluster
def test_an_address_in_the_environment_is_ignored(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN)
    done = retort("submit", manifest, "--store", tmp_path / "s", RAY_ADDRESS="ray://nowhere:1")
    assert done.returncode == 0, done.stderr
    assert "RAY_ADDRESS is set and ignored: this run starts a Ray of its own" in done.stderr


def hashes(pool: Path) -> dict[str, str]:
    return {str(tar.relative_to(pool)): sha256_of(tar) for tar in sorted(pool.rglob("*.tar"))}


def test_ray_and_inline_make_the_same_bytes_even_after_a_worker_is_killed(ray, tiny, tmp_path):
    """Compares the shards of a real U-Net from two Ray workers, one of which is killed, with those of the inline
    engine."""
    teacher = tiny[1]["teacher"].artifact.folder
    text = f"""
name: same
stages:
  pairs:
    kind: pairs
    teacher: {teacher}
    prompts: digits
    count: 64
    shard_size: 8
    sampler: {{steps: 8}}
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


def test_figures_do_not_depend_on_the_number_of_workers(ray, tiny, quick_probes, monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 32)
    probe = "  probe: {kind: probe, images: digits, limit: 400, steps: 100, execution: {threads: 1}}\n"
    text = TINY + probe + PARTS
    alone = execute(text, tiny[0], name="alone")["parted"].artifact.record["metrics"]
    text += "resources: {parted: {workers: 2}}\n"
    two = execute(text, tiny[0], engine=ray, force=["parted"], name="two")["parted"].artifact.record["metrics"]
    assert without_seconds(two) == without_seconds(alone)


def working() -> set[int]:
    """Return the processes of our workers. Ray's own helper processes do not count: they hold no model, and may end
    later."""
    names = subprocess.run(["ps", "-e", "-o", "pid=,stat=,args="], capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=2) for line in names.splitlines()]
    return {int(pid) for pid, state, *name in lines if not state.startswith("Z") and "ray::Host" in " ".join(name)}


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_stops_its_ray_and_can_be_resumed(tmp_path, number):
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
