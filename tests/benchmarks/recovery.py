"""Shows why E-LatentLPIPS has an ensemble: which distances, minimised from a random latent, recover a target?

    python -m tests.benchmarks.recovery PERCEPTUAL [--steps 2000] [--targets 8] [--draw docs/recovery.png]

PERCEPTUAL is the folder of a sealed `perceptual` artifact. The targets are held-out latents of the artifact's image
set. Latents ~ N(0, 1) are optimised towards them by Adam at 1e-2, as in the overfitting experiment of the authors
(2405.05967, section 3.2; 15,000 steps there). Every distance has the same start. Prints, in Markdown, the mean squared
error that remains, in latents and in decoded images, with its standard error over the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.store import load_artifact
from stages.base import Execution
from stages.data import pictures
from stages.data.latents import read_latents
from stages.losses.augmentation import Augmentation
from stages.losses.perceptual import PerceptualLoss
from stages.losses.regression import mse
from stages.networks.perceptual import LPIPS
from stages.networks.teachers import load_network

GROUPS = ("b", "g", "c", "o", "bg", "co", "bgc", "bgo", "bgco")
RATE = 1e-2


def distances(folder: Path) -> Iterator[tuple[str, nn.Module | None]]:
    metric = LPIPS.load(folder)
    yield "MSE", None
    yield "LatentLPIPS", PerceptualLoss(metric)
    for groups in GROUPS:
        yield f"E-LatentLPIPS, {groups}", PerceptualLoss(metric, Augmentation(groups))


def recovered(distance: nn.Module | None, target: Tensor, steps: int) -> Tensor:
    """Return the optimised latents (B, C, h, w). Every distance starts from the same latents."""
    torch.manual_seed(0)
    latent = torch.randn_like(target).requires_grad_()
    optimizer = torch.optim.Adam([latent], RATE)
    for _ in range(steps):
        loss = (mse if distance is None else distance)(latent, target).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return latent.detach()


def words(values: Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std() / len(values) ** 0.5):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perceptual", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args()
    latents = load_artifact(given.perceptual).inputs["latents"]
    teacher = load_network(latents.inputs["teacher"].folder, Execution())
    held_out = read_latents(latents.folder, held_out=True)
    target, prompts = torch.from_numpy(held_out.batch(slice(0, given.targets))), held_out.captions[: given.targets]
    images = teacher.decode(target)
    rows: list[pictures.Row] = []

    def add(label: str, decoded: Tensor) -> None:
        rows.append((label, pictures.cut(Image.fromarray(pictures.strip(decoded.numpy())), len(prompts))))

    print(f"{given.targets} targets, {given.steps} steps\n")
    print("| distance | latent MSE | image MSE |\n|---|---|---|")
    add("targets", images)
    for name, distance in distances(given.perceptual):
        latent = recovered(distance, target, given.steps)
        decoded, error = teacher.decode(latent), words(mse(latent, target))
        add(f"{name}\nlatent MSE {error}", decoded)
        print(f"| {name} | {error} | {words(mse(decoded, images))} |", flush=True)
    if given.draw:
        pictures.figure(rows, prompts).save(given.draw)


if __name__ == "__main__":
    main()
