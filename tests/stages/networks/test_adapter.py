"""A package adds a family of architectures that Retort does not know. Every method works with it."""

import json
import os
from pathlib import Path

import pytest

from tests.support.cli import ROOT, retort
from tests.support.packages import install
from tests.support.two_layer import teacher

METHODS = {
    "distilled": "pairs: pairs, method: knowledge_distillation",
    "progressed": "latents: latents, method: {name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 2.0, "
    "prediction: flow_prediction}",
    "guided": "latents: latents, method: {name: guided, start_steps: 4, end_steps: 2, prediction: flow_prediction}",
    "consistent": "pairs: pairs, method: {name: consistency, steps: 2, solver_steps: 4}",
}
MANIFEST = """
name: family
stages:
  teacher: {{kind: teacher, from: {folder}}}
  pairs:
    {{kind: pairs, teacher: teacher, prompts: digits, count: 48, sampler: {{steps: 4, guidance_scale: 2.0}}}}
  latents: {{kind: latents, teacher: teacher, images: digits}}
"""
STUDENT = "  {name}: {{kind: distill, {how}, training: {{steps: 3, batch_size: 8}}, held_out: 16}}\n"
QUALITY = "  quality_of_{name}: {{kind: evaluate, student: {name}, pairs: pairs, samples: 20, split: validation}}\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(the folder of a teacher of the family, PYTHONPATH with the package that offers its adapter)."""
    make = tmp_path_factory.mktemp
    installed = install("retort-family", make("source"), make("installed"))
    return teacher(make("teacher")), os.pathsep.join((str(ROOT), str(installed)))


def test_every_method_works_with_a_new_family(family, tmp_path):
    folder, path = family
    manifest, store = tmp_path / "m.yaml", tmp_path / "store"
    text = MANIFEST.format(folder=folder)
    for name, how in METHODS.items():
        text += STUDENT.format(name=name, how=how) + QUALITY.format(name=name)
    manifest.write_text(text)
    done = retort("submit", manifest, "--store", store, "--engine", "inline", "--json", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr + done.stdout
    stages = json.loads(done.stdout)["stages"]
    for name in ("distilled", "progressed/2", "guided/4", "guided/2", "consistent"):
        student = Path(stages[name]["artifact"])
        assert "diffusers has no pipeline of two layers" in (student / "README.md").read_text()
        metrics = Path(stages[f"quality_of_{name}"]["artifact"]) / "metrics.json"
        assert json.loads(metrics.read_text())["sides"]["student"]["latent_mse"] > 0


def test_a_discriminator_is_refused_if_the_adapter_has_none(family, tmp_path):
    folder, path = family
    manifest = tmp_path / "m.yaml"
    how = "pairs: pairs, method: {name: diffusion2gan, loss: mse}"
    manifest.write_text(MANIFEST.format(folder=folder) + STUDENT.format(name="student", how=how))
    planned = retort("plan", manifest, "--store", tmp_path / "store", PYTHONPATH=path)
    assert planned.returncode == 2
    assert "the method trains a discriminator, which does not support the teacher's network" in planned.stderr


def test_without_the_package_the_family_is_refused(family, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(MANIFEST.format(folder=family[0]))
    done = retort("submit", manifest, "--store", tmp_path / "store", "--engine", "inline")
    assert done.returncode == 1 and "is a TwoLayerPipeline; supported teachers: folders or hub ids of" in done.stderr
