"""Compares initial weights of the last layer of a one-step student of an epsilon teacher.

    python -m tests.benchmarks.first_layer PAIRS [--steps 250] [--fit 512]

PAIRS is the folder of a sealed `pairs` artifact with at least 1,304 pairs, such as digits_epsilon.yaml's. Students are
trained on its first 1,000 pairs by knowledge distillation (L1, batches of 64, learning rate 1e-3), and measured on the
next 304. The last layer starts from zeros, from a fit with each ridge penalty of stages/networks/head.py, or from the
fit that Retort chooses. Prints the error before and after training. The other pairs are not used, because
digits_epsilon.yaml reports on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from pipeline.store import load_artifact
from stages.data.supply import PairSupply
from stages.methods.base import Materials, StudentTraining
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.networks import head
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from stages.training import TrainingExecution
from stages.training.loop import train

TRAINED, MEASURED = 1000, 304


def tensors(stored: dict) -> dict:
    return {name: v if name == "prompts" else torch.from_numpy(v).float() for name, v in stored.items()}


def error(student: Student, supply: PairSupply) -> float:
    asked = supply.reader.batch(range(TRAINED, TRAINED + MEASURED))
    with torch.no_grad():
        made = student(torch.from_numpy(asked.noise).float(), student.encode(asked.prompts))
    return float((made - torch.from_numpy(asked.latent).float()).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--fit", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    artifact = load_artifact(given.pairs)
    settings = StudentTraining(steps=given.steps, warmup_steps=20)
    ridges = head.RIDGES
    choices = {"zeros": (), **{f"ridge {ridge:g}": (ridge,) for ridge in ridges}, "as chosen": ridges}
    print(f"{'last layer':>12}  {'before':>8}  {'after':>8}")
    for name, head.RIDGES in choices.items():
        torch.manual_seed(0)
        teacher = StableDiffusion(artifact.inputs["teacher"].folder)
        held = artifact.stage.count - TRAINED
        supply = PairSupply([given.pairs], [None], held, settings.batch_size, 0)
        materials = Materials(teacher, settings, examples=lambda supply=supply: tensors(supply.examples(given.fit)))
        method = KnowledgeDistillationConfig().create(materials)
        before = error(method.student, supply)
        with tempfile.TemporaryDirectory() as folder:
            steps = train(
                method,
                lambda step, supply=supply: {"pairs": tensors(supply.batch(step))},
                seed=0,
                checkpoints=Path(folder),
                execution=TrainingExecution(checkpoint_every=10**6),
            )
            try:
                while True:
                    next(steps)
            except StopIteration as end:
                trained = end.value
        print(f"{name:>12}  {before:8.4f}  {error(trained.averages['student'], supply):8.4f}", flush=True)


if __name__ == "__main__":
    main()
