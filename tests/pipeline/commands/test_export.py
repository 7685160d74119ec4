"""`retort export`: a student as one file that plain diffusers samples, as a LoRA, and the cases that are refused."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from stages.base import StageError
from stages.distill.whole import write_single_file
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.cli import retort
from tests.support.networks import drawn, pixel_unet
from tests.support.pipelines import TINY, execute


def test_a_single_file_draws_the_same_images_as_the_student(tiny, tmp_path):
    """The file has no scheduler and no guidance embedding. The test uses the scheduler that the command names."""
    plan = tiny[1]
    out = tmp_path / "new" / "student.safetensors"
    done = retort("export", plan["student"].artifact.folder, out, "--single-file")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(out),
        "sample it in 1 step with DDIM, trailing timesteps 999, guidance scale 1 (ComfyUI: cfg 1, because guidance is "
        "built in), prediction type v_prediction",
    ]
    with safe_open(out, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    folder = plan["student"].artifact.folder
    pipeline = StableDiffusionPipeline.from_single_file(
        str(out), config=str(plan["teacher"].artifact.folder), local_files_only=True
    )
    teacher = DDIMScheduler.from_pretrained(plan["teacher"].artifact.folder / "scheduler")
    pipeline.scheduler = DDIMScheduler.from_config(
        teacher.config, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, prompts = torch.randn(2, 4, 8, 8), ["a red handwritten seven", "a blue handwritten one"]
    images = pipeline(prompts, latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(images, drawn(folder, noise, prompts, num_inference_steps=1), atol=1e-5, rtol=1e-5)


def test_a_lora_is_exported_to_a_folder_and_its_errors_are_printed(tiny, tmp_path):
    out = tmp_path / "lora"
    execute(TINY, tiny[0], name="exported")  # which no other test plans again
    done = retort("export", "exported/student", out, "--lora", 4, "--store", tiny[0])
    assert done.returncode == 0, done.stderr
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert re.search(r"keeps [\d.]+% of the squared difference .*\n.* on 32 held-out pairs: ", done.stdout)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A student of a teacher in pixel space."""
    from diffusers import DDPMPipeline, DDPMScheduler

    place = tmp_path_factory.mktemp("pixels")
    DDPMPipeline(pixel_unet(), DDPMScheduler()).save_pretrained(place / "teacher")
    text = f"""
name: pixels
stages:
  teacher: {{kind: teacher, from: {place / "teacher"}}}
  pairs: {{kind: pairs, teacher: teacher, count: 16, shard_size: 16, sampler: {{steps: 1, guidance_scale: 1.0}}}}
  student:
    kind: distill
    pairs: pairs
    method: {{name: knowledge_distillation}}
    training: {{steps: 1, batch_size: 4}}
    held_out: 4
"""
    return execute(text, place / "store")["student"].artifact.folder


def test_other_families_are_refused_and_the_supported_ones_listed(pixels, tmp_path):
    for options, words in (
        (
            (tmp_path / "x.safetensors", "--single-file"),
            "PixelDiffusion students, only for those of Stable Diffusion",
        ),
        (
            (tmp_path / "x", "--lora", 4),
            "cannot load the student as a LoRA: the pipelines of its teacher's family load no LoRA",
        ),
    ):
        done = retort("export", pixels, *options)
        assert done.returncode == 2 and words in done.stderr and not options[0].exists(), done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_range": [0.0, 4.0], "guidance_scale": None}, "takes the guidance strength w as an input"),
        ({"schedule": "cosine"}, "has the schedule cosine, and the layout holds no noise schedule"),
        ({"prediction": "both"}, "predicts both x0 and the noise"),
        ({"steps": 4, "sampler": "stochastic"}, "diffusers has no N-step stochastic sampler"),
    ],
)
def test_students_that_only_retort_can_sample_are_refused(tiny, tmp_path, changes, words):
    student = tiny[1]["student"].artifact
    copy = shutil.copytree(student.folder, tmp_path / "student")
    about = json.loads((copy / "student.json").read_text())
    (copy / "student.json").write_text(json.dumps(about | changes))
    with pytest.raises(StageError, match=f"other programs cannot sample this student: .*{words}"):
        write_single_file(replace(student, folder=copy), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_wrong_arguments_give_one_sentence(tiny, tmp_path):
    store = tiny[0]
    there, new = tmp_path / "there.safetensors", tmp_path / "x.safetensors"
    there.write_text("mine")
    for arguments, words in (
        (("tiny/student", new), "give one of --single-file, --pipeline and --lora RANK"),
        (("tiny/student", new, "--single-file", "--lora", 4), "give one of --single-file, --pipeline and --lora RANK"),
        (("tiny/student", tmp_path / "x.bin", "--single-file"), "should end in .safetensors"),
        (("tiny/student", there, "--single-file"), "already exists"),
        (("tiny/student", tmp_path, "--lora", 4), "already exists"),
        (("tiny/student", tmp_path / "x", "--lora", 0), "0 is not in the range x>=1"),
        (("tiny/pairs", new, "--single-file"), "is of kind pairs; only a student can be exported"),
        (("tiny/teacher", tmp_path / "x", "--lora", 4), "is of kind teacher; only a student can be exported"),
        (("tiny/nothing", new, "--single-file"), "has no stage"),
    ):
        done = retort("export", *arguments, "--store", store)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert there.read_text() == "mine" and not new.exists() and not (tmp_path / "x").exists()


LORA_STUDENT = """
  small:
    kind: distill
    pairs: pairs
    method: {name: guided, start_steps: 2, end_steps: 2, w_range: [0.0, 4.0]}
    training: {steps: 2, batch_size: 8, learning_rate: 1e-2, lora: {rank: 2}}
    held_out: 32
    execution: {threads: 1}
"""


def test_a_lora_student_is_exported_as_a_pipeline(tiny, tmp_path):
    """The student takes w, so diffusers' load_lora_weights cannot load it: its guidance embedding is not part of a
    LoRA."""
    folder = execute(TINY + LORA_STUDENT, tiny[0], name="small")["small/2"].artifact.folder
    assert "`retort export --pipeline` writes" in (folder / "README.md").read_text()
    out = tmp_path / "pipeline"
    done = retort("export", folder, out, "--pipeline")
    assert done.returncode == 0 and "guidance_scale=3, num_inference_steps=2" in done.stdout, done.stderr
    assert "```python" in (out / "README.md").read_text() and not list(tmp_path.glob(".*"))
    teacher = StableDiffusion(tiny[1]["teacher"].artifact.folder)
    noise, prompts = torch.randn(2, 4, 8, 8), ["a red handwritten seven", "a blue handwritten one"]
    for w in (0.5, 3.0):
        with torch.no_grad():
            ours = Student.load(folder, teacher)(noise, teacher.encode_prompts(prompts), torch.full((2,), w))
        theirs = drawn(out, noise, prompts, num_inference_steps=2, guidance_scale=1 + w)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    again = retort("export", tiny[1]["student"].artifact.folder, tmp_path / "whole", "--pipeline")
    assert again.returncode == 2 and "is a pipeline already" in again.stderr
    lora = retort("export", folder, tmp_path / "lora", "--lora", 2)
    assert lora.returncode == 2 and "the student takes w as an input" in lora.stderr


def test_a_lora_student_is_exported_as_one_file_but_not_as_a_lora(tiny, tmp_path):
    text = TINY + LORA_STUDENT.replace(
        "{name: guided, start_steps: 2, end_steps: 2, w_range: [0.0, 4.0]}", "{name: knowledge_distillation}"
    )
    plan = execute(text, tiny[0], name="one")
    out = tmp_path / "one.safetensors"
    done = retort("export", plan["small"].artifact.folder, out, "--single-file")
    assert done.returncode == 0, done.stderr
    pipeline = StableDiffusionPipeline.from_single_file(
        str(out), config=str(plan["teacher"].artifact.folder), local_files_only=True
    )
    teacher = StableDiffusion(plan["teacher"].artifact.folder)
    z, condition = torch.randn(2, 4, 8, 8), teacher.encode_prompts(["a red handwritten seven"] * 2)
    student = Student.load(plan["small"].artifact.folder, teacher)
    with torch.no_grad():
        ours = teacher.predict(student.network, z, student.level(1, z), condition)
        theirs = teacher.predict(pipeline.unet, z, student.level(1, z), condition)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    lora = retort("export", plan["small"].artifact.folder, tmp_path / "lora", "--lora", 2)
    assert lora.returncode == 2 and "is a LoRA of rank 2 already" in lora.stderr
