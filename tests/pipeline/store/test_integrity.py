"""Sealed bytes are checked before use, changed inputs are noticed, and no kill leaves a broken store."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ManifestError, StageFailed
from pipeline.planning.content import HashCache
from pipeline.runs import Run, all_runs
from pipeline.runs.garbage import collect
from pipeline.store import Store
from stages.data.files import sha256_of, temporary_of
from stages.data.pool import read_list
from stages.data.reader import PairReader
from tests.support.cli import retort
from tests.support.pipelines import GAUSSIAN, TINY, execute, flip, plan_of

MORE = ["stages.pairs.count=64"]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A store with GAUSSIAN's teacher and pairs; tests copy it."""
    store = tmp_path_factory.mktemp("sealed") / "store"
    execute(GAUSSIAN, store)
    return store


@pytest.fixture
def store(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "store"))


def edit(path: Path) -> None:
    """Write another mean without changing the size of the file."""
    content = path.read_text()
    assert "0.5" in content
    path.write_text(content.replace("0.5", "0.9"))


def made_again(folder: Path, name: str, content: bytes) -> None:
    """Change the artifact as if another GPU had made it again with other bytes."""
    (folder / name).write_bytes(content)
    record = json.loads((folder / "artifact.json").read_text())
    record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "artifact.json").write_text(json.dumps(record))


def latents(folder: Path, count: int) -> np.ndarray:
    return PairReader(read_list(folder)).batch(range(count)).latent


# --- Before use --------------------------------------------------------------------------------------


def test_an_edited_teacher_of_equal_size_stops_the_pairs(store):
    plan = plan_of(GAUSSIAN, store)
    file = plan["teacher"].artifact.folder / "gaussian.json"
    before = file.read_bytes()
    edit(file)
    assert plan_of(GAUSSIAN, store, MORE)["teacher"].state == "reuse", "a plan looks at sizes alone"
    words = rf"teacher/{plan['teacher'].artifact.fingerprint} is damaged: {file} is missing or changed since.*"
    with pytest.raises(StageFailed, match=rf"{words}retort resume gaussian --store {store}"):
        execute(GAUSSIAN, store, MORE)
    assert len(list(plan["pairs"].pool.rglob("*.tar"))) == 3
    file.unlink()  # what the message says
    done = execute(GAUSSIAN, store, MORE)
    assert file.read_bytes() == before and done["pairs"].artifact.record["metrics"]["reused_count"] == 32
    assert plan_of(GAUSSIAN, store)["pairs"].state == "reuse", "the teacher came to the same bytes"


def test_the_inputs_of_inputs_are_checked_too(tiny, tmp_path):
    store = Path(shutil.copytree(tiny[0], tmp_path / "store"))
    vae = next(store.glob("teacher/*/vae/*.safetensors"))
    flip(vae, vae.stat().st_size - 9)
    text = f"{TINY}  quality: {{kind: evaluate, pairs: pairs, student: student, samples: 20}}\n"
    with pytest.raises(StageFailed, match=rf"is damaged: {vae} is missing or changed since it was sealed"):
        execute(text, store)


@pytest.mark.parametrize("to", ["parquet", "huggingface"])
def test_pairs_with_a_flipped_bit_are_not_exported(store, tmp_path, to):
    pairs = plan_of(GAUSSIAN, store)["pairs"]
    flip(pairs.pool / "00001.tar", 4000)
    done = retort("shards", "export", pairs.artifact.folder, tmp_path / "out", "--to", to)
    assert done.returncode == 2 and "00001.tar or its receipt is missing or changed" in done.stderr
    assert "`retort shards repair ARTIFACT`" in done.stderr and not (tmp_path / "out").exists()


def test_a_replaced_file_is_hashed_again(tmp_path):
    file, other, cache = tmp_path / "file", tmp_path / "other", tmp_path / "contents.json"
    file.write_text("one")
    first = HashCache(cache)
    assert first.sha256_of(file) == sha256_of(file)
    first.save()
    time = file.stat().st_mtime_ns
    other.write_text("two")
    os.utime(other, ns=(time, time))
    other.replace(file)
    assert HashCache(cache).sha256_of(file) == sha256_of(file)


@pytest.mark.parametrize("text", ["null", "[]", "3", "[" * 100_000, '{"PATH": null}', '{"PATH": [STAMP, 5]}'])
def test_a_hash_cache_with_other_content_is_ignored(store, text):
    prompts = store.parent / "prompts.txt"
    prompts.write_text("a cat\n")
    stat = prompts.stat()
    stamp = f"{stat.st_size}, {stat.st_mtime_ns}, {stat.st_ino}"
    (store / "contents.json").write_text(text.replace("PATH", str(prompts)).replace("STAMP", stamp))
    plan = plan_of(GAUSSIAN.replace("prompts: digits", f"prompts: {prompts}"), store)
    assert plan["pairs"].contents == {"prompts.path": f"sha256:{sha256_of(prompts)}"}
    assert json.loads((store / "contents.json").read_text())[str(prompts)][-1] == sha256_of(prompts)


# --- retort verify -----------------------------------------------------------------------------------


def test_verify_checks_any_artifact(store):
    plan = plan_of(GAUSSIAN, store)
    for target in ("gaussian/teacher", "gaussian/pairs", plan["teacher"].artifact.folder, "gaussian"):
        done = retort("verify", target, "--store", store)
        assert done.returncode == 0 and "DAMAGED" not in done.stdout, done.stdout + done.stderr
    found = json.loads(retort("verify", "gaussian/pairs", "--store", store, "--json").stdout)
    assert (found["kind"], found["files"], found["damaged"]) == ("pairs", 5, {}), "list, prompts, three shards"
    edit(plan["teacher"].artifact.folder / "gaussian.json")
    flip(plan["pairs"].pool / "00001.tar", 4000)
    for name, victim in {"teacher": "gaussian.json", "pairs": "00001.tar"}.items():
        done = retort("verify", f"gaussian/{name}", "--store", store, "--json")
        assert done.returncode == 1 and list(json.loads(done.stdout)["damaged"]) == [victim]
    done = retort("verify", "gaussian", "--store", store)
    assert done.returncode == 1 and done.stdout.count("DAMAGED") == 2
    (plan["teacher"].artifact.folder / "artifact.json").write_text("{")
    done = retort("verify", "gaussian", "--store", store, "--json")
    assert done.returncode == 1 and ["artifact.json"] in [list(one["damaged"]) for one in json.loads(done.stdout)]
    done = retort("verify", "gaussian/nothing", "--store", store)
    assert done.returncode == 2 and "run gaussian has no stage 'nothing'" in done.stderr


# --- Inputs that were made again ---------------------------------------------------------------------


def test_pairs_are_made_again_if_their_teacher_has_other_bytes(store):
    plan = plan_of(GAUSSIAN, store)
    teacher, pairs = plan["teacher"].artifact.folder, plan["pairs"].artifact.folder
    assert plan["pairs"].artifact.record["inputs_sha256"] == {"teacher": plan["teacher"].artifact.sha256}
    before = latents(pairs, 40)
    made_again(teacher, "gaussian.json", (teacher / "gaussian.json").read_bytes().replace(b"0.5", b"0.9"))
    now = plan_of(GAUSSIAN, store)["pairs"]
    assert (now.state, now.why) == ("run", "its input teacher was made again with different bytes")
    assert now.artifact.fingerprint == plan["pairs"].artifact.fingerprint
    more = execute(GAUSSIAN, store, MORE)["pairs"].artifact
    assert more.record["metrics"]["reused_count"] == 0, "no shard of the first teacher among those of the second"
    assert (abs(latents(more.folder, 64)[:40] - before) > 0.1).all((1, 2, 3)).all()
    assert execute(GAUSSIAN, store)["pairs"].artifact.record["metrics"]["reused_count"] == 32
    np.testing.assert_array_equal(latents(pairs, 40), latents(more.folder, 40))
    assert plan_of(GAUSSIAN, store)["pairs"].state == plan_of(GAUSSIAN, store, MORE)["pairs"].state == "reuse"


def test_artifacts_that_depend_on_the_pairs_are_made_again_too(tiny, tmp_path):
    store = Path(shutil.copytree(tiny[0], tmp_path / "store"))
    plan = plan_of(TINY, store)
    student = plan["student"].artifact.folder
    made_again(plan["teacher"].artifact.folder, "README.md", b"another")
    plan = plan_of(TINY, store)
    assert [(s.state, s.why) for s in plan.values()][1:] == [
        ("run", "its input teacher was made again with different bytes"),
        ("run", "its input pairs.0.pairs.teacher was made again with different bytes"),
    ]
    evaluate = f"name: x\nstages:\n  quality: {{kind: evaluate, student: {student}, samples: 20}}\n"
    with pytest.raises(ManifestError, match=r"its input pairs\.0\.pairs\.teacher was made again with different bytes"):
        plan_of(evaluate, store)


def test_a_record_without_hashes_of_its_inputs_is_accepted(store):
    pairs = plan_of(GAUSSIAN, store)["pairs"].artifact
    record = pairs.record
    for name in ("inputs_sha256", "pool"):
        del record[name]
    (pairs.folder / "artifact.json").write_text(json.dumps(record))
    assert plan_of(GAUSSIAN, store)["pairs"].state == "reuse"


@pytest.mark.parametrize("same", [True, False])
def test_an_attempt_is_resumed_only_with_the_same_inputs(store, same):
    plan = plan_of(GAUSSIAN, store, MORE)
    sha256 = plan["teacher"].artifact.sha256 if same else "0" * 64
    work = store / "work" / f"pairs-{plan['pairs'].artifact.fingerprint}"
    work.mkdir()
    (work / ".inputs.json").write_text(json.dumps({"inputs_sha256": {"teacher": sha256}}))
    (work / "half").touch()
    assert plan_of(GAUSSIAN, store, MORE)["pairs"].state == ("resume" if same else "run")
    done = execute(GAUSSIAN, store, MORE)["pairs"].artifact
    assert ("half" in done.record["files"]) == same and not (done.folder / ".inputs.json").exists()


# --- Leftovers ---------------------------------------------------------------------------------------


def test_temporary_files_of_killed_writers_are_not_sealed(store):
    plan = plan_of(GAUSSIAN, store, MORE)["pairs"]
    work = store / "work" / f"pairs-{plan.artifact.fingerprint}"
    (work / "inside").mkdir(parents=True)
    left = [temporary_of(work / "receipts.json"), temporary_of(work / "inside" / "file")]
    for path in (*left, work / "inside" / "file"):
        path.write_text("x")
    execute(GAUSSIAN, store, MORE)
    assert sorted(plan.artifact.record["files"]) == ["inside/file", "receipts.json"]
    found = (path.relative_to(plan.artifact.folder) for path in plan.artifact.folder.rglob("*"))
    assert sorted(map(str, found)) == ["artifact.json", "inside", "inside/file", "receipts.json"]


def test_a_pairs_stage_removes_only_its_own_temporary_files(store):
    pool = plan_of(GAUSSIAN, store)["pairs"].pool
    left = [temporary_of(pool / name) for name in ("00007.tar", "00007.parquet", "tail-8/00002.tar", "prompts.arrow")]
    others = [pool / ".nfs0001", pool / ".folder" / "file", temporary_of(pool / "folder") / "file"]
    for path in (*left, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    execute(GAUSSIAN, store, MORE)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


# --- Repair ------------------------------------------------------------------------------------------


def test_repair_makes_the_same_artifact_again(store):
    pairs = plan_of(GAUSSIAN, store)["pairs"]
    before = pairs.artifact.sha256
    flip(pairs.pool / "00000.tar", 4000)
    done = retort("shards", "repair", "gaussian/pairs", "--store", store, "--engine", "inline")
    assert done.returncode == 0, done.stderr
    assert pairs.artifact.sha256 == before, "what depends on it stays"


@pytest.mark.parametrize("made", [False, True])
def test_repair_is_refused_if_the_teacher_has_changed(store, made):
    plan = plan_of(GAUSSIAN, store)
    teacher, pairs = plan["teacher"].artifact.folder, plan["pairs"]
    flip(pairs.pool / "00000.tar", 4000)
    if made:
        made_again(teacher, "gaussian.json", (teacher / "gaussian.json").read_bytes().replace(b"0.5", b"0.9"))
    else:
        edit(teacher / "gaussian.json")
    done = retort("shards", "repair", pairs.artifact.folder, "--engine", "inline")
    words = (
        "its input teacher was made again with different bytes" if made else "gaussian.json is missing or changed since"
    )
    assert done.returncode == 2 and "cannot be made again as it was" in done.stderr and words in done.stderr
    assert (pairs.artifact.folder / "artifact.json").exists() and (pairs.pool / "00000.parquet").exists()


@pytest.mark.parametrize("by_path", [False, True])
def test_repair_is_refused_while_another_run_reads_the_artifact(store, by_path):
    """Another run is under way. It has the pairs in its plan, or it reads other pairs of the same pool by their
    path."""
    pairs = plan_of(GAUSSIAN, store)["pairs"]
    run = Run(Store(store), "gaussian")
    if by_path:
        other = execute(GAUSSIAN, store, ["stages.pairs.count=32"], name="second")["pairs"].artifact.folder
        frozen = json.loads((run.folder / "plan.json").read_text())["pairs"]
        reader = frozen | {"kind": "distill", "fingerprint": "x", "pool": "x", "inputs": {"pairs": str(other)}}
        run = Run(Store(store), "reader")
        run.folder.mkdir()
        (run.folder / "plan.json").write_text(json.dumps({"student": reader}))
    flip(pairs.pool / "00000.tar", 4000)
    with run.held():
        done = retort("shards", "repair", pairs.artifact.folder, "--engine", "inline")
    assert done.returncode == 3 and f"is in use by run {run.name}" in done.stderr
    assert (pairs.artifact.folder / "artifact.json").exists() and (pairs.pool / "00000.parquet").exists()
    assert retort("shards", "repair", pairs.artifact.folder, "--engine", "inline").returncode == 0


# --- Killed at any moment ----------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates the end of the process: after it nothing changes the disk, not even a `finally` block."""


def killed_at(number: int, store: Path, patch: pytest.MonkeyPatch) -> None:
    """Raise Killed before change `number` (counted from 0) of the store. Changes of runs and locks do not count."""
    done = itertools.count()
    dead = False

    def wrapped(change):
        def instead(path, *arguments, **named):
            nonlocal dead
            path = Path(path)
            inside = path.parts[len(store.parts) :][:1]
            nothing = path.is_absolute() and not path.exists()  # a temporary that is gone already
            counts = not nothing and inside not in (("runs",), ("locks",), ("contents.json",))
            dead = dead or (counts and next(done) == number)
            if dead:
                raise Killed
            return change(path, *arguments, **named)

        return instead

    for name in ("replace", "rename", "unlink", "rmdir"):
        patch.setattr(os, name, wrapped(getattr(os, name)))


def repair(store: Path) -> None:
    done = retort("shards", "repair", "gaussian/pairs", "--store", store, "--engine", "inline")
    assert done.returncode == 0, done.stderr


def force(store: Path) -> None:
    execute(GAUSSIAN, store, force=["pairs"])


def drop(store: Path) -> None:
    collect(Store(store), [run.name for run in all_runs(Store(store))], delete=True)


@pytest.mark.parametrize("command", [repair, force, drop])
def test_a_command_killed_before_any_change_of_the_store_can_be_repeated(sealed, tmp_path, command):
    whole = {tar.name: sha256_of(tar) for tar in sealed.rglob("*.tar")}
    for number in itertools.count():
        store = Path(shutil.copytree(sealed, tmp_path / "store"))
        for tar in ("00000.tar", "tail-8/00002.tar") if command is repair else ():
            flip(next(store.glob(f"pairs/pool/*/{tar}")), 4000)
        finished = True
        with pytest.MonkeyPatch.context() as patch:
            killed_at(number, store, patch)
            try:
                command(store)
            except Killed:
                finished = False
        command(store)
        drop_leftovers = collect(Store(store), delete=True)
        assert all(one["what"] == "temporary" for one in drop_leftovers["found"]), number
        if command is drop:
            assert not [*store.glob("*/*/artifact.json"), *store.rglob("*.tar"), *store.glob("work/*")], number
        else:
            assert {s.state for s in plan_of(GAUSSIAN, store).values()} == {"reuse"}, number
            assert retort("verify", "gaussian", "--store", store).returncode == 0, number
            assert {tar.name: sha256_of(tar) for tar in store.rglob("*.tar")} == whole, number
        shutil.rmtree(store)
        if finished:
            break
    assert number > 5
