"""Sealing and locks."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.errors import Locked, UsageError
from pipeline.store import RECORD, Store, load_artifact
from tests.conftest import GAUSSIAN, ROOT, command, execute, plan_of

HOLD = """
import sys, time
from tests.conftest import GAUSSIAN, plan_of
from pipeline.store import Store
from pathlib import Path
store = Path(sys.argv[1])
with Store(store).lock(plan_of(GAUSSIAN, store)["teacher"].artifact, "other"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_artifact_records_how_it_was_made(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)
    record = plan["pairs"].artifact.record
    assert record["kind"] == "pairs" and record["fingerprint"] == plan["pairs"].artifact.fingerprint
    assert record["metrics"]["count"] == 40
    assert {"seconds", "device_seconds", "versions", "commit", "threads", "files", "made_by"} <= set(record)
    assert not (tmp_path / "work").joinpath(f"pairs-{record['fingerprint']}").exists()
    again = load_artifact(plan["pairs"].artifact.folder)
    assert again.inputs["teacher"].fingerprint == plan["teacher"].artifact.fingerprint
    assert again.stage == plan["pairs"].artifact.stage


def test_an_unfinished_folder_is_not_there_for_anyone(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)
    (plan["pairs"].artifact.folder / RECORD).unlink()
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "resume"
    with pytest.raises(UsageError, match="no sealed artifact"):
        load_artifact(plan["pairs"].artifact.folder)
    before = (plan["pairs"].pool / "00000.parquet").stat().st_mtime_ns
    execute(GAUSSIAN, tmp_path)
    assert (plan["pairs"].pool / "00000.parquet").stat().st_mtime_ns == before


def test_a_lock_names_its_holder_and_a_killed_holder_frees_it_at_once(tmp_path):
    store = Store(tmp_path)
    store.create()
    teacher = plan_of(GAUSSIAN, tmp_path)["teacher"].artifact
    assert store.holder(teacher.kind, teacher.fingerprint) is None
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(Locked, match=rf"being made by run other \(process {holder.pid} on "),
        store.lock(teacher, "mine"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with store.lock(teacher, "mine"):
        assert "run mine" in str(store.holder(teacher.kind, teacher.fingerprint))
    assert store.holder(teacher.kind, teacher.fingerprint) is None


def test_two_runs_at_once_make_a_shared_stage_once(tmp_path):
    """Two drivers, one waiting for the other; every stage is made by one of them and reused by the other."""
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN.replace("delay: 0.0", "delay: 0.02"))
    store = tmp_path / "store"
    runs = [
        subprocess.Popen(
            command("submit", manifest, "--store", store, "--name", name, "--engine", "inline", "--wait"),
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert [run.wait(60) for run in runs] == [0, 0]
    events = [
        json.loads(line)
        for name in ("one", "two")
        for line in (store / "runs" / name / "events.jsonl").read_text().splitlines()
    ]
    assert sum(e["event"] == "stage_done" and e["stage"] == "pairs" for e in events) == 1
    assert sum(e["event"] == "stage_reused" and e["stage"] == "pairs" for e in events) == 1


def test_waiting_for_a_lock(tmp_path):
    store = Store(tmp_path)
    store.create()
    artifact = plan_of(GAUSSIAN, tmp_path)["teacher"].artifact
    released = threading.Event()

    def hold() -> None:
        with store.lock(artifact, "first"):
            started.set()
            released.wait(10)

    started = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    started.wait()
    with pytest.raises(Locked), store.lock(artifact, "second"):
        pass
    released.set()
    thread.join()
    with store.lock(artifact, "second"):
        pass


def test_urls_are_refused_with_a_sentence():
    with pytest.raises(UsageError, match="keeps its store in a folder"):
        Store("s3://bucket/prefix")
