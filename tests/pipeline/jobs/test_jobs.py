"""Runs as jobs of a real Ray cluster, through the command line. These tests do not run by default: use `pytest -m
cluster`."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.engines.nodes import needs
from pipeline.errors import StageFailed
from pipeline.jobs import job as jobs
from pipeline.jobs.dashboard import ask
from stages.data.files import sha256_of
from tests.support.cli import ROOT, command
from tests.support.pipelines import GAUSSIAN, execute
from tests.support.ray_cluster import TOKEN, Cluster, Proxy

pytestmark = pytest.mark.cluster

SLOW = GAUSSIAN.replace("delay: 0.0", "delay: 0.25")  # long enough to be met half-way on a busy machine


@pytest.fixture(scope="session")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    started = Cluster(folder)
    yield started
    started.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(cluster):
    """A function that runs the command line as a user of the cluster. With `wait=False` it returns the running
    process."""
    started = []

    def run(*arguments, wait=True, **environment):
        process = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=cluster.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def manifest(tmp_path):
    def write(text):
        path = tmp_path / "m.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def inline(tmp_path_factory):
    """The shards that the inline engine makes."""
    return hashes(execute(GAUSSIAN, tmp_path_factory.mktemp("inline"))["pairs"].pool)


def hashes(pool):
    return {tar.name: sha256_of(tar) for tar in sorted(pool.rglob("*.tar"))}


def made(store):
    (pool,) = (store / "pairs" / "pool").iterdir()
    assert list(store.glob("pairs/*/artifact.json"))
    return hashes(pool)


def events(store):
    lines = (store / "runs/gaussian/events.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_goes_to_the_cluster_and_its_log_comes_back(cluster, run, manifest, tmp_path, inline):
    store = tmp_path / "store of mine"
    elsewhere = {"RAY_ADDRESS": "ray://nowhere:1", "RAY_API_SERVER_ADDRESS": "http://nowhere:1"}
    done = run("submit", manifest(GAUSSIAN), "--store", store, "--address", cluster.address, **elsewhere)
    assert done.returncode == 0, done.stderr
    assert "pairs: done in" in done.stdout and str(next(store.glob("pairs/*/artifact.json")).parent) in done.stdout
    assert "is set and ignored" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert f"RAY_ADDRESS is set and ignored: --address {cluster.address} is used" in done.stderr
    assert "RAY_API_SERVER_ADDRESS is set and ignored" in done.stderr
    assert made(store) == inline
    job = json.loads((store / "runs/gaussian/job.json").read_text())
    assert job["address"] == cluster.address and job["id"].startswith("retort-gaussian-")


def test_a_detached_job_goes_on_is_followed_again_and_is_never_doubled(cluster, run, manifest, tmp_path, inline):
    store, at = tmp_path / "store", ("--address", cluster.address)
    process = run("submit", manifest(SLOW), "--store", store, *at, wait=False)
    until(lambda: list(store.glob("pairs/pool/*/*.parquet")))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    follow = f"retort resume gaussian --store {store} --address {cluster.address}"
    assert f"goes on; follow it with: {follow}, stop it with: retort stop gaussian" in stderr
    second = run("submit", manifest(SLOW), "--store", store, *at)
    assert second.returncode == 3 and "is job retort-gaussian-" in second.stderr
    again = run("resume", "gaussian", "--store", store, *at, "--json")
    assert again.returncode == 0, again.stderr
    assert "is still under way: following it" in again.stderr and "pairs: done in" in again.stderr
    assert again.stderr.count("Running entrypoint for job") == 1 and stdout.strip() in again.stderr
    assert json.loads(again.stdout)["stages"]["pairs"]["kind"] == "pairs"
    assert events(store).count("run_started") == 1
    assert made(store) == inline


def test_a_job_is_submitted_stopped_and_resumed(cluster, run, manifest, tmp_path, inline):
    store, at = tmp_path / "store", ("--address", cluster.address)
    sent = run("submit", manifest(SLOW), "--store", store, *at, "--no-wait", "--json")
    assert sent.returncode == 0, sent.stderr
    assert set(json.loads(sent.stdout)) == {"run", "job", "address"}
    until(lambda: list(store.glob("pairs/pool/*/*.parquet")))
    stopped = run("stop", "--store", store)
    assert stopped.returncode == 0, stopped.stderr
    assert f"stopped; carry on with: retort resume gaussian --store {store}" in stopped.stdout
    assert events(store)[-2:] == ["stage_interrupted", "run_interrupted"] and "RAY_JOB_STOP" not in stopped.stderr
    assert not list(store.glob("pairs/*/artifact.json"))
    nothing = run("stop", "--store", store)
    assert nothing.returncode == 2 and "run gaussian is not running" in nothing.stderr
    done = run("resume", "gaussian", "pairs", "--store", store, *at)
    assert done.returncode == 0, done.stderr
    assert "teacher" not in done.stdout.split("Running entrypoint")[1].split("pairs: done")[0].split("\n", 1)[1]
    assert made(store) == inline


@pytest.fixture
def user(monkeypatch, cluster):
    """This process as a user of the cluster."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def job_of(address, entry_point, name):
    ask(address, "/api/jobs/", {"entrypoint": entry_point, "submission_id": name})
    return jobs.Job(address, name)


def test_a_cut_log_goes_on_where_it_was(cluster, user, capsys, monkeypatch):
    """The connection is cut four times, in the middle of lines."""
    monkeypatch.setattr(jobs, "LOOK_EVERY", 0.5)
    proxy = Proxy(cluster.port, cuts=[350, 1200, 1777, 2503], outage=0.7)
    entry_point = 'i=0; while [ $i -lt 300 ]; do echo "line $i ☃ of the log"; i=$((i+1)); sleep 0.03; done; exit 7'
    job = job_of(proxy.address, entry_point, "cut")
    written: list[str] = []
    assert jobs.follow(job, written.append) == 7
    lines = [line for line in "".join(written).splitlines() if line.startswith("line")]  # Ray adds two of its own
    assert lines == [f"line {i} ☃ of the log" for i in range(300)]
    assert proxy.all_cut and "connection lost, trying again" in capsys.readouterr().err
    proxy.close()


def test_a_job_that_cannot_start_is_explained(cluster, user):
    ids = {"missing": "retort-that-is-nowhere resume x", "killed": "kill -9 $$", "fine": "echo fine"}
    started = {name: job_of(cluster.address, entry_point, name) for name, entry_point in ids.items()}
    with pytest.raises(StageFailed, match="found no `retort` on the PATH of its node: every node needs retort=="):
        jobs.follow(started["missing"], lambda text: None)
    assert jobs.follow(started["killed"], lambda text: None) == 128 + 9
    written: list[str] = []
    assert jobs.follow(started["fine"], written.append) == 0 and written[-1].endswith("fine\n")
    with pytest.raises(StageFailed, match="does not know job unknown; the cluster may have been restarted"):
        jobs.follow(jobs.Job(cluster.address, "unknown"), lambda text: None)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token of RAY_AUTH_TOKEN (HTTP 403): set RAY_AUTH_TOKEN to"),
        ({"RAY_AUTH_TOKEN": ""}, "asks for a token, and there is none here (HTTP 401): set RAY_AUTH_TOKEN to"),
        ({"RAY_AUTH_MODE": "disabled"}, "(HTTP 401): unset RAY_AUTH_MODE, which is `disabled` here, and set"),
    ],
)
def test_a_wrong_token_is_explained(cluster, run, manifest, tmp_path, token, says):
    refused = run("submit", manifest(GAUSSIAN), "--store", tmp_path / "s", "--address", cluster.address, **token)
    assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "s/runs/gaussian/job.json").exists()


def test_a_token_in_a_file_is_sent(cluster, run, manifest, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    file = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    at = ("--store", tmp_path / "s", "--address", cluster.address, "--no-wait")
    assert run("submit", manifest(GAUSSIAN), *at, **file).returncode == 0
    until(lambda: list(tmp_path.glob("s/pairs/*/artifact.json")))


# Workers get their driver's sys.path, so on one machine they find its Retort. These start codes change that.
OTHER_VERSION = """
import importlib.metadata
true = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9.9" if name == "retort" else true(name)
"""
OTHER_SOURCES = """
import importlib, pathlib, sys
copy = str(pathlib.Path(__file__).parent / "copy")
sys.path.insert(0, copy)
import pipeline, stages  # their modules come from here from now on
"""
NO_RETORT = "import sys; sys.modules['pipeline'] = None"


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (OTHER_VERSION, "has retort 9.9.9, its driver 0.1.0: install retort==0.1.0 on every node"),
        (OTHER_SOURCES, "runs other sources of retort 0.1.0 than its driver: install the same commit on every node"),
        (NO_RETORT, f"a node of the cluster cannot import Retort: every node needs {needs()}"),
    ],
    ids=["other version", "other sources", "none"],
)
def test_a_node_with_another_retort_or_none_is_explained(cluster, user, run, manifest, tmp_path, start, says):
    with_gpu = SLOW + "resources: {pairs: {gpus_per_worker: 1}}\n"
    at = ("--store", tmp_path / "s", "--address", cluster.address)
    (tmp_path / "sitecustomize.py").write_text(start)
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, tmp_path / "copy" / package)
    with open(tmp_path / "copy/stages/pairs/stage.py", "a") as source:
        source.write("# another line\n")
    node = cluster.add_node(os.pathsep.join((str(tmp_path), str(ROOT))))
    try:
        until(lambda: gpus(cluster) == 1)
        failed = run("submit", manifest(with_gpu), *at)
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "stage pairs failed: " in failed.stdout and says in failed.stdout and "Traceback" not in failed.stdout
    finally:
        cluster.remove(node)
        until(lambda: gpus(cluster) == 0)


def gpus(cluster):
    """Return the number of GPUs of all nodes that are alive, according to the dashboard."""
    nodes = ask(cluster.address, "/api/v0/nodes?detail=1")["data"]["result"]["result"]
    return sum(node["resources_total"].get("GPU", 0) for node in nodes if node["state"] == "ALIVE")
