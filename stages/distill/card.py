"""The model card of a student, the README.md of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.base import Artifact
from stages.diffusion.config import in_words
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.distill.recipe import Recipe
from stages.losses.config import LossConfig
from stages.methods.base import MethodConfig, Stream
from stages.networks.adapter import Adapter
from stages.networks.lora import LoraSettings
from stages.networks.perceptual import about_of
from stages.pairs import Pairs
from stages.teacher.stage import licence_of


def card(
    recipe: Recipe,
    form: Form,
    teacher: Adapter,
    counts: Mapping[Stream, int],
    figures: Mapping[str, Any],
    fingerprint: str,
) -> str:
    """Return the model card of a student of `form`, in Markdown.

    `counts` is the number of training samples of each data stream. The card states how the student was made, its
    figures, its licence and the code that samples it."""
    data, taught_by, start, training = recipe.data, recipe.teacher, recipe.start, recipe.training
    names = ", ".join(f"{one.kind}/{one.fingerprint}" for one in data)
    begun = "Training started from the teacher's weights."
    if start:
        begun = f"Training continued from distill/{start.fingerprint}."
    if recipe.origin:
        about = recipe.origin.about
        begun = f"Training started from the network of {about['source']}{_at(about)} (licence: {_stated(about)})."
    if training.lora:
        begun += f" LoRA weights of rank {training.lora.rank} were trained, and the teacher's were frozen."
    samples = " and ".join(f"{count} {stream}" for stream, count in counts.items())
    return f"""---
library_name: diffusers
license: {licence_of(taught_by)}
---
# {_counted(form.steps)}-step student

Distilled by Retort (distill/{fingerprint}) with `{_method_and_loss(recipe.method)}`, {training.steps} steps of
{training.batch_size}, from {samples}{f" ({names})" if names else ""} of a teacher
{_origin(taught_by)}{_solved(data)}.
{begun} {_guidance(form)}

{_looked_through(recipe.inputs)}{_quality(recipe.held_out, figures)}{_call(form, teacher, taught_by, training.lora)}
"""


def derived_card(student: Artifact, form: Form, teacher: Artifact, name: str, what: str, code: str) -> str:
    """Return the model card, in Markdown, of a student of `form` that was exported to another format.

    `what` describes the result, with {teacher} in place of the teacher's name. `code` samples an image with it."""
    return f"""---
library_name: diffusers
license: {licence_of(teacher)}
{"tags: [lora]" if name == "LoRA" else "tags: [distilled]"}
---
# {_counted(form.steps)}-step {name}

Made by Retort from distill/{student.fingerprint}. {what.format(teacher=_origin(teacher))} {_guidance(form)}

```python
{_loading(code, teacher)}
```
"""


def _origin(teacher: Artifact) -> str:
    """Return what a teacher is, where it comes from, its fingerprint and its licence."""
    about = teacher.record.get("metrics", {})
    source = about.get("source") or "trained by Retort"
    if about.get("like"):
        source += f", with the pipeline of teacher/{about['like']}"
    lora = about.get("lora")
    fused = ""
    if lora:
        fused = f"\nwith the LoRA {lora['source']}{_at(lora)} at scale {lora['scale']:g} (licence: {_stated(lora)})"
    if "images" in about:
        source = f"the exact denoiser of {about['images']} images, in the latents of {source}"
    return f"({source}{_at(about)}; teacher/{teacher.fingerprint}; licence: {_stated(about)}){fused}"


def _at(about: Mapping[str, Any]) -> str:
    """Return a clause on the commit of a source, or nothing if it has none."""
    return f" at {about['revision']}" if about.get("revision") else ""


def _stated(about: Mapping[str, Any]) -> str:
    return about.get("licence") or "not stated"


def _loading(code: str, teacher: Artifact) -> str:
    """Return `code` with the teacher's hub id in place of "THE TEACHER", and with lines that fuse the teacher's LoRA.

    "THE TEACHER" stays if the hub id is not known. A teacher without a LoRA needs no such lines."""
    about = teacher.record.get("metrics", {})
    line = 'from_pretrained("THE TEACHER")\n'
    loading = line
    if about.get("revision"):
        loading = f'from_pretrained("{about["source"]}", revision="{about["revision"]}")\n'
    if about.get("lora"):
        lora = about["lora"]
        folder, _, file = lora["source"].rpartition("/")
        commit = f', revision="{lora["revision"]}"' if lora.get("revision") else ""
        loading += (
            f'pipeline.load_lora_weights("{folder or "."}", weight_name="{file}"{commit})\n'
            f"pipeline.fuse_lora(lora_scale={lora['scale']:g})\npipeline.unload_lora_weights()\n"
        )
    return code.replace(line, loading)


def _counted(steps: int) -> str:
    return {1: "One", 2: "Two", 4: "Four", 8: "Eight"}.get(steps, str(steps))


def _quality(held_out: int, figures: Mapping[str, Any]) -> str:
    """Return a sentence on the error on held-out pairs, or nothing if it was not measured."""
    if "held_out_mse" not in figures:
        return ""
    error = figures["held_out_mse"]
    return f"Mean squared error to the teacher's latents on {held_out} held-out pairs: {error:.4f}.\n\n"


def _call(form: Form, teacher: Adapter, taught_by: Artifact, lora: LoraSettings | None) -> str:
    """Return the code that samples the student with plain diffusers, or a sentence that says why that is impossible."""
    grid = Grid.of(form, teacher.schedule)
    scheduler = teacher.student_scheduler(form, grid)
    problem = teacher.plain_error(form, grid, scheduler)
    if problem:
        return f"Plain diffusers cannot sample this student: {problem}. `retort sample` can."
    as_lora = lora is not None and not lora.merged
    lora_problem = teacher.plain_lora_error(form) if as_lora else None
    if lora_problem:
        return (
            f"Plain diffusers cannot sample this student: {lora_problem}. `retort sample` can, and `retort export "
            "--pipeline` writes it as a whole pipeline."
        )
    return f"```python\n{_loading(teacher.usage(form, type(scheduler).__name__, as_lora), taught_by)}\n```"


def _solved(data: Sequence[Artifact]) -> str:
    """Return a clause on how the first source of pairs was solved, or nothing if there are no pairs."""
    if not data or not isinstance(data[0].stage, Pairs):
        return ""
    sampler = data[0].stage.sampler
    return f" solved by\n{sampler.name.upper()} in {sampler.steps} steps at guidance {in_words(sampler.guidance_scale)}"


def _guidance(form: Form) -> str:
    """Return a sentence on the student's guidance scale."""
    scale = form.scale
    if isinstance(scale, tuple):
        least, most = scale
        return f"It takes any guidance_scale from {least:g} to {most:g}, without calling its network twice."
    assert scale is not None, "known once the student is trained"
    return f"Guidance {scale:g} is built in."


def _method_and_loss(method: MethodConfig) -> str:
    loss = getattr(method, "loss", None)
    return f"{method.name}, loss {loss.name}" if isinstance(loss, LossConfig) else method.name


def _looked_through(inputs: Mapping[str, Artifact]) -> str:
    """Return a sentence for each perceptual network that the loss uses, with its licence."""
    lines = ""
    for network in (artifact for artifact in inputs.values() if artifact.kind == "perceptual"):
        about = about_of(network.folder)
        through = f"perceptual/{network.fingerprint} ({about.trunk}; licence: {about.licence})"
        lines += f"The loss compared features of {through}.\n\n"
    return lines
