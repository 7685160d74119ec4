"""--only, --from, --force, --dry-run and --diff: which stages a command selects."""

import json

import pytest

from pipeline.commands.console import held
from pipeline.errors import UsageError
from pipeline.planning import Selection
from pipeline.runs import Run
from pipeline.store import Store
from tests.support.cli import retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of

CHAIN = GAUSSIAN + "  more: {kind: pairs, teacher: teacher, prompts: digits, count: 8, shard_size: 8}\n"


@pytest.fixture
def made(tmp_path):
    """A manifest's file and a store in which it is done."""
    path, store = tmp_path / "m.yaml", tmp_path / "store"
    path.write_text(CHAIN)
    execute(CHAIN, store, name="gaussian")
    return path, store


def tars(store):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(store.glob("pairs/pool/*/*.tar"))}


def test_a_forced_stage_and_its_dependants_are_made_again_with_the_same_bytes(made):
    _, store = made
    before = tars(store)
    plan = execute(CHAIN, store, force=["teacher"])
    assert [(s.state, s.why) for s in plan.values()] == [("run", "forced"), *[("run", "teacher is made again")] * 2]
    after = tars(store)
    assert {path: data for path, (_, data) in after.items()} == {path: data for path, (_, data) in before.items()}
    assert all(after[path][0] > time for path, (time, _) in before.items())
    assert {s.state for s in plan_of(CHAIN, store).values()} == {"reuse"}


def test_forcing_one_stage_does_not_change_the_others(made):
    _, store = made
    plan = execute(CHAIN, store, force=["more"])
    assert [s.state for s in plan.values()] == ["reuse", "reuse", "run"]


def test_forcing_is_refused_if_it_would_remove_files_of_other_artifacts(made):
    path, store = made
    arguments = ("submit", path, "--store", store, "--engine", "inline")
    done = retort(*arguments, "--force", "teacher", "--only", "teacher")
    assert done.returncode == 2 and "pairs would have to be made again, too" in done.stderr
    execute(CHAIN, store, ["stages.pairs.count=32"], name="fewer")
    done = retort(*arguments, "--force", "pairs")
    assert done.returncode == 2 and "pairs shares its parts with" in done.stderr
    assert {s.state for s in plan_of(CHAIN, store).values()} == {"reuse"}


def test_forcing_is_all_or_nothing(made):
    """If another run makes one of the forced artifacts, or reads it by its path, nothing is removed."""
    _, store = made
    teacher = plan_of(CHAIN, store)["teacher"].artifact.folder
    text = GAUSSIAN.replace("delay: 0.0", "delay: 0.1").replace("teacher: teacher", f"teacher: {teacher}")
    text = text.replace("steps: 10", "steps: 3")
    text = text.replace(text[text.index("  teacher: {kind") : text.index("  pairs:")], "")
    plan = execute(text, store, name="reader")
    run = Run(Store(store), "reader")
    with run.held():
        done = retort("resume", "gaussian", "--store", store, "--engine", "inline", "--force", "teacher")
    assert done.returncode == 3 and "in use by run reader" in done.stderr
    more = plan_of(CHAIN, store)["more"]
    with run.making(more.artifact, more.pool):
        done = retort("resume", "gaussian", "--store", store, "--engine", "inline", "--force", "teacher")
    assert done.returncode == 3 and plan["pairs"].artifact.folder.exists()
    assert {s.state for s in plan_of(CHAIN, store).values()} == {"reuse"}


def test_a_killed_forced_run_can_be_resumed(made):
    _, store = made
    run = Run(Store(store), "gaussian")
    loaded = run.manifest()
    with held(loaded, run, Selection(force=["teacher"]), wait=False):
        pass  # killed before the first stage
    assert {s.state for s in plan_of(CHAIN, store).values()} == {"run"}
    assert retort("resume", "gaussian", "--store", store, "--engine", "inline").returncode == 0
    assert {s.state for s in plan_of(CHAIN, store).values()} == {"reuse"}


def test_from_runs_a_stage_and_its_dependants(made):
    path, store = made
    arguments = ("submit", path, "--store", store, "--engine", "inline", "--set", "stages.teacher.gaussian.std=0.7")
    done = retort(*arguments, "--from", "pairs")
    assert done.returncode == 2 and "stage pairs needs teacher, which is not made yet (gaussian.std" in done.stderr
    plan = json.loads(retort(*arguments, "--from", "teacher", "--dry-run", "--json").stdout)
    assert list(plan) == ["teacher", "pairs", "more"]
    assert list(json.loads(retort("plan", path, "--store", store, "--from", "pairs", "--json").stdout)) == ["pairs"]


def test_unknown_stage_names_are_refused(tmp_path):
    plan = list(plan_of(CHAIN, tmp_path).values())
    with pytest.raises(UsageError, match="no stage 'teecher'; did you mean 'teacher'"):
        Selection(only=["teecher"]).of(plan)
    with pytest.raises(UsageError, match="no stage 'x'"):
        Selection(force=["x"]).forced(["teacher"])


def test_a_dry_run_changes_nothing(tmp_path):
    path, store = tmp_path / "m.yaml", tmp_path / "store"
    path.write_text(CHAIN)
    done = retort("submit", path, "--store", store, "--dry-run")
    assert done.returncode == 0 and "never made" in done.stdout and not store.exists()
    execute(CHAIN, store, name="gaussian")
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    for options in (["--force", "teacher"], ["--set", "seed=3"]):
        assert retort("submit", path, "--store", store, "--dry-run", *options).returncode == 0
    assert retort("resume", "gaussian", "--store", store, "--dry-run").stdout.count("sealed") == 3
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_differences_between_a_manifest_and_a_run_and_between_runs(made):
    path, store = made
    options = ("--set", "stages.pairs.sampler.steps=5", "--set", "stages.extra={kind: teacher, from: digit_scenes}")
    shown = retort("plan", path, "--store", store, *options, "--diff", "gaussian", "--json")
    assert json.loads(shown.stdout) == {"pairs": ["sampler.steps 10 -> 5"], "extra": ["added"]}
    execute(CHAIN, store, ["stages.teacher.gaussian.std=0.7"], name="other")
    shown = json.loads(retort("plan", "other", "--store", store, "--diff", "gaussian", "--json").stdout)
    assert shown["teacher"] == ["gaussian.std 0.6 -> 0.7"] and shown["pairs"] == ["its input teacher changed"]
    assert "no difference" in retort("plan", "gaussian", "--store", store, "--diff", "gaussian").stdout
    assert retort("plan", path, "--store", store, "--diff", "nobody").returncode == 2


def test_commands_take_the_name_or_the_manifest_of_a_run(made, tmp_path):
    path, store = made
    assert json.loads(retort("plan", "gaussian", "--store", store, "--json").stdout)["more"]["state"] == "reuse"
    path.write_text(CHAIN.replace("name: gaussian", f"name: gaussian\nstore: {store}"))
    for arguments in (["status", path], ["resume", path]):  # the manifest's name and store
        done = retort(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = retort("status", "gaussian", cwd=tmp_path, RETORT_STORE=str(store))
    assert done.returncode == 0
    elsewhere = retort("status", path, "--store", tmp_path / "none", cwd=tmp_path, RETORT_STORE=str(store))
    assert elsewhere.returncode == 2 and "which has none" in elsewhere.stderr
