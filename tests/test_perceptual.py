"""The perceptual stage: a network trained in a latent space, calibrated, tested, sealed; and its use as a loss."""

import json

import numpy as np
import pytest
import torch

from stages.data.latents import read_latents
from stages.networks.perceptual import LPIPS
from tests.conftest import TINY, execute

METRIC = """
  latents: {kind: latents, teacher: teacher, images: digits}
  perceptual: &network
    kind: perceptual
    latents: latents
    width: 4
    classification: {training: {steps: 150, batch_size: 64, learning_rate: 4e-3}}
    triplets: {name: synthetic, count: 300, test_count: 40}
    calibration: {training: {steps: 40, learning_rate: 4e-3}}
    execution: {threads: 2, checkpoint_every: 30}
"""
PIXELS = METRIC.replace("perceptual: &network", "pixels:").replace(
    "latents: latents", "latents: latents\n    space: pixels"
)
PIXELS = "\n" + PIXELS.partition("images: digits}\n")[2]


@pytest.fixture(scope="module")
def made(tiny):
    """The store of the digits teacher, with both networks in it."""
    store, _ = tiny
    return store, execute(TINY + METRIC + PIXELS, store, only=["latents", "perceptual", "pixels"])


@pytest.fixture(scope="module")
def target(made):
    return torch.from_numpy(read_latents(made[1]["latents"].artifact.folder, held_out=True).batch(slice(0, 8)))


def test_a_network_is_trained_calibrated_tested_and_sealed(made):
    for name, channels in (("perceptual", 4), ("pixels", 3)):
        artifact = made[1][name].artifact
        metrics = artifact.record["metrics"]
        chance = np.mean([1 / 6, 1 / 10])
        assert metrics["top_1"] > 2 * chance, metrics
        assert set(metrics["top_1_by_label"]) == {"colour", "digit"}
        metric = LPIPS.load(artifact.folder)
        assert (metric.about.channels, metric.about.space) == (channels, made[1][name].stage.space)
        assert metric.about.trunk == "trained on digits"
        assert all((head >= 0).all() for head in metric.heads) and any((head > 0).any() for head in metric.heads)
        found = json.loads((artifact.folder / "two_afc.json").read_text())
        assert found["warp"]["count"] == 40 and found["warp"]["ceiling"] == 1.0
        assert set(found["all"]["metrics"]) == {"lpips", "mse", "untrained"}
        assert found["all"]["metrics"]["lpips"]["score"] > 0.6
        assert metrics["two_afc"]["all"] == found["all"]["metrics"]["lpips"]["score"]


def test_training_it_again_or_after_a_kill_comes_to_the_same_bytes(made, tmp_path, monkeypatch): ...
