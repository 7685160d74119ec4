"""What users of DVC, Snakemake and Metaflow expect of a workflow, each with the command that does it here."""

# ruff: noqa: E501 - a table is read in lines

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.store import hold
from tests.support.cli import ROOT, retort
from tests.support.pipelines import GAUSSIAN, execute

NEW_CODE = "import stages.pairs; stages.pairs.Pairs.VERSION = 99; from pipeline.cli import main; main()"


class Place(NamedTuple):
    """A manifest beside its prompts, and a store in which its run `gaussian` is done."""

    manifest: Path
    prompts: Path
    store: Path


def nothing(place: Place) -> None: ...


def edit_prompts(place: Place) -> None:
    place.prompts.write_text("a cat\na cow\n")


def break_pool(place: Place) -> None:
    """A stage that fails: its pool is a file."""
    shutil.rmtree(place.store / "pairs")
    (place.store / "pairs").mkdir()
    (place.store / "pairs" / "pool").write_text("")


def fail_and_mend(place: Place) -> None:
    break_pool(place)
    assert retort("resume", "gaussian", "--store", place.store, "--engine", "inline").returncode == 1
    (place.store / "pairs" / "pool").unlink()


def interrupt_after_a_shard(place: Place) -> None:
    pool = next(place.store.glob("pairs/pool/*"))
    shutil.rmtree(next(place.store.glob("pairs/*/artifact.json")).parent)
    (pool / "00001.parquet").unlink()


def second_run(place: Place) -> None:
    execute(place.manifest.read_text(), place.store, ["stages.pairs.sampler.steps=5"], name="other")


class Feature(NamedTuple):
    name: str
    command: str
    """{m}: the manifest, {s}: the store."""
    words: str
    code: int = 0
    before: Callable[[Place], None] = nothing


FEATURES = [
    Feature("dry run", "submit {m} --store {s} --dry-run --force teacher", r"forced"),
    Feature("status", "status gaussian --store {s}", r"2 done; .* of devices"),
    Feature("list of runs", "runs --store {s}", r"gaussian +done +2/2"),
    Feature("plan", "plan {m} --store {s}", r"\nteacher  .*\npairs    teacher  "),
    Feature("why a stage is stale", "plan {m} --store {s} --set seed=4", r"seed 0 -> 4"),
    Feature("parameter invalidation", "plan {m} --store {s} --set stages.pairs.sampler.steps=5", r"sampler.steps 10 -> 5"),
    Feature("code invalidation", "NEW_CODE plan {m} --store {s}", r"the code of pairs stages changed \(VERSION \d -> 99\)"),
    Feature("input content hash", "plan {m} --store {s}", r"p.txt changed", before=edit_prompts),
    Feature("nothing done twice", "submit {m} --store {s} --engine inline", r"pairs: reused"),
    Feature("force", "submit {m} --store {s} --engine inline --force pairs", r"pairs: run: forced"),
    Feature("one stage only", "resume gaussian pairs --store {s} --engine inline", r"pairs: reused"),
    Feature("from a stage on", "submit {m} --store {s} --engine inline --from teacher", r"teacher: reused\npairs: reused"),
    Feature("resume what failed", "resume gaussian --store {s} --engine inline", r"pairs: done", before=fail_and_mend),
    Feature("resume inside a stage", "plan gaussian --store {s}", r"2 of 3 shards are there", before=interrupt_after_a_shard),
    Feature("override", "plan {m} --store {s} --set stages.pairs.count=48", r"count 40 -> 48"),
    Feature("matrix", "plan {m} --store {s} --set stages.pairs.matrix.seed=[1,2]", r"pairs\[seed=2\]"),
    Feature("parameter diff", "plan {m} --store {s} --diff other", r"pairs +sampler.steps 5 -> 10", before=second_run),
    Feature("diff of two runs", "plan gaussian --store {s} --diff other", r"sampler.steps 5 -> 10", before=second_run),
    Feature("visible lock", "LOCKED submit {m} --store {s} --engine inline", r"carried out by run mine \(process \d+ on .*--wait", 3),
    Feature("garbage collection", "gc --store {s} --drop other --delete", r"removed", before=second_run),
    Feature("stage logs", "logs gaussian --store {s}", r"pairs: stage done"),
    Feature("JSON", "status gaussian --store {s} --json", r'"state": "done"'),
    Feature("exit code of success", "submit {m} --store {s}", r"pairs"),
    Feature("exit code of a failed stage", "resume gaussian --store {s} --engine inline", r"failed: Not a dir", 1, break_pool),
    Feature("exit code of a wrong manifest", "plan {m} --store {s} --set stages.pairs.cuont=1", r"did you mean 'count'", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    (folder / "p.txt").write_text("a cat\na dog\n")
    text = GAUSSIAN.replace("prompts: digits", f"prompts: {folder / 'p.txt'}")
    execute(text, folder / "store")
    return folder


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name.replace(" ", "-"))
def test_every_row_of_the_table_works(feature, done, tmp_path):
    place = Place(tmp_path / "m.yaml", tmp_path / "p.txt", tmp_path / "store")
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    place.manifest.write_text(GAUSSIAN.replace("prompts: digits", f"prompts: {place.prompts}"))
    feature.before(place)
    words = feature.command.format(m=place.manifest, s=place.store).split()
    if words[0] == "LOCKED":
        with hold(place.store / "runs" / "gaussian" / "lock", "", "mine"):
            found = retort(*words[1:])
    elif words[0] == "NEW_CODE":
        found = subprocess.run(
            [sys.executable, "-c", NEW_CODE, *words[1:]],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
    else:
        found = retort(*words)
    assert found.returncode == feature.code, found.stderr
    assert re.search(feature.words, found.stdout + found.stderr), found.stdout + found.stderr
    if "--json" in words:
        json.loads(found.stdout)
