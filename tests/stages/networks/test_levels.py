"""Students at explicit timesteps, such as 999, 749, 499, 249 or 399 alone, in Retort and in plain diffusers."""

import json

import pytest
import torch

from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.networks.scaling import to_network, to_vae
from stages.networks.student import Student, export
from tests.support.networks import drawn, shaken

PROMPTS = ["a red handwritten seven", "a blue handwritten two"]


@pytest.mark.parametrize("sampler", ["ddim", "consistency"])
@pytest.mark.parametrize("levels", [(999, 749, 499, 249), (399,), (980, 333)])
def test_plain_diffusers_calls_a_student_at_its_levels(teacher, tmp_path, levels, sampler):
    form = Form(steps=len(levels), levels=levels, sampler=sampler, guidance_scale=1.0)
    student = shaken(Student.from_teacher(teacher, form))
    export(student, tmp_path, "a card")
    assert json.loads((tmp_path / "student.json").read_text())["levels"] == list(levels)
    grid = Grid.of(form, teacher.schedule)
    assert teacher.plain_error(form, grid, teacher.student_scheduler(form, grid)) is None
    assert f"timesteps={list(levels)}" in teacher.usage(form, "any")
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    loaded = Student.load(tmp_path, teacher)
    with torch.no_grad():
        ours = loaded(noise, loaded.encode(PROMPTS), None, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    latents = drawn(tmp_path, noise, PROMPTS, timesteps=list(levels), guidance_scale=7.5, generator=generator)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)


def test_a_boundary_without_its_sampler_is_refused_for_plain_diffusers(teacher):
    form = Form(steps=4, boundary="lcm")
    grid = Grid.of(form, teacher.schedule)
    assert "LCM boundary condition" in teacher.plain_error(form, grid, teacher.student_scheduler(form, grid))


@pytest.mark.parametrize(("levels", "fits"), [((999, 499), True), ((399, 0), False)])
def test_the_lcm_scheduler_cannot_leave_out_the_boundary_near_clean_data(teacher, levels, fits):
    form = Form(steps=2, levels=levels, sampler="consistency", boundary="none")
    grid = Grid.of(form, teacher.schedule)
    assert (teacher.plain_error(form, grid, teacher.student_scheduler(form, grid)) is None) == fits


def test_the_boundary_is_independent_of_the_sampler(teacher):
    z, i = torch.randn(3, *teacher.latent_shape), torch.tensor([1, 2, 4])
    for sampler in ("ddim", "consistency"):
        student = shaken(Student.from_teacher(teacher, Form(steps=4, sampler=sampler, boundary="none")))
        bounded = Student(teacher, student.network, student.grid, Form(steps=4, sampler=sampler, boundary="lcm"))
        condition = student.encode(["a", "b", "c"])
        with torch.no_grad():
            plain, mixed = student.x0(z, i, condition), bounded.x0(z, i, condition)
        t = 10.0 * student.timesteps[i].view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, 0.25 / (t**2 + 0.25) * z + t / (t**2 + 0.25).sqrt() * plain)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},  # Stable Diffusion 3
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.0, 2.0, 0.5]},
    ],
)
def test_scaling_of_latents_can_be_inverted(config):
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scaled = to_network(latents, config)
    torch.testing.assert_close(to_vae(scaled, config), latents)
    mean, std = torch.tensor(config.get("latents_mean", [0.0] * 3)), torch.tensor(config.get("latents_std", [1.0] * 3))
    shift = config.get("shift_factor", 0.0)
    for channel in range(3):
        wanted = (
            (latents[:, channel] - mean[channel].double() - shift) / std[channel].double() * config["scaling_factor"]
        )
        torch.testing.assert_close(scaled[:, channel], wanted, atol=1e-6, rtol=1e-6)
