"""status, runs and logs: the state and cost of a run, and how to follow it while it is running."""

import json
import os
import signal
import subprocess
import time

import pytest

from pipeline.engines import InlineEngine
from pipeline.runs import Run, status_of
from pipeline.runs.history import attempts
from pipeline.runs.status import runs_of
from pipeline.store import Store
from pipeline.views.progress import Plain
from pipeline.views.tables import duration
from tests.support.cli import ROOT, command, retort, started
from tests.support.pipelines import GAUSSIAN, LONG, SLOW, execute


def test_status_shows_the_rate_of_a_running_stage_and_the_cost_of_a_finished_one(tmp_path):
    store = tmp_path / "store"
    process = started(store, text=SLOW.replace("delay: 0.06", "delay: 0.15"))
    deadline = time.monotonic() + 30
    while "per_second" not in (pairs := status_of(run := Run(Store(store), "gaussian"))["pairs"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert pairs["state"] == "running" and pairs["progress"]["total"] == 40 and pairs["seconds_left"] > 0
    pairs = status_of(run)["pairs"]
    assert pairs["state"] == "stopped" and "per_second" not in pairs
    before = pairs["device_seconds"]
    assert before > 0, "a killed attempt costs what it did until its last sign of life"
    assert retort("resume", "gaussian", "--store", store, "--engine", "inline").returncode == 0
    pairs = status_of(run)["pairs"]
    assert pairs["state"] == "done" and pairs["device_seconds"] > before
    record = json.loads((store / "pairs" / pairs["fingerprint"] / "artifact.json").read_text())
    assert (
        record["device_seconds"] == pytest.approx(pairs["device_seconds"], abs=1.0)
        and record["seconds"] < record["device_seconds"]
    )
    table = retort("status", "gaussian", "--store", store).stdout
    assert f"pairs/{pairs['fingerprint']}" in table and "2 done" in table


def test_a_stage_that_another_run_made_is_shown_with_its_cost(tmp_path):
    execute(GAUSSIAN, tmp_path, name="one")
    execute(GAUSSIAN, tmp_path, name="two")
    one, two = (status_of(Run(Store(tmp_path), name))["pairs"] for name in ("one", "two"))
    assert (one["detail"], two["detail"]) == ("", "reused")
    assert one["device_seconds"] == pytest.approx(two["device_seconds"], abs=1.0)


def test_the_seconds_of_all_attempts_are_added_even_if_the_clock_jumps():
    def event(kind, **more):
        return {
            "time": more.pop("time", "2026-01-01T00:00:00"),
            "event": kind,
            "stage": "s",
            "fingerprint": "f",
            **more,
        }

    def progress(done, seconds, **more):
        return event("progress", done=done, total=100, unit="pairs", seconds=seconds, **more)

    events = [
        event("stage_started", workers=4),
        progress(0, 0.5),
        progress(20, 10.5, time="1970-01-01T00:00:00"),  # killed here, and the clock was set back
        event("stage_started", workers=2),
        progress(20, 1.0, time="2090-01-01T00:00:00"),
        progress(60, 5.0),
        event("stage_interrupted", seconds=6.0),
        {"time": "", "event": "run_done", "stage": None},
        event("stage_reused"),
    ]
    first, second = attempts(events[:3])["s", "f"], attempts(events)["s", "f"]
    assert first.rate() == pytest.approx(2.0) and second.rate() == pytest.approx(10.0)
    assert (first.ended, second.ended) == (None, "interrupted")
    assert first.device_seconds == pytest.approx(10.5 * 4)
    assert second.device_seconds == pytest.approx(10.5 * 4 + 6.0 * 2)
    again = [event("stage_started", workers=1), event("stage_done", seconds=3.0)]
    made = attempts([*events, *again, *again])["s", "f"]
    assert made.device_seconds == pytest.approx(3.0), "forced: what it cost last"


def test_incomplete_events_of_a_crash_are_skipped(tmp_path):
    execute(GAUSSIAN, tmp_path)
    file = tmp_path / "runs" / "gaussian" / "events.jsonl"
    file.write_bytes(file.read_bytes() + b'123\n{}\n[]\n{"time": "x", "event": "progress", "stage": "pairs"}\n"caf\xc3')
    for arguments in (["status"], ["runs"], ["logs", "gaussian"]):
        done = retort(*arguments, "--store", tmp_path)
        assert done.returncode == 0, done.stderr
    execute(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=5"])
    events = list(Run(Store(tmp_path), "gaussian").events())
    assert [e["event"] for e in events if e["event"].startswith("run_")] == ["run_started", "run_done"] * 2


def test_the_progress_of_another_run_is_not_shown(tmp_path):
    store = tmp_path / "store"
    first = started(store, text=LONG)
    first.kill()
    first.communicate()
    second = started(store, "--name", "second", text=LONG, shards=2)
    ours = status_of(Run(Store(store), "gaussian"))["pairs"]
    second.kill()
    second.communicate()
    assert ours["state"] == "running" and "run second" in ours["detail"] and "progress" not in ours
    found = runs_of(Store(store))
    assert {run["state"] for run in found.values()} == {"stopped"}


def test_runs_and_status_agree(tmp_path):
    store = tmp_path / "store"
    first = started(store, text=LONG)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    execute(LONG, store, ["stages.pairs.sampler.steps=3"], only=["teacher"], name="gaussian")
    assert status_of(Run(Store(store), "gaussian"))["pairs"]["state"] == "waiting"
    assert runs_of(Store(store))["gaussian"]["state"] == "waiting"


def test_runs_are_listed(tmp_path):
    assert "no runs in" in retort("runs", "--store", tmp_path).stdout
    execute(GAUSSIAN, tmp_path, name="whole")
    execute(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=5"], only=["teacher"], name="part")
    found = runs_of(Store(tmp_path))
    assert (found["whole"]["state"], found["whole"]["done"], found["whole"]["stages"]) == ("done", 2, 2)
    assert (found["part"]["state"], found["part"]["done"]) == ("waiting", 1)
    lines = retort("runs", "--store", tmp_path).stdout.splitlines()
    assert lines[2].split()[:3] == ["part", "waiting", "1/2"]


def test_logs_and_events_are_followed_until_the_run_ends(tmp_path):
    store = tmp_path / "store"
    process = started(store)
    arguments = ("gaussian", "pairs", "--store", store, "-f")
    follower = subprocess.Popen(
        command("logs", *arguments, "--json"), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    watched = retort("status", "gaussian", "--store", store, "--watch")
    out, _ = follower.communicate(timeout=60)
    assert process.wait(timeout=60) == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "stage_started" and events[-1]["event"] == "stage_done"
    assert {event["stage"] for event in events} == {"pairs"}
    written = [json.loads(line) for line in (store / "runs/gaussian/events.jsonl").read_text().splitlines()]
    assert events == [event for event in written if event["stage"] == "pairs"]
    assert "running" in watched.stdout and watched.stdout.count("run gaussian:") >= 2
    assert "2 done" in watched.stdout.rsplit("run gaussian:", 1)[1]
    words = retort("logs", "gaussian", "--store", store).stdout
    assert "pairs: 40/40 pairs" in words and "run: run done" in words
    done = retort("logs", "gaussian", "pears", "--store", store)
    assert done.returncode == 2 and "run gaussian has: teacher, pairs" in done.stderr


def test_a_stage_s_log_is_printed(tmp_path):
    store = tmp_path / "store"
    (store / "pairs").mkdir(parents=True)
    (store / "pairs" / "pool").write_text("")  # nothing any stage foresees
    path = tmp_path / "m.yaml"
    path.write_text(GAUSSIAN)
    assert retort("submit", path, "--store", store, "--engine", "inline").returncode == 1
    assert "Not a directory" in retort("logs", "gaussian", "pairs", "--store", store).stdout
    assert "stage failed: Not a directory" in retort("logs", "gaussian", "--store", store).stdout


class WaitingEngine(InlineEngine):
    def map(self, key, make_worker, items, shape, say):
        say("worker 2 of 2 is waiting for 1 GPU; 1 is working")
        yield from super().map(key, make_worker, items, shape, say)


def test_a_waiting_stage_is_shown_in_status_logs_and_events(tmp_path, capsys):
    execute(GAUSSIAN, tmp_path, engine=WaitingEngine(), reporter=Plain())
    says = "worker 2 of 2 is waiting for 1 GPU; 1 is working"
    assert f"pairs: {says}\n" in capsys.readouterr().err
    assert f"pairs: stage waits: {says}\n" in retort("logs", "gaussian", "--store", tmp_path).stdout
    assert f"WARNING pipeline.runs.runner: {says}\n" in retort("logs", "gaussian", "pairs", "--store", tmp_path).stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (3720, "1 h 2 min"), (90061, "1 d 1 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
