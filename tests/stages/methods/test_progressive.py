"""Progressive distillation: its chain of stages, a killed chain, and refused settings."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch

from pipeline.errors import ManifestError
from stages.base import StageError
from stages.data.files import sha256_of
from stages.data.latents import read_latents
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.methods.base import Materials, StudentTraining
from stages.methods.progressive.config import ProgressiveConfig
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.cli import ROOT, command
from tests.support.pipelines import PROGRESSIVE, TINY, execute, plan_of
from tests.support.samplers import sample


@pytest.fixture(scope="module")
def chain(tiny):
    return execute(TINY + PROGRESSIVE, tiny[0], name="chain")


def test_links_are_sealed_evaluated_and_start_from_each_other(chain, teacher):
    assert chain["quality/2"].artifact.inputs["student"] == chain["fewer/2"].artifact
    for steps in (4, 2, 1):
        artifact = chain[f"fewer/{steps}"].artifact
        about = json.loads((artifact.folder / "student.json").read_text())
        assert about["steps"] == steps == len(about["timesteps"]) and about["guidance_scale"] == 2.0
        metrics = chain[f"quality/{steps}"].artifact.record["metrics"]
        assert metrics["sides"]["student"]["network_calls"] == steps
        assert f"student, {steps} step" in (chain[f"quality/{steps}"].artifact.folder / "index.html").read_text()
        assert f"num_inference_steps={steps}" in (artifact.folder / "README.md").read_text()
    assert chain["fewer/1"].artifact.inputs["start_from"] == chain["fewer/2"].artifact
    one, two = (Student.load(chain[f"fewer/{n}"].artifact.folder, teacher).state_dict() for n in (1, 2))
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


def test_a_link_learns_the_result_of_twice_the_steps(tiny, teacher):
    text = (
        (TINY + PROGRESSIVE.split("  quality")[0])
        .replace("end_steps: 1", "end_steps: 4")
        .replace("steps: {1: 6}", "steps: {4: 40}")
    )
    plan = execute(text.replace("learning_rate: 1e-4", "learning_rate: 1e-3"), tiny[0], name="learns")
    student = Student.load(plan["fewer/4"].artifact.folder, teacher)
    untrained = Student.from_teacher(teacher, student.form)
    prompts = read_latents(plan["latents"].artifact.folder, held_out=True).captions[:32]
    noise = torch.randn(32, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = teacher.encode_prompts(prompts)
    eight = Grid.trailing(teacher.schedule, 8)
    many = TeacherDenoiser(teacher, eight, 2.0)
    with torch.no_grad():
        wanted = sample("ddim", lambda z, j: many.x0(z, torch.full((len(z),), j), condition), noise, eight)
        errors = [float((s(noise, condition) - wanted).square().mean()) for s in (untrained, student)]
    assert errors[1] < 0.75 * errors[0]


def test_a_killed_chain_is_resumed_to_the_same_bytes(chain, tiny, tmp_path):
    """The driver gets SIGKILL during the first round, then between the first and the second."""
    store, manifest = tmp_path / "store", tmp_path / "m.yaml"
    text = "  fewer" + PROGRESSIVE.partition("  fewer")[2].partition("  quality")[0]
    text = "name: killed\nstages:\n" + text.replace("start_steps: 8", "start_steps: 4")
    text = text.replace("latents: latents", f"latents: {chain['latents'].artifact.folder}")
    text = text.replace("{threads: 1}", "{threads: 1, checkpoint_every: 1}")
    manifest.write_text(text)
    execute(text, tiny[0], name="unkilled")
    submit = command("submit", manifest, "--store", store, "--engine", "inline")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def killed_when(seen):
        process = subprocess.Popen(submit, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not seen():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    killed_when(lambda: list(store.glob("work/*/checkpoints/step-*2")))
    assert not list(store.glob("distill/*/artifact.json"))
    killed_when(lambda: list(store.glob("distill/*/artifact.json")))
    (first,) = (path.parent for path in store.glob("distill/*/artifact.json"))
    assert json.loads((first / "student.json").read_text())["steps"] == 2
    execute(text, store)
    for student in (store / "distill").iterdir():
        for file in ("unet/diffusion_pytorch_model.safetensors", "history.jsonl"):
            assert sha256_of(student / file) == sha256_of(tiny[0] / "distill" / student.name / file)
    assert len(list((store / "distill").iterdir())) == 2


@pytest.mark.parametrize(("old", "new", "words"), [
    ("start_steps: 8", "start_steps: 12", "end_steps: should be start_steps: 12 halved one or more times, not 1"),
    ("start_steps: 8, end_steps: 1", "start_steps: 8, end_steps: 8", "nothing is halved: give fewer end_steps"),
    ("start_steps: 8", "start_steps: 1024", "method.start_steps: 1024 are more than the teacher's 1000 timesteps"),
    ("{1: 6}", "{1: null}", "training_steps.1: should be a valid integer, not None"),
    ("start_steps: 8", "start_steps: 2097152", "start_steps: should be less than or equal to 524288"),
    ("{1: 6}", "{3: 6}", "training_steps.3: should be the number of steps of a round, not '3'"),
    ("training_steps: {1: 6}", "schedule: cosine, weighting: snr", "snr is 0 in pure noise"),
    ("    latents: latents\n", "    latents: latents\n    pairs: pairs\n",
     "progressive is trained on latents or pairs, not on pairs and latents"),
    ("{name: progressive, ", "{name: knowledge_distillation, ", "unknown key"),
    (" guidance_scale: 2.0,", "", "latents have no guidance_scale: set it in the method"),
    ("student: fewer\n    pairs: pairs", "student: fewer", "it was not trained on pairs; give `pairs`"),
    ("guidance_scale: 2.0", "guidance_scale: 3.0", "the pairs have guidance_scale: 2; the student has learned 3"),
    ("student: fewer", "student: fewer/16", "there is no stage 'fewer/16'; did you mean 'fewer/1'"),
])  # fmt: skip
def test_contradictory_settings_are_errors_of_the_plan(tmp_path, old, new, words):
    assert old in PROGRESSIVE
    with pytest.raises(ManifestError, match=words):
        plan_of(TINY + PROGRESSIVE.replace(old, new), tmp_path)


@pytest.mark.parametrize(("scale", "guided"), [(None, False), (1.0, False), (1.5, True)])
def test_the_teacher_is_called_without_a_prompt_only_for_scales_above_one(scale, guided):
    config = ProgressiveConfig(start_steps=4, end_steps=2, guidance_scale=scale)
    assert config.uses_guidance == guided
    assert config.step_count_error(2) is None and "steps are 2, not 4" in config.step_count_error(4)


def test_snr_weighting_is_refused_if_the_teachers_schedule_ends_in_pure_noise(tiny):
    teacher = StableDiffusion(tiny[1]["teacher"].artifact.folder)
    config, training = ProgressiveConfig(start_steps=4, end_steps=2, weighting="snr"), StudentTraining(steps=1)
    assert config.create(Materials(teacher, training)).student.alpha[-1] > 0
    teacher.schedule.alpha[-1], teacher.schedule.sigma[-1] = 0.0, 1.0
    with pytest.raises(StageError, match="snr is 0 in pure noise, where the teacher's schedule ends"):
        config.create(Materials(teacher, training))


def test_guidance_needs_a_teacher_trained_with_dropped_prompts(tmp_path):
    text = (TINY + PROGRESSIVE).replace("      dataset: digits\n", "      dataset: digits\n      drop_text: 0.0\n")
    with pytest.raises(ManifestError, match="needs guidance, but the teacher was trained with drop_text: 0"):
        plan_of(text, tmp_path)


def test_the_default_guidance_is_that_of_the_pairs(tiny, teacher):
    """Also checks that the method's name alone gives a chain with the default start_steps, 32."""
    text = TINY.replace("{name: knowledge_distillation}", "progressive")
    assert list(plan_of(text, tiny[0]))[2:] == [f"student/{steps}" for steps in (16, 8, 4, 2, 1)]
    text = TINY.replace("{name: knowledge_distillation}", "{name: progressive, start_steps: 4, end_steps: 2}")
    student = execute(text.replace("steps: 24", "steps: 1"), tiny[0], name="of_pairs")["student/2"].artifact
    assert "held_out_mse" in student.record["metrics"]
    assert json.loads((student.folder / "student.json").read_text())["guidance_scale"] == 2.0
    assert "Guidance 2 is built in." in (student.folder / "README.md").read_text()
    materials = Materials(teacher, StudentTraining(steps=1), guidance_scale=2.0)
    assert materials.teacher_denoiser(Form(steps=2)).default_w == 1.0
    assert materials.teacher_denoiser(Form(steps=2, guidance_scale=4.0)).default_w == 3.0


def test_the_default_guidance_is_checked_too(tmp_path):
    first, rest = TINY.partition("  pairs:")[::2]
    pairs, student = rest.partition("  student:")[::2]
    student = student.replace("{name: knowledge_distillation}", "{name: progressive, start_steps: 4, end_steps: 2}")
    other = pairs.replace("guidance_scale: 2.0", "guidance_scale: 5.0") + "    seed: 7\n"
    text = f"{first}  pairs:{pairs}  other:{other}  student:{student}"
    assert plan_of(text, tmp_path)["student/2"]

    def refused(text, words):
        with pytest.raises(ManifestError, match=words):
            plan_of(text, tmp_path)

    second = "  second:" + student.replace("pairs: pairs", "pairs: other\n    start_from: student/2")
    second = second.replace("start_steps: 4, end_steps: 2", "start_steps: 2, end_steps: 1")
    refused(text + second, "the student in start_from has guidance_scale: 2, this one has 5")
    assert plan_of(text + second.replace("pairs: other", "pairs: pairs"), tmp_path)["second/1"]
    refused(
        text + "  quality: {kind: evaluate, student: student, pairs: other, samples: 20, teacher_steps: []}",
        "the pairs have guidance_scale: 5; the student has learned 2",
    )
    mixed = text.replace("pairs: pairs\n", "pairs: [pairs, other]\n")
    refused(mixed, "the pairs have guidance_scale: 2 and 5; set one in the method")
    assert plan_of(mixed.replace("end_steps: 2", "end_steps: 2, guidance_scale: 2.0"), tmp_path)["student/2"]
    one_step = re.sub("{name: progressive.*}", "knowledge_distillation", mixed)
    refused(one_step, "the pairs have guidance_scale: 2 and 5; use pairs with the same")
