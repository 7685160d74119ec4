"""Sealing and locks."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.errors import Locked, UsageError
from pipeline.store import RECORD, hold, holder, load_artifact
from tests.support.cli import ROOT, command, retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of

HOLD = """
import sys, time
from pathlib import Path
from pipeline.store import hold
with hold(Path(sys.argv[1]), "the thing is being made", "other"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_record_of_an_artifact_says_how_it_was_made(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)
    record = plan["pairs"].artifact.record
    assert record["kind"] == "pairs" and record["fingerprint"] == plan["pairs"].artifact.fingerprint
    assert record["metrics"]["count"] == 40
    assert {"seconds", "device_seconds", "versions", "commit", "threads", "files", "made_by"} <= set(record)
    assert not (tmp_path / "work").joinpath(f"pairs-{record['fingerprint']}").exists()
    again = load_artifact(plan["pairs"].artifact.folder)
    assert again.inputs["teacher"].fingerprint == plan["teacher"].artifact.fingerprint
    assert again.stage == plan["pairs"].artifact.stage


def test_an_unfinished_folder_is_not_an_artifact(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)
    (plan["pairs"].artifact.folder / RECORD).unlink()
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "resume"
    with pytest.raises(UsageError, match="not a sealed artifact"):
        load_artifact(plan["pairs"].artifact.folder)
    before = (plan["pairs"].pool / "00000.parquet").stat().st_mtime_ns
    execute(GAUSSIAN, tmp_path)
    assert (plan["pairs"].pool / "00000.parquet").stat().st_mtime_ns == before


def test_a_lock_names_its_holder_and_a_killed_holder_frees_it_at_once(tmp_path):
    file = tmp_path / "lock"
    assert holder(file) is None
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    words = rf"^the thing is being made by run other \(process {process.pid} on .*; wait for it"
    with pytest.raises(Locked, match=words), hold(file, "the thing is being made", "mine"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold(file, "the thing is being made", "mine"):
        assert "run mine" in str(holder(file))
    assert holder(file) is None


def test_reading_a_lock_does_not_block_it(tmp_path):
    file, stop = tmp_path / "lock", threading.Event()

    def look() -> None:
        while not stop.is_set():
            holder(file)

    threads = [threading.Thread(target=look) for _ in range(4)]
    file.touch()
    for thread in threads:
        thread.start()
    for _ in range(200):
        with hold(file, "the thing is being made", "mine"):
            pass
    stop.set()
    for thread in threads:
        thread.join()


def test_two_runs_at_once_make_a_shared_stage_once(tmp_path):
    """Two drivers run at once. Each stage is made by one of them and reused by the other, which waits for it."""
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


def test_a_moved_store_still_works(tmp_path):
    execute(GAUSSIAN, tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    done = retort("resume", "gaussian", "--store", tmp_path / "new", "--engine", "inline")
    assert done.returncode == 0 and "pairs: reused" in done.stderr
    assert not (tmp_path / "old").exists()


def test_a_run_killed_between_record_and_move_is_resumed_with_the_move(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)["pairs"]
    plan.artifact.folder.rename(tmp_path / "work" / f"pairs-{plan.artifact.fingerprint}")
    execute(GAUSSIAN, tmp_path)
    assert plan.artifact.record["fingerprint"] == plan.artifact.fingerprint
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"


def test_urls_are_refused_with_a_sentence(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN + "store: s3://bucket/prefix\n")
    done = retort("submit", manifest, cwd=tmp_path)
    assert done.returncode == 2 and "s3://bucket/prefix: this version keeps its store in a folder" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.yaml"]
