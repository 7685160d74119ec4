"""How much do images of one prompt differ? A student's, as a share of its teacher's.

    python -m tests.benchmarks.diversity PROBE STUDENT... [--prompts 64] [--noises 4]

PROBE and STUDENTs are folders of sealed artifacts; all students are of one teacher. Prompts of the pairs held out are
each drawn from several fresh noises, the same for all sides; diversity is the mean distance between two images of one
prompt in the probe's features (after DreamDiv of 2405.05967, which takes DreamSim's). Prints, in Markdown, that of
each, and its ratio to the teacher's, with a standard error over the prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline.store import load_artifact
from stages.base import Execution
from stages.data.noise import noise_for
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.distill import sources
from stages.metrics.distances import diversity
from stages.networks.probe import Classifier
from stages.networks.student import Student
from stages.networks.teachers import load_network, solve

SEED = 12345
"""Of the noises: not one that pairs are made with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probe", type=Path)
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--noises", type=int, default=4)
    given = parser.parse_args()
    students = [load_artifact(folder) for folder in given.students]
    pairs = sources(students[0].inputs)[0]
    teacher = load_network(pairs.inputs["teacher"].folder, Execution())
    reader = PairReader(read_list(pairs.folder))
    held_out = min(artifact.stage.held_out for artifact in students)
    known = list(dict.fromkeys(reader.batch(range(len(reader) - held_out, len(reader))).prompts))
    prompts = [prompt for prompt in known[: given.prompts] for _ in range(given.noises)]
    noise = np.stack([noise_for(SEED, i, teacher.latent_shape, np.dtype(np.float32)) for i in range(len(prompts))])
    classifier = Classifier.load(given.probe, teacher.device)

    def per_prompt(latents: torch.Tensor) -> np.ndarray:
        features, _ = classifier.look(teacher.decode(part) for part in latents.split(64))
        groups = np.split(features, len(prompts) // given.noises)
        return np.array([diversity(group, ["same"] * given.noises) for group in groups])

    print("| | diversity | over the teacher's |\n|---|---|---|")
    with torch.inference_mode():
        of_teacher = per_prompt(solve(teacher, noise, prompts, pairs.stage.sampler).float())
        print(f"| teacher | {of_teacher.mean():.3f} | |", flush=True)
        for artifact in students:
            student = Student.load(artifact.folder, teacher)
            own = per_prompt(student(teacher.to_device(noise), student.encode(prompts)))
            ratio = own.mean() / of_teacher.mean()
            spread = (own - ratio * of_teacher).std(ddof=1) / of_teacher.mean() / len(own) ** 0.5
            name = f"{artifact.stage.method.name}, distill/{artifact.fingerprint[:8]}"
            print(f"| {name} | {own.mean():.3f} | {ratio:.3f} ± {spread:.3f} |", flush=True)


if __name__ == "__main__":
    main()
