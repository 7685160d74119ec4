"""Faults around a run: other drivers, edits, a removed store, unusual terminals."""

import json
import os
import pty
import shutil
import subprocess
import time

import pytest

from tests.support.cli import ROOT, command, retort, started
from tests.support.pipelines import GAUSSIAN


def test_a_second_driver_waits_if_asked_to(tmp_path):
    store = tmp_path / "store"
    first = started(store)
    second = retort("resume", "gaussian", "--store", store, "--engine", "inline", "--wait")
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and second.returncode == 0, out + second.stderr
    assert f"waiting: run gaussian is being carried out by run gaussian (process {first.pid}" in second.stderr
    events = [json.loads(line) for line in (store / "runs/gaussian/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["stage"] == "pairs"].count("stage_started") == 1


def test_a_second_run_waits_for_a_shared_stage(tmp_path):
    store = tmp_path / "store"
    first = started(store)
    second = retort("submit", tmp_path / "m.yaml", "--store", store, "--engine", "inline", "--wait", "--name", "second")
    assert first.wait(timeout=60) == 0 and second.returncode == 0
    assert "pairs: waiting: pairs/" in second.stderr and "pairs: reused" in second.stderr


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    store = tmp_path / "store"
    first = started(store)
    first.kill()
    first.communicate()
    assert retort("resume", "gaussian", "--store", store, "--engine", "inline").returncode == 0


def test_editing_the_manifest_does_not_change_a_run_under_way(tmp_path):
    store = tmp_path / "store"
    process = started(store)
    (tmp_path / "m.yaml").write_text("name: [")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    plan = json.loads((store / "runs/gaussian/plan.json").read_text())
    sealed = {path.parent.name for path in store.glob("*/*/artifact.json")}
    assert sealed == {stage["fingerprint"] for stage in plan.values()}
    assert retort("resume", "gaussian", "--store", store).returncode == 0, "the frozen manifest is what is resumed"


def test_a_store_removed_during_a_run_gives_one_sentence(tmp_path):
    store = tmp_path / "store"
    process = started(store)
    shutil.rmtree(store)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out, out
    assert str(store) in out
    assert not list(store.glob("*/*/artifact.json"))


def test_a_terminal_of_forty_columns_and_no_utf8(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN)
    store = tmp_path / "store"
    narrow = {"COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    assert retort("submit", manifest, "--store", store, "--engine", "inline", **narrow).returncode == 0
    for arguments in (["plan", manifest], ["status"], ["runs"], ["logs", "gaussian"], ["gc", "--drop", "gaussian"]):
        done = retort(*arguments, "--store", store, **narrow)
        assert done.returncode == 0 and done.stdout.isascii(), done.stderr
        if arguments[0] != "logs":
            wide = [
                line for line in done.stdout.splitlines() if len(line) > 40
            ]  # only lines with a single long path may be longer
            assert all(len(max(line.split(), key=len)) > len(line) - 16 for line in wide), done.stdout
    wrong = tmp_path / "w.yaml"
    wrong.write_text(GAUSSIAN.replace("prompts: digits", "prompts: grüße.txt"))
    done = retort("plan", wrong, "--store", store, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [40, 120])
def test_a_real_terminal_shows_a_run_live(tmp_path, columns):
    import fcntl
    import struct
    import termios

    manifest, store = tmp_path / "m.yaml", tmp_path / "store"
    manifest.write_text(GAUSSIAN)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        command("submit", manifest, "--store", store, "--engine", "inline"),
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"}, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=20) == 0
    text = shown.decode()
    assert "40/40 pairs" in text and "Traceback" not in text and "done in" in text
