"""The exact teacher: its closed forms, its prompts, its pairs, and students of it."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ManifestError, StageFailed
from stages.base import StageError
from stages.data.files import sha256_of
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.mixture import nearest, posterior
from stages.networks.exact import CAPTION
from stages.networks.gaussian import GaussianTeacher
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.teachers import load_network
from stages.teacher.config import SHIPPED
from stages.training import TrainingExecution
from tests.support.networks import pixel_unet
from tests.support.pipelines import execute, plan_of

TEXT = """
name: exact
stages:
  teacher:
    kind: teacher
    exact: {images: digit_scenes, count: 200, spread: 0.1, captions: none}
    execution: {threads: 1}
  pairs:
    kind: pairs
    teacher: teacher
    count: 64
    shard_size: 32
    storage_dtype: float32
    sampler: {steps: 20, guidance_scale: 1.0}
    execution: {micro_batch: 16, threads: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = tmp_path_factory.mktemp("exact")
    return store, execute(TEXT, store)


@pytest.fixture(scope="module")
def exact(made):
    return load_network(made[1]["teacher"].artifact.folder, TrainingExecution(device="cpu"))


def drawn(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(count, alpha=0.6):
    values = torch.full((count, 1), alpha, dtype=torch.float64)
    return values, (1 - values**2).sqrt()


def test_one_image_gives_a_gaussian(tmp_path):
    """With one image, the data are N(x, h^2), so the formulas of the Gaussian teacher hold."""
    teacher = GaussianTeacher(0.5, 0.7, (2, 4, 4))
    z = drawn(3, 32)
    data = torch.full((1, 32), 0.5, dtype=torch.float64)
    for t in (0, 300, 999):
        alpha, sigma = (torch.full((3, 1), v, dtype=torch.float64) for v in teacher.schedule.at(t))
        x0, log_density = posterior(z, data, alpha, sigma, 0.7)
        epsilon = teacher.denoiser([""] * 3, 1.0)(z.numpy(), t)
        np.testing.assert_allclose((z - alpha * x0) / sigma, epsilon, rtol=1e-9, atol=1e-9)
        wanted = torch.distributions.Normal(alpha * 0.5, (sigma**2 + (0.7 * alpha) ** 2).sqrt()).log_prob(z).sum(1)
        torch.testing.assert_close(log_density, wanted, rtol=1e-10, atol=1e-10)


def test_a_large_spread_gives_a_gaussian_around_the_mean():
    """To first order in 1 / h^2, the weights are equal."""
    data, z = drawn(50, 6), drawn(4, 6, seed=1)
    alpha, sigma = levels(4)
    x0, _ = posterior(z, data, alpha, sigma, 1e5)
    variance = sigma**2 + (alpha * 1e5) ** 2
    mean = data.mean(0)
    torch.testing.assert_close(x0, mean + alpha * 1e10 / variance * (z - alpha * mean), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.999, 0.6, 0.02])
def test_the_score_is_the_gradient_of_the_log_density(alpha):
    """By finite differences, and by autograd."""
    data, z = drawn(40, 5), drawn(3, 5, seed=1).requires_grad_()
    alpha, sigma = levels(3, alpha)
    allowed = torch.rand(3, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    x0, log_density = posterior(z, data, alpha, sigma, 0.2, allowed)
    score = (alpha * x0 - z) / sigma**2
    (gradient,) = torch.autograd.grad(log_density.sum(), z)
    torch.testing.assert_close(score, gradient, rtol=1e-7, atol=1e-7)
    for place in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[place] = 1e-6
        above, below = (posterior(z + s, data, alpha, sigma, 0.2, allowed)[1] for s in (step, -step))
        torch.testing.assert_close(score[:, place], (above - below) / 2e-6, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", [[True, True, True], [True, False, True]])
def test_the_density_integrates_to_one(which):
    data, grid = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), torch.linspace(-9, 9, 20001).double()
    alpha, sigma = levels(len(grid))
    allowed = torch.tensor([which]).expand(len(grid), 3)
    density = posterior(grid[:, None], data, alpha, sigma, 0.3, allowed)[1].exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(chunk=st.integers(1, 70), alpha=st.floats(0.001, 0.9999), spread=st.floats(0.01, 3), seed=st.integers(0, 99))
def test_chunks_change_rounding_only(chunk, alpha, spread, seed):
    data, z = drawn(61, 8, seed), 2 * drawn(5, 8, seed + 1000)
    numbers = torch.arange(61) % 4
    allowed = numbers == torch.tensor([[0], [1], [2], [3], [0]])
    for some in (None, allowed):
        whole = posterior(z, data, *levels(5, alpha), spread, some, chunk=61)
        parts = posterior(z, data, *levels(5, alpha), spread, some, chunk=chunk)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
        assert whole[0].isfinite().all() and whole[1].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_nearest_datum_is_the_nearest(chunk):
    data, z = drawn(40, 5), drawn(6, 5, seed=1)
    wanted = (z[:, None] - data).square().sum(2).amin(1)
    torch.testing.assert_close(nearest(z, data, chunk), wanted)


def test_samples_are_images_of_the_set(made, exact):
    """Samples are images plus noise of the spread. The last step goes to clean data, and its estimate keeps a part of
    this noise."""
    pairs = PairReader(read_list(made[1]["pairs"].artifact.folder)).batch(range(64))
    latents = torch.from_numpy(pairs.latent)
    assert float(exact.nearest(latents).mean()) < 0.1**2
    assert len({int(i) for i in torch.cdist(latents.double().flatten(1), exact.data).argmin(1)}) > 20


def test_a_schedule_that_ends_in_noise_samples_the_gaussian_exactly(made):
    """Around one image the data are N(x, h^2). From pure noise, the ODE ends at x + h noise."""
    pixels = "{name: digits, size: 32, digits_per_image: 1}"
    text = TEXT.replace("images: digit_scenes, count: 200, spread: 0.1", f"images: {pixels}, count: 1, spread: 0.5")
    errors = []
    for ends in ("false", "true"):
        own = text.replace("captions: none", f"captions: none, zero_terminal_snr: {ends}")
        plan = execute(own.replace("steps: 20", "steps: 500"), made[0], name=f"ends_{ends}")
        teacher = load_network(plan["teacher"].artifact.folder, TrainingExecution(device="cpu"))
        assert (teacher.schedule.alpha[-1] == 0) == (ends == "true")
        pairs = PairReader(read_list(plan["pairs"].artifact.folder)).batch(range(64))
        wanted = teacher.data.numpy() + 0.5 * pairs.noise.reshape(64, -1)
        errors.append(float(np.abs(pairs.latent.reshape(64, -1) - wanted).mean()))
    assert errors[1] < 0.01 and errors[0] > 2 * errors[1]


def test_pairs_have_the_same_bytes_again_and_for_any_micro_batch(made, tmp_path):
    """The teacher computes in float64, but micro-batches may change the last bits of float32, so values are compared
    with a tolerance."""
    again = execute(TEXT, tmp_path / "again")["pairs"].artifact.folder
    ours, theirs = ([one.tar for one in read_list(folder)] for folder in (again, made[1]["pairs"].artifact.folder))
    assert [sha256_of(tar) for tar in ours] == [sha256_of(tar) for tar in theirs]
    other = execute(TEXT.replace("micro_batch: 16", "micro_batch: 5"), tmp_path / "other")["pairs"].artifact.folder
    latents = [PairReader(read_list(folder)).batch(range(64)).latent for folder in (again, other)]
    np.testing.assert_allclose(*latents, rtol=1e-5, atol=1e-5)


def test_the_output_has_the_prediction_type_of_the_pipeline(exact):
    z = torch.randn(3, *exact.latent_shape, generator=torch.Generator().manual_seed(0))
    level, condition = exact.schedule.at(700), exact.teacher_condition([""] * 3)
    x0, _ = exact.posterior(z, level, condition)
    v = level.alpha * (z - level.alpha * x0) / level.sigma - level.sigma * x0
    torch.testing.assert_close(exact.output(z, level, condition).double(), v, rtol=1e-5, atol=1e-5)


CAPTIONED = TEXT.replace("captions: none", "captions: full").replace("count: 200", "count: 500")


@pytest.fixture(scope="module")
def captioned(made):
    folder = execute(CAPTIONED, made[0], name="captioned", only=["teacher"])["teacher"].artifact.folder
    return load_network(folder, TrainingExecution(device="cpu"))


def test_a_prompt_selects_the_images_with_that_caption(captioned):
    captions = json.loads((captioned.folder / "exact.json").read_text())["captions"]
    caption = max(set(captions), key=captions.count)
    z = torch.randn(4, *captioned.latent_shape, generator=torch.Generator().manual_seed(0))
    level = captioned.schedule.at(500)
    given, dropped = (captioned.posterior(z, level, captioned.teacher_condition([p] * 4))[0] for p in (caption, ""))
    own = captioned.data[[i for i, one in enumerate(captions) if one == caption]]
    columns = (torch.full((4, 1), v, dtype=torch.float64) for v in level)
    torch.testing.assert_close(given.flatten(1), posterior(z.flatten(1).double(), own, *columns, 0.1)[0])
    assert (given - dropped).abs().max() > 0.1
    guided = captioned.denoiser([caption] * 4, 3.0)(z, 500)
    plain, none = (captioned.denoiser([p] * 4, 1.0)(z, 500) for p in (caption, ""))
    torch.testing.assert_close(guided, none + 3.0 * (plain - none), rtol=1e-4, atol=1e-4)
    mixed = captioned.teacher_condition([caption, "", caption, ""])
    both = captioned.posterior(z, level, mixed)[0]
    torch.testing.assert_close(both[0], given[0])
    torch.testing.assert_close(both[1], dropped[1])
    assert CAPTION not in captioned.encode_prompts([caption]).tensors  # students are conditioned as their network is
    with pytest.raises(StageError, match="'a cat' is not a caption of the exact teacher's images; captions are 'a "):
        captioned.teacher_condition(["a cat"])


STUDENTS = """
  regressed:
    kind: distill
    pairs: pairs
    method: {name: diffusion2gan, loss: mse}
    TRAINING
  halved:
    kind: distill
    pairs: pairs
    method: {name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 1.0}
    TRAINING
  consistent:
    kind: distill
    pairs: pairs
    method: {name: consistency, steps: 1, solver_steps: 4, guidance_scale: 1.0}
    TRAINING
  probe: {kind: probe, images: digit_scenes, limit: 1000, steps: 100}
  quality: {kind: evaluate, student: regressed, real: probe, samples: 100, teacher_steps: [1]}
"""
TRAINING = "training: {steps: 2, batch_size: 4}\n    held_out: 16\n    execution: {threads: 1}"


def test_methods_train_on_it_and_evaluations_sample_it(made, quick_probes):
    text = TEXT + STUDENTS.replace("TRAINING", TRAINING)
    plan = execute(text, made[0], name="methods")
    metrics = json.loads((plan["quality"].artifact.folder / "metrics.json").read_text())
    sides = metrics["sides"]
    assert set(sides) >= {"teacher_20", "teacher_1", "student"} and sides["student"]["latent_mse"] > 0
    assert sides["teacher_20"]["kernel_distance"] < sides["teacher_1"]["kernel_distance"]
    assert "prompt_accuracy" not in sides["student"] and sides["student"]["diversity"] > 0  # no prompt asks for a class
    nearest = {name: side["nearest_mse"] for name, side in (sides | metrics["references"]).items() if name != "real"}
    assert nearest["teacher_20"] < 0.01 < nearest["vae_reconstruction"] < 2  # held-out images are not in the set
    for name in ("regressed", "halved/2", "consistent"):
        assert (plan[name].artifact.folder / "unet").exists()
    card = (plan["consistent"].artifact.folder / "README.md").read_text()
    assert "(the exact denoiser of 200 images, in the latents of digit_scenes; teacher/" in card


def test_a_student_of_it_starts_from_the_pipelines_network(exact):
    theirs = StableDiffusion(SHIPPED / "digit_scenes").network.state_dict()
    assert all(torch.equal(value, theirs[name].float()) for name, value in exact.student_network().state_dict().items())


def test_an_exact_teacher_in_pixel_space(tmp_path):
    unet = pixel_unet()
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pixels")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(images / f"{i}.png")
    text = TEXT.replace("digit_scenes, count: 200", f"{{name: image_folder, path: {images}, size: 8, caption: null}}")
    text = text.replace("captions: none", f"captions: none, pipeline: {tmp_path / 'pixels'}")
    plan = execute(text, tmp_path / "store")
    latents = PairReader(read_list(plan["pairs"].artifact.folder)).batch(range(64)).latent
    assert math.isclose(float(latents.std((1, 2, 3)).mean()), 0.0, abs_tol=0.1)  # each image has one colour


@pytest.mark.parametrize(("change", "words"), [
    (("spread: 0.1", "spread: 0"), "greater than 0"),
    (("exact: {", "from: digit_scenes\n    exact: {"), "bridge and gaussian, not 2"),
    (("guidance_scale: 1.0", "guidance_scale: 3.0"), "guidance needs prompts"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_when_planning(change, words, tmp_path):
    with pytest.raises(ManifestError, match=words):
        plan_of(TEXT.replace(*change), tmp_path)


def test_a_pipeline_that_predicts_epsilon_cannot_end_in_noise(tmp_path):
    DDIMPipeline(unet=pixel_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pixels")
    text = TEXT.replace("captions: none", f"captions: none, zero_terminal_snr: true, pipeline: {tmp_path / 'pixels'}")
    with pytest.raises(ManifestError, match="predicts epsilon, from which x0 cannot be computed at pure noise"):
        plan_of(text, tmp_path)


def test_files_of_an_interrupted_attempt_do_not_break_the_next_one(tmp_path, monkeypatch):
    from stages.teacher import exact

    def cut(path, _content):
        path.write_text("{")
        raise StageError("cut")

    with monkeypatch.context() as patched, pytest.raises(StageFailed, match="cut"):
        patched.setattr(exact, "write_atomically", cut)
        execute(TEXT, tmp_path, only=["teacher"])
    execute(TEXT, tmp_path, only=["teacher"])


@pytest.mark.parametrize(("change", "words"), [
    (("count: 200", "count: 9000000"), r"exact\.count: the image set has only \d+ images, not 9000000"),
    (("images: digit_scenes", "images: digits"),
     r"exact\.images: the images have 16 pixels; the pipeline takes 32 x 32"),
])  # fmt: skip
def test_images_that_do_not_fit_the_pipeline_stop_the_stage(change, words, tmp_path):
    with pytest.raises(StageFailed, match=words):
        execute(TEXT.replace(*change), tmp_path, only=["teacher"])
