"""SDS and VSD: fixed points with exact scores, which players get gradients, cameras, turns and resuming."""

from functools import partial
from pathlib import Path

import pytest
import torch

from stages.base import StageError
from stages.data.images.config import Digits as ImageSettings
from stages.data.images.load import load
from stages.diffusion.grid import Grid
from stages.diffusion.levels import Levels
from stages.diffusion.mixture import nearest, posterior
from stages.diffusion.schedule import NoiseSchedule
from stages.losses.score import ScoreDifference, matching_loss
from stages.networks.camera import CAMERA, dropped
from stages.networks.condition import Condition
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.exact import Exact
from stages.networks.fake_score import FakeScore
from stages.networks.lora import LoraSettings
from stages.networks.pixel import PixelDiffusion
from stages.networks.stable_diffusion import StableDiffusion
from stages.optimize.cameras import Cameras
from stages.optimize.config import ObjectiveMaterials, ObjectTraining, RepresentationMaterials
from stages.optimize.objectives.config import Anneal, SDSConfig, VSDConfig
from stages.optimize.representations.base import Rendering, Representation, Views
from stages.optimize.representations.config import CameraRange
from stages.optimize.representations.flat import Flat, Latents
from stages.optimize.representations.nerf.config import NerfConfig
from stages.training import TrainingExecution
from stages.training.loop import train
from tests.support.networks import adapter_around, pixel_unet

SCHEDULE = NoiseSchedule.stable_diffusion()
EVERY = Levels(SCHEDULE, "cpu")
PROMPT = "a red handwritten seven"
MEANS = {"": -0.5, "up": 0.3}


class Gaussians(StableDiffusion):
    """A teacher of numbers: N(MEANS[prompt], std^2) in closed form."""

    def __init__(self, std):
        self.std, self.schedule, self.prediction = std, SCHEDULE, "epsilon"
        self.device, self.latent_shape, self.network = torch.device("cpu"), (1, 1, 1), None

    def teacher_condition(self, prompts):
        return Condition(len(prompts), {"mean": torch.tensor([MEANS[prompt] for prompt in prompts])})

    def teacher_dropped(self):
        return self.teacher_condition([""])

    def output(self, z, level, condition):
        alpha, sigma = (value.double() for value in level)
        mean = condition.tensors["mean"].double().view(-1, 1, 1, 1)
        return (sigma / (alpha**2 * self.std**2 + sigma**2) * (z - alpha * mean)).float()


class Given:
    """The exact score of N(mean, std^2), or of the sample itself if there is no std."""

    def __init__(self, x, std=None):
        self.x, self.std = x, std

    def encode(self, prompts):
        return Condition(len(prompts))

    def x0(self, z, t, condition, w=None):
        if self.std is None:
            return self.x
        alpha, sigma = EVERY.at(t)
        return self.x + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (z - alpha * self.x)


class Numbers(Flat):
    """Particles with given initial values, as latents."""

    def __init__(self, teacher, start):
        super().__init__(teacher, start.view(-1, *teacher.latent_shape))

    def render(self, views):
        return Rendering(self.chosen(views), {})

    def images(self, views):
        return self.chosen(views).expand(-1, 3, -1, -1)


def denoiser(teacher, guidance_scale=1.0):
    return TeacherDenoiser(teacher, Grid.trailing(teacher.schedule, len(teacher.schedule)), guidance_scale)


def run(method, folder, count, batch=None, every=1000, stop=None):
    """Train to the end, or until `stop` reports of progress."""
    training = train(
        method,
        batch or (lambda step: {"particles": torch.arange(count)}),
        seed=3,
        checkpoints=folder,
        execution=TrainingExecution(checkpoint_every=every, threads=1, device="cpu"),
    )
    for _ in range(stop or 10**6):
        try:
            next(training)
        except StopIteration as stopped:
            return stopped.value.averages["particles"]
    training.close()
    return None


def settings(steps, **given):
    return ObjectTraining(steps=steps, **{"learning_rate": 0.05, **given})


# --- Closed forms (methods.md 5.5) ---


def test_sds_particles_collapse_to_the_guided_mean(tmp_path):
    """From any start, with one deviation for all prompts, at any s: m + w (m - m_dropped), w = s - 1."""
    teacher = Gaussians(0.4)
    particles = Numbers(teacher, torch.linspace(-3, 3, 24))
    config = SDSConfig(guidance_scale=3.0)
    method = config.create(ObjectiveMaterials(teacher, particles, "up", settings(700)))
    ends = torch.stack(list(run(method, tmp_path, 24).state)).flatten()
    guided = 0.3 + 2 * (0.3 - -0.5)
    assert float(ends.mean()) == pytest.approx(guided, abs=0.02)
    assert float(ends.std()) < 0.04


@pytest.mark.parametrize(("weighting", "weight"), [("sigma2", 2), ("uniform", 0), ("alpha_sigma2", None)])
@pytest.mark.parametrize("t", [60, 500, 940])
def test_mean_and_noise_of_the_gradient_equal_the_closed_form(t, weighting, weight):
    """w sigma alpha (x - m) / v and w alpha^2 S^2 / v. The gradient is linear in the noise."""
    std, x, m = 0.4, 1.1, 0.3
    alpha, sigma = SCHEDULE.at(t)
    w = alpha * sigma**2 if weight is None else sigma**weight
    variance = alpha**2 * std**2 + sigma**2
    difference = ScoreDifference(denoiser(Gaussians(std)), None, EVERY, weighting)
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    low, high = difference.at(torch.full_like(noise, x), ["up"] * 2, torch.full((2,), t), noise).flatten().tolist()
    assert (low + high) / 2 == pytest.approx(w * sigma * alpha * (x - m) / variance, rel=1e-4)
    assert (low - high) / 2 == pytest.approx(w * alpha**2 * std**2 / variance, rel=1e-4)


def test_vsd_with_the_score_of_single_points_equals_sds():
    x, noise = torch.randn(2, 6, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([20, 100, 400, 600, 900, 980])
    ours = ScoreDifference(denoiser(Gaussians(0.4)), None, EVERY, "sigma2").at(x, ["up"] * 6, t, noise)
    point = ScoreDifference(denoiser(Gaussians(0.4)), Given(x), EVERY, "sigma2").at(x, ["up"] * 6, t, noise)
    z = EVERY.noised(x, t, noise)
    level = EVERY.at(t)
    told = Gaussians(0.4).output(z, level, Gaussians(0.4).teacher_condition(["up"] * 6))
    torch.testing.assert_close(point, ours, rtol=0, atol=0)
    torch.testing.assert_close(ours, level.sigma**2 * (told - noise), rtol=2e-4, atol=1e-5)


def test_with_an_exact_score_of_512_particles_vsd_keeps_mean_and_deviation():
    teacher, m, std = Gaussians(0.4), 0.3, 0.4
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(512, 1, 1, 1, generator=generator, dtype=torch.float64)

    def ends(exact):
        particles = torch.nn.Parameter(start * 0.9 - 1)
        optimizer = torch.optim.Adam([particles], 0.03)
        torch.manual_seed(0)
        for _ in range(300):
            x = particles.detach()
            fake = Given(x.mean(), x.std()) if exact else None
            gradient = ScoreDifference(denoiser(teacher), fake, EVERY, "sigma2").gradient(x, ["up"] * len(x))
            optimizer.zero_grad()
            matching_loss(particles, gradient).mean().backward()
            optimizer.step()
        return float(particles.detach().mean()), float(particles.detach().std())

    assert ends(exact=True) == pytest.approx((m, std), abs=0.05)
    mean, deviation = ends(exact=False)
    assert mean == pytest.approx(m, abs=0.05) and deviation < 0.1


def test_particles_distributed_like_the_data_have_no_gradient():
    x = torch.randn(64, 1, 1, 1, dtype=torch.float64)
    t, noise = EVERY.draw(x)
    same, wider, moved = (
        ScoreDifference(denoiser(Gaussians(0.4)), Given(torch.tensor(mean), std), EVERY, "uniform").at(
            x, ["up"] * 64, t, noise
        )
        for mean, std in ((0.3, 0.4), (0.3, 0.5), (0.2, 0.4))
    )
    assert same.abs().max() < 1e-4
    assert wider.abs().max() > 0.01 and moved.abs().max() > 0.01


# --- The exact teacher of images ---


class Digits(Exact, PixelDiffusion):
    """The exact teacher of twelve tinted digits, averaged to `side` pixels a side, in memory."""

    def __init__(self, side):
        self.schedule, self.prediction, self.device = SCHEDULE, "epsilon", torch.device("cpu")
        self.latent_shape, self.network, self.spread = (3, side, side), None, 0.1
        pixels = load(ImageSettings(), limit=12).pixels(slice(0, 12))
        self.data = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(pixels), side).flatten(1).double()
        self.captions, self.numbers = {"": 0}, torch.zeros(12, dtype=torch.long)


def sds(teacher, start, folder, fake=None):
    """The ends of unguided particles, (N, D), float64. `fake`: a function from the particles to their score."""
    particles = Numbers(teacher, start)
    method = SDSConfig(guidance_scale=1.0).create(ObjectiveMaterials(teacher, particles, "", settings(300)))
    method.scores[0].fake = fake and fake(particles)
    return torch.stack(list(run(method, folder, len(start)).state)).detach().flatten(1).double()


def test_sds_ends_near_single_images_shrunk_to_their_mean(tmp_path):
    """Ends are zeros of sum_t alpha sigma (x - E x0). An image itself is still pulled to the mean."""
    images = Digits(8)
    ends = sds(images, images.data.float() + 0.5 * torch.randn(12, 192), tmp_path)
    mean, found = images.data.mean(0), torch.cdist(ends, images.data).argmin(1)
    image = images.data[found]
    apart = torch.pdist(images.data).min()
    assert nearest(ends, images.data).sqrt().max() < 0.5 * apart
    assert ((ends - mean).norm(dim=1) < (image - mean).norm(dim=1)).all()
    assert len(found.unique()) > 6
    difference = ScoreDifference(denoiser(images), None, EVERY, "sigma2")

    def pull(x):
        torch.manual_seed(0)
        shaped = x.view(-1, 3, 8, 8)
        return (sum(difference.gradient(shaped, [""] * len(x)) for _ in range(60)) / 60).flatten(1)

    towards = torch.nn.functional.normalize(image - mean, dim=1)
    assert (pull(image) * towards).sum(1).min() > 0
    assert abs((pull(ends) * towards).sum(1).mean()) < 0.15 * (pull(image) * towards).sum(1).mean()


def test_from_one_start_sds_particles_end_together_and_vsd_particles_spread_out(tmp_path):
    """The score of the particles is exact: that of a mixture of points. It repels only points whose noised densities
    overlap, so the images must be near one another."""

    class Points(Given):
        def x0(self, z, t, condition, w=None):
            alpha, sigma = (value.view(-1, 1) for value in EVERY.at(t))
            points = torch.stack(list(self.x.state)).detach().flatten(1).double()
            return posterior(z.flatten(1).double(), points, alpha, sigma, 0.0)[0].view(z.shape).to(z.dtype)

    images = Digits(4)
    start, between = images.data[3].float().repeat(24, 1), torch.pdist(images.data).mean()
    together = sds(images, start, tmp_path / "sds")
    apart = sds(images, start, tmp_path / "vsd", Points)
    assert torch.pdist(together).mean() < 0.15 * between
    assert torch.pdist(apart).mean() > 0.85 * between
    assert len(torch.cdist(apart, images.data).argmin(1).unique()) >= 9


# --- Networks ---


def vsd(teacher, count=3, particles=None, prompt=PROMPT, **given):
    torch.manual_seed(0)
    config = VSDConfig(**{"guidance_scale": 2.0, **given})
    return config.create(ObjectiveMaterials(teacher, particles or Latents(teacher, count), prompt, settings(6)))


def gradients(module):
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def stir(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


def test_no_gradient_reaches_the_teacher_or_the_other_player(teacher):
    method = vsd(teacher)
    stir(method.fake)
    batch = {"particles": torch.arange(3)}
    first, second = method.turns(0)
    assert (first.player, second.player) == ("particles", "score")
    first.loss(batch)[0].backward()
    assert gradients(method.particles) and not gradients(method.fake) and not gradients(teacher.network)
    for parameter in method.particles.parameters():
        parameter.grad = None
    second.loss(batch)[0].backward()
    assert gradients(method.fake) and not gradients(method.particles) and not gradients(teacher.network)


def test_a_new_lora_score_equals_the_teachers_and_training_it_does_not_change_the_teacher(teacher):
    """The teacher has no LoRA. The network with the LoRA is another module, and they share only frozen weights."""
    method = vsd(teacher, guidance_scale=1.0)
    x, t, noise = torch.randn(3, *teacher.latent_shape), torch.tensor([50, 500, 950]), torch.randn(3, 4, 8, 8)
    at = partial(method.scores[0].at, x, [PROMPT] * 3, t, noise)
    assert at().abs().max() < 2e-5
    real = method.scores[0].real.x0(x, t + 1, teacher.encode_prompts([PROMPT] * 3))
    stir(method.fake)
    assert at().abs().max() > 1e-2
    assert torch.equal(method.scores[0].real.x0(x, t + 1, teacher.encode_prompts([PROMPT] * 3)), real)


def test_the_score_is_trained_on_the_same_renders_over_all_timesteps(teacher):
    method = vsd(teacher, score={"turns": 2})
    seen, errors = [], method.fake.errors
    method.fake.errors = lambda x, t, *rest: seen.append((x, t)) or errors(x, t, *rest)
    first, *scores = method.turns(0)
    batch = {"particles": torch.tensor([2, 0])}
    first.loss(batch)
    for turn in scores:
        turn.loss(batch)
    wanted = torch.stack([method.particles.state[n] for n in (2, 0)])
    assert len(seen) == 2 and all(torch.equal(x, wanted) and not x.requires_grad for x, _ in seen)
    torch.manual_seed(0)
    drawn = method.fake.levels.draw(torch.zeros(20_000, 1, 1, 1))[0]
    assert (int(drawn.min()), int(drawn.max())) == (0, 999)


def test_annealing_lowers_the_largest_timestep(teacher):
    method = SDSConfig(guidance_scale=1.0, anneal=Anneal(after=5, time_range=(0.02, 0.5))).create(
        ObjectiveMaterials(teacher, Latents(teacher, 1), PROMPT, settings(10))
    )
    drawn = {}
    for number, score in enumerate(method.scores):
        score.at = lambda x, prompts, t, *rest, key=number: drawn.setdefault(key, []).append(int(t)) or x * 0
    for step in [*range(5)] * 40 + [*range(5, 10)] * 40:
        method.loss({"particles": torch.tensor([0])}, step)
    assert len(drawn[0]) == len(drawn[1]) == 200
    assert max(drawn[0]) > 800 and max(drawn[1]) <= 500 and min(drawn[1]) >= 20


def test_a_particle_that_is_not_viewed_does_not_change(teacher, tmp_path):
    method = vsd(teacher, 4)
    before = [particle.clone() for particle in method.particles.state]
    run(method, tmp_path, 4, lambda step: {"particles": torch.tensor([[0, 2], [2, 0]][step % 2])})
    moved = [not torch.equal(now, then) for now, then in zip(method.particles.state, before, strict=True)]
    assert moved == [True, False, True, False]


def test_resume_gives_the_bits_of_an_uninterrupted_training(teacher, tmp_path):
    def batch(step):
        return {"particles": torch.tensor([step % 4, (step + 1) % 4])}

    def made():
        torch.manual_seed(0)
        materials = ObjectiveMaterials(teacher, Latents(teacher, 4), PROMPT, settings(14))
        return VSDConfig(guidance_scale=2.0).create(materials)

    whole = run(made(), tmp_path / "whole", 4, batch)
    assert run(made(), tmp_path / "parts", 4, batch, every=3, stop=1) is None
    assert list((tmp_path / "parts").glob("step-*"))
    resumed = run(made(), tmp_path / "parts", 4, batch, every=3)
    assert all(torch.equal(*pair) for pair in zip(whole.state, resumed.state, strict=True))


def test_resume_gives_the_same_bits_with_cameras_several_turns_and_accumulation(teacher, tmp_path):
    """A third particle is first seen after the interruption: its optimizer has no state yet."""
    config = NerfConfig(resolution=8, levels=2, samples=4, log2_table_size=6, view_prompts=False)
    seen = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 2, 1, 0, 2])[:, None]

    def made():
        torch.manual_seed(0)
        particles = config.create(RepresentationMaterials(teacher, 3, tmp_path))
        own = settings(6, accumulate=2, ema_decay=0.9)
        objective = VSDConfig(guidance_scale=2.0, score={"turns": 2, "lora": {"rank": 2}})
        return objective.create(ObjectiveMaterials(teacher, particles, PROMPT, own))

    def batch(number):
        if number == 8 and halting:
            raise KeyboardInterrupt
        return {"particles": seen[number]}

    halting = False
    whole = run(made(), tmp_path / "whole", 3, batch, every=1).state_dict()
    halting = True
    with pytest.raises(KeyboardInterrupt):
        run(made(), tmp_path / "parts", 3, batch, every=1)
    halting = False
    kept = [path.name for path in (tmp_path / "parts").glob("step-*")]
    assert kept and max(kept) < "step-00000005"
    resumed = run(made(), tmp_path / "parts", 3, batch, every=1).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_each_turn_of_the_score_sees_every_render_once(teacher):
    """With two turns of the score and two batches a step, each turn sees both renders in order."""
    method = vsd(teacher, score={"turns": 2})
    seen, errors = [], method.fake.errors
    method.fake.errors = lambda x, *rest: seen.append(x) or errors(x, *rest)
    first, *scores = method.turns(0)
    batches = [{"particles": torch.tensor([number])} for number in (1, 2)]
    for turn in (first, *scores):
        for part in batches:
            turn.loss(part)
    one, two = (method.particles.state[number][None] for number in (1, 2))
    assert [torch.equal(x, wanted) for x, wanted in zip(seen, [one, two, one, two], strict=True)] == [True] * 4
    assert not method._renders


def test_view_prompts_that_the_teacher_does_not_know_are_errors_with_a_remedy():
    adapter = adapter_around(pixel_unet(3).requires_grad_(False), PixelDiffusion)
    adapter.schedule, adapter.prediction, adapter.latent_shape = SCHEDULE, "epsilon", (3, 8, 8)
    adapter._classes = {"0": 0, "1": 1, "2": 2}
    for views in (True, False):
        config = NerfConfig(resolution=8, levels=1, samples=2, view_prompts=views)
        particles = config.create(RepresentationMaterials(adapter, 1, Path()))
        materials = ObjectiveMaterials(adapter, particles, "1", settings(1))
        if views:
            with pytest.raises(StageError, match=r"set representation\.view_prompts: false"):
                SDSConfig(guidance_scale=1.0).create(materials)
        else:
            SDSConfig(guidance_scale=1.0).create(materials)


def test_a_prompt_that_the_teacher_does_not_know_gives_one_sentence():
    adapter = adapter_around(pixel_unet(3), PixelDiffusion)
    adapter.schedule, adapter.prediction, adapter.latent_shape = SCHEDULE, "epsilon", (3, 8, 8)
    adapter._classes = {"0": 0, "1": 1, "2": 2}
    particles = Latents(adapter, 1)
    with pytest.raises(StageError, match="'a horse' is not a class of the teacher"):
        SDSConfig(guidance_scale=1.0).create(ObjectiveMaterials(adapter, particles, "a horse", settings(1)))


# --- Cameras ---


class Boxes(Representation):
    """Latents with cameras: every camera sees the same latents."""

    solid = True

    def __init__(self, teacher):
        super().__init__(teacher, 2)
        self.state = torch.nn.ParameterList([torch.zeros(teacher.latent_shape) for _ in range(2)])

    def draw(self, particles):
        return Views(particles, Cameras.draw(len(particles), CameraRange()))

    def fixed(self, most):
        return Views(torch.arange(most), Cameras.spread(most, CameraRange()))

    def render(self, views):
        return Rendering(torch.stack([self.state[n] for n in views.particles.tolist()]), {})

    def images(self, views):
        raise NotImplementedError

    def prompts(self, prompt, views):
        return views.cameras.prompts(prompt)


def test_the_score_gets_the_camera_and_the_plain_prompt_and_the_teacher_the_view(teacher):
    method = vsd(teacher, particles=Boxes(teacher))
    asked = {"real": [], "fake": []}
    score = method.scores[0]
    score.at = lambda x, prompts, t, noise, condition, w: asked["real"].append((prompts, condition)) or x * 0
    method.turns(0)[0].loss({"particles": torch.tensor([0, 1])})
    ((prompts, condition),) = asked["real"]
    assert all(prompt.startswith(f"{PROMPT}, ") and prompt.endswith(" view") for prompt in prompts)
    plain = teacher.encode_prompts([PROMPT] * 2)
    assert torch.equal(condition.tensors["text"], plain.tensors["text"])
    matrices = condition.tensors[CAMERA].view(2, 4, 4)
    assert not torch.equal(matrices[0], matrices[1])
    torch.testing.assert_close(matrices[:, :3, :3] @ matrices[:, :3, :3].mT, torch.eye(3).expand(2, 3, 3))


def test_a_camera_is_dropped_one_time_in_ten():
    torch.manual_seed(0)
    rows = dropped(torch.ones(5000, 16), 0.1)
    assert set(rows.sum(1).tolist()) == {0.0, 16.0}
    assert float((rows.sum(1) == 0).float().mean()) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("classes", [None, 3, "text"])
def test_a_new_camera_input_changes_nothing_and_a_trained_one_does(teacher, classes):
    adapter = teacher
    if classes != "text":
        adapter = adapter_around(pixel_unet(classes).requires_grad_(False), PixelDiffusion)
        adapter.schedule, adapter.prediction, adapter.latent_shape = SCHEDULE, "epsilon", (3, 8, 8)
        adapter._classes = None if classes is None else {"": 0, "1": 1, "2": 2}
    prompts = {"text": [PROMPT, ""], 3: ["1", "2"], None: ["", ""]}[classes]
    fake = FakeScore.from_teacher(adapter, LoraSettings(rank=2))
    z, t = torch.randn(2, *adapter.latent_shape), torch.tensor([100, 900])
    condition = fake.encode(prompts)
    with torch.no_grad():
        plain = fake.x0(z, t, condition)
        adapter.with_camera(fake.network)
        camera = Cameras.draw(2, CameraRange()).to_world().flatten(1)
        seen = Condition(2, {**condition.tensors, CAMERA: camera})
        torch.testing.assert_close(fake.x0(z, t, seen), plain)
        trained = {name for name, value in fake.named_parameters() if value.requires_grad and "layers" in name}
        assert len(trained) == 4
        stir(fake.network.class_embedding)
        assert (fake.x0(z, t, seen) - plain).abs().max() > 1e-3
        other = Condition(2, {**condition.tensors, CAMERA: torch.zeros_like(camera)})
        assert (fake.x0(z, t, seen) - fake.x0(z, t, other)).abs().max() > 1e-4


def test_cameras_look_at_the_origin_and_rays_leave_through_the_centres_of_pixels():
    cameras = Cameras(*(torch.tensor(of) for of in ([0.0, 90.0], [0.0, 30.0], [3.0, 2.0], [60.0, 40.0])))
    matrix = cameras.to_world()
    torch.testing.assert_close(matrix[0, :3, 3], torch.tensor([3.0, 0.0, 0.0]))
    torch.testing.assert_close(matrix[1, :3, 3], 2 * torch.tensor([0.0, 3**0.5 / 2, 0.5]))
    origins, rays = cameras.rays(4)
    torch.testing.assert_close(rays.norm(dim=-1), torch.ones(2, 4, 4))
    torch.testing.assert_close(
        rays[:, 1:3, 1:3].mean((1, 2)), -origins / origins.norm(dim=1, keepdim=True) * 0.98, atol=0.03, rtol=0
    )
    assert (rays[:, 0, :, 2] > rays[:, 3, :, 2]).all()  # the first row is the upper one
    assert (rays[0, :, 3, 1] > rays[0, :, 0, 1]).all()  # from +x, +y is to the right
    edge = torch.tensor([-1.0, 0.75 * 3**-0.5, 0.75 * 3**-0.5])  # the centre of the upper right pixel
    torch.testing.assert_close(rays[0, 0, 3], edge / edge.norm())


def test_rays_are_exact_under_autocast():
    cameras = Cameras.spread(3, CameraRange())
    with torch.autocast("cpu", torch.bfloat16):
        _, rays = cameras.rays(5)
    assert torch.equal(rays, cameras.rays(5)[1])


@pytest.mark.parametrize(
    ("azimuth", "wanted"), [((-180, 180), [0, 90, 180, 270]), ((-40, 40), [-30, -10, 10, 30]), ((20, 20), [20] * 4)]
)
def test_fixed_cameras_are_spread_over_the_azimuths_of_the_random_ones(azimuth, wanted):
    cameras = Cameras.spread(4, CameraRange(azimuth=azimuth, elevation=(0, 20), distance=(2, 3)))
    assert cameras.azimuth.tolist() == wanted
    assert cameras.elevation.tolist() == [10] * 4 and cameras.distance.tolist() == [2.5] * 4


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        (0, 0, "front"),
        (-44, 10, "front"),
        (46, 0, "side"),
        (180, 0, "back"),
        (-136, 5, "back"),
        (400, 0, "front"),
        (0, 61, "overhead"),
    ],
)
def test_prompts_name_the_view(azimuth, elevation, view):
    cameras = Cameras(*(torch.tensor([float(value)]) for value in (azimuth, elevation, 3, 40)))
    assert cameras.prompts("a cube") == [f"a cube, {view} view"]
