"""Cluster commands: problems that are found before a cluster is contacted, and `retort stop` on this machine."""

import json
import os
import shutil
import tempfile
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.engines import nodes
from pipeline.errors import UsageError
from pipeline.jobs.dashboard import checked
from pipeline.jobs.job import SHARED, check_store, file_system
from pipeline.store import hold
from stages.data.provenance import versions
from tests.support.cli import ROOT, retort, started
from tests.support.pipelines import GAUSSIAN, LONG
from tests.support.ray_cluster import free_port

HERE = f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(GAUSSIAN)
    return path


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("head:8265", "http:// or https:// is missing; give the dashboard's address, http://head:8265"),
        ("head", "http:// or https:// is missing; give the dashboard's address, http://head:8265"),
        ("head:6379", "port 6379 is Ray's own (GCS); give the dashboard's address, http://head:8265"),
        ("http://head:6379", "port 6379 is Ray's own (GCS); give the dashboard's address, http://head:8265"),
        ("ray://head:10001", "port 10001 is Ray Client's; give the dashboard's address, http://head:8265"),
        ("ray://[::1]:9", "ray:// is neither http:// nor https://; give the dashboard's address, http://[::1]:8265"),
        ("auto", "expected the address of a Ray dashboard, such as http://HEAD:8265"),
        ("http://head:port", "expected the address of a Ray dashboard, such as http://HEAD:8265"),
    ],
)
def test_an_address_that_is_not_a_dashboards_is_refused_with_a_suggestion(address, says):
    with pytest.raises(UsageError) as refused:
        checked(address)
    assert str(refused.value) == f"--address {address}: {says}"
    assert checked("https://proxy/ray/") == "https://proxy/ray"


def submit(manifest, store, *options, **environment):
    done = retort("submit", manifest, "--store", store, *options, HOME=str(store.parent), **environment)
    assert "Traceback" not in done.stderr
    return done


def test_an_address_without_a_server_is_an_error(manifest, tmp_path):
    done = submit(manifest, tmp_path / "s", "--address", HERE)
    assert done.returncode == 2
    assert f"no Ray dashboard listens at {HERE} (Connection refused)" in done.stderr


@pytest.fixture
def answering():
    """Start a server that gives one answer to every request."""
    servers = []

    def answer(body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield answer
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b'{"version": 3}', b"[]"])
def test_a_server_that_is_not_a_dashboard_is_an_error(manifest, tmp_path, answering, body):
    address = answering(body)
    done = submit(manifest, tmp_path / "s", "--address", address)
    assert done.returncode == 2 and f"what listens at {address} is no Ray dashboard" in done.stderr


def test_a_cluster_with_another_ray_version_is_refused(manifest, tmp_path, answering):
    address, ours = answering(b'{"version": "4", "ray_version": "2.9.3"}'), versions()
    done = submit(manifest, tmp_path / "s", "--address", address)
    assert done.returncode == 2
    assert (
        f"runs Ray 2.9.3, but this machine has Ray {ours['ray']}: its nodes need retort=={ours['retort']}, ray=="
        in done.stderr
    )


def test_a_run_submitted_by_another_build_is_refused(manifest, tmp_path):
    submit(manifest, tmp_path / "s", "--engine", "inline")
    ours, machine = versions()["retort"], "the machine that submitted the run"
    others = {
        "9.9.9+0123456789abcdef": f"this node has retort {ours}, {machine} 9.9.9: install retort==9.9.9 on every node",
        f"{ours}+0123456789abcdef": f"this node runs other sources of retort {ours} than {machine}: "
        "install the same commit on every node",
    }
    for build, says in others.items():
        done = retort("resume", "--store", tmp_path / "s", "--submitted-by", build)
        assert done.returncode == 2 and done.stderr == f"retort: {says}\n"
    same = ("--submitted-by", nodes.build(), "--engine", "inline")
    assert retort("resume", "--store", tmp_path / "s", *same).returncode == 0


def test_the_hash_of_a_build_covers_its_sources_and_data(tmp_path):
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, tmp_path / package)
    before = nodes.hash_of_sources(tmp_path)
    assert nodes.build() == f"{versions()['retort']}+{before}"
    (tmp_path / "stages/__pycache__").mkdir(exist_ok=True)
    (tmp_path / "stages/__pycache__/new.pyc").touch()
    assert nodes.hash_of_sources(tmp_path) == before
    shipped = next(path for path in (tmp_path / "stages/teacher/shipped").rglob("*.safetensors"))
    seen = {before}
    for path in (tmp_path / "pipeline/runs/runner.py", tmp_path / "pipeline/reference/templates/digits.yaml", shipped):
        with open(path, "ab") as file:
            file.write(b"#")
        seen.add(nodes.hash_of_sources(tmp_path))
    (tmp_path / "stages/base.py").rename(tmp_path / "stages/basis.py")
    assert len(seen | {nodes.hash_of_sources(tmp_path)}) == 5
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    data = {f"{package}/{pattern}" for package, patterns in packaged.items() for pattern in patterns}
    assert data - {"pipeline/py.typed", "stages/py.typed"} <= set(nodes.SOURCES)


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
server:/export /data nfs4 rw 0 0
/dev/sdb1 /data/scratch xfs rw 0 0
tmpfs /data/scratch/fast tmpfs rw 0 0
bucket /my\040bucket fuse.s3fs rw 0 0
/dev/sdc1 /twice ext4 rw 0 0
server:/twice /twice lustre rw 0 0
"""


def test_the_longest_matching_mount_point_gives_the_file_system(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.strip())
    expected = {"/data/s": "nfs4", "/data/scratch/s": "xfs", "/data/scratchy": "nfs4", "/data/scratch/fast": "tmpfs"}
    expected |= {"/my bucket/s": "fuse.s3fs", "/twice/s": "lustre", "/elsewhere": "ext4"}
    assert {path: file_system(Path(path), mounts) for path in expected} == expected
    assert file_system(tmp_path, tmp_path / "none") is None


@pytest.mark.skipif(
    file_system(Path(tempfile.gettempdir())) in (None, *SHARED), reason="needs a disk that is not shared"
)
def test_a_store_that_only_this_machine_sees_is_refused(manifest, tmp_path):
    kind = file_system(tmp_path)
    done = submit(manifest, tmp_path / "s", "--address", "http://head.example:8265")
    assert done.returncode == 2 and done.stderr == (
        f"retort: the store {tmp_path}/s is on a disk of this machine ({kind}), which the nodes of "
        "http://head.example:8265 do not see: name a shared folder with --store, or add --store-is-shared if every "
        "node does see it at this path\n"
    )
    assert not (tmp_path / "s").exists()
    for address in ("http://localhost:1", "http://127.0.0.2:1", "http://[::1]:1", f"http://{os.uname().nodename}:1"):
        check_store(tmp_path, address, store_is_shared=False)
    check_store(tmp_path, "http://head.example:8265", store_is_shared=True)


def test_cluster_options_need_an_address(manifest, tmp_path):
    done = submit(manifest, tmp_path / "s", "--no-wait")
    assert done.returncode == 2 and "--no-wait and --store-is-shared need --address" in done.stderr


def test_a_driver_on_this_machine_is_stopped(tmp_path):
    store = tmp_path / "s"
    driver = started(store, text=LONG)
    stopped = retort("stop", "--store", store)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"stopped; carry on with: retort resume gaussian --store {store}\n"
    assert driver.wait(10) == 130
    nothing = retort("stop", "--store", store)
    assert nothing.returncode == 2 and f"run gaussian is not running (store {store})" in nothing.stderr


def test_a_driver_on_another_machine_is_named(manifest, tmp_path):
    store = tmp_path / "s"
    submit(manifest, store, "--engine", "inline")
    lock = store / "runs/gaussian/lock"
    with hold(lock, "the run", "gaussian"):
        lock.write_text(json.dumps({"run": "gaussian", "pid": 7, "host": "far.example", "since": "yesterday"}))
        done = retort("stop", "gaussian", "--store", store)
    assert done.returncode == 2
    assert "run gaussian is driven by process 7 on far.example: stop it there" in done.stderr
