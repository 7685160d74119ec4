"""Planning: what is reused, what runs, and why."""

import json
import subprocess
import sys
from typing import Annotated

import pytest

from pipeline.engines import InlineEngine
from pipeline.errors import ManifestError, StageFailed
from pipeline.manifest import loads
from pipeline.planning import make_plan, read_contents
from pipeline.planning.content import HashCache, pinned
from pipeline.planning.fingerprint import fingerprint, identity, pool_fingerprint
from pipeline.runs import Reporter, Run, Runner
from pipeline.store import Store
from stages.base import Extent, Neutral, Stage
from stages.data.files import files_of
from tests.support.cli import BLOCKER, ROOT, retort
from tests.support.pipelines import GAUSSIAN, TINY, execute, plan_of


@pytest.mark.parametrize("path", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_planning_imports_neither_torch_nor_ray_nor_diffusers(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, "plan", str(path), "--store", str(tmp_path), "--json"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {stage["state"] for stage in json.loads(done.stdout).values()} <= {"run", "blocked"}


def test_planning_changes_nothing(tmp_path):
    plan_of(TINY, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_sealed_stages_are_reused_and_changed_stages_say_why(tmp_path):
    execute(GAUSSIAN, tmp_path)
    assert {s.state for s in plan_of(GAUSSIAN, tmp_path).values()} == {"reuse"}
    plan = plan_of(GAUSSIAN, tmp_path, ["stages.pairs.sampler.steps=25", "stages.pairs.dtype=float16"])
    assert plan["teacher"].state == "reuse"
    assert (plan["pairs"].state, plan["pairs"].why) == ("run", "dtype float32 -> float16; sampler.steps 10 -> 25")
    plan = plan_of(GAUSSIAN, tmp_path, ["stages.teacher.gaussian.std=0.7"])
    assert plan["teacher"].why == "gaussian.std 0.6 -> 0.7"
    assert plan["pairs"].why == "its input teacher changed"
    assert plan_of(GAUSSIAN, tmp_path, ["seed=5"])["teacher"].why == "seed 0 -> 5"


def test_execution_and_resources_make_nothing_stale(tmp_path):
    execute(GAUSSIAN, tmp_path)
    changed = GAUSSIAN.replace("micro_batch: 8", "micro_batch: 16, threads: 1") + "resources: {pairs: {workers: 2}}"
    assert {s.state for s in plan_of(changed, tmp_path).values()} == {"reuse"}


def test_two_manifests_share_equal_stages(tmp_path):
    first = execute(GAUSSIAN, tmp_path)
    other = plan_of(GAUSSIAN.replace("name: gaussian", "name: other"), tmp_path)
    assert other["pairs"].state == "reuse" and other["pairs"].artifact.folder == first["pairs"].artifact.folder


def test_the_content_of_a_prompts_file_decides_the_fingerprint(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    text = GAUSSIAN.replace("prompts: digits", f"prompts: {prompts}")
    before = execute(text, tmp_path / "store")["pairs"]
    elsewhere = tmp_path / "same.txt"
    elsewhere.write_text("a cat\na dog\n")
    assert plan_of(text.replace(str(prompts), str(elsewhere)), tmp_path / "store")["pairs"].state == "reuse"
    prompts.write_text("a cat\na cow\n")
    after = plan_of(text, tmp_path / "store")["pairs"]
    assert (after.state, after.why) == ("run", "prompts.txt changed")
    assert after.pool != before.pool


def test_a_stage_whose_prompts_change_during_the_run_is_not_sealed(tmp_path):
    prompts, store = tmp_path / "prompts.txt", tmp_path / "store"
    prompts.write_text("a cat\n")
    loaded = loads(GAUSSIAN.replace("prompts: digits", f"prompts: {prompts}"), "test.yaml", [f"store={store}"])
    found = Store(store)
    found.create()
    run = Run(found, "changing")
    plan = make_plan(loaded, read_contents(loaded, store / "contents.json"), found)
    run.freeze(loaded.manifest, plan)
    prompts.write_text("a dog\n")
    with pytest.raises(StageFailed, match=r"prompts.txt changed since the run was planned"):
        Runner(run, loaded.manifest, InlineEngine(), Reporter()).execute(plan, {"teacher", "pairs"})
    assert not list(store.glob("pairs/pool/*/*.tar"))


def test_links_are_followed_when_a_folder_is_hashed(tmp_path):
    real, folder = tmp_path / "real", tmp_path / "folder"
    (real / "unet").mkdir(parents=True)
    folder.mkdir()
    (folder / "unet").symlink_to(real / "unet")
    (real / "unet" / "config.json").write_text("1")
    (folder / "notes.txt").write_text("x")
    before = HashCache(tmp_path / "none").sha256_of(folder, ["unet/config.json"])
    (folder / "notes.txt").write_text("y")
    assert HashCache(tmp_path / "none").sha256_of(folder, ["unet/config.json"]) == before
    (real / "unet" / "config.json").write_text("2")
    assert HashCache(tmp_path / "none").sha256_of(folder, ["unet/config.json"]) != before


def test_looping_links_are_followed_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "one.txt").write_text("x")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert list(files_of(str(tmp_path / "a"))) == ["one.txt"], "a link to its own folder"
    assert list(files_of(f"{tmp_path}/a/**/*.txt")) == ["one.txt"]
    (tmp_path / "a" / "self").unlink()
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    assert list(files_of(str(tmp_path))) == ["a/one.txt", "b/back/one.txt"], "two folders that link to each other"
    assert list(files_of(f"{tmp_path}/**/*.txt")) == ["a/one.txt", "b/back/one.txt"]
    assert len(files_of(f"{tmp_path}/**")) == 2 and list(files_of(f"{tmp_path}/*/*.txt")) == ["one.txt"]


def test_the_pool_does_not_depend_on_the_count(tmp_path):
    plan, more = plan_of(GAUSSIAN, tmp_path)["pairs"], plan_of(GAUSSIAN, tmp_path, ["stages.pairs.count=99"])["pairs"]
    assert plan.artifact.fingerprint != more.artifact.fingerprint and plan.pool == more.pool
    assert plan_of(GAUSSIAN, tmp_path, ["stages.pairs.shard_size=8"])["pairs"].pool != plan.pool


def test_the_seed_of_a_stage_does_not_change_its_inputs(tmp_path):
    plan, other = plan_of(TINY, tmp_path), plan_of(TINY, tmp_path, ["stages.student.seed=1"])
    assert plan["pairs"].artifact == other["pairs"].artifact
    assert plan["student"].artifact.fingerprint != other["student"].artifact.fingerprint
    same = plan_of(TINY, tmp_path, ["stages.student.seed=0"])
    assert same["student"].artifact.fingerprint == plan["student"].artifact.fingerprint


def test_the_plan_notices_damage(tmp_path):
    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    next(pairs.pool.glob("00001.tar")).unlink()
    plan = plan_of(GAUSSIAN, tmp_path)["pairs"]
    assert plan.state == "resume" and "1 of 3 shards are missing or changed, such as 00001.tar" in plan.why
    execute(GAUSSIAN, tmp_path)
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"
    teacher = execute(GAUSSIAN, tmp_path)["teacher"].artifact.folder / "gaussian.json"
    teacher.write_text("{}")
    plan = plan_of(GAUSSIAN, tmp_path)["teacher"]
    assert plan.state == "run" and "gaussian.json is missing or changed" in plan.why


def test_a_list_of_shards_that_is_damaged_at_equal_size_is_made_again(tmp_path):
    receipts = execute(GAUSSIAN, tmp_path)["pairs"].artifact.folder / "receipts.json"
    receipts.write_text(receipts.read_text().replace('"sha256": "', '"sha256": "?', 1)[:-1])
    plan = plan_of(GAUSSIAN, tmp_path)["pairs"]
    assert plan.state in ("run", "resume") and "receipts.json" in plan.why
    execute(GAUSSIAN, tmp_path)
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"


def test_a_lost_receipt_is_made_again(tmp_path):
    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    (pairs.pool / "00001.parquet").unlink()
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "resume"
    execute(GAUSSIAN, tmp_path)
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"


def test_an_artifact_may_be_named_by_its_path(tmp_path):
    teacher = execute(GAUSSIAN, tmp_path)["teacher"].artifact
    text = GAUSSIAN.replace("teacher: teacher", f"teacher: {teacher.folder}")
    assert plan_of(text, tmp_path)["pairs"].state == "reuse"
    with pytest.raises(ManifestError, match=r"needs an artifact of kind teacher; .* is of kind pairs"):
        pairs = execute(GAUSSIAN, tmp_path)["pairs"].artifact
        plan_of(text.replace(str(teacher.folder), str(pairs.folder)), tmp_path)
    with pytest.raises(ManifestError, match="is not a sealed artifact"):
        plan_of(text.replace(teacher.fingerprint, "nothing"), tmp_path)


def test_settings_that_contradict_other_stages_are_errors_of_the_plan(tmp_path):
    for override, words in {
        "stages.student.held_out=96": "96 pairs held out of 96 leave none to train on",
        "stages.pairs.shard_size=97": "it is 97, but count is only 96",
        "stages.pairs.sampler.timestep_spacing=leading": "needs pairs solved with timestep_spacing: trailing",
    }.items():
        with pytest.raises(ManifestError, match=words):
            plan_of(TINY, tmp_path, [override])
    with pytest.raises(ManifestError, match="no network for a student to start from"):
        student = (
            "{kind: distill, pairs: pairs, held_out: 8, method: {name: knowledge_distillation}, training: {steps: 1}}"
        )
        plan_of(f"{GAUSSIAN}  student: {student}", tmp_path)


def test_an_unreachable_hub_blocks_the_plan_unless_a_commit_is_given(tmp_path):
    text = "name: hub\nstages:\n  teacher: {kind: teacher, from: someone/model%s}\n"
    blocked = plan_of(text % "", tmp_path)["teacher"]
    assert blocked.state == "blocked" and "give `revision:` a full commit" in blocked.why
    known = plan_of(text % f", revision: {'a' * 40}", tmp_path)["teacher"]
    assert known.state == "run" and known.contents == {"from_": "hub:" + "a" * 40}


def test_a_blocked_plan_is_not_stored_as_a_run(tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text("name: hub\nstages:\n  teacher: {kind: teacher, from: someone/model}\n")
    done = retort("submit", manifest, "--store", tmp_path / "s")
    assert done.returncode == 2 and "stage teacher is blocked: the commit of someone/model" in done.stderr
    assert not (tmp_path / "s" / "runs" / "hub" / "plan.json").exists()


def test_the_commit_of_a_hub_id_is_kept_with_the_run(tmp_path):
    loaded = loads("name: hub\nstages:\n  teacher: {kind: teacher, from: someone/model}\n", "m.yaml")
    kept = pinned(loaded.manifest, {"teacher": {"from_": "hub:" + "b" * 40}})
    assert kept.stages["teacher"].revision == "b" * 40


class Example(Stage):
    VERSION = 1
    kind: str = "example"
    size: int = 3
    amount: Annotated[int, Extent()] = 10


class Extended(Example):
    added: Annotated[float, Neutral()] = 0.5


def test_a_neutral_default_leaves_fingerprints_unchanged():
    before = identity(Example(), 0, {}, {})
    assert identity(Extended(), 0, {}, {}) == before
    assert identity(Extended(added=1.0), 0, {}, {}) != before


def test_only_extent_fields_do_not_change_the_pool():
    a, b, c = Example(), Example(amount=11), Example(size=4)
    ids = [identity(x, 0, {}, {}) for x in (a, b, c)]
    pools = [pool_fingerprint(x, i) for x, i in zip((a, b, c), ids, strict=True)]
    assert len({fingerprint(i) for i in ids}) == 3 and pools[0] == pools[1] != pools[2]
