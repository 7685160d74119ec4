"""Coop-Diffusion: two teachers in one sampling process. Closed forms, and whole pipelines."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import ManifestError, StageFailed
from pipeline.manifest import loads
from stages.base import StageError
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler
from stages.diffusion.samplers import ddim
from stages.diffusion.schedule import NoiseSchedule
from stages.networks.condition import Condition
from stages.networks.coop import Bridge, BridgeSettings, Coop, CoopSettings, cooperating
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.teachers import load_network, solve
from stages.reports.sampling import draw
from stages.training import TrainingExecution
from tests.support.pipelines import TINY, execute, plan_of

SCHEDULE = NoiseSchedule.stable_diffusion()
ROTATION = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


class Normal(StableDiffusion):
    """The exact denoiser of images whose elements are N(mean, std^2). Latents are rotated images."""

    def __init__(self, mean, std, turn=None, schedule=SCHEDULE):
        self.mean, self.std, self.turn = mean, std, torch.eye(12, dtype=torch.float64) if turn is None else turn
        self.schedule, self.prediction, self.latent_shape = schedule, "epsilon", (3, 2, 2)
        self.device, self.network = torch.device("cpu"), None

    down_sampling = 1

    def teacher_condition(self, prompts):
        return Condition(len(prompts))

    def teacher_dropped(self):
        return Condition(1)

    def output(self, z, level, condition):
        alpha, sigma = level.alpha, level.sigma
        mean = self.encode(torch.full((1, *self.latent_shape), self.mean, dtype=torch.float64))
        return sigma / (alpha**2 * self.std**2 + sigma**2) * (z - alpha * mean)

    def decode(self, latents):
        return (latents.flatten(1).double() @ self.turn).view(latents.shape)

    def encode(self, images):
        return (images.flatten(1).double() @ self.turn.T).view(images.shape)

    def to_device(self, array):
        return torch.from_numpy(array)


def fused(host, guest, **mixing):
    made = object.__new__(cooperating(Coop, Normal, Normal))
    made.join(host, guest, CoopSettings(**mixing))
    return made


def noise(count=5, shape=(3, 2, 2)):
    return np.random.default_rng(1).normal(size=(count, *shape))


SAMPLER = Sampler(steps=20, guidance_scale=1.0)


@pytest.mark.parametrize("refresh", ["own", "re_encode"])
def test_delta_0_gives_the_hosts_samples_and_delta_1_the_guests(refresh):
    host, guest = Normal(-1.0, 0.5), Normal(2.0, 0.3)
    alone = [solve(one, noise(), [""] * 5, SAMPLER) for one in (host, guest)]
    first, last = (solve(fused(host, guest, delta=d, refresh=refresh), noise(), [""] * 5, SAMPLER) for d in (0, 1))
    assert torch.equal(first, alone[0])
    torch.testing.assert_close(last, alone[1].double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_the_conversion_between_turned_latents_is_exact(delta):
    """A guest with rotated latents of the same images has the same estimate as the host, so the output does not depend
    on delta."""
    host, guest = Normal(-1.0, 0.5), Normal(-1.0, 0.5, ROTATION)
    z = torch.from_numpy(noise())
    state = torch.cat([z.flatten(1), guest.encode(z).flatten(1)], 1)
    output = fused(host, guest, delta=delta).denoiser([""] * 5, 1.0)(state, 500)[:, :12].view(z.shape)
    torch.testing.assert_close(output, host.denoiser([""] * 5, 1.0)(z, 500), atol=1e-12, rtol=0)


@pytest.mark.parametrize("delta", [0.25, 0.5, 0.9])
def test_fused_gaussians_of_equal_deviation_sample_a_mean_between_theirs(delta):
    """Samples come from one Gaussian with mean (1 - delta) m_A + delta m_B. If the guest follows its own path, it has
    more influence, because the host's estimate follows the fused state."""
    host, guest, std = Normal(-1.0, 0.4), Normal(2.0, 0.4), 0.4
    mean = (1 - delta) * -1.0 + delta * 2.0
    together, apart, wanted = (
        solve(one, noise(), [""] * 5, SAMPLER).double()
        for one in (fused(host, guest, delta=delta), fused(host, guest, delta=delta, refresh="own"), Normal(mean, std))
    )
    torch.testing.assert_close(together, wanted, atol=1e-4, rtol=1e-4)
    assert (apart - wanted).mean() > 0.1


def test_one_fused_estimate_is_the_weighted_sum_of_two_at_one_z():
    host, guest = Normal(-1.0, 0.5), Normal(2.0, 0.3)
    z, t = torch.from_numpy(noise()), 400
    alpha, sigma = SCHEDULE.at(t)
    state = torch.cat([z.flatten(1)] * 2, 1)
    estimates = [(z - sigma * one.denoiser([""] * 5, 1.0)(z, t)) / alpha for one in (host, guest)]
    output = fused(host, guest, delta=0.3).denoiser([""] * 5, 1.0)(state, t)[:, :12].view(z.shape)
    wanted = 0.7 * estimates[0] + 0.3 * estimates[1]
    torch.testing.assert_close((z - sigma * output) / alpha, wanted, atol=1e-5, rtol=1e-5)


def test_a_guest_with_another_schedule_is_called_at_the_same_snr():
    host = Normal(-1.0, 0.5)
    other = Normal(2.0, 0.3, schedule=NoiseSchedule.from_alphas_cumprod(SCHEDULE.alpha[::2] ** 2))
    z, t = torch.from_numpy(noise()), 600
    state = torch.cat([z.flatten(1)] * 2, 1)
    same, scheduled = (
        fused(host, guest, delta=1.0).denoiser([""] * 5, 1.0)(state, t) for guest in (Normal(2.0, 0.3), other)
    )
    torch.testing.assert_close(scheduled, same, atol=1e-4, rtol=1e-4)


def test_delta_follows_its_schedule_and_stops_at_the_snr():
    mixing = CoopSettings(delta=0.2, first_delta=1.0, max_snr=4.0)
    assert mixing.share(0.0, 1.0) == 1.0
    assert mixing.share(0.8, 0.6) == pytest.approx(0.2 + 0.8 * 0.6)
    assert mixing.share(0.98**0.5, 0.02**0.5) == 0.0
    assert CoopSettings(delta=0.3).share(0.999, 0.04) == 0.3


def test_a_guest_of_half_the_size_starts_from_white_noise():
    host, guest = Normal(0.0, 1.0), Normal(0.0, 1.0)
    host.latent_shape = (3, 64, 64)
    guest.latent_shape = (3, 32, 32)
    guest.down_sampling = 2
    made = fused(host, guest)
    drawn = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert made.noise_shape == (3, 64, 64)
    own, smaller = made.starts(drawn)
    assert torch.equal(own, drawn)
    assert float(smaller.var()) == pytest.approx(1.0, abs=0.03)
    assert abs(neighbours(smaller)) < 0.02
    guest.latent_shape = (4, 32, 32)
    with pytest.raises(StageError, match="both cannot start from one noise"):
        made.starts(drawn)


def neighbours(noise):
    """The correlation of horizontal neighbours."""
    return float((noise[..., 1:] * noise[..., :-1]).mean() / noise.var())


class Large(Normal):
    """As Normal, for images and latents of another size."""

    def __init__(self, size, *arguments):
        super().__init__(*arguments)
        self.latent_shape, self.called = (3, size, size), []

    def output(self, z, level, condition):
        self.called.append((float(level.timestep), z))
        return Normal.output(self, z, level, condition)

    def encode(self, images):
        return images.double()

    decode = encode


def bridged(host, guest, switch=500, finish=False):
    made = object.__new__(cooperating(Bridge, Large, Large))
    made.join(host, guest, BridgeSettings(switch=switch, finish=finish))
    return made


def test_a_bridge_noises_scaled_images_with_the_hosts_noise():
    """The guest's estimate is its mean. The host adds its own white noise to it. Bilinear scaling of noisy latents
    would correlate the noise instead."""
    host, guest = Large(64, 0.0, 0.5), Large(32, 0.7, 1e-6)
    teacher = bridged(host, guest)
    drawn = noise(20, (3, 64, 64))
    solve(teacher, drawn, [""] * 20, SAMPLER)
    assert [t for t, _ in guest.called] == list(range(999, 499, -50))
    assert [t for t, _ in host.called] == list(range(499, 0, -50))
    alpha, sigma = SCHEDULE.at(499)
    left = (host.called[0][1] - alpha * 0.7) / sigma
    torch.testing.assert_close(left, torch.from_numpy(drawn), atol=1e-4, rtol=1e-4)
    assert float(left.var()) == pytest.approx(1.0, abs=0.02)
    assert abs(neighbours(left)) < 0.02
    halved = torch.from_numpy(noise(20, (3, 32, 32)))
    scaled = torch.nn.functional.interpolate(halved, scale_factor=2, mode="bilinear")
    assert float(scaled.var()) == pytest.approx(0.39, abs=0.01)
    assert neighbours(scaled) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("finish", [False, True])
def test_the_host_starts_from_the_guests_estimate_or_from_its_image(finish):
    host, guest = Large(8, 0.7, 0.5), Large(8, -0.2, 0.1)
    drawn, grid = torch.from_numpy(noise(5, (3, 8, 8))), list(range(999, 0, -50))
    made = solve(bridged(host, guest, finish=finish), drawn.numpy(), [""] * 5, SAMPLER)
    assert [t for t, _ in guest.called] == grid[: 20 if finish else 10]
    *_, (_, image) = guest.trajectory(ddim, drawn, [""] * 5, 1.0, grid[: 20 if finish else 10])
    alpha, sigma = SCHEDULE.at(499)
    *_, (_, wanted) = host.trajectory(ddim, alpha * image + sigma * drawn, [""] * 5, 1.0, grid[10:])
    torch.testing.assert_close(made, wanted)
    assert (wanted - 0.7).abs().mean() > 0.1  # so it depends on what the host was given


def test_a_constant_image_is_the_same_after_a_bridge_up_and_down():
    small, large = Large(8, 0.0, 1.0), Large(16, 0.0, 1.0)
    flat = torch.full((2, 3, 8, 8), 0.3, dtype=torch.float64)
    torch.testing.assert_close(bridged(small, large).bridged(bridged(large, small).bridged(flat)), flat)


def test_a_bridge_down_starts_from_the_noise_of_the_larger_and_makes_no_pairs():
    host, guest = Large(8, 0.5, 0.1), Large(16, 0.5, 0.1)
    teacher = bridged(host, guest)
    assert teacher.noise_shape == (3, 16, 16)
    made = solve(teacher, noise(400, (3, 16, 16)), [""] * 400, SAMPLER)
    alone = solve(host, noise(400, (3, 8, 8)), [""] * 400, SAMPLER)
    assert made.shape == alone.shape
    assert float(made.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(made.std()) == pytest.approx(float(alone.std()), rel=0.1)


def test_the_guest_of_a_bridge_is_called_at_the_switch_itself():
    host, guest = Large(8, 0.0, 1.0), Large(8, 0.0, 1.0)
    solve(bridged(host, guest, 499), noise(2, (3, 8, 8)), [""] * 2, SAMPLER)
    assert (guest.called[-1][0], host.called[0][0]) == (499, 449)


@pytest.mark.parametrize(("spacing", "steps", "called"), [("trailing", 1, (1, 0)), ("leading", 2, (0, 2))])
def test_if_no_timestep_is_on_one_side_the_other_teacher_samples_alone(spacing, steps, called):
    """Here both teachers have the same latents, the images."""
    host, guest = Large(8, 0.7, 0.5), Large(8, -0.2, 0.1)
    sampler = Sampler(steps=steps, guidance_scale=1.0, timestep_spacing=spacing)  # at 999; at 501 and 1
    made = solve(bridged(host, guest, 600), noise(2, (3, 8, 8)), [""] * 2, sampler)
    assert (len(guest.called), len(host.called)) == called
    alone = Large(8, -0.2, 0.1) if called[0] else Large(8, 0.7, 0.5)
    torch.testing.assert_close(made, solve(alone, noise(2, (3, 8, 8)), [""] * 2, sampler))


def test_a_bridge_needs_one_noise_schedule():
    short = Large(4, 0.0, 1.0, None, NoiseSchedule.from_alphas_cumprod(SCHEDULE.alpha[::2] ** 2))
    with pytest.raises(StageError, match="the same noise schedule"):
        bridged(Large(8, 0.0, 1.0), short)


HEAD, _, _ = TINY.partition("  pairs:")
FUSED = f"""{HEAD}
  other:
    kind: teacher
    train:
      dataset: digits
      vae: {{channels: [8, 16], max_mse: 1.0, training: {{steps: 10, batch_size: 16}}}}
      denoiser: {{channels: [16, 32], training: {{steps: 4, batch_size: 8}}}}
    execution: {{threads: 1}}
    seed: 1
  both:
    kind: teacher
    coop: {{host: teacher, guest: other, delta: 0.4}}
    execution: {{threads: 1}}
  pairs:
    kind: pairs
    teacher: both
    prompts: digits
    count: 32
    shard_size: 16
    sampler: {{steps: 3, guidance_scale: 2.0}}
    execution: {{micro_batch: 8, threads: 1}}
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {{steps: 4, batch_size: 8}}
    held_out: 16
    execution: {{threads: 1}}
  quality: {{kind: evaluate, student: student, samples: 20, teacher_steps: [], execution: {{threads: 1}}}}
"""


def test_a_fused_teacher_makes_pairs_and_is_distilled_into_one_student(tiny):
    from diffusers import DiffusionPipeline

    store, _ = tiny
    plan = execute(FUSED, store, name="coop")
    folder, student = plan["both"].artifact.folder, plan["student"].artifact.folder
    assert json.loads((folder / "coop.json").read_text())["delta"] == 0.4
    assert type(DiffusionPipeline.from_pretrained(student)).__name__ == "StableDiffusionPipeline"
    metrics = json.loads((plan["quality"].artifact.folder / "metrics.json").read_text())
    assert metrics["sides"].keys() == {"teacher_3", "student"}
    both = load_network(folder, TrainingExecution(device="cpu"))
    drawn = np.random.default_rng(0).normal(size=(6, *both.latent_shape)).astype(np.float32)
    prompts = ["a red handwritten seven", ""] * 3
    whole = solve(both, drawn, prompts, Sampler(steps=3, guidance_scale=2.0))
    part = solve(both, drawn[2:4], prompts[2:4], Sampler(steps=3, guidance_scale=2.0))
    torch.testing.assert_close(part, whole[2:4], atol=1e-4, rtol=1e-4)
    with pytest.raises(StageError, match="a method that reads pairs"):
        both.output(whole, both.schedule.at(5), both.teacher_condition(prompts))


PARTS = f"""{HEAD}
  high: &half
    kind: teacher
    train:
      dataset: digits
      vae: teacher
      times: [500, 1000]
      denoiser: {{channels: [16, 32], training: {{steps: 2, batch_size: 8}}}}
  low: {{<<: *half, train: {{dataset: digits, vae: teacher, times: [0, 500], denoiser: {{channels: [16, 32]}}}}}}
  halves: {{kind: teacher, structure: high, texture: low}}
  made: """


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("{bridge: {host: low, guest: high}}", None),
        ("{bridge: {host: low, guest: high, switch: 900}}", "times: [0, 500], but is called at times: [0, 900]"),
        ("{bridge: {host: high, guest: low}}", "times: [0, 500], but is called at times: [500, 1000]"),
        ("{bridge: {host: low, guest: high, switch: 5000}}", "less than 1000"),
        ("{coop: {host: teacher, guest: high}}", "times: [500, 1000], but is called at times: [0, 1000]"),
        ("{coop: {host: halves, guest: teacher}}", None),
        ("{train: {dataset: digits, start: teacher}}", "add `vae:` with the same teacher"),
        ("{train: {dataset: digits, start: teacher, vae: teacher}}", "denoiser.channels: [16, 32]; set these"),
    ],
)
def test_teachers_called_at_timesteps_they_were_not_trained_on_are_refused(tmp_path, made, expected):
    text = PARTS + made.replace("{", "{kind: teacher, ", 1)
    if expected is None:
        plan_of(text, tmp_path)
        return
    with pytest.raises(ManifestError) as error:
        plan_of(text, tmp_path)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("delta: 0.4", "delta: 1.4", "less than or equal to 1"),
        ("guest: other", "guest: nothing", "there is no stage"),
        (
            "method: knowledge_distillation",
            "method: {name: consistency, steps: 1, guidance_scale: 2.0}",
            "a teacher of host and guest can only sample whole trajectories",
        ),
        (
            "dataset: digits\n",
            "dataset: {name: digits, size: 32}\n",
            "its image size is (32, 32), that of the host (16, 16)",
        ),
    ],
)
def test_teachers_that_cannot_cooperate_are_errors_of_the_plan(tmp_path, old, new, expected):
    before, _, after = FUSED.partition("  other:")
    text = f"{before}  other:{after.replace(old, new)}"
    with pytest.raises(ManifestError) as error:
        loads(text, "test.yaml")
        plan_of(text, tmp_path)
    assert expected in str(error.value)


BRIDGED = f"""{HEAD}
  large:
    kind: teacher
    train:
      dataset: {{name: digits, size: 32}}
      vae: {{channels: [8, 16], max_mse: 1.0, training: {{steps: 2, batch_size: 8}}}}
      denoiser: {{channels: [16, 32], training: {{steps: 2, batch_size: 8}}}}
    execution: {{threads: 1}}
  up: {{kind: teacher, bridge: {{host: large, guest: teacher, switch: 400}}}}
  down: {{kind: teacher, bridge: {{host: teacher, guest: large}}}}
  pairs_up: &pairs
    kind: pairs
    teacher: up
    prompts: digits
    count: 8
    shard_size: 8
    sampler: {{steps: 3, guidance_scale: 2.0}}
    path_timesteps: [332]
    execution: {{micro_batch: 8, threads: 1}}
  pairs_down: {{<<: *pairs, teacher: down, path_timesteps: []}}
"""


def test_a_bridge_makes_pairs_from_the_hosts_noise_if_the_host_is_the_larger(tiny, tmp_path):
    store, _ = tiny
    plan = execute(BRIDGED, store, name="bridge", only=["large", "up", "pairs_up", "down"])
    made = PairReader(read_list(plan["pairs_up"].artifact.folder), ["noise", "latent", "path"]).batch(range(8))
    assert made.noise.shape == made.latent.shape == (8, 4, 16, 16)
    teacher = load_network(plan["up"].artifact.folder, TrainingExecution(device="cpu"))
    smaller = torch.nn.functional.avg_pool2d(torch.from_numpy(made.noise).float(), 2) * 2
    with teacher.inference():
        *_, (_, x0) = teacher.guest.trajectory(ddim, smaller, made.prompts, 2.0, [999, 666])
        scaled = torch.nn.functional.interpolate(teacher.guest.decode(x0), (32, 32), mode="bicubic", antialias=True)
        wanted = teacher.encode(scaled.clamp(-1, 1)).numpy()
    alpha, sigma = teacher.schedule.at(332)
    np.testing.assert_allclose(made.arrays["path"][:, 0], alpha * wanted + sigma * made.noise, atol=1e-2)
    with pytest.raises(StageFailed, match=r"latents of shape \(4, 8, 8\) from noise of shape \(4, 16, 16\)"):
        execute(BRIDGED, store, name="bridge", only=["pairs_down"])
    early, picture = "stages.pairs_up.path_timesteps=[999]", tmp_path / "down.png"
    with pytest.raises(ManifestError, match="only below switch: 400"):
        plan_of(BRIDGED, store, [early])
    draw(plan["down"].artifact, ["a red handwritten seven"], 2, 0, 3, 2.0, picture, print)
    assert Image.open(picture).size == (32, 16)
