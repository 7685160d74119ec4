"""Stage kinds, methods and image sets of other packages. The tests install small packages and run the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.planning.fingerprint import changes, fingerprint, identity
from stages.methods.base import StudentTraining
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from tests.support.cli import ROOT, command, retort
from tests.support.packages import PACKAGES, install

MANIFEST = """
name: plugins
stages:
  teacher: {kind: teacher, gaussian: {shape: [2, 4, 4]}}
  pairs: {kind: pairs, teacher: teacher, prompts: {images: stripes}, count: 8, shard_size: 4, sampler: {steps: 2}}
  number: {kind: count, pairs: pairs, plus: 2}
"""
DISTILL = """
name: plugins
stages:
  student:
    kind: distill
    pairs: %s
    method: %s
    training: {steps: 2, batch_size: 4}
    held_out: 32
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Name of a package -> the folder that it was installed to."""
    make = tmp_path_factory.mktemp
    return {name: install(name, make("source"), make("installed")) for name in PACKAGES}


def path_with(*folders: Path) -> str:
    return os.pathsep.join(map(str, (ROOT, *folders)))


@pytest.fixture
def good(installed):
    return path_with(installed["retort-good"])


def test_a_stage_kind_and_an_image_set_of_a_package_are_run(good, tmp_path):
    manifest, store = tmp_path / "m.yaml", tmp_path / "store"
    manifest.write_text(MANIFEST)
    plan = retort("plan", manifest, "--store", store, PYTHONPATH=good)
    assert plan.returncode == 0, plan.stderr
    assert "count" in plan.stdout
    done = retort("submit", manifest, "--store", store, "--engine", "inline", "--json", PYTHONPATH=good)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["stages"]["number"]["artifact"])
    assert folder.parent == store / "count" and json.loads((folder / "count.json").read_text()) == 10
    settings = json.loads((folder / "artifact.json").read_text())["settings"]
    assert settings["plus"] == 2
    manifest.write_text(DISTILL % (folder, "knowledge_distillation"))
    without = retort("plan", manifest, "--store", store)
    assert without.returncode == 2 and "is of kind 'count', which no installed package offers" in without.stderr


def test_a_method_and_a_loss_of_a_package_train_a_student(good, tiny, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(DISTILL % (tiny[1]["pairs"].artifact.folder, "{name: squares, loss: fourth_power}"))
    store = tmp_path / "store"
    done = retort("submit", manifest, "--store", store, "--engine", "inline", "--json", PYTHONPATH=good)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["stages"]["student"]["artifact"])
    assert (folder / "model_index.json").exists()
    manifest.write_text(f"name: x\nstages:\n  quality: {{kind: evaluate, student: {folder}}}\n")
    without = retort("plan", manifest, "--store", store)
    assert without.returncode == 2
    assert "method.name is 'squares', which no installed package offers" in without.stderr


def test_an_image_set_of_a_package_is_loaded(good):
    code = """
from stages.data.images.config import IMAGE_SETS
from stages.data.images.load import captions, load
found = IMAGE_SETS["stripes"](size=8)
images = load(found, limit=3)
print(images.images.shape, images.labels["label"].shape, list(captions(found)), found.labelled)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": good}, capture_output=True, text=True
    )
    assert done.stdout == "(3, 3, 8, 8) (3,) ['black', 'white'] False\n", done.stderr


def test_errors_about_unknown_names_list_names_of_packages(good, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(DISTILL % ("pairs", "sqares") + "  n: {kind: cuont}\n  t: {kind: teacher, train: {dataset: x}}")
    done = retort("plan", manifest, PYTHONPATH=good)
    assert done.returncode == 2
    assert "unknown name 'sqares'; did you mean 'squares'? (allowed: " in done.stderr
    assert "knowledge_distillation, progressive, squares)" in done.stderr
    assert "unknown kind 'cuont'; did you mean 'count'?" in done.stderr
    assert "parquet, stripes, webdataset" in done.stderr


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("squares", "retort-bad and retort-good both offer 'squares' (entry points of retort.methods)"),
        ("missing", "it cannot be imported (ModuleNotFoundError: No module named 'a_package_that_nobody_has')"),
        ("{name: absent}", "it cannot be imported (AttributeError: module 'retort_bad.other' has no attribute"),
        ("plain", "{'name': 'plain'} is not a subclass of stages.methods.base.MethodConfig"),
        ("misnamed", "its class has name: another"),
    ],
)
def test_a_broken_package_is_a_problem_of_the_manifest(installed, tmp_path, method, words):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(DISTILL % ("a/path", method))
    done = retort("plan", manifest, PYTHONPATH=path_with(*installed.values()))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    column = 20 if method.startswith("{") else 13
    assert done.stderr.startswith(f"{manifest}:7:{column}: stages.student.method.name: "), done.stderr
    assert words in done.stderr
    name = method.strip("{}").removeprefix("name: ")
    if name != "squares":
        assert f"package retort-bad, entry point `{name} = retort_bad." in done.stderr


def test_a_broken_adapter_and_a_method_without_pairs_give_one_sentence(installed, tmp_path):
    path = path_with(installed["retort-bad"])
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model_index.json").write_text('{"_class_name": "MissingPipeline"}')
    manifest = tmp_path / "m.yaml"
    teacher = f"teacher: {{kind: teacher, from: {tmp_path / 'teacher'}}}"
    pairs = "pairs: {kind: pairs, teacher: teacher, prompts: digits, count: 64, sampler: {steps: 2}}"
    text = DISTILL.replace("stages:\n", f"stages:\n  {teacher}\n  {pairs}\n")
    manifest.write_text(text % ("pairs", "knowledge_distillation"))
    planned = retort("plan", manifest, "--store", tmp_path / "store", PYTHONPATH=path)
    assert planned.returncode == 0, planned.stderr
    done = retort("init", tmp_path / "new.yaml", "--teacher", tmp_path / "teacher", PYTHONPATH=path)
    assert done.returncode == 2 and "a_package_that_nobody_has" in done.stderr and "Traceback" not in done.stderr
    done = retort("init", tmp_path / "new.yaml", "--method", "prompted", PYTHONPATH=path)
    assert done.returncode == 2 and "manifests that train on pairs, but prompted needs prompts" in done.stderr


def test_a_kind_cannot_have_the_name_of_a_store_folder(installed, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text("name: x\nstages:\n  a: {kind: runs}\n")
    done = retort("plan", manifest, PYTHONPATH=path_with(installed["retort-bad"]))
    assert (
        done.returncode == 2
        and "runs = retort_bad.other:Other` of retort.kinds: Retort reserves this name" in done.stderr
    )


def test_a_built_in_name_is_found_without_a_search_of_packages(good, tmp_path):
    """A search of the installed packages would call every finder on sys.meta_path."""
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        return None
    def find_distributions(self, context=None):
        raise SystemExit("the installed packages were looked through")
sys.meta_path.insert(0, Finder())
from pipeline.cli import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": good, "PYDANTIC_DISABLE_PLUGINS": "__all__"}

    def plan(manifest: Path) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", code, "plan", str(manifest), "--store", str(tmp_path), "--json"]
        return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = plan(ROOT / "manifests" / "digits.yaml")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["student"]["identity"]["settings"]["method"]["name"] == "knowledge_distillation"
    (tmp_path / "m.yaml").write_text(DISTILL % ("a/path", "squares"))
    assert "were looked through" in plan(tmp_path / "m.yaml").stderr  # proves that the finder works


def test_only_a_version_above_1_is_part_of_the_fingerprint(installed, tmp_path):
    class First(KnowledgeDistillationConfig):
        VERSION = 1

    class Raised(KnowledgeDistillationConfig):
        VERSION = 2

    from stages.distill import Distill

    def identity_of(method):
        stage = Distill(kind="distill", pairs=["p"], method=method, training=StudentTraining(steps=1))
        return identity(stage, 0, {}, {})

    before, after = identity_of(First()), identity_of(Raised())
    assert "VERSION" not in before["settings"]["method"]
    assert fingerprint(before) != fingerprint(after)
    assert list(changes(before, after, {})) == ["method.VERSION 1 -> 2"]


def test_a_higher_version_of_a_package_makes_its_students_stale(installed, good, tiny, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(DISTILL % (tiny[1]["pairs"].artifact.folder, "squares"))

    def planned() -> str:
        done = subprocess.run(
            command("plan", manifest, "--store", tmp_path, "--json"),
            env={**os.environ, "PYTHONPATH": good, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)["student"]["fingerprint"]

    before = planned()
    module = installed["retort-good"] / "retort_good" / "methods.py"
    text = module.read_text()
    module.write_text(text.replace("= 1", "= 22"))
    assert planned() != before
    module.write_text(text)
    assert planned() == before


def test_explain_describes_classes_of_packages(good, installed):
    assert "count (retort-good)" in " ".join(retort("explain", PYTHONPATH=good).stdout.split())  # lines are wrapped
    shown = retort("explain", "count", PYTHONPATH=good).stdout
    assert shown.startswith("count: a stage kind, from the package retort-good (kind: count)\n\nCounts pairs.\n")
    assert "added to the number of pairs" in shown
    broken = retort("explain", "missing", PYTHONPATH=path_with(installed["retort-bad"]))
    assert broken.returncode == 2 and "a_package_that_nobody_has" in broken.stderr
