"""Measures how one-step students differ from their teacher, in latents and in the spatial frequencies of their images.

    python -m tests.benchmarks.spectra STUDENT... [--samples 1000]

STUDENTs are folders of sealed artifacts of one pairs stage. All start from the last noises of the pairs. Prints, in
Markdown, for each student: the Fréchet distance between its latents and the teacher's, and the power of its decoded
images in four bands of radial frequency, divided by the teacher's. Values below 1 mean blur, values above 1 noise. The
first row compares the teacher with itself on other noises: these are the values of a perfect student.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline.store import load_artifact
from stages.base import Execution
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.distill import sources
from stages.metrics.distances import frechet_distance
from stages.networks.student import Student
from stages.networks.teachers import load_network

BANDS = (0.0625, 0.125, 0.25, 0.5)
"""Upper ends of the bands, in cycles a pixel. The mean of an image counts in none."""


def powers(images: torch.Tensor) -> np.ndarray:
    """Mean power of images (N, C, H, W) in each band."""
    size = images.shape[-1]
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    lower = (1e-9, *BANDS[:-1])
    return np.array([float(power[(radius >= a) & (radius < b)].sum()) for a, b in zip(lower, BANDS, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=1000)
    given = parser.parse_args()
    students = [load_artifact(folder) for folder in given.students]
    pairs = sources(students[0].inputs)[0]
    teacher = load_network(pairs.inputs["teacher"].folder, Execution())
    reader = PairReader(read_list(pairs.folder))
    last, before = (
        reader.batch(range(len(reader) - end, len(reader) - end + given.samples))
        for end in (given.samples, 2 * given.samples)
    )

    def row(name: str, latents: np.ndarray) -> None:
        distance = frechet_distance(flat(last.latent), flat(latents))
        images = torch.cat([teacher.decode(part) for part in teacher.to_device(latents).split(64)])
        shares = " | ".join(f"{share:.2f}" for share in powers(images) / reference)
        print(f"| {name} | {distance:.1f} | {shares} |", flush=True)

    def flat(latents: np.ndarray) -> np.ndarray:
        return latents.reshape(len(latents), -1).astype(np.float64)

    with torch.inference_mode():
        reference = powers(torch.cat([teacher.decode(part) for part in teacher.to_device(last.latent).split(64)]))
        print("| | Fréchet distance of latents |", " | ".join(f"to {band:g}" for band in BANDS), "|")
        print("|---|---|" + "---|" * len(BANDS))
        row("other noises of the teacher", before.latent)
        for artifact in students:
            student = Student.load(artifact.folder, teacher)
            parts = zip(teacher.to_device(last.noise).split(64), range(0, given.samples, 64), strict=True)
            made = [student(noise, student.encode(last.prompts[at : at + 64])) for noise, at in parts]
            loss = getattr(artifact.stage.method, "loss", None)
            name = f"{artifact.stage.method.name}, {getattr(loss, 'name', loss)}, distill/{artifact.fingerprint[:8]}"
            row(name, torch.cat(made).cpu().numpy())


if __name__ == "__main__":
    main()
