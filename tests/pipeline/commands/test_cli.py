"""The command line: exit codes, messages, signals, JSON."""

import json
import signal
import subprocess

import pytest

from tests.support.cli import ROOT, command, retort, started
from tests.support.pipelines import GAUSSIAN, LONG, TINY


@pytest.fixture
def gaussian(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN)
    return manifest


def test_help_imports_nothing_heavy():
    code = "import sys, pipeline.cli; print({'torch', 'ray', 'pydantic', 'numpy', 'yaml'} & set(sys.modules))"
    done = subprocess.run([*command()[:1], "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"
    assert "retort submit manifests/digits.yaml" in retort("--help").stdout


def test_a_run_is_submitted_and_then_has_nothing_to_do(gaussian, tmp_path):
    store = tmp_path / "store"
    assert json.loads(retort("plan", gaussian, "--store", store, "--json").stdout)["pairs"]["state"] == "run"
    done = retort("submit", gaussian, "--store", store, "--engine", "inline")
    assert done.returncode == 0, done.stderr
    assert "pairs: done in" in done.stderr and str(store / "pairs") in done.stdout
    done = retort("resume", "--store", store, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["run"] == "gaussian"
    status = json.loads(retort("status", "gaussian", "--store", store, "--json").stdout)
    assert {stage["state"] for stage in status["stages"].values()} == {"done"}
    table = retort("plan", gaussian, "--store", store, "--set", "stages.pairs.sampler.steps=5").stdout
    assert "sampler.steps 10 -> 5" in table and "reuse" in table
    events = [json.loads(line) for line in (store / "runs/gaussian/events.jsonl").read_text().splitlines()]
    assert next(e["event"] for e in events if e["stage"] == "pairs") == "stage_started"
    assert all({"time", "event", "stage"} <= set(e) for e in events)


def test_only_one_stage(gaussian, tmp_path):
    store = tmp_path / "store"
    submit = ("submit", gaussian, "--store", store, "--engine", "inline")
    done = retort(*submit, "--only", "pairs")
    assert done.returncode == 2 and "stage pairs needs teacher, which is not made yet" in done.stderr
    assert retort(*submit, "--only", "teacher").returncode == 0
    status = json.loads(retort("status", "--store", store, "--json").stdout)["stages"]
    assert (status["teacher"]["state"], status["pairs"]["state"]) == ("done", "waiting")
    assert retort("resume", "gaussian", "pairs", "--store", store, "--engine", "inline").returncode == 0
    done = retort(*submit, "--only", "pears")
    assert done.returncode == 2 and "no stage 'pears'; did you mean 'pairs'? (allowed: teacher, pairs)" in done.stderr


def test_an_invalid_manifest_exits_with_2_and_names_the_line(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN.replace("shard_size", "shardsize"))
    for name in ("plan", "submit"):
        done = retort(name, manifest, "--store", tmp_path / "store")
        assert done.returncode == 2
        assert done.stderr.startswith(
            f"{manifest}:10:5: stages.pairs.shardsize: unknown key; did you mean 'shard_size'?"
        )
    assert not (tmp_path / "store").exists()
    assert retort("plan", tmp_path / "none.yaml").returncode == 2
    assert retort("no-such-command").returncode == 2


def test_an_unknown_run_lists_the_existing_runs(gaussian, tmp_path):
    store = tmp_path / "store"
    done = retort("resume", "--store", store)
    assert done.returncode == 2 and "which has none; `retort submit MANIFEST` makes one" in done.stderr
    retort("submit", gaussian, "--store", store, "--engine", "inline", "--name", "mine")
    done = retort("status", "yours", "--store", store)
    assert done.returncode == 2 and f"no run 'yours' in store {store}, which has: mine" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130_and_can_be_resumed(tmp_path, monkeypatch, number):
    store = tmp_path / "store"
    process = started(store, text=LONG)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed and f"carry on with: retort resume gaussian --store {store}" in printed
    status = json.loads(retort("status", "--store", store, "--json").stdout)["stages"]["pairs"]
    assert status["state"] == "interrupted"
    plan = json.loads(retort("plan", tmp_path / "m.yaml", "--store", store, "--json").stdout)["pairs"]
    assert plan["state"] == "resume" and "of 25 shards are there" in plan["why"]
    monkeypatch.setattr("stages.networks.gaussian.time.sleep", lambda seconds: None)  # resuming need not take long
    assert retort("resume", "--store", store, "--engine", "inline").returncode == 0


def test_a_locked_stage_exits_with_3(tmp_path):
    store = tmp_path / "store"
    holder = started(store, text=LONG)
    same = retort("resume", "gaussian", "--store", store, "--engine", "inline")
    assert same.returncode == 3
    assert f"run gaussian is being carried out by run gaussian (process {holder.pid}" in same.stderr
    done = retort("submit", tmp_path / "m.yaml", "--store", store, "--engine", "inline", "--name", "second")
    status = json.loads(retort("status", "gaussian", "--store", store, "--json").stdout)["stages"]["pairs"]
    holder.kill()
    holder.communicate()
    assert done.returncode == 3 and f"is being made by run gaussian (process {holder.pid}" in done.stderr
    assert status["state"] == "running" and str(holder.pid) in status["detail"]
    status = json.loads(retort("status", "gaussian", "--store", store, "--json").stdout)["stages"]["pairs"]
    assert status["state"] == "stopped"


def test_the_traceback_of_an_unexpected_error_is_only_in_the_log(gaussian, tmp_path):
    """The pool of the store is a file instead of a folder. No stage expects this error."""
    store = tmp_path / "store"
    (store / "pairs").mkdir(parents=True)
    (store / "pairs" / "pool").write_text("")
    done = retort("submit", gaussian, "--store", store, "--engine", "inline")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "stage pairs failed: Not a directory" in done.stderr
    assert "Traceback" in (store / "runs" / "gaussian" / "logs" / "pairs.log").read_text()


def test_names_of_runs_stay_inside_the_store(gaussian, tmp_path):
    done = retort("submit", gaussian, "--store", tmp_path / "store", "--name", "../../x")
    assert done.returncode == 2 and "is not a valid name for a run" in done.stderr


def test_a_failed_stage_exits_with_1_and_names_its_log(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(TINY)
    arguments = ("submit", manifest, "--store", tmp_path / "s", "--engine", "inline", "--only", "teacher")
    overrides = ("--set", "stages.teacher.train.vae.max_mse=1e-9", "--set", "stages.teacher.train.vae.training.steps=1")
    done = retort(*arguments, *overrides)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "stage teacher failed: the VAE reconstructs held-out images with MSE" in done.stderr
    log = (tmp_path / "s" / "runs" / "tiny" / "logs" / "teacher.log").read_text()
    assert "VAE reconstruction MSE" in log
    status = json.loads(retort("status", "--store", tmp_path / "s", "--json").stdout)["stages"]["teacher"]
    assert status["state"] == "failed" and "max_mse" in status["detail"]
    assert "Traceback" in retort(*arguments, *overrides, "--debug").stderr


def test_samples_of_a_teacher_and_of_a_student(tiny, tmp_path):
    from PIL import Image

    for name, steps in (("teacher", ("--steps", 4)), ("student", ())):
        out = tmp_path / f"{name}.png"
        done = retort(
            "sample", tiny[1][name].artifact.folder, "-p", "a red handwritten seven", "-p", "a blue handwritten two",
            "-n", 3, *steps, "-o", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert Image.open(out).size == (48, 32)
    done = retort("sample", tiny[1]["student"].artifact.folder, "-p", "x", "--steps", 4)
    assert done.returncode == 2 and "the student's steps are 1, not 4" in done.stderr
    done = retort("sample", tiny[1]["pairs"].artifact.folder, "-p", "x")
    assert done.returncode == 2 and "is of kind pairs; only a teacher or a student makes images" in done.stderr
