"""Distillation of guided models: both stages' targets in closed form, the stochastic sampler, one student for all w."""

import json
import re

import pytest
import torch

from pipeline.commands.console import find_artifact
from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import loads
from pipeline.manifest.model import dump
from pipeline.store import load_artifact
from stages.base import StageError
from stages.diffusion.few_step import noising, sample
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.diffusion.guidance import embed, guide_by_w
from stages.diffusion.halving import two_step_target
from stages.methods.guided.config import GuidedConfig
from stages.networks.denoiser import ManyStep
from stages.networks.student import Student, export
from stages.reports.sampling import draw
from tests.support.networks import drawn, shaken
from tests.support.pipelines import TINY, execute, plan_of

CHAIN = """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  guided:
    kind: distill
    latents: latents
    method: {name: guided, start_steps: 4, end_steps: 2, w_range: [0.0, 4.0]}
    training: {steps: 8, batch_size: 16, learning_rate: 1e-3, ema_decay: 0.0}
    execution: {threads: 1}
  strengths:
    kind: pairs
    matrix: {sampler.guidance_scale: [1.0, 3.0]}
    teacher: teacher
    prompts: digits
    count: 24
    shard_size: 24
    sampler: {steps: 4}
    execution: {threads: 1}
  quality:
    kind: evaluate
    student: guided
    pairs: strengths
    samples: 20
    teacher_steps: []
    execution: {threads: 1}
"""
MEAN, OTHER_MEAN, STD = 1.5, -0.5, 0.6


@pytest.fixture(scope="module")
def chain(tiny):
    return execute(TINY + CHAIN, tiny[0], name="guided")


def denoised(z, alpha, sigma, mean, std=STD):
    """What the best denoiser of N(mean, std^2) makes of z."""
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)


# --- Arithmetic ----------------------------------------------------------------------------------------


def test_guidance_of_equal_normals_shifts_the_mean_alone():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for alpha, sigma in ((0.9, 0.19**0.5), (0.1, 0.99**0.5)):
        of, none = (denoised(z, alpha, sigma, mean) for mean in (MEAN, OTHER_MEAN))
        for w in (0.0, 1.0, 4.0):
            shifted = denoised(z, alpha, sigma, MEAN + w * (MEAN - OTHER_MEAN))
            torch.testing.assert_close(guide_by_w(none, of, w), shifted, atol=1e-12, rtol=0)
        assert torch.equal(guide_by_w(none, of, 0.0), of)
        wide = denoised(z, alpha, sigma, OTHER_MEAN, std=1.2)
        gains = [alpha * s**2 / (alpha**2 * s**2 + sigma**2) for s in (STD, 1.2)]
        found = guide_by_w(wide, of, 2.0)
        assert float((found[-1] - found[0]) / (z[-1] - z[0])) == pytest.approx(3 * gains[0] - 2 * gains[1])


def test_a_linear_student_of_every_strength_finds_the_guided_gain_affine_in_w():
    """Fitted exactly to its targets: (1 + w) times one class's own gain, less w times that without a class."""
    alpha, sigma, wide = 0.6, 0.8, 1.2
    z, w = (torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(2, -1) * 4).unbind()
    target = guide_by_w(denoised(z, alpha, sigma, OTHER_MEAN, wide), denoised(z, alpha, sigma, MEAN), w)
    gain, by_w, *_ = torch.linalg.lstsq(torch.stack([z, w * z, torch.ones_like(z), w], 1), target[:, None]).solution
    own, none = (alpha * std**2 / (alpha**2 * std**2 + sigma**2) for std in (STD, wide))
    assert float(gain) == pytest.approx(own, abs=1e-10) and float(by_w) == pytest.approx(own - none, abs=1e-10)
    assert own + 4 * (own - none) < 0, "at w = 4 it is turned round"


def test_the_stronger_guidance_the_surer_the_class_and_the_narrower_it_is():
    """Two classes, N(1, 0.6^2) and N(-1, 0.6^2), as likely as one another: samples of the first by 64 steps."""
    grid = Grid.cosine(64)

    def classes(z, alpha=1.0, sigma=0.0):
        """How likely the first is of z: a logistic of the difference of two squares."""
        return torch.sigmoid(2 * alpha * z / (alpha**2 * STD**2 + sigma**2))

    def sampled(w):
        def denoise(z, i):
            first, second = (denoised(z, *grid.level(i), mean) for mean in (1.0, -1.0))
            p = classes(z, *grid.level(i))
            return guide_by_w(p * first + (1 - p) * second, first, w)

        noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return sample("ddim", denoise, noise, grid)

    found = [sampled(w) for w in (0.0, 1.0, 4.0)]
    sure, wide = [float(classes(x).mean()) for x in found], [float(x.std()) for x in found]
    assert float(found[0].mean()) == pytest.approx(1.0, abs=0.02) and wide[0] == pytest.approx(STD, abs=0.02)
    assert sure[0] + 0.02 < sure[1] < sure[2] and wide[0] > wide[1] + 0.02 > wide[2] + 0.04


def test_noising_keeps_the_variance():
    grid = Grid.cosine(16)
    for from_, to in ((0, 1), (3, 4), (13, 15)):
        scale, std = noising(grid.level(from_), grid.level(to))
        here, there = (level[0] ** 2 * STD**2 + level[1] ** 2 for level in (grid.level(from_), grid.level(to)))
        assert scale**2 * here + std**2 == pytest.approx(there, abs=1e-12)


def test_the_stochastic_sampler_calls_n_times_and_keeps_the_marginals():
    """With the exact map over two steps, and one at last: N = 8, mean 1.5, standard deviation 0.6."""
    grid, calls = Grid.cosine(8), []

    def exact(z, i):
        """The x0 with which one DDIM step of double length is the ODE's own."""
        calls.append(i)
        (alpha, sigma), (alpha_s, sigma_s) = grid.level(i), grid.level(max(i - 2, 0))
        here, there = (a**2 * STD**2 + s**2 for a, s in ((alpha, sigma), (alpha_s, sigma_s)))
        end = alpha_s * MEAN + (there / here) ** 0.5 * (z - alpha * MEAN)
        ratio = sigma_s / sigma
        return (end - ratio * z) / (alpha_s - ratio * alpha)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    found = sample("stochastic", exact, noise, grid, generator)
    assert calls == [8, 7, 6, 5, 4, 3, 2, 1]
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.005) and float(found.std()) == pytest.approx(STD, abs=0.004)
    assert not torch.equal(found, sample("stochastic", exact, noise, grid, generator))
    again = [sample("stochastic", exact, noise, grid, torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*again)


def test_a_student_for_stochastic_sampling_jumps_twice_as_far():
    """Its target leads where two of the teacher's jumps do; at the last point, where two halves of one do: to what the
    teacher says at point 1. Here it says the number of the point."""
    grid, asked, z = Grid.cosine(8), [], torch.randn(4, 1, 1, 1, dtype=torch.float64)

    def denoise(z, j):
        asked.append(j.tolist())
        return j.double().view(-1, 1, 1, 1).expand_as(z)

    found = two_step_target(denoise, z, torch.tensor([4, 3, 2, 1]), grid, stochastic=True)
    assert asked == [[8, 6, 4, 2], [6, 4, 2, 1]]
    for target, start, i in zip(found.flatten().tolist(), z.flatten().tolist(), (8, 6, 4), strict=False):
        (a, s), (a_2, s_2), (a_4, s_4) = (grid.level(j) for j in (i, i - 2, i - 4))
        middle = a_2 * i + s_2 / s * (start - a * i)
        end = a_4 * (i - 2) + s_4 / s_2 * (middle - a_2 * (i - 2))
        assert a_4 * target + s_4 / s * (start - a * target) == pytest.approx(end)
    assert float(found[3]) == pytest.approx(1.0)


def test_w_is_embedded_as_diffusers_embeds_it():
    from diffusers import StableDiffusionPipeline

    w = torch.tensor([0.0, 0.5, 3.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(embed(w, 256), expected)


# --- The chain ------------------------------------------------------------------------------------------


def test_the_first_link_takes_as_many_steps_as_the_teacher():
    loaded = loads(TINY + CHAIN, "m.yaml")
    stages = loaded.manifest.stages
    links = [(n, s.method.start_steps, s.method.end_steps, s.start_from) for n, s in stages.items() if "guided" in n]
    assert links == [("guided/4", 4, 4, None), ("guided/2", 4, 2, "guided/4")]
    assert [n for n in stages if n.startswith("quality")] == [
        f"quality/{steps}[guidance_scale={scale}]" for steps in (4, 2) for scale in (1.0, 3.0)
    ]
    assert loads(dump(loaded.manifest), "again.yaml").manifest == loaded.manifest


def test_without_guidance_the_target_is_the_conditional_output_bit_for_bit(teacher):
    grid, z = Grid.trailing(teacher.schedule, 4), torch.randn(3, *teacher.latent_shape)
    condition, i = teacher.encode_prompts(["a red handwritten seven"] * 3), torch.tensor([4, 2, 1])
    many = ManyStep(teacher, grid)
    batch = torch.cat([teacher.encode_prompts([""] * 3), condition])
    t = many.timesteps[i].float()
    with torch.no_grad():
        output = teacher.unet(torch.cat([z, z]), torch.cat([t, t]), batch).sample.chunk(2)[1]
    alpha, sigma = (torch.from_numpy(x)[i].float().view(-1, 1, 1, 1) for x in (grid.alpha, grid.sigma))
    assert torch.equal(many.x0(z, i, condition, torch.zeros(3)), alpha * z - sigma * output)
    guided = many.x0(z, i, condition, torch.full((3,), 2.0))
    torch.testing.assert_close(guided, ManyStep(teacher, grid, 3.0).x0(z, i, condition))
    assert not torch.equal(guided, many.x0(z, i, condition))


def test_w_changes_nothing_before_training_and_something_after(chain, teacher):
    noise = torch.randn(2, *teacher.latent_shape)
    condition = teacher.encode_prompts(["a red handwritten seven", "a blue handwritten two"])
    new = Student.from_teacher(teacher, Form(steps=2, w_range=(0.0, 4.0)))
    trained = Student.load(chain["guided/2"].artifact.folder, teacher)
    with torch.no_grad():
        plain = Student.from_teacher(teacher, Form(steps=2))(noise, condition)
        low, high = (torch.full((2,), w) for w in (0.0, 4.0))
        assert torch.equal(new(noise, condition, low), new(noise, condition, high))
        torch.testing.assert_close(new(noise, condition, low), plain)
        assert (trained(noise, condition, low) - trained(noise, condition, high)).abs().max() > 1e-5
    with pytest.raises(ValueError, match="give w"):
        trained(noise, condition)


def test_every_strength_is_measured_with_one_student(chain):
    for steps in (4, 2):
        for scale in (1.0, 3.0):
            metrics = chain[f"quality/{steps}[guidance_scale={scale}]"].artifact.record["metrics"]
            assert metrics["student"] == chain[f"guided/{steps}"].artifact.fingerprint
            assert metrics["sides"]["student"]["network_calls"] == steps
            assert metrics["sides"]["teacher_4"]["network_calls"] == (4 if scale == 1 else 8)
    card = (chain["guided/2"].artifact.folder / "README.md").read_text()
    assert "any guidance_scale from 1 to 5" in card and "guidance_scale=3, num_inference_steps=2" in card


def test_the_first_link_learns_the_guided_teacher(tiny, teacher):
    """At strengths that this hasty teacher heeds; a new student is the teacher without guidance."""
    text = TINY + CHAIN.split("  strengths")[0].replace("end_steps: 2", "end_steps: 4").replace("4.0]", "30.0]")
    text = text.replace("steps: 8,", "steps: 60,")
    folder = execute(text, tiny[0], name="learns")["guided/4"].artifact.folder
    assert find_artifact("learns/guided", str(tiny[0])) == folder, "a chain of one link needs no other name"
    student = Student.load(folder, teacher)
    untrained = Student.from_teacher(teacher, student.form)
    torch.manual_seed(0)
    z, condition = torch.randn(64, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"] * 64)
    i, w = torch.full((64,), 4), torch.full((64,), 25.0)
    target = ManyStep(teacher, student.grid).x0(z, i, condition, w)
    with torch.no_grad():
        before, after = (float((s.x0(z, i, condition, w) - target).square().mean()) for s in (untrained, student))
    assert after < 0.5 * before


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_plain_diffusers_feeds_guidance_scale_less_one(teacher, tmp_path, w):
    form = Form(steps=4, schedule="cosine", w_range=(0.0, 4.0))
    student = shaken(Student.from_teacher(teacher, form))
    export(student, teacher, tmp_path, "a card")
    assert json.loads((tmp_path / "student.json").read_text())["w_range"] == [0.0, 4.0]
    prompts = ["a red handwritten seven", "a blue handwritten two"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Student.load(tmp_path, teacher)(noise, teacher.encode_prompts(prompts), torch.full((2,), w))
    latents = drawn(tmp_path, noise, prompts, num_inference_steps=4, guidance_scale=1 + w)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)


def test_a_stochastic_chain_runs_and_says_that_its_sampler_is_retorts_own(tiny):
    text = TINY + CHAIN.split("  strengths")[0].replace("w_range", "sampler: stochastic, w_range")
    student = execute(text.replace("steps: 8,", "steps: 2,"), tiny[0], name="stochastic")["guided/2"].artifact
    assert json.loads((student.folder / "student.json").read_text())["sampler"] == "stochastic"
    card = (student.folder / "README.md").read_text()
    assert "Not for plain diffusers: the N-step stochastic sampler is Retort's own" in card and "```python" not in card


def test_images_are_drawn_with_a_link_at_any_strength(chain, tiny, tmp_path):
    """Named as RUN/STAGE, though a link's name has a slash of its own."""
    from PIL import Image

    folder = find_artifact("guided/guided/2", str(tiny[0]))
    assert folder == chain["guided/2"].artifact.folder
    with pytest.raises(UsageError, match="several stages guided; name one: guided/4, guided/2"):
        find_artifact("guided/guided", str(tiny[0]))
    drawn = []
    for scale in (1.0, 1.0, 5.0):
        draw(load_artifact(folder), ["a red handwritten seven"], 2, 0, None, scale, tmp_path / "i.png", pytest.fail)
        drawn.append(Image.open(tmp_path / "i.png").tobytes())
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(StageError, match=r"from 1 to 5, not 7\.5"):
        draw(load_artifact(folder), ["a red handwritten seven"], 2, 0, None, 7.5, tmp_path / "i.png", pytest.fail)


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "words"), [
    ("[1.0, 3.0]", "[1.0, 5.5]", "guidance_scale: 5.5, w = 4.5; the student was trained for w from 0 to 4"),
    ("w_range: [0.0, 4.0]", "w_range: 4.0", "method.w_range: should be a list, not 4.0"),
    ("w_range: [0.0, 4.0]", "w_range: [4.0, 4.0]", "w_range should be two numbers"),
    ("start_steps: 4", "start_steps: 5", "end_steps: should be start_steps: 5 halved one or more times, not 2"),
    ("    latents: latents\n", "    latents: latents\n    start_from: student\n", "the student in start_from takes 1"),
])  # fmt: skip
def test_contradictions_are_errors_of_the_plan(tmp_path, old, new, words):
    assert old in CHAIN
    with pytest.raises(ManifestError, match=words):
        plan_of(TINY + CHAIN.replace(old, new), tmp_path)


def test_a_chain_that_goes_on_has_no_first_link(tmp_path):
    """Nor a budget for it, which would otherwise make one wrong round of all that follow."""
    settings = "method: {name: guided, start_steps: 4, end_steps: 1, w_range: [0.0, 4.0], training_steps: {%s}}"
    text = TINY + CHAIN.split("  strengths")[0]
    more = "  further:" + CHAIN.partition("  guided:")[2].split("  strengths")[0]
    more = re.sub("method: .*", settings, more).replace(
        "latents: latents\n", "latents: latents\n    start_from: guided/4\n"
    )
    plan = plan_of(text + more % "1: 3", tmp_path)
    assert [n for n in plan if n.startswith("further")] == ["further/2", "further/1"]
    with pytest.raises(ManifestError, match=r"training_steps.4: with `start_from` no round has this"):
        plan_of(text + more % "4: 20, 1: 3", tmp_path)
    for start, end, wrong in ((32, 1, True), (32, 8, True), (32, 16, False)):
        found = list(
            GuidedConfig(start_steps=start, end_steps=end).check_start(GuidedConfig(start_steps=32, end_steps=32))
        )
        assert [path for path, _ in found] == (["end_steps"] if wrong else [])


def test_a_teacher_that_cannot_be_guided_is_refused_when_planning(tmp_path):
    text = TINY.replace("      dataset: digits\n", "      dataset: digits\n      drop_text: 0.0\n") + CHAIN
    with pytest.raises(ManifestError, match="needs guidance, but the teacher was trained with drop_text: 0"):
        plan_of(text, tmp_path)
    for classes, words in ((None, "the teacher is unconditional"), (3, "no class that stands for none")):
        folder = tmp_path / f"pixels-{classes}"
        pixel_teacher(folder, classes)
        text = f"name: pixels\nstages:\n  teacher: {{kind: teacher, from: {folder}}}\n"
        text += CHAIN.split("  strengths")[0].replace("images: digits", "images: {name: digits, size: 16}")
        with pytest.raises(ManifestError, match=words):
            plan_of(text, tmp_path)


def pixel_teacher(folder, classes):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, num_class_embeds=classes,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    if classes:
        index = folder / "model_index.json"
        index.write_text(
            json.dumps({**json.loads(index.read_text()), "id2label": {str(i): f"c{i}" for i in range(classes)}})
        )
