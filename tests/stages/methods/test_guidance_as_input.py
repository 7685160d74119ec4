"""Pairs with a guidance scale for each sample, and one-step students that take it as an input."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from stages.data.export import to_huggingface, to_parquet
from stages.data.noise import guidance_scale_for
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler
from stages.losses.config import Regression
from stages.methods.base import Materials, StudentTraining
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.dmd.config import DMDConfig
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.networks.student import Student
from stages.networks.teachers import solve
from tests.support.cli import retort
from tests.support.pipelines import TINY, execute, plan_of

DRAWN = """
  drawn:
    kind: pairs
    teacher: teacher
    prompts: digits
    count: 96
    shard_size: 32
    sampler: {steps: 5, guidance_scale: [1.0, 8.0]}
    execution: {micro_batch: 16, threads: 1}
"""
STUDENTS = """
  taught:
    kind: distill
    matrix:
      method:
        - {as: kd, value: {name: knowledge_distillation}}
        - {as: gan, value: {name: diffusion2gan, loss: l1}}
        - {as: dmd, value: {name: dmd}}
    pairs: drawn
    training: {steps: 4, batch_size: 8, learning_rate: 1e-3, ema_decay: 0.0}
    held_out: 24
    execution: {threads: 1}
  measured: {kind: evaluate, student: taught, samples: 30, teacher_steps: [2], execution: {threads: 1}}
  at_scale:
    kind: evaluate
    matrix: {guidance_scale: [1.0, 6.0]}
    student: "taught[method=kd]"
    samples: 20
    teacher_steps: []
    execution: {threads: 1}
"""
SCALES = np.array([guidance_scale_for(0, i, 1.0, 8.0) for i in range(96)])


@pytest.fixture(scope="module")
def made(tiny):
    return execute(TINY + DRAWN + STUDENTS, tiny[0], name="drawn")


def test_scales_are_uniform_and_independent_of_the_noise():
    scales = np.array([guidance_scale_for(3, i, 1.0, 8.0) for i in range(4000)])
    assert scales.min() >= 1 and scales.max() < 8
    assert abs(scales.mean() - 4.5) < 4 * 7 / 12**0.5 / 4000**0.5
    assert np.abs(np.sort(scales) - np.linspace(1, 8, 4000)).max() < 7 * 1.63 / 4000**0.5  # Kolmogorov-Smirnov, 1 %
    assert len(np.unique(scales)) > 3990


def test_each_pair_is_solved_at_its_own_scale(made, teacher):
    pairs = PairReader.of(made["drawn"].artifact, ("noise", "latent", "guidance_scale")).batch(range(96))
    assert np.array_equal(pairs.arrays["guidance_scale"], SCALES)
    for i in (0, 33, 95):
        with torch.inference_mode():
            alone = solve(
                teacher, pairs.noise[i : i + 1], [pairs.prompts[i]], Sampler(steps=5, guidance_scale=float(SCALES[i]))
            )
        assert np.abs(alone.numpy() - pairs.latent[i].astype(np.float32)).max() < 2e-3  # stored in float16


def test_stats_show_the_histogram_of_the_scales(made, tiny, tmp_path):
    folder = made["drawn"].artifact.folder
    done = retort("stats", folder, "--json", "--html", tmp_path / "page.html")
    found = json.loads(done.stdout)["arrays"]["guidance_scale"]
    assert found["histogram"] == np.histogram(SCALES, bins=96, range=(0, 24))[0].tolist()
    assert found["mean"] == pytest.approx(SCALES.mean())
    assert (tmp_path / "page-guidance_scale.svg").exists()
    assert "guidance_scale" in retort("stats", folder).stdout


@pytest.mark.parametrize("method", ["kd", "gan", "dmd"])
def test_a_student_takes_the_scale_as_an_input(made, teacher, method):
    artifact = made[f"taught[method={method}]"].artifact
    about = json.loads((artifact.folder / "student.json").read_text())
    assert about["w_range"] == [0.0, 7.0] and about["guidance_scale"] is None
    assert "It takes any guidance_scale from 1 to 8" in (artifact.folder / "README.md").read_text()
    student = Student.load(artifact.folder, teacher)
    noise, condition = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"] * 2)
    with torch.no_grad():
        low, high = (student(noise, condition, torch.full((2,), w)) for w in (0.0, 7.0))
    assert (low - high).abs().max() > 1e-6


@pytest.mark.parametrize("config", [
    KnowledgeDistillationConfig(name="knowledge_distillation"),
    Diffusion2GANConfig(name="diffusion2gan", loss=Regression(name="l1"), gan_weight=0),
    DMDConfig(name="dmd"),
], ids=["kd", "gan", "dmd"])  # fmt: skip
def test_training_gives_each_pair_its_own_scale(teacher, config):
    """The loss uses the w of each pair: with another w for one pair, the loss changes."""
    method = config.create(Materials(teacher, StudentTraining(steps=1, batch_size=2), guidance_scale=(1.0, 8.0)))
    with torch.no_grad():
        for name, weights in method.student.named_parameters():
            if "cond_proj" in name:
                weights.normal_(generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    noise, latent = torch.randn(2, 2, *teacher.latent_shape, generator=generator)
    pairs = {"noise": noise, "latent": latent, "prompts": ["a red handwritten seven", "a blue handwritten two"]}
    losses = []
    for w in ([1.0, 5.0], [1.0, 5.0], [1.0, 2.0]):
        torch.manual_seed(0)
        loss = method.turns(1)[0].loss({"pairs": {**pairs, "w": torch.tensor(w)}})[0]
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_held_out_pairs_are_compared_at_their_own_scales(made, teacher):
    artifact = made["taught[method=kd]"].artifact
    pairs = PairReader.of(made["drawn"].artifact).batch(range(72, 96))
    student = Student.load(artifact.folder, teacher)
    with torch.no_grad():
        w = torch.from_numpy(SCALES[72:] - 1)
        x0 = student(teacher.to_device(pairs.noise), student.encode(pairs.prompts), w)
    error = float((x0 - torch.from_numpy(pairs.latent).float()).square().mean())
    assert artifact.record["metrics"]["held_out_mse"] == pytest.approx(error, rel=1e-4)


def test_plain_diffusers_passes_the_scale_to_the_student(made, teacher):
    from diffusers import DiffusionPipeline

    folder = made["taught[method=kd]"].artifact.folder
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    student = Student.load(folder, teacher)
    noise, prompts = torch.randn(2, *teacher.latent_shape), ["a red handwritten seven", "a blue handwritten two"]
    for scale in (1.5, 6.0):
        plain = pipeline(
            prompts, guidance_scale=scale, num_inference_steps=1, latents=noise, output_type="latent"
        ).images
        with torch.no_grad():
            ours = student(noise, student.encode(prompts), torch.full((2,), scale - 1))
        torch.testing.assert_close(plain, ours, atol=1e-4, rtol=1e-4)


def test_an_evaluation_measures_at_each_pairs_scale_or_at_one(made, tiny):
    metrics = made["measured[method=kd]"].artifact.record["metrics"]
    assert metrics["guidance_scale"] == [1.0, 8.0] and metrics["sides"]["teacher_5"]["latent_mse"] == 0
    student = made["taught[method=kd]"].artifact
    sides = {scale: made[f"at_scale[guidance_scale={scale}]"].artifact.record["metrics"] for scale in (1.0, 6.0)}
    assert sides[1.0]["sides"]["teacher_5"]["network_calls"] == 5
    assert sides[6.0]["sides"]["teacher_5"]["network_calls"] == 10 and sides[6.0]["student"] == student.fingerprint
    assert sides[1.0]["sides"]["student"]["latent_mse"] != sides[6.0]["sides"]["student"]["latent_mse"]
    compared = json.loads(retort("compare", "drawn", "--store", tiny[0], "--html", tiny[0] / "c.html", "--json").stdout)
    titles = [section["title"] for section in compared["sections"]]
    assert len(titles) == 3 and sum("guidance scale [1.0, 8.0]" in title for title in titles) == 1
    assert sum("guidance scale 6.0" in title for title in titles) == 1


def test_scales_are_exported(made, tmp_path):
    to_parquet(made["drawn"].artifact, tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet")["guidance_scale"].to_pylist() == SCALES.tolist()
    to_huggingface(made["drawn"].artifact, tmp_path / "hub")
    assert "| `guidance_scale.npy` | float32 | () |" in (tmp_path / "hub/README.md").read_text()


@pytest.mark.parametrize(("old", "new", "path", "words"), [
    ("[1.0, 8.0]", "[8.0, 1.0]", "sampler.guidance_scale", "two numbers"),
    ("[1.0, 8.0]", "[0.5, 8.0]", "sampler.guidance_scale", "at least 1"),
    ("[1.0, 8.0]", "0.5", "sampler.guidance_scale", "1"),
    ("{name: dmd}", "{name: dmd2, guidance_scale: null}", "method", "learns one guidance scale"),
    ("[1.0, 6.0]", "[1.0, 9.0]", "guidance_scale", "takes scales of [1, 8]"),
    ("pairs: drawn", "pairs: [drawn, pairs]", "method", "[1, 8] and 2"),
    ("pairs: drawn", "pairs: [drawn, pairs]", "pairs", "use pairs of one kind"),
    ("[1.0, 8.0]", "fast", "sampler.guidance_scale", "should be a number, or a list of two numbers, not 'fast'"),
])  # fmt: skip
def test_scales_that_do_not_fit_are_refused(tiny, old, new, path, words):
    text = TINY + DRAWN + STUDENTS
    assert old in text
    with pytest.raises(ManifestError) as refused:
        plan_of(text.replace(old, new), tiny[0])
    assert path in str(refused.value) and words in str(refused.value)
    assert "function" not in str(refused.value) and "constrained" not in str(refused.value)


def test_the_settings_survive_a_round_trip():
    from pipeline.manifest.model import dump

    loaded = loads(TINY + DRAWN + STUDENTS, "m.yaml")
    assert loads(dump(loaded.manifest), "again.yaml").manifest == loaded.manifest
