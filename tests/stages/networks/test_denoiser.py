"""A teacher's estimates of x0 at the points of a student's grid."""

import numpy as np
import torch

from stages.diffusion.grid import Grid
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.stable_diffusion import StableDiffusion
from tests.support.networks import stable_diffusion_layout


def test_a_teacher_is_called_at_the_timestep_of_equal_snr(teacher):
    asked = TeacherDenoiser(teacher, Grid.cosine(64))
    log_snr = 2 * (asked.alpha / asked.sigma).log()
    grid, known = Grid.cosine(64), teacher.schedule.log_snr
    wanted = (2 * np.log(grid.alpha[1:-1] / grid.sigma[1:-1])).clip(known[-1])
    torch.testing.assert_close(log_snr[1:-1], torch.from_numpy(wanted), atol=1e-9, rtol=0)
    own = TeacherDenoiser(teacher, Grid.trailing(teacher.schedule, 50))
    assert own.timesteps[1:].tolist() == Grid.trailing(teacher.schedule, 50).timesteps[1:].tolist()


def test_an_epsilon_teacher_gives_x0_to_students_of_any_type(teacher, tmp_path):
    """The output of an epsilon teacher is converted to x0."""
    of_noise = StableDiffusion(stable_diffusion_layout(tmp_path / "sd"))
    z, i = torch.randn(3, *of_noise.latent_shape), torch.tensor([2, 3, 4])
    condition, grid = of_noise.encode_prompts(["a", "b", ""]), Grid.trailing(of_noise.schedule, 4)
    x0, text = TeacherDenoiser(of_noise, grid).x0(z, i, condition), condition.tensors["text"]
    for k in range(3):
        alpha, sigma = grid.level(int(i[k]))
        output = of_noise.network(z[k : k + 1], int(grid.timesteps[i[k]]), text[k : k + 1]).sample
        torch.testing.assert_close(x0[k : k + 1], (z[k : k + 1] - sigma * output) / alpha, atol=1e-4, rtol=1e-4)


def test_below_the_teachers_lowest_noise_its_output_is_converted_at_the_grids_level(teacher, monkeypatch):
    """The cleanest of 8,192 steps are nearer to data than the teacher's timestep 0. There, an estimate of x0 is nearly
    z."""
    grid = Grid.cosine(8192)
    z, condition = torch.randn(1, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"])
    alpha, sigma = grid.level(1)
    assert sigma < 0.1 * teacher.schedule.at(0).sigma
    with torch.no_grad():
        output = teacher.network(z, torch.zeros(1), condition.tensors["text"]).sample
    for prediction, wanted in (("epsilon", (z - sigma * output) / alpha), ("v_prediction", alpha * z - sigma * output)):
        monkeypatch.setattr(teacher, "prediction", prediction)
        torch.testing.assert_close(TeacherDenoiser(teacher, grid).x0(z, torch.tensor([1]), condition), wanted)


def test_a_teacher_keeps_its_own_precision_in_bf16_training(teacher):
    z, condition = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"] * 2)
    many, i = TeacherDenoiser(teacher, Grid.trailing(teacher.schedule, 4), 5.0), torch.tensor([4, 2])
    wanted = many.x0(z, i, condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(many.x0(z, i, condition), wanted)


def test_without_guidance_the_target_equals_the_conditional_output(teacher):
    grid, z = Grid.trailing(teacher.schedule, 4), torch.randn(3, *teacher.latent_shape)
    condition, i = teacher.encode_prompts(["a red handwritten seven"] * 3), torch.tensor([4, 2, 1])
    many = TeacherDenoiser(teacher, grid)
    batch = torch.cat([one.tensors["text"] for one in (teacher.encode_prompts([""] * 3), condition)])
    t = many.timesteps[i].float()
    with torch.no_grad():
        output = teacher.network(torch.cat([z, z]), torch.cat([t, t]), batch).sample.chunk(2)[1]
    alpha, sigma = (torch.from_numpy(x)[i].float().view(-1, 1, 1, 1) for x in (grid.alpha, grid.sigma))
    assert torch.equal(many.x0(z, i, condition, torch.zeros(3)), alpha * z - sigma * output)
    guided = many.x0(z, i, condition, torch.full((3,), 2.0))
    torch.testing.assert_close(guided, TeacherDenoiser(teacher, grid, 3.0).x0(z, i, condition))
    assert not torch.equal(guided, many.x0(z, i, condition))
