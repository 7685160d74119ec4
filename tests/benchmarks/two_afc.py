"""Tests whether a calibrated network finds the weaker distortion closer, even in families that its heads were not
trained on.

    python -m tests.benchmarks.two_afc PERCEPTUAL [--threads 1]

PERCEPTUAL is the folder of a sealed `perceptual` artifact with synthetic triplets and a trained trunk. The trunk is not
changed. For each of the six families, new heads are calibrated on the other five with the artifact's settings, and
tested on the held-out images of this family. Prints, in Markdown, the scores of two-alternative forced choice of three
distances: the network, the mean squared error in its space, and the same heads on the untrained trunk. Also prints how
much higher the network scores than each of the other two on the same triplets, with the standard error of the
difference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from pipeline.store import load_artifact
from stages.data.triplets.config import Synthetic
from stages.data.triplets.families import FAMILIES
from stages.losses.regression import mse
from stages.networks import perceptual
from stages.networks.perceptual import LPIPS
from stages.networks.vgg import VGG
from stages.perceptual import Perceptual
from stages.perceptual.config import Recipe
from stages.perceptual.judgement import judged
from stages.perceptual.source import Source
from stages.perceptual.train import calibrate


def finished(generator):
    """Run a stage's generator, ignore its progress, and return its result."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perceptual", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    artifact = load_artifact(given.perceptual)
    stage = artifact.stage
    assert isinstance(stage, Perceptual) and isinstance(stage.triplets, Synthetic)
    trunk, _, about = perceptual.read(given.perceptual)
    torch.manual_seed(artifact.seed)
    untrained = VGG(about.channels, about.width, about.space).eval()  # as it was before it was trained
    print(
        "| held-out family | this network | MSE | untrained | above MSE | above untrained |\n|---|---|---|---|---|---|"
    )
    for family in FAMILIES:
        triplets = stage.triplets.model_copy(update={"held_out_family": family})
        recipe = Recipe(stage.space, stage.width, None, triplets, stage.calibration, artifact.inputs["latents"])
        with tempfile.TemporaryDirectory() as folder:
            source = Source(recipe, stage.execution, Path(folder))
            known = finished(source.encoded(source.triplets(False), "triplets"))
            heads, _ = finished(
                calibrate(trunk, about, known, recipe, stage.execution, artifact.seed + 1, Path(folder))
            )
            tests = finished(source.encoded(source.triplets(True), "test triplets"))
            metrics = {"own": LPIPS(trunk, heads, about), "mse": mse, "untrained": LPIPS(untrained, heads, about)}
            found = judged(metrics, tests, torch.device("cpu"))[family]["metrics"]
        below = " | ".join(
            f"{found[name]['below']:+.3f} ± {found[name]['below_se']:.3f}" for name in ("mse", "untrained")
        )
        scores = " | ".join(f"{found[name]['score']:.3f}" for name in ("own", "mse", "untrained"))
        print(f"| {family} | {scores} | {below} |", flush=True)


if __name__ == "__main__":
    main()
