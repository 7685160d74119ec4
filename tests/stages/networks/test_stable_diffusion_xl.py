"""Stable Diffusion XL: its conditions, its pairs compared with diffusers' pipeline, refused pipelines, and a whole
run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from pipeline.errors import ManifestError, StageFailed
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.form import Form
from stages.networks.adapter import Unsupported
from stages.networks.adapters import checked
from stages.networks.lora import FILE
from stages.networks.stable_diffusion_xl import StableDiffusionXL
from tests.support.cli import BLOCKER, ROOT, retort
from tests.support.networks import SDXL_UNET, stable_diffusion_layout, stable_diffusion_xl_layout
from tests.support.pipelines import execute, plan_of

PROMPTS = ["a b", "b", "", "a a b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion_xl_layout(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def xl(folder):
    return StableDiffusionXL(folder)


def stock(folder, **options):
    """The stock pipeline with the DDIM scheduler of the pairs."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **options)
    spaced = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **spaced)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PAIRS = """
name: sdxl
stages:
  teacher: {{kind: teacher, from: {folder}{settings}}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: {prompts}
    count: 8
    storage_dtype: float32
    sampler: {{steps: 4, guidance_scale: {scale}}}
    execution: {{micro_batch: {batch}, threads: 1}}
"""


def pairs(store, folder, scale, batch=4, settings=""):
    prompts = store.with_suffix(".csv")
    prompts.write_text("prompt\n" + "\n".join(f'"{prompt or "a"}"' for prompt in PROMPTS) + "\n")
    plan = execute(PAIRS.format(folder=folder, scale=scale, batch=batch, prompts=prompts, settings=settings), store)
    return PairReader(read_list(plan["pairs"].artifact.folder)).batch(range(8)), plan


@pytest.mark.parametrize(("prediction", "zeros", "scale"), [
    ("epsilon", True, 5.0), ("epsilon", False, 5.0), ("epsilon", True, 1.0), ("v_prediction", True, 3.0)
])  # fmt: skip
def test_pairs_equal_the_latents_of_the_diffusers_pipeline(prediction, zeros, scale, tmp_path):
    folder = stable_diffusion_xl_layout(tmp_path / "sdxl", prediction, zeros)
    found, _ = pairs(tmp_path / "store", folder, scale)
    latents = stock(folder)(
        found.prompts, latents=torch.from_numpy(found.noise), num_inference_steps=4, guidance_scale=scale,
        output_type="latent",
    ).images  # fmt: skip
    np.testing.assert_allclose(found.latent, latents.numpy(), atol=2e-4, rtol=2e-4)


def test_micro_batches_change_rounding_only(folder, tmp_path):
    (four, _), (three, _) = pairs(tmp_path / "four", folder, 5.0), pairs(tmp_path / "three", folder, 5.0, batch=3)
    np.testing.assert_allclose(four.latent, three.latent, atol=1e-4, rtol=1e-4)


def test_an_empty_prompt_is_encoded_and_a_missing_one_is_zeros(folder, xl, tmp_path):
    """diffusers encodes an empty prompt, and takes zeros in place of a negative prompt that is left out."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = stock(folder)(["", "b"], latents=noise, **given).images
    denoise = xl.denoiser(["", "b"], 4.0)
    with torch.no_grad():
        output = denoise(noise, 999)
    level = xl.schedule.at(999)
    torch.testing.assert_close((noise - level.sigma * output) / level.alpha, theirs, atol=2e-3, rtol=1e-4)
    dropped, empty = xl.encode_dropped().tensors, xl.encode_prompts([""]).tensors
    assert not dropped["text"].any() and not dropped["text_embeds"].any() and empty["text"].any()
    assert torch.equal(dropped["time_ids"], empty["time_ids"])
    kept = StableDiffusionXL(stable_diffusion_xl_layout(tmp_path, zeros=False))
    assert torch.equal(kept.encode_dropped().tensors["text"], kept.encode_prompts([""]).tensors["text"])


def test_conditioning_sizes_are_used_and_written_to_the_card(folder, tmp_path):
    sizes = ", micro_conditioning: {original_size: [8, 12], crops_coords_top_left: [0, 3]}"
    found, plan = pairs(tmp_path / "store", folder, 3.0, settings=sizes)
    latents = stock(folder)(
        found.prompts, latents=torch.from_numpy(found.noise), num_inference_steps=4, guidance_scale=3.0,
        original_size=(8, 12), crops_coords_top_left=(0, 3), output_type="latent",
    ).images  # fmt: skip
    np.testing.assert_allclose(found.latent, latents.numpy(), atol=2e-4, rtol=2e-4)
    plain, default = pairs(tmp_path / "default", folder, 3.0)
    assert np.abs(plain.latent - found.latent).max() > 1e-3
    assert default["teacher"].artifact.fingerprint != plan["teacher"].artifact.fingerprint
    for wrong in (sizes.replace("8, 12", "0, 12"), sizes.replace("0, 3", "-1, 3"), sizes.replace("8, 12", "8")):
        with pytest.raises(ManifestError):
            plan_of(PAIRS.format(folder=folder, scale=3.0, batch=4, prompts="digits", settings=wrong), tmp_path)
    teacher = StableDiffusionXL(plan["teacher"].artifact.folder)
    assert teacher.time_ids == [8, 12, 0, 3, 16, 16]
    assert '"a prompt", original_size=(8, 12), crops_coords_top_left=(0, 3), ' in teacher.usage(Form(), "DDIMScheduler")


def test_the_vae_is_float32_in_a_float16_teacher(folder):
    """SDXL's VAE overflows in float16."""
    teacher = StableDiffusionXL(folder, dtype=torch.float16)
    assert next(teacher.network.parameters()).dtype == next(teacher.text_encoder_2.parameters()).dtype == torch.float16
    assert next(teacher.vae.parameters()).dtype == torch.float32
    image = teacher.decode(torch.randn(1, 4, 8, 8))
    assert image.dtype == torch.float32 and image.shape == (1, 3, 16, 16)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(teacher.encode(images), StableDiffusionXL(folder).encode(images))


@pytest.mark.parametrize(("file", "change", "words"), [
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "is a StableDiffusionXLImg2ImgPipeline"),
    ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "is a StableDiffusionXLInpaintPipeline"),
    ("model_index.json", {"text_encoder": [None, None]}, "whose text_encoder is missing"),
    ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "whose text_encoder_2 is T5EncoderMo"),
    ("unet/config.json", {"in_channels": 9}, "unet has 9 channels in and 4 out"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "on 64 features beside the text states, not o"),
    ("unet/config.json", {"addition_embed_type": None}, "unet has addition_embed_type: None"),
    ("unet/config.json", {"cross_attention_dim": 48}, "text has states of 80 features, its unet takes 48"),
    ("vae/config.json", {"latent_channels": 16}, "vae makes latents of 16 channels, its unet takes 4"),
    ("text_encoder_2/config.json", {"hidden_size": 64}, "text has states of 96 features, its unet takes 80"),
])  # fmt: skip
def test_unsupported_pipelines_are_refused_and_the_supported_ones_listed(file, change, words, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sdxl")
    path = tmp_path / "sdxl" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Unsupported, match=words) as refused:
        checked(tmp_path / "sdxl")
    assert "Stable Diffusion XL base layout" in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_component_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sdxl")
    (tmp_path / "sdxl" / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(StageFailed, match=r"has no text_encoder_2/model\.safetensors; supported teachers"):
        pairs(tmp_path / "store", tmp_path / "sdxl", 1.0)


def test_an_sdxl_student_cannot_start_from_stable_diffusion(folder, tmp_path):
    """Its adapter is the base class of SDXL's adapter, but they are different families."""
    other = stable_diffusion_layout(tmp_path / "sd")
    student = f"""
  student:
    kind: distill
    pairs: pairs
    start: {{pipeline: {other}}}
    method: knowledge_distillation
    training: {{steps: 1, batch_size: 2}}
    held_out: 2
"""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    text = PAIRS.format(folder=folder, scale=1.0, batch=4, prompts=prompts, settings="") + student
    with pytest.raises(StageFailed, match=r"start: its pipeline is of another family than the teacher's"):
        execute(text, tmp_path / "store")


def test_sizes_of_another_family_are_refused(tmp_path):
    text = PAIRS.format(
        folder="digit_scenes", scale=1.0, batch=4, prompts="digits", settings=", micro_conditioning: {}"
    )
    with pytest.raises(ManifestError, match="only Stable Diffusion XL is conditioned on sizes"):
        plan_of(text, tmp_path)


WHOLE = """
name: whole
stages:
  teacher: {{kind: teacher, from: {folder}}}
  pairs:
    {{kind: pairs, teacher: teacher, prompts: digits, count: 32, sampler: {{steps: 2, guidance_scale: 5.0}}}}
  latents: {{kind: latents, teacher: teacher, images: digits}}
  latent_vgg:
    kind: perceptual
    latents: latents
    width: 4
    triplets: {{name: synthetic, count: 60, test_count: 20}}
    calibration: {{training: {{steps: 4}}}}
  student:
    kind: distill
    pairs: pairs
    method:
      name: diffusion2gan
      loss: {{name: e_latent_lpips, perceptual: latent_vgg}}
    training: {{steps: 2, batch_size: 8, learning_rate: 1e-4}}
    held_out: 16
  probe: {{kind: probe, images: digits, steps: 100}}
  quality: {{kind: evaluate, student: student, real: probe, samples: 100, teacher_steps: [1]}}
"""


def test_an_sdxl_manifest_runs_from_teacher_to_evaluation(folder, quick_probes, tmp_path):
    """From the teacher to the evaluation, planned without torch; then `stats` and `sample`."""
    manifest, store = tmp_path / "whole.yaml", tmp_path / "store"
    manifest.write_text(WHOLE.format(folder=folder))
    done = retort("submit", manifest, "--store", store, "--engine", "inline", "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    sides = json.loads((store.parent / stages["quality"]["artifact"] / "metrics.json").read_text())["sides"]
    assert set(sides) >= {"teacher_2", "teacher_1", "student"}
    told = retort("stats", "whole", "--store", store, "--sample", 2, "--out", tmp_path / "samples")
    assert told.returncode == 0 and len(list((tmp_path / "samples").glob("*.png"))) == 2, told.stderr
    for stage in ("teacher", "student"):
        image = tmp_path / f"{stage}.png"
        drawn = retort("sample", f"whole/{stage}", "--store", store, "-p", "a", "-n", 2, "-o", image)
        assert drawn.returncode == 0 and Image.open(image).size[1] == 16, drawn.stderr
    out = tmp_path / "student.safetensors"
    done = retort("export", "whole/student", out, "--single-file", "--store", store)
    assert done.returncode == 0 and "in 1 step with DDIM" in done.stdout, done.stderr
    names = set(load_file(out))
    assert {"v_pred", "conditioner.embedders.1.model.ln_final.weight"} < names
    assert "model.diffusion_model.label_emb.0.0.weight" in names
    done = retort("export", "whole/student", tmp_path / "lora", "--lora", 4, "--store", store)
    assert done.returncode == 0 and "on 16 held-out pairs" in done.stdout, done.stderr
    stock(folder).load_lora_weights(tmp_path / "lora", weight_name=FILE)


@pytest.mark.parametrize("source", ["a folder", "a hub id"])
def test_planning_needs_no_torch_and_no_internet(source, folder, tmp_path):
    commit = "owner/sdxl, revision: 462165984030d82259a11f4367a4eed129e94a7b"
    manifest = tmp_path / "m.yaml"
    manifest.write_text(WHOLE.format(folder=folder if source == "a folder" else commit))
    planned = subprocess.run(
        [sys.executable, "-c", BLOCKER, "plan", manifest, "--store", tmp_path / "store"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr


def test_the_published_configs_are_accepted(folder, tmp_path):
    """The U-Net's shape of stable-diffusion-xl-base-1.0, at its true width: 2,567 million weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    shutil.copytree(folder, tmp_path / "sdxl")
    unet.save_config(tmp_path / "sdxl" / "unet")
    changes = {"text_encoder": {"hidden_size": 768}, "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280}}
    for name, change in changes.items():
        file = tmp_path / "sdxl" / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert checked(tmp_path / "sdxl") is StableDiffusionXL
