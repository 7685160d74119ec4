"""The student's model card, written as README.md of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.base import Artifact
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.distill.recipe import Recipe
from stages.losses.config import LossConfig
from stages.methods.base import MethodConfig
from stages.networks.exporting import scheduler_of, why_not_plain
from stages.networks.network import NetworkTeacher
from stages.networks.perceptual import about_of
from stages.pairs import Pairs


def card(
    recipe: Recipe, form: Form, teacher: NetworkTeacher, count: int, figures: Mapping[str, Any], fingerprint: str
) -> str:
    """The card of a student of `form`, trained on `count` samples: how it was made, from what, how good, and the exact
    call."""
    data, taught_by, start, training = recipe.data, recipe.teacher, recipe.start, recipe.training
    source = taught_by.record.get("metrics", {})
    origin = source.get("source") or "trained by Retort"
    at = f" at {source['revision']}" if source.get("revision") else ""
    names = ", ".join(f"{one.kind}/{one.fingerprint}" for one in data)
    begun = f"It went on from distill/{start.fingerprint}." if start else "It began with the teacher's weights."
    steps = {1: "One", 2: "Two", 4: "Four", 8: "Eight"}.get(form.steps, str(form.steps))
    return f"""---
library_name: diffusers
license: {source.get("licence") or ("apache-2.0" if origin.startswith("trained") else "unknown")}
---
# {steps}-step student

Distilled by Retort (distill/{fingerprint}) with `{_method_and_loss(recipe.method)}`, {training.steps} steps of
{training.batch_size}, from {count} {data[0].kind} ({names}) of a teacher
({origin}{at}; teacher/{taught_by.fingerprint}; licence: {source.get("licence") or "not stated"}){_solved(data[0])}.
{begun} {_guidance(form)}

{_looked_through(recipe.inputs)}{_quality(recipe.held_out, figures)}{_call(form, teacher)}
"""


def _quality(held_out: int, figures: Mapping[str, Any]) -> str:
    if "held_out_mse" not in figures:
        return ""
    error = figures["held_out_mse"]
    return f"Mean squared error to the teacher's latents on {held_out} held-out pairs: {error:.4f}.\n\n"


def _call(form: Form, teacher: NetworkTeacher) -> str:
    """How plain diffusers draws with it, or why it does not."""
    grid = Grid.of(form.schedule, teacher.schedule, form.steps)
    scheduler = scheduler_of(form, grid, teacher.folder)
    alone = why_not_plain(form, grid, scheduler)
    if alone:
        return f"Not for plain diffusers: {alone}. `retort sample` draws with it."
    return f"```python\n{teacher.usage(form, type(scheduler).__name__)}\n```"


def _solved(data: Artifact) -> str:
    if not isinstance(data.stage, Pairs):
        return ""
    sampler = data.stage.sampler
    return f" solved by\n{sampler.name.upper()} in {sampler.steps} steps at guidance {sampler.guidance_scale}"


def _guidance(form: Form) -> str:
    if form.w_range:
        least, most = (1 + w for w in form.w_range)
        return f"It takes any guidance_scale from {least:g} to {most:g}, without calling its network twice."
    return f"Guidance {form.guidance_scale:g} is built in."


def _method_and_loss(method: MethodConfig) -> str:
    loss = getattr(method, "loss", None)
    return f"{method.name}, loss {loss.name}" if isinstance(loss, LossConfig) else method.name


def _looked_through(inputs: Mapping[str, Artifact]) -> str:
    """A sentence for each network of others' making that the loss looked through, and its licence."""
    lines = ""
    for network in (artifact for artifact in inputs.values() if artifact.kind == "perceptual"):
        about = about_of(network.folder)
        through = f"perceptual/{network.fingerprint} ({about.trunk}; licence: {about.licence})"
        lines += f"The loss looked through {through}.\n\n"
    return lines
