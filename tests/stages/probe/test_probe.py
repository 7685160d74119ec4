"""The classifier of evaluations: it is trained once and sealed, and training it again gives the same bytes."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.engines import InlineEngine
from pipeline.errors import ManifestError, StageFailed
from tests.support.pipelines import TINY, execute, plan_of

pytestmark = pytest.mark.usefixtures("quick_probes")

COLOURS = ("red", "green", "blue")
ALONE = """
name: walls
stages:
  probe:
    kind: probe
    images: {{name: image_folder, path: {path}, size: 16, label: class, hold_out_every: 4}}
    steps: 100
    execution: {{threads: 1}}
"""


def against(probe):
    about = f"pairs: pairs, real: {probe}, samples: 110, teacher_steps: [], execution: {{threads: 1}}"
    return f"{TINY}  quality: {{kind: evaluate, {about}}}\n"


class Interrupting(InlineEngine):
    """Simulates Ctrl-C when a function reports progress for the second time."""

    def run(self, *asked):
        steps = super().run(*asked)
        yield next(steps)
        next(steps)
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    """800 noisy images, a third in each colour."""
    folder = tmp_path_factory.mktemp("walls")
    noise = np.random.default_rng(0).integers(0, 100, (800, 16, 16, 3), dtype=np.uint8)
    rows = [("file_name", "text", "class")]
    for i, pixels in enumerate(noise):
        pixels[..., i % 3] += 120
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        rows.append((f"{i:03d}.png", f"a {COLOURS[i % 3]} wall", COLOURS[i % 3]))
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def made(walls, quick_probes, tmp_path_factory):
    return execute(ALONE.format(path=walls), tmp_path_factory.mktemp("store"))["probe"].artifact


def test_a_sealed_probe_records_its_labels_and_accuracy(made):
    assert {file.name for file in made.folder.iterdir()} == {
        "artifact.json", "classifier.json", "classifier.safetensors",
    }  # fmt: skip
    assert json.loads((made.folder / "classifier.json").read_text()) == {"classes": {"label": 3}, "features": 64}
    assert made.record["device"] and made.record["metrics"] == {
        "images": 600, "held_out_images": 200, "accuracy": 1.0, "caption_accuracy": 1.0,
        "label_accuracy": {"label": 1.0},
    }  # fmt: skip


def test_a_resumed_probe_has_the_same_bytes_and_another_seed_other_bytes(made, walls, tmp_path):
    text = ALONE.format(path=walls)
    with pytest.raises(KeyboardInterrupt):
        execute(text, tmp_path, engine=Interrupting())
    assert plan_of(text, tmp_path)["probe"].state == "run"
    again = execute(text, tmp_path)["probe"].artifact
    other = execute(text, tmp_path, ["stages.probe.seed=1"])["probe"].artifact
    weights, same, others = (
        (artifact.folder / "classifier.safetensors").read_bytes() for artifact in (made, again, other)
    )
    assert again.fingerprint == made.fingerprint and weights == same != others


def test_a_set_without_classes_is_refused_at_its_line(tmp_path):
    text = "name: x\nstages:\n  probe:\n    kind: probe\n    images: {name: image_folder, path: x, size: 16}\n"
    with pytest.raises(ManifestError, match=r"^test.yaml:5:13: stages\.probe\.images: a probe is trained on classes"):
        plan_of(text, tmp_path)


def test_an_evaluation_needs_a_probe_instead_of_an_image_set(tmp_path):
    with pytest.raises(ManifestError, match="there is no stage 'digits'; give a stage of kind probe, or the path"):
        plan_of(against("digits"), tmp_path)
    with pytest.raises(ManifestError, match="needs a stage of kind probe; 'teacher' is of kind teacher"):
        plan_of(against("teacher"), tmp_path)


def test_an_evaluation_fails_if_the_images_of_its_probe_changed(made, walls, tiny):
    text = against(made.folder)
    metrics = execute(text, tiny[0], name="walls")["quality"].artifact.record["metrics"]
    assert metrics["features"] == "image_folder_probe_64" and metrics["probe_accuracy"] == 1.0
    assert metrics["distance_samples"] == 100  # half of the held-out images, although the probe was trained on 600
    assert "prompt_accuracy" not in metrics["sides"]["teacher_5"]
    real, teacher = metrics["references"]["real"], metrics["sides"]["teacher_5"]
    assert real["frechet_distance"] < teacher["frechet_distance"]
    Image.new("RGB", (16, 16)).save(walls / "000.png")
    changed = f"{walls} changed since {made.folder} was made from it"
    with pytest.raises(StageFailed, match=re.escape(changed)):
        execute(text, tiny[0], ["stages.quality.samples=111"], name="walls")
