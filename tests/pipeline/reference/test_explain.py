"""`retort explain`: every setting has a description, and the command prints it."""

import json
import re
import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from pipeline.errors import UsageError
from pipeline.manifest import Manifest
from pipeline.reference.explain import REGISTRIES, names, text, topics
from pipeline.reference.settings import about, settings_of, words
from stages import KINDS
from stages.methods import METHODS
from tests.support.cli import BLOCKER, ROOT, retort


def walk(config, path):
    yield path, config
    for setting in settings_of(config):
        if setting.config:
            yield from walk(setting.config, f"{path}.{setting.name}")


BUILT_IN = [("manifest", Manifest), *(pair for registry in REGISTRIES.values() for pair in registry.built_in.items())]
EVERYTHING = dict(found for name, config in BUILT_IN for found in walk(config, name))


@pytest.mark.parametrize("path", EVERYTHING)
def test_every_class_has_a_docstring_and_every_setting_a_description(path):
    config = EVERYTHING[path]
    assert about(config), f"{path}: {config.__name__} has no docstring"
    silent = [setting.name for setting in settings_of(config) if not setting.description]
    assert not silent, f"{path}: Field(description=...) is missing of {', '.join(silent)}"
    assert all("any value" not in setting.allowed for setting in settings_of(config))


def type_and_default(path):
    setting = next(s for topic in topics(path) for s in topic.settings if s.name == path.rpartition(".")[2])
    return setting.allowed, "required" if setting.required else setting.default


@pytest.mark.parametrize(
    ("path", "allowed", "default"),
    [
        ("knowledge_distillation.loss", " | ".join(REGISTRIES["losses"]), "l1"),
        ("pairs.sampler.steps", "integer, 1 to 1000", 50),
        ("pairs.count", "integer >= 1", "required"),
        ("training.ema_decay", "number >= 0 and < 1", 0.99),
        ("training.betas", "[number, number]", [0.9, 0.99]),
        ("pairs.teacher", "a stage of kind teacher, or the path of such an artifact", "required"),
        ("teacher.from", "path or hub id", None),
        ("webdataset.path", "path", "required"),
        ("distill.method", " | ".join(METHODS.built_in), "required"),
        ("evaluate.teacher_steps", "list: integer >= 1", None),
        ("gaussian.shape", "list of 3: integer", [4, 8, 8]),
        ("vae.channels", "list: integer; at least 2", [32, 64]),
        ("dmd2.levels", "list: integer", None),
        ("teacher.train.vae.max_mse", "number > 0", 0.01),
        ("pairs.text_embeddings", "true | false", False),
        ("digits.size", "16 | 32", 16),
        ("manifest.name", "text: letters, digits, - and _", "required"),
        ("e_latent_lpips.augment", "text", "bg"),
        ("guided.match_first", "true", True),
        ("manifest.stages", f"{' | '.join(KINDS.built_in)}, by name", "required"),
    ],
)
def test_types_and_defaults_are_described_in_words(path, allowed, default):
    assert type_and_default(path) == (allowed, default)


def test_other_annotations_are_described_in_words():
    assert words(TypeAdapter(int | None).json_schema()) == "integer"
    assert words(TypeAdapter(dict[str, int]).json_schema()) == "integer, by name"


def test_a_name_with_several_meanings_is_explained_with_all_of_them():
    assert [topic.used for topic in topics("pairs")] == ["kind: pairs", "distill.pairs"]
    assert len(topics("execution")) == 5 and len(topics("distill.execution")) == 1
    methods = ["progressive", "consistency", "dmd", "dmd2"]
    assert [topic.name for topic in topics("guidance_scale")] == ["evaluate", *methods, "sds", "vsd", "sampler"]


def test_every_listed_name_and_every_reference_can_be_explained():
    for name in [name for group in names().values() for name in group]:
        for topic in topics(name):
            shown = text(topic)
            assert shown.startswith(f"{name}: ")
            for line in shown.splitlines():
                if "see: retort explain " in line:
                    assert topics(line.rpartition(" ")[2])


def test_explain_prints_a_table(tmp_path):
    shown = retort("explain", "pairs", COLUMNS="100").stdout
    assert shown.startswith("pairs: a stage kind (kind: pairs)\n\nSolves the teacher's ODE from random noise")
    assert "\n  count            integer >= 1; required\n" in shown
    assert "see: retort explain sampler" in shown and "see: retort explain pairs.execution" in shown
    assert (
        "\n  steps             integer, 1 to 1000; default 50\n" in retort("explain", "sampler", COLUMNS="100").stdout
    )
    assert "\n      turns          integer >= 1; default 1\n" in retort("explain", "vsd", COLUMNS="100").stdout
    assert max(map(len, shown.splitlines())) <= 100
    assert "2101.02388" in retort("explain", "knowledge_distillation").stdout
    found = json.loads(retort("explain", "distill", "--json").stdout)
    assert [topic["name"] for topic in found] == ["distill"]
    schema = found[0]["schema"]
    assert schema["properties"]["held_out"]["default"] == 256 and "training" in schema["required"]
    training = schema["$defs"][schema["properties"]["training"]["$ref"].rpartition("/")[2]]
    assert {"steps", "learning_rate"} <= training["properties"].keys()
    assert json.loads(retort("explain", "pairs.count", "--json").stdout)[0]["setting"] == "count"
    assert json.loads(retort("explain", "--json").stdout)["methods"] == list(METHODS.built_in)
    assert f"stage kinds\n  {', '.join(KINDS.built_in)}\n" in retort("explain").stdout


def test_the_page_of_all_settings_is_current():
    printed = retort("explain", "--markdown")
    assert printed.stdout == (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8"), (
        "docs/manifest.md is not current; run: retort explain --markdown > docs/manifest.md"
    )
    assert retort("explain", "pairs", "--markdown").returncode == 2


def test_the_page_has_each_class_of_settings_once_with_its_own_heading():
    page = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    headings = re.findall("^#+ (.+)$", page, re.M)
    assert len(headings) == len(set(headings))
    rows = re.findall(r"^\| `(\w+)` \|", page, re.M)
    settings = [setting.name for config in set(EVERYTHING.values()) for setting in settings_of(config)]
    assert sorted(rows) == sorted(settings)


def test_unknown_names_get_a_suggestion():
    done = retort("explain", "trainig")
    assert done.returncode == 2
    assert done.stderr == (
        "retort: nothing is called 'trainig'; did you mean 'training'? `retort explain` lists all names\n"
    )
    for name in ("pairs.nothing", "pairs.count.more", ".", ""):
        with pytest.raises(UsageError, match="nothing is called"):
            topics(name)


def test_explaining_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", BLOCKER, "explain", "distill"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
