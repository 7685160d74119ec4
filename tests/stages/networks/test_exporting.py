"""Exported students in plain diffusers: the same samples as Retort's, or the reason why not."""

import json

import pytest
import torch

from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student, export
from tests.support.networks import SCHEDULER, drawn, shaken, stable_diffusion_layout


@pytest.mark.parametrize(("steps", "schedule", "prediction"), [
    (1, "teacher", "v_prediction"), (4, "teacher", "v_prediction"), (16, "teacher", "v_prediction"),
    (3, "teacher", "sample"), (4, "cosine", "v_prediction"), (16, "cosine", "v_prediction"), (1, "cosine", "sample"),
])  # fmt: skip
def test_plain_diffusers_takes_the_same_steps_as_retort(teacher, tmp_path, steps, schedule, prediction):
    """This also holds if the steps do not divide the teacher's 1,000 timesteps, and if the schedule ends in pure
    noise."""
    student = shaken(Student.from_teacher(teacher, Form(steps=steps, schedule=schedule, prediction=prediction)))
    export(student, tmp_path, "a card")
    prompts = ["a red handwritten seven", "a blue handwritten two"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Student.load(tmp_path, teacher)(noise, teacher.encode_prompts(prompts))
    latents = drawn(tmp_path, noise, prompts, num_inference_steps=steps, guidance_scale=7.5)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "prediction", "w"), [
    (4, "v_prediction", 2.0), (1, "v_prediction", None), (8, "epsilon", None), (2, "sample", 0.0)
])  # fmt: skip
def test_plain_diffusers_gives_the_same_samples_as_retort(teacher, tmp_path, steps, prediction, w):
    """The same call, with the same generator: LCMScheduler on 999, 749, 499, 249."""
    from diffusers import LCMScheduler

    form = Form(steps=steps, sampler="consistency", prediction=prediction, w_range=None if w is None else (0.0, 4.0))
    student = shaken(Student.from_teacher(teacher, form))
    export(student, tmp_path, "a card")
    scheduler = LCMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == student.grid.timesteps[:0:-1].tolist()
    prompts = ["a red handwritten seven", "a blue handwritten two"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    strength = None if w is None else torch.full((2,), w)
    with torch.no_grad():
        loaded, condition = Student.load(tmp_path, teacher), teacher.encode_prompts(prompts)
        ours = loaded(noise, condition, strength, torch.Generator().manual_seed(3))
    latents = drawn(
        tmp_path, noise, prompts, num_inference_steps=steps, guidance_scale=7.5 if w is None else 1 + w,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    torch.testing.assert_close(latents, ours, atol=1e-3 if prediction == "epsilon" else 1e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_plain_diffusers_passes_guidance_scale_minus_one(teacher, tmp_path, w):
    form = Form(steps=4, schedule="cosine", w_range=(0.0, 4.0))
    student = shaken(Student.from_teacher(teacher, form))
    export(student, tmp_path, "a card")
    assert json.loads((tmp_path / "student.json").read_text())["w_range"] == [0.0, 4.0]
    prompts = ["a red handwritten seven", "a blue handwritten two"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Student.load(tmp_path, teacher)(noise, teacher.encode_prompts(prompts), torch.full((2,), w))
    latents = drawn(tmp_path, noise, prompts, num_inference_steps=4, guidance_scale=1 + w)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [SCHEDULER, {"_class_name": "DDPMScheduler", "thresholding": True}])
@pytest.mark.parametrize("form", [
    Form(), Form(steps=4), Form(steps=3), Form(steps=4, schedule="cosine"), Form(steps=4, w_range=(0.0, 14.0)),
    Form(steps=4, sampler="consistency"),
], ids=str)  # fmt: skip
def test_an_exported_scheduler_sets_every_value_that_the_published_config_lacks(tmp_path, scheduler, form):
    folder = stable_diffusion_layout(tmp_path / "sd")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    teacher = StableDiffusion(folder)
    assert teacher.prediction == "epsilon"
    student = shaken(Student.from_teacher(teacher, form))
    export(student, tmp_path / "student", "a card")
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    w = torch.full((2,), 7.0)
    with torch.no_grad():
        ours = student(noise, teacher.encode_prompts(["a", "b"]), w, torch.Generator().manual_seed(1))
    more = {"num_inference_steps": form.steps, "generator": torch.Generator().manual_seed(1)}
    latents = drawn(tmp_path / "student", noise, ["a", "b"], guidance_scale=8.0, **more)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)
    assert reason(teacher, form) is None


def test_a_student_that_predicts_both_is_loaded_as_such(teacher, tmp_path):
    """Its card says that plain diffusers cannot load it."""
    student = shaken(Student.from_teacher(teacher, Form(steps=2, prediction="both")))
    export(student, tmp_path, "a card")
    loaded = Student.load(tmp_path, teacher)
    noise, condition = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["", "a red handwritten seven"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(noise, condition), student(noise, condition))
        output = loaded.network(noise, 999.0, condition.tensors["text"]).sample
        alpha, sigma = loaded.grid.level(2)
        x0 = sigma**2 * output[:, :4] + alpha * (noise - sigma * output[:, 4:])
        torch.testing.assert_close(loaded.x0(noise, 2, condition), x0)
    assert "which diffusers does not support" in reason(teacher, student.form)


def reason(teacher, form):
    grid = Grid.of(form, teacher.schedule)
    return teacher.plain_error(form, grid, teacher.student_scheduler(form, grid))


@pytest.mark.parametrize(("form", "words"), [
    (Form(steps=4096, schedule="cosine"), "not all whole numbers"),
    (Form(steps=512, schedule="cosine"), None),
    (Form(steps=48), "rounds the timesteps of 48 steps differently"),
    (Form(steps=61), "rounds the timesteps of 61 steps differently"),
    (Form(steps=3), None),
    (Form(steps=16), None),
    (Form(steps=2, sampler="stochastic"), "no N-step stochastic sampler"),
    (Form(steps=1, sampler="stochastic"), None),  # a last step adds no noise
    (Form(steps=4, sampler="consistency"), None),
])  # fmt: skip
def test_reasons_why_plain_diffusers_cannot_sample_a_student(teacher, form, words):
    found = reason(teacher, form)
    assert found is None if words is None else words in found


def test_steps_off_the_teachers_timesteps_are_refused_for_plain_diffusers(teacher):
    form = Form(steps=3, sampler="consistency")
    student, grid = Student.from_teacher(teacher, form, 30), Grid.trailing(teacher.schedule, 3)
    assert student.grid.subsample(10).timesteps.tolist() == grid.timesteps.tolist()
    why = teacher.plain_error(form, grid, teacher.student_scheduler(form, grid))
    assert "rounds the timesteps of 3 steps differently" in why
