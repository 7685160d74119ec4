"""`retort gc` removes what no run refers to, and nothing that a run may need."""

import json
import shutil
import threading
from contextlib import ExitStack

import pytest

from pipeline.errors import Locked, UsageError
from pipeline.runs import Run
from pipeline.runs.garbage import collect
from pipeline.store import Store
from pipeline.store.locks import share
from stages.data.files import temporary_of
from tests.support.cli import retort, started
from tests.support.pipelines import GAUSSIAN, execute, plan_of


def paths(found):
    return {(one["what"], one["path"]) for one in found["found"]}


def test_gc_removes_only_what_an_edit_left_behind(tmp_path):
    old = execute(GAUSSIAN, tmp_path)
    execute(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=5"])
    store = Store(tmp_path)
    expected = {("artifact", str(old["pairs"].artifact.folder)), ("pool", str(old["pairs"].pool))}
    found = collect(store)
    assert paths(found) == expected and found["bytes"] > 1000
    assert old["pairs"].pool.exists(), "without --delete nothing is changed"
    assert paths(collect(store, delete=True)) == expected
    assert not old["pairs"].pool.exists() and not old["pairs"].artifact.folder.exists()
    assert {s.state for s in plan_of(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=5"]).values()} == {"reuse"}
    assert collect(store)["found"] == []


def test_a_pool_stays_as_long_as_one_artifact_lists_it(tmp_path):
    execute(GAUSSIAN, tmp_path)
    execute(GAUSSIAN, tmp_path, ["stages.pairs.count=32"])
    assert [what for what, _ in paths(collect(Store(tmp_path), delete=True))] == ["artifact"]
    assert plan_of(GAUSSIAN, tmp_path, ["stages.pairs.count=32"])["pairs"].state == "reuse"


def test_the_inputs_of_a_kept_artifact_are_kept(tmp_path):
    """The artifact is named by its path, through a link to the store, in a run that has not started."""
    made = execute(GAUSSIAN, tmp_path / "store", name="first")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    teacher = tmp_path / "link" / made["teacher"].artifact.folder.relative_to(tmp_path / "store")
    text = GAUSSIAN.replace("teacher: teacher", f"teacher: {teacher}").replace("steps: 10", "steps: 5")
    text = text.replace(text[text.index("  teacher: {kind") : text.index("  pairs:")], "")
    path = tmp_path / "m.yaml"
    path.write_text(text.replace("prompts: digits", f"prompts: {tmp_path / 'none.txt'}"))
    assert retort("submit", path, "--store", tmp_path / "store", "--name", "second").returncode == 2
    execute(text, tmp_path / "store", only=[], name="second")
    found = collect(Store(tmp_path / "store"), ["first"], delete=True)
    assert {what for what, _ in paths(found)} == {"artifact", "pool", "run"}
    assert made["teacher"].artifact.folder.exists()
    assert not Run(Store(tmp_path / "store"), "first").folder.exists()


def test_temporary_files_of_dead_writers_are_removed(tmp_path):
    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    left = [temporary_of(pairs.pool / "00007.tar"), temporary_of(tmp_path / "contents.json")]
    for path in (*left, pairs.pool / ".nobodys"):
        path.write_bytes(b"x" * 10)
    left.append(tmp_path / "work" / "pairs-0123456789")
    left[-1].mkdir()
    assert paths(collect(Store(tmp_path), delete=True)) == {("temporary", str(path)) for path in left}
    assert not any(path.exists() for path in left) and (pairs.pool / ".nobodys").exists()
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"


def test_a_pool_is_kept_if_a_list_is_damaged(tmp_path):
    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    (pairs.artifact.folder / "receipts.json").write_text("{")
    assert collect(Store(tmp_path))["found"] == []


def test_files_of_a_running_stage_are_kept(tmp_path):
    store = tmp_path / "store"
    process = started(store, text=GAUSSIAN.replace("delay: 0.0", "delay: 0.1"))
    assert collect(Store(store), delete=True)["found"] == []
    dropped = retort("gc", "--store", store, "--drop", "gaussian", "--delete")
    (store / "runs" / "gaussian" / "plan.json").rename(tmp_path / "plan.json")  # so that no run refers to it
    held = collect(Store(store), delete=True)
    (tmp_path / "plan.json").rename(store / "runs" / "gaussian" / "plan.json")
    assert process.poll() is None
    assert process.wait(timeout=60) == 0
    assert dropped.returncode == 3 and f"process {process.pid}" in dropped.stderr
    assert any("pairs" in one["path"] and f"process {process.pid}" in one["why"] for one in held["kept"])
    assert not any("/pairs" in one["path"] for one in held["found"])


@pytest.mark.parametrize("text", ["{", "[]", '{"pairs": {"kind": "pairs"}}'])
def test_an_unreadable_plan_stops_gc(tmp_path, text):
    execute(GAUSSIAN, tmp_path)
    (tmp_path / "runs" / "gaussian" / "plan.json").write_text(text)
    with pytest.raises(UsageError, match="make a new plan with: retort resume gaussian"):
        collect(Store(tmp_path))
    assert retort("runs", "--store", tmp_path).stdout.splitlines()[2].split()[:2] == ["gaussian", "damaged"]
    assert retort("resume", "gaussian", "--store", tmp_path, "--engine", "inline").returncode == 0
    assert collect(Store(tmp_path))["found"] == []


def test_an_unreadable_record_stops_gc(tmp_path):
    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    (pairs.artifact.folder / "artifact.json").write_text("[]")
    with pytest.raises(UsageError, match="resume its run first"):
        collect(Store(tmp_path))
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "resume"


def test_artifacts_planned_while_gc_waits_are_kept(tmp_path):
    old = execute(GAUSSIAN, tmp_path)["pairs"]
    execute(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=5"])
    store = Store(tmp_path)

    def waiting(text):
        plan = json.loads((tmp_path / "runs/gaussian/plan.json").read_text())
        plan["pairs"] |= {"fingerprint": old.artifact.fingerprint, "pool": old.pool.name}
        (tmp_path / "runs" / "late").mkdir()
        (tmp_path / "runs/late/plan.json").write_text(json.dumps(plan))
        planning.close()

    planning = ExitStack()
    planning.enter_context(share(store.garbage_lock))
    assert collect(store, delete=True, waiting=waiting)["found"] == []


def test_the_lock_of_a_dropped_run_cannot_be_held_twice(tmp_path):
    """Another process waits for the run's lock while its folder is removed: it must get the lock of the new folder."""
    execute(GAUSSIAN, tmp_path)
    store, run = Store(tmp_path), Run(Store(tmp_path), "gaussian")
    drivers, waits, planning = [], threading.Event(), ExitStack()

    def wait_for_the_run():
        with run.held(waiting=lambda text: waits.set()):
            drivers.append(run.driver())

    def waiting(text):  # gc holds the run's lock, and waits for us
        thread.start()
        waits.wait(30)
        planning.close()

    thread = threading.Thread(target=wait_for_the_run)
    planning.enter_context(share(store.garbage_lock))
    collect(store, ["gaussian"], delete=True, waiting=waiting)
    thread.join(30)
    assert drivers and drivers[0] is not None and drivers[0].run == "gaussian"


def test_unknown_folders_among_the_runs_are_ignored(tmp_path):
    execute(GAUSSIAN, tmp_path)
    shutil.copytree(tmp_path / "runs" / "gaussian", tmp_path / "runs" / "gaussian.bak")
    for arguments in (["runs"], ["status"], ["gc"], ["resume"]):
        assert retort(*arguments, "--store", tmp_path).returncode == 0


def test_gc_does_not_run_while_a_plan_is_made(tmp_path):
    execute(GAUSSIAN, tmp_path)
    with share(Store(tmp_path).garbage_lock), pytest.raises(Locked, match="a plan is being made"):
        collect(Store(tmp_path))


def test_gc_lists_and_deletes(tmp_path):
    execute(GAUSSIAN, tmp_path)
    assert retort("gc", "--store", tmp_path).stdout == "nothing to remove\n"
    shown = retort("gc", "--store", tmp_path, "--drop", "gaussian")
    assert "can be removed by --delete" in shown.stdout
    assert json.loads(retort("gc", "--store", tmp_path, "--drop", "gaussian", "--delete", "--json").stdout)["deleted"]
    assert not list(tmp_path.glob("pairs/*/artifact.json")) and not list(tmp_path.glob("runs/*"))
    assert retort("gc", "--store", tmp_path / "none").returncode == 2
    with pytest.raises(UsageError, match="no run 'x' in store"):
        collect(Store(tmp_path), ["x"])
