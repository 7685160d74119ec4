"""Higher-order solvers, compared with the exact ODE of a Gaussian; and the states that pairs store."""

import numpy as np
import pytest
import torch

from pipeline.errors import ManifestError, StageFailed
from pipeline.manifest import loads
from stages.base import StageError
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler
from stages.diffusion.prediction import target
from stages.diffusion.samplers import timesteps
from stages.networks import solvers
from stages.networks.gaussian import GaussianTeacher
from stages.networks.teachers import solve, trajectory
from tests.support.pipelines import GAUSSIAN, TINY, execute

MEAN, STD = 0.5, 0.6
NOISE = np.random.default_rng(0).standard_normal((2, 1, 2, 2))


def exact(schedule, t: int) -> np.ndarray:
    """Return the solution of the ODE at t that starts from NOISE at 999. Every point keeps its quantile (methods.md
    0.2)."""
    alpha_1, sigma_1 = schedule.at(999)
    alpha, sigma = schedule.at(t)
    scale = ((alpha**2 * STD**2 + sigma**2) / (alpha_1**2 * STD**2 + sigma_1**2)) ** 0.5
    return alpha * MEAN + scale * (NOISE - alpha_1 * MEAN)


def error(name: str, steps: int) -> float:
    """Return the error at t = 199, which is on both grids. The last step, to clean data, is of first order in all
    solvers."""
    teacher = GaussianTeacher(MEAN, STD, (1, 2, 2))
    states = dict(trajectory(teacher, NOISE, ["", ""], Sampler(name=name, steps=steps)))
    return float(np.abs(states[199] - exact(teacher.schedule, 199)).max())


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_second_order_solvers_are_of_second_order(name):
    assert error(name, 10) > 3.5 * error(name, 20)
    assert error("ddim", 10) < 2.5 * error("ddim", 20)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_every_state_is_near_the_exact_trajectory(name):
    teacher = GaussianTeacher(MEAN, STD, (1, 2, 2))
    states = list(trajectory(teacher, NOISE, ["", ""], Sampler(name=name, steps=50)))
    assert [t for t, _ in states] == [*timesteps(1000, 50), -1]
    np.testing.assert_allclose(states[0][1], NOISE, atol=1e-6)
    for t, z in states:
        np.testing.assert_allclose(z, exact(teacher.schedule, t), atol=0.06 if name == "ddim" else 0.02)


@pytest.mark.parametrize("solver", [solvers.dpmpp_2m, solvers.heun])
def test_solvers_do_not_depend_on_the_prediction_type(solver):
    """The same optimal denoiser is given as epsilon, v and x0."""
    teacher = GaussianTeacher(MEAN, STD, (1, 2, 2))
    ends = []
    for prediction in ("epsilon", "v_prediction", "sample"):

        def denoise(z, t, prediction=prediction):
            alpha, sigma = teacher.schedule.at(t)
            epsilon = torch.from_numpy(teacher.denoiser([""], 1.0)(z.double().numpy(), t))
            return target(prediction, (z - sigma * epsilon) / alpha, epsilon, alpha, sigma)

        *_, (_, x0) = solver(denoise, torch.from_numpy(NOISE), teacher.schedule, prediction, timesteps(1000, 12))
        ends.append(x0)
    torch.testing.assert_close(ends[0].double(), ends[1].double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ends[0].double(), ends[2].double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_the_number_of_network_calls_equals_the_documented_one(name):
    teacher = GaussianTeacher(MEAN, STD, (1, 2, 2))
    calls = []
    denoise = teacher.denoiser([""], 1.0)
    teacher.denoiser = lambda prompts, scale: lambda z, t: calls.append(t) or denoise(z, t)
    sampler = Sampler(name=name, steps=7, guidance_scale=1.0)
    solve(teacher, NOISE, [""], sampler)
    assert len(calls) == sampler.network_calls == {"ddim": 7, "dpmpp_2m": 7, "heun": 13}[name]
    assert Sampler(name=name, steps=7, guidance_scale=3.0).network_calls == 2 * len(calls)


def test_only_ddim_solves_a_schedule_that_ends_in_pure_noise():
    teacher = GaussianTeacher(MEAN, STD, (1, 2, 2))
    teacher.schedule.alpha[-1], teacher.schedule.sigma[-1] = 0.0, 1.0
    for name in ("heun", "dpmpp_2m"):
        with pytest.raises(StageError, match="ends in pure noise"):
            solve(teacher, NOISE, ["", ""], Sampler(name=name, steps=5))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_pairs_store_the_states_at_path_timesteps(tmp_path, name):
    grid = timesteps(1000, 10)
    text = GAUSSIAN.replace("{steps: 10}", f"{{name: {name}, steps: 10}}\n    path_timesteps: [{grid[0]}, {grid[4]}]")
    pairs = execute(text, tmp_path)["pairs"].artifact
    batch = PairReader(read_list(pairs.folder), ["noise", "latent", "path"]).batch(range(40))
    teacher = GaussianTeacher(MEAN, STD, (2, 4, 4))
    states = dict(trajectory(teacher, batch.noise, [""] * 40, Sampler(name=name, steps=10)))
    assert batch.arrays["path"].shape == (40, 2, 2, 4, 4)
    np.testing.assert_array_equal(batch.arrays["path"][:, 0], batch.noise)
    np.testing.assert_allclose(batch.arrays["path"][:, 1], states[grid[4]], atol=2e-3)
    np.testing.assert_allclose(batch.latent, states[-1], atol=2e-3)


def test_states_that_are_not_on_the_grid_are_refused(tmp_path):
    text = GAUSSIAN.replace("{steps: 10}", "{steps: 10}\n    path_timesteps: [998]")
    with pytest.raises(StageFailed, match=r"998 is not a timestep of the sampler; its timesteps are \[999, 899"):
        execute(text, tmp_path)
    with pytest.raises(ManifestError, match="must be in descending order"):
        loads(text.replace("[998]", "[499, 999]"), "m.yaml")


def test_text_embeddings_equal_the_encoders_states(tiny):
    from stages.networks.stable_diffusion import StableDiffusion

    plan = execute(TINY, tiny[0], ["stages.pairs.text_embeddings=true", "stages.pairs.count=64"], only=["pairs"])
    pairs = plan["pairs"].artifact
    batch = PairReader(read_list(pairs.folder), ["text_embedding"]).batch([0, 63])
    states = StableDiffusion(pairs.inputs["teacher"].folder).encode_prompts(batch.prompts).tensors["text"]
    np.testing.assert_array_equal(batch.arrays["text_embedding"], states.numpy().astype(np.float16))
    with pytest.raises(StageError, match="has no array path; it has: noise, latent, text_embedding"):
        PairReader(read_list(pairs.folder), ["path"]).batch([0])


def test_a_teacher_without_text_has_no_embeddings(tmp_path):
    with pytest.raises(StageFailed, match="the teacher has no text encoder"):
        execute(GAUSSIAN + "    text_embeddings: true\n", tmp_path)
