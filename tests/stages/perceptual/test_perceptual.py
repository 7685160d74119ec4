"""The perceptual stage: a network trained in a latent space, calibrated, tested, sealed; and its use as a loss."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from pipeline.errors import ManifestError, StageFailed
from stages.base import StageError
from stages.data.latents import read_latents
from stages.losses.config import LOSSES, LossMaterials
from stages.losses.regression import mse
from stages.networks import perceptual
from stages.networks.perceptual import LPIPS
from stages.networks.stable_diffusion import StableDiffusion
from stages.perceptual.config import Recipe
from stages.perceptual.train import train_perceptual
from stages.teacher.config import SHIPPED
from tests.support.pipelines import TINY, execute, plan_of

LATENT = """
  latents: {kind: latents, teacher: teacher, images: digits}
  perceptual:
    kind: perceptual
    latents: latents
    width: 4
    classification: {training: {steps: 150, batch_size: 64, learning_rate: 4e-3}}
    triplets: {name: synthetic, count: 300, test_count: 40}
    calibration: {training: {steps: 40, learning_rate: 4e-3}}
    execution: {threads: 1, checkpoint_every: 25}
"""


@pytest.fixture(scope="module")
def made(tiny):
    """The store of the digits teacher, with latents and a network in it."""
    store, _ = tiny
    return store, execute(TINY + LATENT, store, only=["latents", "perceptual"])


@pytest.fixture(scope="module")
def target(made):
    return torch.from_numpy(read_latents(made[1]["latents"].artifact.folder, held_out=True).batch(slice(0, 8)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """144 images of 32 pixels with horizontal or vertical stripes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    rows = ["file_name,kind"]
    for i in range(144):
        wave = np.sin(np.arange(32) * generator.uniform(0.5, 1.5) + generator.uniform(0, 6))
        stripes = np.tile(wave[:, None] if i % 2 else wave, (1, 32) if i % 2 else (32, 1))
        Image.fromarray(np.repeat(127 + 100 * stripes[..., None], 3, 2).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'lying' if i % 2 else 'standing'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def in_pixels(pictures, tmp_path_factory):
    """A network for images instead of latents. Its teacher ships with Retort."""
    text = f"""
name: pixels
stages:
  teacher: {{kind: teacher, from: digit_scenes}}
  latents:
    kind: latents
    teacher: teacher
    images: {{name: image_folder, path: {pictures}, size: 32, caption: null, label: kind}}
  perceptual:
    kind: perceptual
    latents: latents
    space: pixels
    width: 4
    classification: {{training: {{steps: 60, batch_size: 32, learning_rate: 4e-3}}}}
    triplets: {{name: synthetic, count: 100, test_count: 20, held_out_family: colour}}
    calibration: {{training: {{steps: 20, learning_rate: 4e-3}}}}
"""
    return execute(text, tmp_path_factory.mktemp("pixels"))["perceptual"].artifact


def test_a_network_is_trained_calibrated_tested_and_sealed(made):
    artifact = made[1]["perceptual"].artifact
    metrics = artifact.record["metrics"]
    assert set(metrics["top_1_by_label"]) == {"colour", "digit"}
    assert metrics["top_1_by_label"]["digit"] > 0.3 and metrics["top_1_by_label"]["colour"] > 1 / 6
    metric = LPIPS.load(artifact.folder)
    assert (metric.about.channels, metric.about.space, metric.about.trunk) == (4, "latents", "trained")
    assert metric.about.std == pytest.approx(1.0, abs=0.2)
    assert all((head >= 0).all() for head in metric.heads)
    assert len({float(weight) for weight in metric.heads[0].flatten()}) > 1  # all were equal before training
    found = json.loads((artifact.folder / "two_afc.json").read_text())
    assert found["warp"]["unseen"] and not found["blur"]["unseen"]
    assert found["warp"]["count"] == 40 and "human_ceiling" not in found["warp"]  # no human judged them
    assert set(found["all"]["metrics"]) == {"latent_lpips_digits", "mse", "untrained"}
    assert found["all"]["metrics"]["latent_lpips_digits"]["score"] > 0.6
    assert metrics["two_afc"]["all"] == found["all"]["metrics"]["latent_lpips_digits"]["score"]


def test_in_pixels_a_standard_vgg_is_trained_on_images(in_pixels):
    metric = LPIPS.load(in_pixels.folder)
    assert metric.about.channels == 3 and metric.about.name == "pixel_lpips_image_folder"
    assert [f.shape[-1] for f in metric.features(torch.zeros(1, 3, 32, 32))] == [32, 16, 8, 4, 2]
    assert in_pixels.record["metrics"]["top_1"] > 0.9


def test_interrupted_anywhere_and_resumed_it_gives_the_same_bytes(made, tmp_path):
    artifact = made[1]["perceptual"].artifact
    stage = artifact.stage
    recipe = Recipe(
        *(stage.space, stage.width, stage.classification, stage.triplets, stage.calibration),
        latents=made[1]["latents"].artifact,
    )

    def attempt(unit, done):
        """Drop the generator where a kill would end it. The unit of its progress shows the phase."""
        phases = []
        for progress in train_perceptual(recipe, stage.execution, artifact.seed, tmp_path, 1):
            phases.append(progress.unit)
            if progress.unit == unit and progress.done >= done:
                break
        return phases

    attempt("classification steps", 60)
    attempt("triplets encoded", 1)  # after classification, before there is a checkpoint of the calibration
    attempt("calibration steps", 10)
    attempt("calibration steps", 30)
    phases = attempt("test triplets encoded", 1)
    assert "classification steps" not in phases and phases[-1] == "test triplets encoded"
    attempt(None, 0)
    for name in (perceptual.WEIGHTS, perceptual.ABOUT, "two_afc.json"):
        assert (tmp_path / name).read_bytes() == (artifact.folder / name).read_bytes(), name


def test_without_classification_the_trunk_is_random_and_the_record_says_so(made, teacher, caplog):
    text = TINY + LATENT.replace(
        "    classification: {training: {steps: 150, batch_size: 64, learning_rate: 4e-3}}\n", ""
    )
    artifact = execute(text, made[0], name="random", only=["perceptual"])["perceptual"].artifact
    assert LPIPS.load(artifact.folder).about.trunk == "random"
    assert "the trunk stay random" in caplog.text and "top_1" not in artifact.record["metrics"]
    loss("latent_lpips", teacher, artifact)
    assert "has random weights: only its heads were trained" in caplog.text


def test_a_network_from_a_folder_is_sealed_and_tested(made, tmp_path):
    own = made[1]["perceptual"].artifact
    text = f"""{TINY}
  latents: {{kind: latents, teacher: teacher, images: digits}}
  taken: {{kind: perceptual, from: {own.folder}}}
  tried: {{kind: perceptual, from: {own.folder}, latents: latents, triplets: {{name: synthetic, test_count: 40}}}}
"""
    plan = execute(text, made[0], name="taken", only=["taken", "tried"])
    for name in ("taken", "tried"):
        assert (plan[name].artifact.folder / perceptual.WEIGHTS).read_bytes() == (
            own.folder / perceptual.WEIGHTS
        ).read_bytes()
    assert plan["tried"].artifact.record["metrics"]["two_afc"] == own.record["metrics"]["two_afc"]
    assert "two_afc" not in plan["taken"].artifact.record["metrics"]
    with pytest.raises(StageFailed, match="compares latents, not pixels"):
        execute(
            text.replace("taken: {kind: perceptual,", "taken: {kind: perceptual, space: pixels,"),
            made[0],
            only=["taken"],
        )


REFUSED = [
    ("{kind: perceptual, latents: latents}", "triplets and calibration missing"),
    ("{kind: perceptual, from: ., calibration: {training: {steps: 1}}, width: 8}", "leave calibration and width out"),
    ("{kind: perceptual, from: ., triplets: synthetic}", "a test on triplets needs latents"),
    ("{kind: perceptual, from: ., latents: latents}", "give triplets, or no latents"),
    (
        "{kind: perceptual, latents: latents, space: pixels, classification: {training: {steps: 1}}, "
        "triplets: synthetic, calibration: {training: {steps: 1}}}",
        "images of 16 pixels are too small for five poolings; give at least 32",
    ),
]


@pytest.mark.parametrize(("stage", "problem"), REFUSED)
def test_invalid_stages_are_refused_when_planning(stage, problem, tmp_path):
    text = f"{TINY}\n  latents: {{kind: latents, teacher: teacher, images: digits}}\n  wrong: {stage}\n"
    with pytest.raises(ManifestError) as error:
        plan_of(text, tmp_path)
    assert problem in str(error.value) and "wrong" in str(error.value)


def loss(name, teacher, artifact=None, **settings):
    """Create a loss as a method gets it."""
    named = {} if artifact is None else {"perceptual": "network"}
    config = LOSSES[name].model_validate({"name": name, **named, **settings})
    contents = {"tiny_vae": "sha256:0"} if "tiny_vae" in settings else {}
    return config.create(LossMaterials(teacher, {} if artifact is None else {"perceptual": artifact}, contents))


def test_the_ensemble_pulls_a_random_latent_to_a_target_and_the_metric_alone_does_not(made, teacher, target):
    """methods.md 2.8, item 5."""
    artifact = made[1]["perceptual"].artifact

    def left(distance):
        torch.manual_seed(0)
        latent = torch.randn_like(target).requires_grad_()
        optimizer = torch.optim.Adam([latent], 5e-2)
        for _ in range(200):
            optimizer.zero_grad()
            distance(latent, target).sum().backward()
            optimizer.step()
        return float(mse(latent.detach(), target).mean())

    assert left(loss("e_latent_lpips", teacher, artifact)) < 0.7 * left(loss("latent_lpips", teacher, artifact))


def test_both_inputs_get_the_same_transformation_which_is_new_at_every_call(made, teacher, target):
    distance = loss("e_latent_lpips", teacher, made[1]["perceptual"].artifact, augment="bgco")
    other = target.flip(0)
    assert (distance(target, target.clone()) == 0).all()
    torch.manual_seed(1)
    first, second = distance(target, other), distance(target, other)
    torch.manual_seed(1)
    assert torch.equal(distance(target, other), first) and not torch.equal(first, second)


def test_the_l1_term_is_off_by_default(made, teacher, target):
    artifact = made[1]["perceptual"].artifact
    plain, both = loss("latent_lpips", teacher, artifact), loss("latent_lpips", teacher, artifact, l1_weight=0.5)
    other = target.flip(0)
    difference = both(target, other) - plain(target, other)
    torch.testing.assert_close(difference, 0.5 * (target - other).abs().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_decoded_losses_compare_images_and_pass_gradients_through_the_decoder(in_pixels, target, tmp_path):
    shipped = StableDiffusion(SHIPPED / "digit_scenes")
    blocks = {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}
    blocks |= {f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")}
    tiny = AutoencoderTiny(**blocks)
    tiny.save_pretrained(tmp_path / "tiny")
    metric = LPIPS.load(in_pixels.folder)
    other = target.flip(0)
    for decode, settings in (
        (lambda z: shipped.vae.decode(z / shipped.vae.config["scaling_factor"]).sample, {}),
        (lambda z: tiny.decode(z).sample, {"tiny_vae": str(tmp_path / "tiny")}),
    ):
        distance = loss("pixel_lpips", shipped, in_pixels, **settings)
        output = target.clone().requires_grad_()
        found = distance(output, other)
        torch.testing.assert_close(found, metric(decode(target), decode(other)), rtol=1e-4, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), output)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    AutoencoderTiny(latent_channels=16, **blocks).save_pretrained(tmp_path / "wide")
    with pytest.raises(StageError, match="decodes latents of 16 channels, the teacher's have 4"):
        loss("pixel_lpips", shipped, in_pixels, tiny_vae=str(tmp_path / "wide"))
    with pytest.raises(StageError, match="cannot be loaded as an AutoencoderTiny"):
        loss("pixel_lpips", shipped, in_pixels, tiny_vae=str(tmp_path))


def test_the_published_lpips_needs_its_weights(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is there, and no machine of the tests can download
    with pytest.raises(StageError, match="use `pixel_lpips` with a `perceptual` stage that has `space: pixels`"):
        loss("lpips", teacher)


@pytest.mark.parametrize("name", ["latent_lpips", "e_latent_lpips"])
def test_a_student_is_trained_with_each_perceptual_loss(made, name):
    text = (
        TINY
        + LATENT
        + f"""
  taught:
    kind: distill
    pairs: pairs
    method: {{name: knowledge_distillation, loss: {{name: {name}, perceptual: perceptual}}}}
    training: {{steps: 60, batch_size: 16}}
    held_out: 32
    execution: {{threads: 1}}
"""
    )
    artifact = execute(text, made[0], name=name, only=["taught"])["taught"].artifact
    assert f"loss {name}" in (artifact.folder / "README.md").read_text()
    assert "licence: apache-2.0" in (artifact.folder / "README.md").read_text()
    history = [json.loads(line)["loss"] for line in (artifact.folder / "history.jsonl").read_text().splitlines()]
    assert sum(history[3:]) < sum(history[:3])


def test_missing_triplets_block_the_stage(tmp_path):
    text = TINY + LATENT.replace("{name: synthetic, count: 300, test_count: 40}", "{name: bapps, path: /nowhere}")
    assert "/nowhere does not exist" in plan_of(text, tmp_path)["perceptual"].why


def test_a_loss_in_the_wrong_space_is_refused_at_its_line(tmp_path):
    text = (
        TINY
        + LATENT
        + """
  taught:
    kind: distill
    pairs: pairs
    method: {name: knowledge_distillation, loss: {name: pixel_lpips, perceptual: perceptual}}
    training: {steps: 20}
    held_out: 32
"""
    )
    with pytest.raises(
        ManifestError, match=r"method\.loss\.perceptual: perceptual compares latents; pixel_lpips needs"
    ):
        plan_of(text, tmp_path)
    for bad, problem in (("{name: e_latent_lpips}", "perceptual: missing"), ("{name: l3}", "'l3'")):
        with pytest.raises(ManifestError, match=problem):
            plan_of(text.replace("{name: pixel_lpips, perceptual: perceptual}", bad), tmp_path)


def test_another_vae_is_warned_about(made, caplog):
    shipped = execute(
        "name: shipped\nstages:\n  teacher: {kind: teacher, from: digit_scenes}\n", made[0], name="shipped"
    )["teacher"].artifact
    artifact = made[1]["perceptual"].artifact
    loss("latent_lpips", StableDiffusion(made[1]["teacher"].artifact.folder), artifact)
    assert "another VAE" not in caplog.text
    loss("latent_lpips", StableDiffusion(shipped.folder), artifact)
    assert "was trained on latents of another VAE" in caplog.text
