"""New students: their initial output, and their training at the last point."""

import json
import shutil

import pytest
import torch

from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student, export


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_a_new_student_applies_its_formula_to_the_teachers_output(teacher, prediction, monkeypatch):
    monkeypatch.setattr(teacher, "prediction", prediction)
    student = Student.from_teacher(teacher, Form(prediction=prediction))
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = teacher.encode_prompts(["a red handwritten seven", ""])
    output = teacher.network(noise, 999, condition.tensors["text"]).sample
    alpha, sigma = teacher.schedule.at(999)
    expected = alpha * noise - sigma * output if prediction == "v_prediction" else (noise - sigma * output) / alpha
    torch.testing.assert_close(student(noise, condition), expected)


def test_a_guidance_embedding_can_be_added_if_the_config_lacks_its_key(teacher, tmp_path):
    """The published U-Nets of Stable Diffusion 1.5 do not name time_cond_proj_dim."""
    folder = shutil.copytree(teacher.folder, tmp_path / "teacher")
    config = json.loads((folder / "unet/config.json").read_text())
    del config["time_cond_proj_dim"]
    (folder / "unet/config.json").write_text(json.dumps(config))
    export(Student.from_teacher(StableDiffusion(folder), Form(guidance_scale=1.0)), tmp_path / "student", "a card")
    assert json.loads((tmp_path / "student/unet/config.json").read_text())["time_cond_proj_dim"] == 256


def test_the_last_point_is_trained_on_pure_noise_with_any_schedule(teacher):
    """Stable Diffusion's own schedule ends at alpha = 0.068. There, a student is trained on pure noise, from which
    sampling starts, and learns what its teacher does with it."""
    x, noise = torch.randn(2, 3, *teacher.latent_shape)
    for schedule, alpha in (("teacher", 0.0683), ("cosine", 0.0)):
        student = Student.from_teacher(teacher, Form(steps=4, schedule=schedule))
        assert student.grid.level(4).alpha == pytest.approx(alpha, abs=1e-4)
        z = student.noised(x, noise, torch.tensor([4, 3, 4]))
        assert torch.equal(z[0], noise[0]) and torch.equal(z[2], noise[2]) and not torch.equal(z[1], noise[1])
    condition = teacher.encode_prompts(["a red handwritten seven"] * 3)
    first = teacher.denoiser(["a red handwritten seven"] * 3, 1.0)(noise, 999)
    alpha, sigma = teacher.schedule.at(999)
    for grid in (Grid.trailing(teacher.schedule, 4), Grid.cosine(4)):
        x0 = TeacherDenoiser(teacher, grid).x0(noise, torch.full((3,), 4), condition)
        torch.testing.assert_close(x0, alpha * noise - sigma * first, atol=1e-5, rtol=1e-5)
