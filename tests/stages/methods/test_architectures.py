"""Tests every method with every architecture, with all weights and as LoRA: students are trained, interrupted, resumed,
exported, and run by diffusers.

docs/methods.md has a table of these tests.
"""

import hashlib
import json
import re

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors import safe_open

from pipeline.runs import Reporter
from stages.networks.student import Student
from stages.networks.teachers import load_network
from stages.training import TrainingExecution
from tests.support.cli import ROOT
from tests.support.networks import photographs, pixel_unet, stable_diffusion_layout, stable_diffusion_xl_layout
from tests.support.pipelines import execute

PROMPTS = ["a b", "b", "a"]
METHODS = {
    "knowledge_distillation": "loss: l1, prediction: TYPE",
    "diffusion2gan": "loss: l1, prediction: TYPE",
    "progressive": "start_steps: 4, end_steps: 2, match_first: EPSILON",
    "guided": "start_steps: 4, end_steps: 2, w_range: [0.0, 4.0]",
    "consistency": "steps: 1, solver_steps: 4",
    "dmd": "loss: l1, fake_score: {LORA}",
    "dmd2": "guidance_scale: 2.0, fake_updates: 1, fake_score: {LORA}",
}
"""Method -> its settings. TYPE stands for the teacher's prediction type, EPSILON for whether it is epsilon, LORA for
the LoRA settings of the fake score. DMD2 reads latents, all others pairs."""
FULL = [(family, method) for family in ("stable_diffusion", "sdxl", "pixels") for method in METHODS]
FULL.remove(("pixels", "guided"))  # a UNet2DModel cannot take w
LORA = [(family + ("_v" if method in ("progressive", "guided") else ""), method) for family, method in FULL]
"""A LoRA student keeps its teacher's prediction type, and halving the steps needs v."""


def pixels(folder, prediction):
    DDIMPipeline(unet=pixel_unet(3), scheduler=DDIMScheduler(prediction_type=prediction)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = {"0": "a b", "1": "b"}
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    return folder


def stable_diffusion(folder, prediction):
    stable_diffusion_layout(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": prediction}))
    return folder


def sdxl(folder, prediction):
    """A shallow one: the layers that it lacks are the same as those that it has."""
    return stable_diffusion_xl_layout(folder, prediction, layers_per_block=1, transformer_layers_per_block=1)


FAMILIES = {"stable_diffusion": stable_diffusion, "sdxl": sdxl, "pixels": pixels}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A function: name of a family -> (plan with its teacher, pairs and latents; its prediction type)."""
    made = {}

    def family_pairs(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            prediction = "v_prediction" if name.endswith("_v") else "epsilon"
            family = name.removesuffix("_v")
            known = PROMPTS if family != "pixels" else PROMPTS[:2]
            (folder / "prompts.txt").write_text("\n".join(known) + "\n")
            size = 8 if family == "pixels" else 16
            photographs(folder / "images.tar", size)
            text = f"""
name: {name}
stages:
  teacher: {{kind: teacher, from: {FAMILIES[family](folder / "teacher", prediction)}}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: {folder / "prompts.txt"}
    count: 16
    sampler: {{steps: 2, guidance_scale: 2.0}}
    execution: {{threads: 1}}
  latents:
    kind: latents
    teacher: teacher
    images: {{name: webdataset, path: {folder / "images.tar"}, size: {size}, label: cls}}
    execution: {{threads: 1}}
"""
            made[name] = execute(text, folder / "store"), prediction
        return made[name]

    return family_pairs


class Interrupting(Reporter):
    """Interrupts the first training of each stage in its second step, after the checkpoint of the first step."""

    def __init__(self):
        self.seen = set()

    def progress(self, stage, progress):
        if stage not in self.seen:
            self.seen.add(stage)
            raise KeyboardInterrupt


def hashes(folder):
    """Return the hash of each file of a student, except the record of the artifact."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "artifact.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def checkpointed(store):
    """The names of the tensors in the checkpoints of unfinished stages."""
    files = list(store.glob("work/*/checkpoints/step-*/tensors.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as tensors:
            yield from tensors.keys()


def is_trained(name):
    """Whether this tensor of a checkpoint is trained for a LoRA student or its discriminator: LoRA weights and new
    layers."""
    added = ("cond_proj", "/module/noise", "/module/resized", "/module/heads", "/module/head.")
    return ".lora_" in name or "/optimizer/" in name or any(part in name for part in added)


CASES = [(*case, "full") for case in FULL] + [(*case, "lora") for case in LORA]


def test_the_table_in_the_documents_has_every_case():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`(\w+-\w+-(?:full|lora))`", page)) == sorted("-".join(case) for case in CASES)


@pytest.mark.parametrize(("family", "method", "lora"), CASES)
def test_a_student_is_trained_resumed_and_run_by_diffusers(family, method, lora, pairs, tmp_path):
    made, prediction = pairs(family)
    settings = METHODS[method].replace("TYPE", prediction).replace("EPSILON", str(prediction == "epsilon").lower())
    settings = settings.replace("LORA", "lora: {rank: 2}" if lora == "lora" else "")
    stream = "latents" if method == "dmd2" else "pairs"
    merged = str(method == "guided" or family.startswith("pixels")).lower()
    training = "steps: 2, batch_size: 4, learning_rate: 1e-3"
    if lora == "lora":
        training += f", lora: {{rank: 2, alpha: 3, merged: {merged}}}"
    text = f"""
name: trained
stages:
  student:
    kind: distill
    {stream}: {made[stream].artifact.folder}
    method: {{name: {method}, {settings}}}
    training: {{{training}}}
    held_out: 4
    execution: {{threads: 1, checkpoint_every: 1}}
"""
    plan = execute(text, tmp_path / "whole")
    reporter, again = Interrupting(), None
    while again is None:
        try:
            again = execute(text, tmp_path / "resumed", reporter=reporter)
        except KeyboardInterrupt:
            frozen = [name for name in checkpointed(tmp_path / "resumed") if not is_trained(name)]
            assert lora == "full" or not frozen, frozen
    assert reporter.seen == set(plan)
    for name, stage in plan.items():
        assert hashes(again[name].artifact.folder) == hashes(stage.artifact.folder)
    folder = list(plan.values())[-1].artifact.folder
    teacher = load_network(made["teacher"].artifact.folder, TrainingExecution())
    ours, theirs = drawn(Student.load(folder, teacher), folder, made["teacher"].artifact.folder)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-4)


def drawn(student, folder, teacher):
    """What Retort and the lines of the card sample from the same noise."""
    lines = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    lines = lines.replace("THIS FOLDER", str(folder)).replace("THE TEACHER", str(teacher))
    noise = torch.randn(1, *student.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    namespace = {"noise": noise}
    exec(lines.replace('"a prompt"', '"a b", latents=noise, output_type="latent"'), namespace)
    with torch.no_grad():
        noise = namespace["noise"]
        ours = student(noise, student.encode(["a b"]), torch.full((1,), 2.0))
    image = namespace["image"]
    return ours, image if image.ndim == 4 else image[None]
