"""Teachers: trained, adopted, refused."""

import json
import shutil

import pytest
import torch

from pipeline.errors import StageFailed
from pipeline.manifest import loads
from stages.base import StageError
from stages.networks.adapters import checked
from stages.teacher import Teacher
from tests.support.cli import ROOT, retort
from tests.support.pipelines import TINY, execute, plan_of


def adopt(folder, store):
    return execute(f"name: adopt\nstages:\n  teacher: {{kind: teacher, from: {folder}}}\n", store)["teacher"].artifact


def test_a_trained_teacher_is_a_standard_diffusers_folder(tiny):
    from diffusers import DiffusionPipeline

    folder = tiny[1]["teacher"].artifact.folder
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red handwritten seven", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    metrics = tiny[1]["teacher"].artifact.record["metrics"]
    assert metrics["vae_reconstruction_mse"] > 0 and metrics["scaling_factor"] > 0


def test_latents_are_scaled_to_unit_variance_and_decode_back(tiny):
    from stages.data.images.config import Digits
    from stages.data.images.load import load
    from stages.networks.stable_diffusion import StableDiffusion

    teacher = StableDiffusion(tiny[1]["teacher"].artifact.folder)
    images = torch.from_numpy(load(Digits()).pixels(slice(0, None, 37)))
    latents = teacher.encode(images)
    assert latents.std() == pytest.approx(1.0, abs=0.1)
    expected = tiny[1]["teacher"].artifact.record["metrics"]["vae_reconstruction_mse"]
    assert (teacher.decode(latents) - images).square().mean() == pytest.approx(expected, rel=0.5)


def test_guidance_in_one_call_equals_two(tiny):
    from stages.networks.stable_diffusion import StableDiffusion

    teacher = StableDiffusion(tiny[1]["teacher"].artifact.folder)
    z = torch.randn(4, *teacher.latent_shape)
    prompts = ["a red handwritten seven"] * 4
    with torch.no_grad():
        conditional = teacher.denoiser(prompts, 1.0)(z, 500)
        empty = teacher.denoiser([""] * 4, 1.0)(z, 500)
        guided = teacher.denoiser(prompts, 3.0)(z, 500)
    torch.testing.assert_close(guided, empty + 3.0 * (conditional - empty), rtol=1e-4, atol=1e-5)


def test_a_prompts_encoding_does_not_depend_on_its_batch(tiny):
    from stages.networks.stable_diffusion import StableDiffusion

    folder = tiny[1]["teacher"].artifact.folder
    alone = StableDiffusion(folder).encode_prompts(["a red handwritten seven"])
    together = StableDiffusion(folder).encode_prompts(["a blue handwritten two", "a red handwritten seven", ""])
    assert torch.equal(alone.tensors["text"][0], together.tensors["text"][1])


def test_a_bad_autoencoder_stops_the_stage_before_the_unet_is_trained(tmp_path):
    text = TINY.replace("max_mse: 1.0, training: {steps: 40", "max_mse: 0.0001, training: {steps: 2")
    with pytest.raises(StageFailed, match=r"reconstructs held-out images with MSE .* train.vae.max_mse = 0.0001"):
        execute(text, tmp_path, only=["teacher"])


def test_the_content_of_a_pipeline_folder_decides_the_fingerprint(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny[1]["teacher"].artifact.folder, source)
    (source / "model_card.txt").write_text("not taken")
    teacher = adopt(source, tmp_path / "store")
    assert {p.name for p in teacher.folder.iterdir()} == {
        "artifact.json", "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler",
    }  # fmt: skip
    text = f"name: adopt\nstages:\n  teacher: {{kind: teacher, from: {source}}}\n"
    assert plan_of(text, tmp_path / "store")["teacher"].state == "reuse"
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    assert plan_of(text, tmp_path / "store")["teacher"].why == "source changed"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "SD3Transformer2DModel"]}, "whose unet is SD3Transformer2DModel"),
        ("model_index.json", {"text_encoder": [None, None]}, "whose text_encoder is missing"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "has a text_encoder_2"),
        ("unet/config.json", {"sample_size": None}, "sample_size: None, not an integer or two integers"),
        ("unet/config.json", {"in_channels": 9}, "9 channels in and 4 out: it takes inputs other than"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "unet has addition_embed_type: text_time"),
        ("model_index.json", None, "it is not a diffusers pipeline"),
        ("unet/diffusion_pytorch_model.safetensors", None, "has no unet/diffusion_pytorch_model.safetensors"),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": ..., "_class_name": "FlowMatch"},
            "FlowMatch, has neither a supported beta_schedule",
        ),
    ],
)
def test_other_layouts_are_refused_and_the_supported_ones_listed(tiny, tmp_path, file, change, words):
    source = tmp_path / "source"
    shutil.copytree(tiny[1]["teacher"].artifact.folder, source)
    if change is None:
        (source / file).unlink()
    else:
        value = json.loads((source / file).read_text()) | change
        (source / file).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    with pytest.raises(StageFailed, match=words) as caught:
        adopt(source, tmp_path / "store")
    assert "supported teachers: folders or hub ids of Stable Diffusion 1.x or 2.x layout" in str(caught.value)


def test_json_that_python_cannot_parse_is_refused(tmp_path):
    """It contains an integer of several thousand digits."""
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("9" * 60_000)
    stage = Teacher.model_validate({"kind": "teacher", "from": str(tmp_path)})
    assert stage.timesteps(tmp_path / "sealed") is None  # planning asks
    with pytest.raises(StageError, match=r"model_index.json is not JSON"):
        checked(tmp_path)


def test_the_shipped_teacher_is_small_and_its_card_names_its_origin(tmp_path):
    from diffusers import StableDiffusionPipeline

    from stages.data.images.config import DigitScenes
    from stages.data.images.load import load
    from stages.networks.stable_diffusion import StableDiffusion
    from stages.teacher.config import SHIPPED

    folder = SHIPPED / "digit_scenes"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    card = (folder / "README.md").read_text()
    assert "manifests/digit_scenes_teacher.yaml` with seed 0 at commit" in card and "dirty" not in card
    assert "None" not in card
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == 8 and pipeline.scheduler.config.prediction_type == "v_prediction"
    adopted = execute("name: a\nstages:\n  teacher: {kind: teacher, from: digit_scenes}\n", tmp_path)[
        "teacher"
    ].artifact
    record = adopted.record
    assert record["settings"]["from"] == record["metrics"]["source"] == "digit_scenes"
    teacher = StableDiffusion(adopted.folder)
    pixels = torch.from_numpy(load(DigitScenes(), held_out=True, limit=64).pixels())
    assert (teacher.decode(teacher.encode(pixels)) - pixels).square().mean() < 0.01


def test_a_run_of_the_shipped_teacher_works_after_the_installation_moved(tmp_path, write_manifest):
    store, manifest = tmp_path / "store", write_manifest("name: a\nstages: {t: {kind: teacher, from: digit_scenes}}")
    here = tmp_path / "before"
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*arguments):
        return retort(*arguments, "--store", store, cwd=tmp_path, PYTHONPATH=str(here))

    assert run("submit", manifest, "--engine", "inline").returncode == 0
    here = here.rename(tmp_path / "after")
    resumed = run("resume", "a", "--force", "t", "--engine", "inline")
    assert resumed.returncode == 0, resumed.stderr
    scheduler = here / "stages/teacher/shipped/digit_scenes/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    planned = json.loads(run("plan", "a", "--json").stdout)
    assert (planned["t"]["state"], planned["t"]["why"]) == ("run", "digit_scenes changed")


def test_the_shipped_name_wins_over_a_local_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digit_scenes").mkdir()
    text = "name: a\nstages: {t: {kind: teacher, from: %s}}"
    found = [loads(text % one, "a.yaml").manifest.stages["t"].from_ for one in ("digit_scenes", "./digit_scenes")]
    assert found == ["digit_scenes", str(tmp_path / "digit_scenes")]


def test_a_teacher_is_trained_on_the_users_images(tmp_path):
    """The images are those of a folder. The words of their captions become the vocabulary of the tokenizer."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Image.new("RGB", (20, 16), ["red", "blue"][i % 2]).save(images / f"{i}.png")
    rows = "".join(f"{i}.png,a {['red', 'blue'][i % 2]} wall\n" for i in range(20))
    (images / "metadata.csv").write_text("file_name,text\n" + rows)
    own = TINY[: TINY.index("  pairs:")].replace(
        "dataset: digits", f"dataset: {{name: image_folder, path: {images}, size: 16}}"
    )
    few = ["stages.teacher.train.vae.training.steps=3", "stages.teacher.train.denoiser.training.steps=3"]
    artifact = execute(own, tmp_path / "store", few)["teacher"].artifact
    words = json.loads((artifact.folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"red", "blue", "wall"} <= set(words)
    assert artifact.record["identity"]["contents"]["train.dataset.path"].startswith("sha256:")
    (images / "3.png").write_bytes((images / "4.png").read_bytes())
    assert plan_of(own, tmp_path / "store", few)["teacher"].why == "images changed"


def test_a_trained_tokenizer_knows_all_words_of_its_captions_and_truncates_none():
    from stages.networks.build import word_tokenizer

    captions = ["a cat, on a mat.", "A dog-like man's hat"]
    tokenizer = word_tokenizer(captions)
    for caption in captions:
        tokens = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in tokens and len(tokens) <= tokenizer.model_max_length
    assert len(tokenizer("").input_ids) == 2
