"""`retort init`: every manifest that it writes loads and is planned."""

import json

import pytest
import yaml

from pipeline.manifest import load
from pipeline.reference.schema import LINE
from tests.support.cli import ROOT, retort


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Folders of an unconditional and of a class-conditional pipeline, as diffusers saves them."""
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    folders = {}
    for name, classes in (("unconditional", None), ("by class", 3)):
        folders[name] = tmp_path_factory.mktemp("pixels") / name
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=classes,
        )  # fmt: skip
        DDPMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folders[name])
    return folders


def planned(folder, *arguments):
    """Write a manifest with `retort init` and plan it. Return its values, and the state and reason of each stage."""
    done = retort("init", "m.yaml", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "next: retort plan m.yaml" in done.stdout
    plan = retort("plan", "m.yaml", "--json", cwd=folder)
    assert plan.returncode == 0, plan.stderr
    text = (folder / "m.yaml").read_text()
    assert "$" not in text.removeprefix(LINE) and all(len(line) <= 120 for line in text.splitlines() if "/" not in line)
    stages = {name: (stage["state"], stage["why"]) for name, stage in json.loads(plan.stdout).items()}
    return yaml.safe_load(text), stages


def test_the_shipped_manifest_equals_the_output_of_init():
    path = "manifests/digits.yaml"
    shown = retort("init", "-").stdout
    assert (ROOT / path).read_text() == shown.replace("retort.yaml", path), (
        "edit pipeline/reference/templates/digits.yaml, then: rm manifests/digits.yaml; "
        "retort init manifests/digits.yaml"
    )


@pytest.mark.parametrize("teacher", ["digits", "digit_scenes"])
def test_init_with_a_shipped_teacher(teacher, tmp_path):
    values, stages = planned(tmp_path, "--teacher", teacher)
    assert values["name"] == teacher and list(values["stages"]) == ["teacher", "pairs", "student", "probe", "quality"]
    assert {state for state, _ in stages.values()} == {"run"}
    settings = load(tmp_path / "m.yaml").manifest.stages["student"].method
    assert type(settings).model_validate(values["stages"]["student"]["method"]) == settings
    done = retort("init", "n.yaml", "--teacher", teacher, "--prompts", "x.txt", cwd=tmp_path)
    assert done.returncode == 2 and "knows only the captions of its own image set" in done.stderr


@pytest.mark.parametrize(("teacher", "method", "words"), [
    ("digits", "knowledge_distillation", ["a one-step student", "# one network call from noise"]),
    ("digits", "progressive", ["a few-step student", "# a few network calls from noise"]),
    ("owner/name", "guided", ["owner/name into few steps", "# a few network calls from noise"]),
    ("digits", "dmd", ["a one-step student", "# one network call from noise"]),
])  # fmt: skip
def test_the_comment_on_steps_fits_the_method(teacher, method, words):
    text = retort("init", "-", "--teacher", teacher, "--method", method).stdout
    assert all(word in text for word in words)


def test_init_with_a_stable_diffusion_folder(tiny, tmp_path):
    folder = tiny[1]["teacher"].artifact.folder
    prompts = tmp_path / "my prompts.txt"
    prompts.write_text("a red handwritten seven\n")
    values, stages = planned(tmp_path, "--teacher", folder, "--prompts", "my prompts.txt")
    assert values["stages"]["teacher"] == {"kind": "teacher", "from": str(folder)}
    assert values["stages"]["pairs"]["prompts"] == str(prompts)
    assert {state for state, _ in stages.values()} == {"run"}


def test_init_with_a_table_of_prompts_names_the_column(tiny, tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na cat\n")
    values, stages = planned(tmp_path, "--teacher", tiny[1]["teacher"].artifact.folder, "--prompts", "p.csv")
    assert values["stages"]["pairs"]["prompts"] == {"path": str(tmp_path / "p.csv"), "column": "prompt"}
    assert {state for state, _ in stages.values()} == {"run"}


def test_init_without_prompts_gives_a_plan_that_says_what_is_missing(tiny, tmp_path):
    done = retort("init", "m.yaml", "--teacher", tiny[1]["teacher"].artifact.folder, cwd=tmp_path)
    assert "replace prompts.txt in it with your own file of prompts" in done.stdout
    (tmp_path / "m.yaml").unlink()
    _, stages = planned(tmp_path, "--teacher", tiny[1]["teacher"].artifact.folder)
    assert stages["teacher"][0] == "run"
    assert stages["pairs"] == ("blocked", f"{tmp_path / 'prompts.txt'} does not exist")


def test_init_with_a_hub_id(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    values, stages = planned(tmp_path, "--teacher", "someone/some.model", "--prompts", "prompts.txt")
    assert (values["name"], values["stages"]["teacher"]["from"]) == ("some_model", "someone/some.model")
    assert stages["teacher"][0] == "blocked" and "give `revision:` a full commit" in stages["teacher"][1]
    text = (tmp_path / "m.yaml").read_text().replace("# revision: a full commit hash;", f"revision: {'a' * 40} #")
    (tmp_path / "m.yaml").write_text(text)
    plan = json.loads(retort("plan", "m.yaml", "--json", cwd=tmp_path).stdout)
    assert {stage["state"] for stage in plan.values()} == {"run"}


def test_init_with_pixel_space_teachers(pixels, tmp_path):
    values, stages = planned(tmp_path, "--teacher", pixels["unconditional"])
    assert "prompts" not in values["stages"]["pairs"]
    assert values["stages"]["pairs"]["sampler"]["guidance_scale"] == 1.0
    assert {state for state, _ in stages.values()} == {"run"}
    done = retort("init", "n.yaml", "--teacher", pixels["unconditional"], "--prompts", "x.txt", cwd=tmp_path)
    assert done.returncode == 2 and "is unconditional and takes no prompts" in done.stderr
    (tmp_path / "m.yaml").unlink()
    values, stages = planned(tmp_path, "--teacher", pixels["by class"])
    assert values["stages"]["pairs"]["prompts"] == "prompts.txt" and values["name"] == "by_class"
    assert stages["teacher"][0] == "run" and stages["pairs"][0] == "blocked"


def test_wrong_arguments_of_init_are_refused(tiny, tmp_path):
    folder = tiny[1]["teacher"].artifact.folder
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("there.yaml",), "there.yaml already exists; give another file"),
        (("none/m.yaml",), "none/m.yaml cannot be written: No such file or directory"),
        (("--teacher", "digit"), "--teacher digit: give digits, digit_scenes, a diffusers folder, or a hub id"),
        (("--teacher", "empty"), "empty has no model_index.json: it is not a diffusers pipeline"),
        (("--method", "knowledge"), "--method knowledge: there is no such method (allowed: knowledge_distillation, "),
        (("--teacher", folder, "--prompts", "none.txt"), "--prompts: none.txt does not exist"),
        (("--teacher", folder, "--prompts", "a.pdf"), "--prompts a.pdf: prompts are digits, digit_scenes, or .txt"),
    ):
        done = retort("init", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert (tmp_path / "there.yaml").read_text() == "mine" and not (tmp_path / "retort.yaml").exists()
