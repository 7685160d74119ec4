"""The losses of the methods that halve steps, term by term, with the loop's own random numbers."""

import numpy as np
import pytest
import torch

from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.methods.base import Materials, StudentTraining
from stages.methods.guided.config import GuidedConfig
from stages.methods.progressive.config import ProgressiveConfig
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.networks import shaken, stable_diffusion_layout

COUNT = 5
WEIGHTS = {
    "snr": lambda a, s: a**2 / s**2,
    "truncated_snr": lambda a, s: max(a**2 / s**2, 1.0),
    "snr_plus_one": lambda a, s: 1 / s**2,
}
CASES = [
    ("v_prediction", "v_prediction", "truncated_snr"),
    ("v_prediction", "sample", "snr"),
    ("v_prediction", "both", "snr_plus_one"),
    ("epsilon", "v_prediction", "snr_plus_one"),
    ("epsilon", "sample", "truncated_snr"),
    ("epsilon", "both", "snr"),
]


@pytest.fixture(scope="module")
def teachers(tiny, tmp_path_factory):
    of_noise = stable_diffusion_layout(tmp_path_factory.mktemp("sd") / "sd")
    return {"v_prediction": StableDiffusion(tiny[1]["teacher"].artifact.folder), "epsilon": StableDiffusion(of_noise)}


def batch_of(teacher):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(COUNT, *teacher.latent_shape, generator=generator)
    return {
        "latents": {"latent": latent, "prompts": ["a red handwritten seven", "a blue handwritten two", "", "a", "b"]}
    }


def x0_of(prediction, output, z, alpha, sigma):
    if prediction == "both":
        first, second = np.split(output, 2, 1)
        return sigma**2 * first + alpha * (z - sigma * second)
    if prediction == "epsilon":
        return (z - sigma * output) / alpha
    return alpha * z - sigma * output if prediction == "v_prediction" else output


def asked(unet, z, t, condition, **inputs):
    with torch.no_grad():
        return unet(torch.from_numpy(z).float(), t, condition.tensors["text"], **inputs).sample.double().numpy()


def of_teacher(teacher, grid, z, j, condition, w):
    """Return the teacher's x0 (1, C, H, W) for z at point j of the grid, guided by w."""
    output = asked(teacher.network, z, grid.timesteps[j], condition)
    if w:
        output = (1 + w) * output - w * asked(teacher.network, z, grid.timesteps[j], teacher.encode_prompts([""]))
    return x0_of(teacher.prediction, output, z, *grid.level(j))


def two_steps(denoise, grid, z, i):
    """Return the x0 for which one step from point 2 i ends where two steps end. A step is z_s = alpha_s x + sigma_s (z
    - alpha x) / sigma."""
    state = z
    for j in (2 * i, 2 * i - 1):
        (alpha, sigma), (alpha_s, sigma_s) = grid.level(j), grid.level(j - 1)
        x0 = denoise(state, j)
        state = alpha_s * x0 + sigma_s / sigma * (state - alpha * x0)
    (alpha, sigma), (alpha_s, sigma_s) = grid.level(2 * i), grid.level(2 * i - 2)
    return (state - sigma_s / sigma * z) / (alpha_s - sigma_s / sigma * alpha)


def noised(x, noise, grid, i):
    alpha, sigma = grid.level(i)
    return noise if i == grid.steps else alpha * x + sigma * noise


def wrong_by(student, z, i, target, condition, **inputs):
    """Return the mean squared error of the student's x0 to the target."""
    output = asked(student.network, z, student.grid.timesteps[i], condition, **inputs)
    x0 = x0_of(student.form.prediction, output, z, *student.grid.level(i))
    return float(np.mean((x0 - target) ** 2))


@pytest.mark.parametrize(("of", "to", "weighting"), CASES)
def test_progressive(teachers, of, to, weighting):
    """At guidance 2. The drawn points include the last one."""
    teacher = teachers[of]
    config = ProgressiveConfig(start_steps=8, end_steps=4, prediction=to, weighting=weighting, guidance_scale=2.0)
    method, batch = config.create(Materials(teacher, StudentTraining(steps=1))), batch_of(teacher)
    shaken(method.student)
    torch.manual_seed(2)
    loss, figures = method.loss(batch)
    torch.manual_seed(2)
    batch = batch["latents"]
    points, noise = torch.randint(1, 5, (COUNT,)).tolist(), torch.randn_like(batch["latent"]).double().numpy()
    assert set(points) == {1, 2, 3, 4}
    coarse, fine = Grid.trailing(teacher.schedule, 4), Grid.trailing(teacher.schedule, 8)
    errors, losses = [], []
    for k, i in enumerate(points):
        condition = teacher.encode_prompts(batch["prompts"][k : k + 1])
        z = noised(batch["latent"][k : k + 1].double().numpy(), noise[k : k + 1], coarse, i)
        target = two_steps(lambda z, j, c=condition: of_teacher(teacher, fine, z, j, c, 1.0), fine, z, i)
        errors.append(wrong_by(method.student, z, i, target, condition))
        losses.append(WEIGHTS[weighting](*coarse.level(i)) * errors[-1])
    assert float(figures["x0_error"]) == pytest.approx(np.mean(errors), rel=1e-3)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize(("of", "to", "weighting"), CASES)
def test_guided(teachers, of, to, weighting):
    """Tests the first link, and the next link at the same points. Each sample has its own w."""
    from diffusers import StableDiffusionPipeline

    teacher = teachers[of]
    config = GuidedConfig(start_steps=4, end_steps=4, prediction=to, weighting=weighting, w_range=(0.5, 3.0))
    method, batch = config.create(Materials(teacher, StudentTraining(steps=1))), batch_of(teacher)
    before = shaken(Student.from_teacher(teacher, config.form.model_copy(update={"steps": 8})))
    shaken(method.student)
    grid = Grid.trailing(teacher.schedule, 4)

    def embedded(w):
        return {"timestep_cond": StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)}

    def of_student(z, j, condition, w):
        output = asked(before.network, z, before.grid.timesteps[j], condition, **embedded(w))
        return x0_of(to, output, z, *before.grid.level(j))

    for link in ("first", "next"):
        if link == "next":
            method.teacher = before
            method.config = config.model_copy(update={"start_steps": 8})
        torch.manual_seed(2)
        loss, figures = method.loss(batch)
        torch.manual_seed(2)
        points, strengths = torch.randint(1, 5, (COUNT,)).tolist(), 0.5 + 2.5 * torch.rand(COUNT)
        noise = torch.randn_like(batch["latents"]["latent"]).double().numpy()
        assert len(set(strengths.tolist())) == COUNT and set(points) == {1, 2, 3, 4}
        errors, losses = [], []
        for k, i in enumerate(points):
            condition, w = teacher.encode_prompts(batch["latents"]["prompts"][k : k + 1]), strengths[k : k + 1]
            z = noised(batch["latents"]["latent"][k : k + 1].double().numpy(), noise[k : k + 1], grid, i)
            if link == "first":
                target = of_teacher(teacher, grid, z, i, condition, float(w))
            else:
                target = two_steps(lambda z, j, c=condition, w=w: of_student(z, j, c, w), before.grid, z, i)
            errors.append(wrong_by(method.student, z, i, target, condition, **embedded(w)))
            losses.append(WEIGHTS[weighting](*grid.level(i)) * errors[-1])
        assert float(figures["x0_error"]) == pytest.approx(np.mean(errors), rel=1e-3)
        assert float(loss) == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "both"])
def test_the_error_is_that_of_x0_for_every_prediction_type(teachers, prediction):
    teacher = teachers["v_prediction"]
    student = shaken(Student.from_teacher(teacher, Form(steps=4, schedule="cosine", prediction=prediction)))
    z, x0 = torch.randn(2, 4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    condition, points = teacher.encode_prompts(["a", "b", "", "c"]), [4, 3, 2, 1]
    found = student.error(z, torch.tensor(points), x0.double(), condition)
    for k, i in enumerate(points):
        one = slice(k, k + 1)
        wanted = wrong_by(student, z[one].double().numpy(), i, x0[one].double().numpy(), condition.select(one))
        assert float(found[k]) == pytest.approx(wanted, rel=1e-4)


def test_targets_are_in_full_precision_even_in_bf16_training(teachers, monkeypatch):
    """This also holds for targets from an earlier student. Precision matters because numerator and denominator are
    differences of nearly equal numbers."""
    teacher = teachers["v_prediction"]
    config = ProgressiveConfig(start_steps=4, end_steps=2, guidance_scale=1.0)
    method = config.create(Materials(teacher, StudentTraining(steps=1)))
    method.teacher = shaken(Student.from_teacher(teacher, Form(steps=4)))
    targets = []
    monkeypatch.setattr(Student, "error", lambda self, z, i, x0, *_: targets.append(x0) or z.square().mean((1, 2, 3)))
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            method.loss(batch_of(teacher))
    assert torch.equal(*targets)
