"""Time-decoupled teachers: their training, which network is called at which timestep, and their students."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from stages.base import StageError
from stages.data.images.config import Digits
from stages.data.images.labelled import doubled, halved
from stages.data.images.load import load
from stages.diffusion.config import Sampler
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.networks.adapters import adapter_of, family_of
from stages.networks.decoupled import FILE, STRUCTURE, TEXTURE
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from stages.networks.teachers import load_network, solve
from stages.training import TrainingExecution
from tests.support.networks import stable_diffusion_xl_layout
from tests.support.pipelines import TINY, execute, plan_of

HEAD, _, _ = TINY.partition("  pairs:")
HALF = """
    kind: teacher
    train:
      dataset: digits
      vae: teacher
      denoiser: {channels: [16, 32], training: {steps: 4, batch_size: 8}}
"""
HALVES = f"""{HEAD}
  high: {HALF}      times: [500, 1000]
      upscaled: 0.5
    execution: {{threads: 1}}
  low: {HALF}      times: [0, 500]
      crop: 8
    execution: {{threads: 1}}
  both:
    kind: teacher
    structure: high
    texture: low
    execution: {{threads: 1}}
"""
USED = """
  pairs:
    kind: pairs
    teacher: both
    prompts: digits
    count: 48
    shard_size: 16
    sampler: {steps: 4, guidance_scale: 2.0}
    execution: {micro_batch: 16, threads: 1}
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {steps: 4, batch_size: 8}
    held_out: 16
    execution: {threads: 1}
  quality: {kind: evaluate, student: student, samples: 20, teacher_steps: [], execution: {threads: 1}}
"""
PROMPTS = ["a red handwritten seven", "a blue handwritten one", "", "a green handwritten two"]


def made_of(folder, structure, texture, switch=500):
    """A time-decoupled teacher of two pipelines, loaded from `folder`."""
    for half, source in ((STRUCTURE, structure), (TEXTURE, texture)):
        shutil.copytree(source, folder / half)
    (folder / FILE).write_text(json.dumps({"switch": switch}))
    return load_network(folder, TrainingExecution(device="cpu"))


@pytest.fixture(scope="module")
def made(tiny):
    store, _ = tiny
    return execute(HALVES + USED, store, name="halves")


@pytest.fixture(scope="module")
def both(made):
    return load_network(made["both"].artifact.folder, TrainingExecution(device="cpu"))


def noise(teacher, count=4):
    return np.random.default_rng(0).normal(size=(count, *teacher.latent_shape)).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_two_equal_halves_make_the_samples_of_one_network(teacher, tmp_path, steps):
    """Each network is called as often as the grid has points on its side."""
    same = made_of(tmp_path / "same", teacher.folder, teacher.folder)
    assert family_of(type(same)) is StableDiffusion and adapter_of(tmp_path / "same") is type(same)
    calls = {"structure": [], "texture": []}
    for name, half in (("structure", same), ("texture", same.texture)):
        half.network.register_forward_pre_hook(lambda _, given, name=name: calls[name].append(int(given[1])))
    sampler = Sampler(steps=steps, guidance_scale=2.0)
    wanted = solve(teacher, noise(teacher), PROMPTS, sampler)
    assert torch.equal(solve(same, noise(teacher), PROMPTS, sampler), wanted)
    grid = [round(1000 * i / steps) - 1 for i in range(steps, 0, -1)]
    assert calls["structure"] == [t for t in grid if t >= 500]
    assert calls["texture"] == [t for t in grid if t < 500]


@pytest.mark.parametrize(("t", "half"), [(999, STRUCTURE), (500, STRUCTURE), (499, TEXTURE), (0, TEXTURE)])
def test_the_current_timestep_selects_the_network(made, both, t, half):
    alone = load_network(made[{STRUCTURE: "high", TEXTURE: "low"}[half]].artifact.folder, TrainingExecution())
    z = torch.from_numpy(noise(both))
    assert torch.equal(both.denoiser(PROMPTS, 2.0)(z, t), alone.denoiser(PROMPTS, 2.0)(z, t))


def test_a_batch_on_both_sides_of_the_switch_is_split_and_joined(both):
    denoiser = TeacherDenoiser(both, Grid.trailing(both.schedule, 1000), 2.0)
    z, points = torch.from_numpy(noise(both)), torch.tensor([900, 20, 501, 500])
    condition = denoiser.encode(PROMPTS)
    together = denoiser.x0(z, points, condition)
    for row in range(4):
        one = slice(row, row + 1)
        torch.testing.assert_close(
            denoiser.x0(z[one], points[one], condition.select(one)), together[one], atol=1e-5, rtol=1e-5
        )


def test_a_student_starts_from_the_half_that_is_called_at_its_noisiest_level(both):
    for form, half in (
        (Form(), both),
        (Form(steps=2, levels=(999, 100), sampler="consistency", boundary="none"), both),
        (Form(levels=(399,), sampler="consistency", boundary="none"), both.texture),
    ):
        student = Student.from_teacher(both, form, origin=both)
        assert student.adapter is half
        for name, value in half.network.named_parameters():
            assert torch.equal(value, student.network.get_parameter(name))
    assert not torch.equal(*(one.encode_prompts(PROMPTS[:1]).tensors["text"] for one in (both, both.texture)))


def test_halves_share_only_the_vae(made):
    first, high, low = (made[name].artifact for name in ("teacher", "high", "low"))
    for half in (high, low):
        assert (half.folder / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
            first.folder / "vae/diffusion_pytorch_model.safetensors"
        ).read_bytes()
        factors = [json.loads((one.folder / "vae/config.json").read_text())["scaling_factor"] for one in (half, first)]
        assert factors[0] == factors[1]
        assert half.inputs.keys() == {"train.vae.teacher"}
        assert half.record["metrics"]["vae"] == first.fingerprint
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (high.folder / name).read_bytes() != (low.folder / name).read_bytes()


def test_training_can_start_from_a_teacher_of_another_image_size(tiny):
    """With a learning rate of almost 0, all weights stay those of the start."""
    store, plan = tiny
    teacher = plan["teacher"].artifact
    boosted = f"""{HEAD}
  boosted: {HALF.replace("digits", "{name: digits, size: 32}").replace("steps: 4", "steps: 1, learning_rate: 1e-9")}
      start: teacher
"""
    made = execute(boosted, store, name="boosted")["boosted"].artifact
    assert made.record["metrics"]["start"] == teacher.fingerprint
    assert json.loads((made.folder / "unet/config.json").read_text())["sample_size"] == 16
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        before, after = (load_file(one.folder / name) for one in (teacher, made))
        assert before.keys() == after.keys()
        assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())


def test_a_time_decoupled_teacher_is_two_diffusers_folders_and_its_student_one(made):
    from diffusers import DiffusionPipeline

    both, student = made["both"].artifact.folder, made["student"].artifact.folder
    for folder in (both / STRUCTURE, both / TEXTURE, student):
        assert type(DiffusionPipeline.from_pretrained(folder)).__name__ == "StableDiffusionPipeline"
    assert "t >= 500" in (both / "README.md").read_text()
    sides = json.loads((made["quality"].artifact.folder / "metrics.json").read_text())["sides"]
    assert sides.keys() == {"teacher_4", "student"}


@pytest.mark.parametrize("times", [(0, 500), (500, 1000)])
def test_a_half_is_trained_on_its_timesteps_only(times):
    from stages.diffusion.schedule import NoiseSchedule
    from stages.networks.condition import Condition
    from stages.teacher.denoiser import DenoiserTraining
    from stages.training import TrainingSettings

    seen, sizes = [], set()

    def predict(z, level, condition):
        seen.extend(level.timestep.tolist())
        sizes.add(tuple(z.shape[2:]))
        return z

    training = DenoiserTraining(
        torch.nn.Linear(1, 1), lambda texts: Condition(len(texts)), predict, NoiseSchedule.stable_diffusion(),
        "epsilon", 0.0, TrainingSettings(steps=1), times, 4,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = {"latents": torch.randn(2000, 1, 8, 8), "captions": [""] * 2000}
    for _ in range(4):
        training.loss(batch)
    assert (min(seen), max(seen)) == (times[0], times[1] - 1) and sizes == {(4, 4)}


def test_upscaled_images_equal_enlarged_images_of_half_the_size():
    images = load(Digits(), limit=40)
    changed = images.upscaled(0.25, seed=3)
    different = [i for i in range(40) if not np.array_equal(images.images[i], changed.images[i])]
    assert len(different) == 10 and images.upscaled(0.0, seed=3) is images
    some = images.images[different]
    assert np.abs(halved(changed.images[different]) - halved(some)).max() < np.abs(halved(some)).max() / 2
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(torch.from_numpy(halved(some)), scale_factor=2, mode="bilinear")
    assert np.abs(doubled(halved(some)).astype(float) - wanted.numpy()).max() <= 0.5


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    structure: high", "    structure: high\n    switch: 400", "called at times: [400, 1000]"),
        ("times: [0, 500]", "times: [0, 400]", "trained with times: [0, 400], but is called at times: [0, 500]"),
        ("times: [0, 500]", "times: [0, 600]", "called at times: [0, 500]"),
        ("    texture: low", "    texture: teacher", None),
        ("      vae: teacher\n", "", "its VAE is not that of structure"),
        ("    texture: low\n", "", "structure and texture need one another"),
        ("times: [0, 500]", "times: [500, 0]", "the first less than the second"),
        ("      vae: teacher\n", "      vae: {teacher: teacher, max_mse: 0.5}\n", "leave max_mse out"),
        ("crop: 8", "crop: 80", "larger than the images"),
        (
            "    structure: high\n    texture: low",
            "    gaussian: {}\n    switch: 300",
            "switch needs structure and texture",
        ),
        (
            "  both:",
            "  third: {kind: teacher, train: {dataset: digits, vae: both}}\n  both:",
            "it is not a single pipeline",
        ),
        (
            "  both:",
            "  third: {kind: teacher, train: {dataset: digits, start: both}}\n  both:",
            "it is not a single pipeline",
        ),
    ],
)
def test_halves_that_do_not_fit_are_errors_of_the_plan(tmp_path, old, new, expected):
    text = HALVES.replace(old, new)
    if expected is None:
        plan_of(text, tmp_path)
        return
    with pytest.raises(ManifestError) as error:
        loads(text, "test.yaml")
        plan_of(text, tmp_path)
    assert expected in str(error.value)


def test_halves_of_sdxl_keep_the_sizes_that_they_are_conditioned_on(tmp_path):
    source = stable_diffusion_xl_layout(tmp_path / "xl")
    text = f"""
name: xl
stages:
  half: {{kind: teacher, from: {source}, micro_conditioning: {{original_size: [64, 32]}}}}
  both: {{kind: teacher, structure: half, texture: half}}
"""
    folder = execute(text, tmp_path / "store")["both"].artifact.folder
    for half in (STRUCTURE, TEXTURE):
        assert json.loads((folder / half / "micro_conditioning.json").read_text())["original_size"] == [64, 32]


def test_pipelines_of_different_latents_are_refused(teacher, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(teacher.folder, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "sample"}))
    with pytest.raises(StageError, match="structure and texture differ in prediction: v_prediction and sample"):
        made_of(tmp_path / "both", teacher.folder, folder)
