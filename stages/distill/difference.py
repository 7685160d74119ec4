"""Exports a student as a LoRA for its teacher: a low-rank approximation of the difference of their weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages.base import Artifact, Execution, StageError
from stages.data.supply import PairSupply
from stages.distill.card import derived_card
from stages.distill.held_out import comparable, mean_square, sampled
from stages.distill.stage import Distill, sources, teacher_of
from stages.networks.adapter import Adapter
from stages.networks.lora import ADAPTER, FILE, saved_form
from stages.networks.low_rank import Factors, add, differences, share_kept
from stages.networks.student import Student
from stages.networks.teachers import load_network
from stages.pairs import Pairs, stored_scale


def write_lora(artifact: Artifact, rank: int, out: Path) -> str:
    """Write a student to the folder `out` as a LoRA of `rank` for its teacher, with its scheduler and a model card.

    Returns the sentences of the card on what the LoRA loses. Raises StageError if the student's difference to the
    teacher cannot be a LoRA, or if plain diffusers cannot sample the student."""
    if rank < 1:
        raise StageError(f"a LoRA of rank {rank} holds nothing: give a rank of at least 1")
    taught_by = teacher_of(artifact.inputs)
    teacher = load_network(taught_by.folder, Execution())
    student = Student.load(artifact.folder, teacher)
    form = student.form
    scheduler = teacher.student_scheduler(form, student.grid)
    problem = _problem(student, teacher, scheduler)
    if problem:
        raise StageError(problem)
    code = teacher.usage(form, type(scheduler).__name__, lora=True)
    lora = differences(student.network, teacher.network, rank)
    if not lora:
        raise StageError("the student's linear layers and convolutions equal the teacher's: there is no difference")
    cost = f"{_kept(student, teacher, lora)}\n{_measured(artifact, student, teacher, lora)}"
    weights, settings = saved_form(lora, teacher.NETWORK)
    what = f"The difference between a student and its teacher\n{{teacher}}, as a LoRA of rank {rank}.\n\n{cost}\n\n"
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    scheduler.save_pretrained(unfinished / "scheduler")
    save_file(weights, unfinished / FILE, {"format": "pt", ADAPTER: json.dumps(settings)})
    text = derived_card(artifact, form, taught_by, "LoRA", what, code)
    (unfinished / "README.md").write_text(text, encoding="utf-8")
    unfinished.rename(out)
    return cost


def _problem(student: Student, teacher: Adapter, scheduler: Any) -> str | None:
    """Return why the student cannot be exported as a LoRA of its teacher, or None if it can."""
    if student.form.w_range:
        return "the student takes w as an input: the teacher's network has no weights for w, and a LoRA cannot add them"
    if student.lora:
        return f"the student is a LoRA of rank {student.lora.rank} already; its folder holds {FILE}"
    if student.form.prediction == "both":
        return "the student predicts both x0 and the noise: a LoRA cannot enlarge the teacher's last layer for that"
    base, weights = teacher.network.state_dict(), student.network.state_dict()
    added = [value for name, value in weights.items() if name not in base]
    same = all(name in weights and value.shape == weights[name].shape for name, value in base.items())
    if not same or any(value.any() for value in added):  # a guidance embedding of zeros does nothing
        return "the student's network has other sizes than the teacher's (`start:`): a LoRA needs equal sizes"
    problem = teacher.plain_lora_error(student.form)
    if problem:
        return f"plain diffusers cannot load the student as a LoRA: {problem}"
    problem = teacher.plain_error(student.form, student.grid, scheduler)
    return f"plain diffusers cannot sample this student: {problem}" if problem else None


def _kept(student: Student, teacher: Adapter, lora: dict[str, Factors]) -> str:
    share = share_kept(student.network, teacher.network, lora)
    return f"The LoRA keeps {share:.2%} of the squared difference of all weights; biases and norms stay the teacher's."


def _measured(artifact: Artifact, student: Student, teacher: Adapter, lora: dict[str, Factors]) -> str:
    """Return sentences on the errors of the student and of the teacher with the LoRA, or on why there are none."""
    pairs = sources(artifact.inputs)
    if not pairs:
        return "The errors were not measured, because the student has no pairs."
    assert isinstance(artifact.stage, Distill) and isinstance(pairs[0].stage, Pairs)
    if not artifact.stage.held_out:
        return "The errors were not measured, because no pairs were held out."
    if not comparable(student.form, pairs[0].stage.sampler.guidance_scale):
        return "The errors were not measured, because the student is not meant to reproduce its pairs."
    supply = PairSupply([pairs[0].folder], [None], artifact.stage.held_out, 1, 0, stored_scale(pairs[:1]))
    restored = Student(teacher, add(teacher.student_network(), lora), student.grid, student.form).to(teacher.device)
    errors = _errors(student, restored, teacher, supply)
    return (
        f"Mean squared error to the teacher's latents on {len(supply.held)} held-out pairs: {errors[0]:.4g} for the "
        f"student, {errors[1]:.4g} for the teacher with the LoRA. Mean squared difference of their samples: "
        f"{errors[2]:.4g}."
    )


def _errors(student: Student, restored: Student, teacher: Adapter, supply: PairSupply) -> list[float]:
    """Return the mean squared errors of `student` and `restored` on the held-out pairs, and that between the two."""
    samples = [list(sampled(one, teacher, supply)) for one in (student, restored)]
    errors = [mean_square(x0 - latent for x0, latent in one) for one in samples]
    return [*errors, mean_square(x0 - other for (x0, _), (other, _) in zip(*samples, strict=True))]
