"""The data of a method (any combination of pairs, latents and prompts), and the network that a student starts from."""

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline.errors import ManifestError, StageFailed
from pipeline.store.artifacts import load_artifact
from stages.data.files import sha256_of
from stages.methods import METHODS
from stages.methods.base import MethodConfig
from stages.training import Player, Turn
from tests.support.pipelines import TINY, execute, plan_of

SEEN = []


class Listener:
    """A method that records its batches. Its loss does not depend on them."""

    def __init__(self, materials):
        self.student = materials.student(ListenerConfig().form)
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step):
        return [Turn("student", self.loss)]

    def loss(self, batch):
        SEEN.append(batch)
        prompts = batch["prompts"]["prompts"]
        noise = torch.randn(len(prompts), *self.student.adapter.latent_shape, device=self.student.adapter.device)
        return self.student(noise, self.student.encode(prompts)).square().mean(), {}

    def after_step(self, step):
        pass


class ListenerConfig(MethodConfig):
    DATA: ClassVar = (frozenset({"prompts"}), frozenset({"pairs", "latents", "prompts"}))
    name: Literal["listener"] = "listener"

    @property
    def form(self):
        return super().form.model_copy(update={"guidance_scale": 1.0})

    def create(self, materials):
        return Listener(materials)


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setitem(METHODS.built_in, "listener", ListenerConfig)
    SEEN.clear()
    return SEEN


DATA = TINY[: TINY.index("  student:")] + "  latents: {kind: latents, teacher: teacher, images: digits}\n"
STUDENT = "  student: {kind: distill, %s, method: %s, training: {steps: 2, batch_size: 4}, held_out: 32}\n"


def test_a_batch_has_all_streams(tiny, seen):
    store, _ = tiny
    text = DATA + STUDENT % ("pairs: pairs, latents: latents, prompts: digits", "listener")
    execute(text, store, name="streams")
    batch = seen[0]
    assert batch.keys() == {"pairs", "latents", "prompts"}
    assert batch["pairs"]["noise"].shape == batch["pairs"]["latent"].shape == batch["latents"]["latent"].shape
    assert all(len(batch[stream]["prompts"]) == 4 for stream in batch)
    assert batch["latents"]["prompts"] != batch["prompts"]["prompts"], "each stream is drawn in an order of its own"


def test_a_student_of_prompts_needs_only_a_teacher(tiny, seen):
    store, plan = tiny
    text = DATA + STUDENT % ("prompts: digits, teacher: teacher", "listener")
    made = execute(text, store, name="prompts")["student"].artifact
    assert seen[0].keys() == {"prompts"} and seen[0]["prompts"]["prompts"][0].startswith("a ")
    card = (made.folder / "README.md").read_text()
    assert "from 60 prompts of a teacher" in card and plan["teacher"].artifact.fingerprint in card
    assert not (made.folder / "checkpoints").exists(), "the table of prompts is scratch"


@pytest.mark.parametrize(
    ("data", "method", "words"),
    [
        ("prompts: digits", "listener", "prompts have no teacher: give `teacher`"),
        ("pairs: pairs, teacher: teacher", "knowledge_distillation", "pairs and latents already have a teacher"),
        ("pairs: pairs", "listener", "listener is trained on prompts or latents and pairs and prompts, not on pairs"),
        ("pairs: pairs, latents: latents", "knowledge_distillation", "is trained on pairs, not on pairs and latents"),
        ("held_out: 3", "knowledge_distillation", "give what the student is trained on: pairs, latents or prompts"),
    ],
)
def test_data_that_does_not_fit_is_refused(tiny, seen, data, method, words):
    with pytest.raises(ManifestError, match=words):
        plan_of(DATA + (STUDENT % (data, method)).replace("held_out: 3, ", "").replace(", held_out: 32", ""), tiny[0])


@pytest.fixture(scope="module")
def narrow(tiny, tmp_path_factory):
    """A pipeline with the teacher's VAE and text encoder, and a U-Net of half its width."""
    folder = tmp_path_factory.mktemp("narrow") / "pipeline"
    shutil.copytree(tiny[1]["teacher"].artifact.folder, folder)
    (folder / "artifact.json").unlink()
    config = json.loads((folder / "unet/config.json").read_text())
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**config, "block_out_channels": [8, 16]}).save_pretrained(folder / "unet")
    return folder


def test_a_student_of_another_size_is_trained_evaluated_and_run_by_plain_diffusers(tiny, narrow):
    from diffusers import DiffusionPipeline

    store, _ = tiny
    text = DATA + STUDENT % (f"pairs: pairs, start: {{pipeline: {narrow}}}", "knowledge_distillation")
    text += "  quality: {kind: evaluate, student: student, samples: 20, split: validation}\n"
    made = execute(text, store, name="narrow")
    folder = made["student"].artifact.folder
    assert json.loads((folder / "unet/config.json").read_text())["block_out_channels"] == [8, 16]
    assert f"Training started from the network of {narrow} (licence: not stated)." in (folder / "README.md").read_text()
    assert (
        json.loads((made["quality"].artifact.folder / "metrics.json").read_text())["sides"]["student"]["latent_mse"] > 0
    )
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline("a red handwritten seven", num_inference_steps=1).images[0].size == (16, 16)


LIKE = """
  narrow:
    kind: teacher
    train:
      dataset: digits
      like: teacher
      denoiser: {channels: [8, 16], training: {steps: 6, batch_size: 8}}
    execution: {threads: 1}
"""


def test_a_student_starts_from_a_smaller_network_that_was_trained_for_the_teachers_pipeline(tiny, tmp_path):
    from diffusers import DiffusionPipeline

    text = DATA + LIKE + STUDENT % ("pairs: pairs, start: {teacher: narrow}", "knowledge_distillation")
    made = execute(text, tiny[0], name="like")
    teacher, narrow, student = (made[name].artifact for name in ("teacher", "narrow", "student"))
    kept = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert all(sha256_of(narrow.folder / file) == sha256_of(teacher.folder / file) for file in kept)
    for folder in (narrow.folder, student.folder):
        assert json.loads((folder / "unet/config.json").read_text())["block_out_channels"] == [8, 16]
    assert narrow.record["metrics"]["parameters_millions"]["unet"] > 0
    card = (student.folder / "README.md").read_text()
    assert f"Training started from the network of teacher/{narrow.fingerprint} (licence: apache-2.0)." in card
    assert DiffusionPipeline.from_pretrained(narrow.folder)("a red handwritten seven", 16, 16, num_inference_steps=2)
    again = execute(text, tmp_path, name="like", only=["teacher", "narrow"])["narrow"].artifact
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sha256_of(again.folder / weights) == sha256_of(narrow.folder / weights)
    assert load_artifact(narrow.folder).fingerprint == narrow.fingerprint  # its record is validated like a manifest
    assert narrow.record["metrics"]["like"] == teacher.fingerprint


def test_a_retry_after_a_lost_worker_gives_the_same_pipeline(tiny, tmp_path, monkeypatch):
    """The first attempt ends after the old network was removed and before the new one is written."""
    from stages.teacher import stage

    replace = stage.os.replace

    def cut(source, target):
        if Path(source).name == "network":
            raise OSError("cut")
        replace(source, target)

    text = DATA + LIKE
    whole = execute(text, tiny[0], name="whole", only=["narrow"])["narrow"].artifact
    teacher, store = tiny[1]["teacher"].artifact.folder, tmp_path / "cut"
    shutil.copytree(teacher, store / teacher.relative_to(tiny[0]))  # it is not trained again
    with monkeypatch.context() as patched, pytest.raises(StageFailed, match="cut"):
        patched.setattr(stage.os, "replace", cut)
        execute(text, store, name="like", only=["narrow"])
    again = execute(text, store, name="like", only=["narrow"])["narrow"].artifact
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sha256_of(again.folder / weights) == sha256_of(whole.folder / weights)


def test_a_student_starts_from_the_network_of_an_exact_teacher(tmp_path):
    text = """
name: exact_start
stages:
  teacher: {kind: teacher, from: digit_scenes}
  exact: {kind: teacher, exact: {images: digit_scenes, count: 20}}
  pairs:
    {kind: pairs, teacher: teacher, prompts: digit_scenes, count: 20, sampler: {steps: 2}, execution: {threads: 1}}
  student:
    kind: distill
    pairs: pairs
    start: {teacher: exact}
    method: {name: knowledge_distillation}
    training: {steps: 1, batch_size: 2}
    held_out: 10
    execution: {threads: 1}
"""
    assert (execute(text, tmp_path)["student"].artifact.folder / "unet").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("like: teacher", "like: teacher\n      prediction: epsilon"), "like keeps the prediction of that teacher"),
        (("like: teacher", "like: teacher\n      vae: {max_mse: 1}"), "like keeps the vae of that teacher"),
        (("{teacher: narrow}", "{teacher: narrow, pipeline: digit_scenes}"), "give either pipeline or teacher"),
        (("{teacher: narrow}", "{}"), "give either pipeline or teacher"),
        (("like: teacher", "like: gaussian"), "it is not a single pipeline"),
        (("{teacher: narrow}", "{teacher: gaussian}"), "`gaussian:`, which has no network"),
        (("{teacher: narrow}", "{teacher: narrow, revision: main}"), "revision needs pipeline"),
    ],
)
def test_start_settings_that_do_not_fit_are_refused_when_planning(tiny, change, words):
    text = DATA + LIKE + STUDENT % ("pairs: pairs, start: {teacher: narrow}", "knowledge_distillation")
    text += "  gaussian: {kind: teacher, gaussian: {}}\n"
    with pytest.raises(ManifestError, match=words):
        plan_of(text.replace(*change), tiny[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[8, 16]", "[8, 16, 24]"), r"train\.denoiser\.channels: "),
        (
            ("dataset: digits", "dataset: digit_scenes"),
            r"train\.dataset: the images have 32 pixels; the pipeline takes 16 x 16",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_pipeline_stops_the_stage(tiny, change, words):
    with pytest.raises(StageFailed, match=words):
        execute(DATA + LIKE.replace(*change), tiny[0], name="like", only=["narrow"])


def test_the_content_of_the_start_pipeline_decides_the_fingerprint(tiny, narrow, tmp_path):
    def planned(folder):
        text = DATA + STUDENT % (f"pairs: pairs, start: {{pipeline: {folder}}}", "knowledge_distillation")
        return plan_of(text, tiny[0])["student"].artifact.fingerprint

    copy = shutil.copytree(narrow, tmp_path / "copy")
    assert planned(copy) == planned(narrow)
    (copy / "notes.txt").write_text("not read")
    assert planned(copy) == planned(narrow)
    (copy / "unet/config.json").write_text((copy / "unet/config.json").read_text() + "\n")
    assert planned(copy) != planned(narrow)


def changed(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}, indent=1))


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}, "its vae differs from the teacher's"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "its noise schedule differs from the teacher's"),
    ],
)
def test_a_pipeline_of_another_vae_or_schedule_is_refused(tiny, narrow, tmp_path, file, settings, words):
    copy = shutil.copytree(narrow, tmp_path / "copy")
    changed(copy / file, **settings)
    text = DATA + STUDENT % (f"pairs: pairs, start: {{pipeline: {copy}}}", "knowledge_distillation")
    with pytest.raises(StageFailed, match=rf"start: {words}"):
        execute(text, tiny[0], name="other")


def test_all_links_of_a_chain_have_the_smaller_network_of_start(tiny, narrow, tmp_path):
    """Another version of diffusers wrote the pipeline."""
    copy = shutil.copytree(narrow, tmp_path / "copy")
    changed(copy / "vae/config.json", _diffusers_version="0.20.0")
    method = "{name: progressive, start_steps: 4, end_steps: 1, guidance_scale: 2.0}"
    made = execute(DATA + STUDENT % (f"latents: latents, start: {{pipeline: {copy}}}", method), tiny[0], name="chain")
    folder = made["student/1"].artifact.folder
    assert json.loads((folder / "unet/config.json").read_text())["block_out_channels"] == [8, 16]
    assert "Training started from the network of" in (made["student/2"].artifact.folder / "README.md").read_text()
    assert "Training continued from distill/" in (folder / "README.md").read_text()


def test_the_prediction_type_of_the_start_pipeline_is_checked_when_planning(tiny, narrow, tmp_path):
    """The teacher predicts v, and the network in `start` epsilon."""
    copy = shutil.copytree(narrow, tmp_path / "copy")
    changed(copy / "scheduler/scheduler_config.json", prediction_type="epsilon")

    def planned(method):
        plan_of(DATA + STUDENT % (f"pairs: pairs, start: {{pipeline: {copy}}}", method), tiny[0])

    planned("{name: consistency, steps: 2, prediction: epsilon}")
    with pytest.raises(ManifestError, match="match_first"):
        planned("{name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 2.0}")


def test_start_and_start_from_exclude_one_another(tiny, narrow):
    text = TINY + STUDENT.replace("student:", "other:") % (
        f"pairs: pairs, start_from: student, start: {{pipeline: {narrow}}}",
        "knowledge_distillation",
    )
    with pytest.raises(ManifestError, match="give either start or start_from"):
        plan_of(text, tiny[0])
