"""Pixel-space teachers: stock pipelines without text, unconditional and by class."""

import json
import shutil
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image

from pipeline.errors import ManifestError, StageFailed
from stages.base import StageError
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.form import Form
from stages.networks.adapters import checked, files_of
from stages.networks.condition import Condition
from stages.networks.pixel import PixelDiffusion
from stages.networks.student import Student, export
from stages.teacher import Teacher
from tests.support.cli import ROOT
from tests.support.networks import pixel_unet
from tests.support.pipelines import execute, plan_of

PIPELINE = """
name: pixels
stages:
  teacher: {{kind: teacher, from: {folder}}}
  pairs:
    kind: pairs
    teacher: teacher
    {prompts}
    count: 24
    shard_size: 8
    sampler: {{steps: 4, guidance_scale: {scale}}}
    execution: {{micro_batch: 8, threads: 1}}
  student:
    kind: distill
    pairs: pairs
    method: knowledge_distillation
    training: {{steps: 4, batch_size: 4}}
    held_out: 8
    execution: {{threads: 1}}
  quality: {{kind: evaluate, student: student, samples: 20, teacher_steps: [1]}}
"""


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A standard DDPM pipeline with a linear schedule, saved like those trained on CIFAR-10."""
    folder = tmp_path_factory.mktemp("unconditional")
    DDPMPipeline(unet=pixel_unet(), scheduler=DDPMScheduler(beta_schedule="linear")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """Two classes and the null class."""
    folder = tmp_path_factory.mktemp("by_class")
    DDIMPipeline(unet=pixel_unet(3), scheduler=DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "cat", "1": "dog"}}))
    return folder


def test_an_unconditional_teacher_is_distilled_and_evaluated(unconditional, tmp_path):
    plan = execute(PIPELINE.format(folder=unconditional, prompts="", scale=1.0), tmp_path)
    reader = PairReader(read_list(plan["pairs"].artifact.folder))
    held = reader.batch(range(4))
    assert held.prompts == [""] * 4 and held.noise.shape == (4, 3, 8, 8)
    assert plan["quality"].artifact.record["metrics"]["sides"]["teacher_4"]["network_calls"] == 4
    folder = plan["student"].artifact.folder
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is DDIMPipeline
    pipeline.set_progress_bar_config(disable=True)
    teacher = PixelDiffusion(plan["teacher"].artifact.folder)
    student = Student.load(folder, teacher)
    generator = torch.Generator().manual_seed(3)
    image = pipeline(num_inference_steps=1, generator=generator, output_type="np").images[0]
    noise = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x0 = student(noise, Condition(1)).clamp(-1, 1)
    np.testing.assert_allclose(image, (x0[0] / 2 + 0.5).permute(1, 2, 0), atol=1e-5)
    assert "pipeline(num_inference_steps=1)" in (folder / "README.md").read_text()


def test_a_class_conditional_teacher_is_distilled_and_keeps_its_class_names(by_class, tmp_path):
    prompts = tmp_path / "classes.txt"
    prompts.write_text("cat\n1\n")
    plan = execute(PIPELINE.format(folder=by_class, prompts=f"prompts: {prompts}", scale=2.0), tmp_path / "store")
    assert plan["quality"].artifact.record["metrics"]["sides"]["teacher_4"]["network_calls"] == 8
    folder = plan["student"].artifact.folder
    assert json.loads((folder / "model_index.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    card = (folder / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(folder))
    namespace: dict = {}
    exec(example, namespace)  # the card's own lines
    teacher = PixelDiffusion(plan["teacher"].artifact.folder)
    with torch.no_grad():
        x0 = Student.load(folder, teacher)(namespace["noise"], teacher.encode_prompts(["cat"]))
    torch.testing.assert_close(
        namespace["image"], x0, atol=1e-5, rtol=1e-6
    )  # random weights give values of several hundred


def test_guidance_combines_the_outputs_of_the_null_class_and_the_class(by_class):
    teacher = PixelDiffusion(by_class)
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        none, cat = (teacher.network(z, 500, torch.tensor([c, c])).sample for c in (2, 0))
        guided = teacher.denoiser(["cat", "0"], 3.0)(z, 500)
    torch.testing.assert_close(guided, none + 3.0 * (cat - none), rtol=1e-4, atol=1e-5)


def test_prompts_that_are_not_classes_of_the_teacher_are_refused(unconditional, by_class, tmp_path):
    with pytest.raises(StageError, match="the teacher is unconditional"):
        PixelDiffusion(unconditional).encode_prompts(["cat"])
    with pytest.raises(StageError, match="'cow' is not a class of the teacher, which has cat, dog, 0, 1, 2"):
        PixelDiffusion(by_class).encode_prompts(["cow"])
    with pytest.raises(StageFailed, match="leave prompts out"):
        execute(PIPELINE.format(folder=unconditional, prompts="prompts: digits", scale=1.0), tmp_path)


def test_guidance_needs_a_null_class(tmp_path):
    DDIMPipeline(unet=pixel_unet(2), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "source")
    prompts = tmp_path / "classes.txt"
    prompts.write_text("0\n1\n")
    text = PIPELINE.format(folder=tmp_path / "source", prompts=f"prompts: {prompts}", scale=3.0)
    with pytest.raises(StageFailed, match=r"guidance_scale: 1.0"):
        execute(text, tmp_path / "store")
    execute(text.replace("guidance_scale: 3.0", "guidance_scale: 1.0"), tmp_path / "store", only=["teacher"])


def test_the_plan_checks_guidance_by_the_sealed_teacher(unconditional, by_class, tmp_path, monkeypatch):
    """For a hub id, the plan knows only the sealed teacher. Files in the current folder are never used."""
    stage = Teacher.model_validate({"kind": "teacher", "from": "owner/name"})
    assert "unconditional" in stage.guidance_error(False, unconditional)
    assert stage.guidance_error(False, by_class) is None and stage.timesteps(by_class) == 1000
    monkeypatch.chdir(unconditional)
    trained = Teacher.model_validate({"kind": "teacher", "gaussian": {"mean": 0.0, "std": 1.0, "shape": [1, 2, 2]}})
    for one in (stage, trained):
        assert one.guidance_error(False, tmp_path) is None and one.timesteps(tmp_path) is None


def test_networks_with_other_inputs_are_refused(unconditional, tmp_path):
    shutil.copytree(unconditional, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "unet" / "config.json").read_text())
    (tmp_path / "source" / "unet" / "config.json").write_text(json.dumps({**config, "out_channels": 6}))
    with pytest.raises(StageFailed, match="3 channels in and 6 out"):
        execute(
            PIPELINE.format(folder=tmp_path / "source", prompts="", scale=1.0), tmp_path / "store", only=["teacher"]
        )


def test_an_unconditional_teacher_cannot_be_guided(unconditional, tmp_path):
    with pytest.raises(ManifestError, match=r"sampler.guidance_scale: guidance needs prompts"):
        execute(PIPELINE.format(folder=unconditional, prompts="", scale=2.0), tmp_path)
    with pytest.raises(StageFailed, match="the teacher is unconditional, but was given"):
        execute(PIPELINE.format(folder=unconditional, prompts="prompts: digits", scale=2.0), tmp_path)


def test_grey_images_are_shown_in_colour(tmp_path):
    from stages.data.pictures import strip

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    teacher = PixelDiffusion(tmp_path)
    images = teacher.decode(torch.randn(2, *teacher.latent_shape))
    assert images.shape == (2, 3, 8, 8) and strip(images.numpy()).shape == (8, 16, 3)
    torch.testing.assert_close(teacher.encode(images)[:, 0], images[:, 0])


def test_classes_of_equal_names_are_given_by_number(by_class, tmp_path):
    shutil.copytree(by_class, tmp_path / "source")
    index = json.loads((by_class / "model_index.json").read_text())
    (tmp_path / "source" / "model_index.json").write_text(
        json.dumps({**index, "id2label": {"0": "crane", "1": "crane"}})
    )
    teacher = PixelDiffusion(tmp_path / "source")
    assert teacher.encode_prompts(["0", "1", ""]).tensors["class"].tolist() == [0, 1, 2]
    with pytest.raises(StageError, match="'crane' is not a class"):
        teacher.encode_prompts(["crane"])


@pytest.mark.parametrize(("steps", "schedule", "pipeline_class"), [
    (4, "teacher", DDIMPipeline), (3, "teacher", DDPMPipeline), (4, "cosine", DDIMPipeline)
])  # fmt: skip
def test_plain_diffusers_samples_students_of_several_steps(unconditional, tmp_path, steps, schedule, pipeline_class):
    """The exported pipeline uses the student's own grid. The teacher predicts epsilon and the student v."""
    teacher = PixelDiffusion(unconditional)
    student = Student.from_teacher(teacher, Form(steps=steps, schedule=schedule))
    export(student, tmp_path, "a card")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "output_type": "np"}
    image = pipeline(generator=torch.Generator().manual_seed(3), **settings).images[0]
    noise = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x0 = student(noise, Condition(1)).clamp(-1, 1)
    np.testing.assert_allclose(image, (x0[0] / 2 + 0.5).permute(1, 2, 0), atol=1e-4)


@pytest.mark.parametrize(("form", "scheduler"), [
    (Form(steps=4, sampler="consistency"), "LCMScheduler"), (Form(steps=16), "DPMSolverMultistepScheduler")
])  # fmt: skip
def test_the_card_of_a_class_conditional_student_names_its_scheduler(by_class, tmp_path, form, scheduler):
    teacher = PixelDiffusion(by_class)
    student = Student.from_teacher(teacher, form).eval()
    export(student, tmp_path, "a card")
    lines = teacher.usage(form, scheduler).replace("THIS FOLDER", str(tmp_path))
    namespace: dict = {}
    torch.manual_seed(3)
    exec(lines, namespace)
    assert type(namespace["scheduler"]).__name__ == scheduler == namespace["scheduler"].config["_class_name"]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(namespace["noise"].shape, generator=generator)
    with torch.no_grad():
        x0 = student(noise, teacher.encode_prompts(["cat"]), None, generator)
    torch.testing.assert_close(namespace["image"], x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("classes", ["unconditional", "by_class"])
def test_the_card_calls_a_student_at_its_own_timesteps(classes, tmp_path, request):
    teacher = PixelDiffusion(request.getfixturevalue(classes))
    form = Form(steps=2, levels=(799, 399))
    student = Student.from_teacher(teacher, form).eval()
    export(student, tmp_path, "a card")
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"]
    namespace: dict = {}
    exec(teacher.usage(form, scheduler).replace("THIS FOLDER", str(tmp_path)), namespace)
    assert namespace["scheduler"].timesteps.tolist() == [799, 399]
    with torch.no_grad():
        x0 = student(namespace["noise"], teacher.encode_prompts(["cat" if classes == "by_class" else ""]))
    torch.testing.assert_close(namespace["image"], x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["[1]", "5", '{"_class_name": ["a"]}', '{"_class_name": "DDPMPipeline", "unet": 5}'])
def test_a_damaged_index_is_refused(text, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    assert files_of(str(tmp_path)), "planning goes on with the files of the built-in families"
    with pytest.raises(StageError, match=r"model_index.json|is a"):
        checked(tmp_path)


def test_a_flow_scheduler_is_refused(unconditional, tmp_path):
    """These networks take the number of a timestep, but flow-matching networks take the noise level."""
    folder = shutil.copytree(unconditional, tmp_path / "source")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler, which is for flow matching"):
        checked(folder)


def test_a_class_conditional_teacher_is_halved_with_the_classes_of_an_image_set(by_class, tmp_path):
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(images / name / f"{i}.png")
    image_set = f"{{name: image_folder, path: {images}, size: 8, caption: null, label: folder}}"
    text = f"""
name: halved
stages:
  teacher: {{kind: teacher, from: {by_class}}}
  latents: {{kind: latents, teacher: teacher, images: {image_set}, execution: {{threads: 1}}}}
  student:
    kind: distill
    latents: latents
    method:
      {{name: progressive, start_steps: 4, end_steps: 1, match_first: true, guidance_scale: 2.0, schedule: cosine}}
    training: {{steps: 2, batch_size: 4}}
    execution: {{threads: 1}}
"""
    plan = execute(text, tmp_path / "store")
    card = (plan["student/2"].artifact.folder / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0]
    namespace: dict = {}
    exec(example.replace("THIS FOLDER", str(plan["student/2"].artifact.folder)), namespace)  # the card's own lines
    teacher = PixelDiffusion(plan["teacher"].artifact.folder)
    with torch.no_grad():
        x0 = Student.load(plan["student/2"].artifact.folder, teacher)(
            namespace["noise"], teacher.encode_prompts(["cat"])
        )
    torch.testing.assert_close(namespace["image"], x0, atol=1e-4, rtol=1e-4)


def test_the_manifest_of_cifar10_pairs_is_planned_offline_and_runs_at_small_size(unconditional, tmp_path):
    """The stages are those of the manifest, with fewer pairs, steps and samples, and without the downloads of LPIPS and
    Inception."""
    text = (ROOT / "manifests/cifar10_ode_pairs.yaml").read_text()
    images = [BytesIO() for _ in range(40)]
    for i, file in enumerate(images):
        Image.fromarray(np.full((32, 32, 3), i * 5, np.uint8)).save(file, format="PNG")
    (tmp_path / "plain_text").mkdir()
    rows = pa.table({"img": [{"bytes": file.getvalue()} for file in images], "label": [i % 10 for i in range(40)]})
    pq.write_table(rows, tmp_path / "plain_text/train.parquet")
    here = [
        f"stages.teacher.from={unconditional}",
        f"stages.cifar10.images.path={tmp_path / 'plain_text'}",
    ]
    plan = plan_of(text, tmp_path / "store", here)
    assert not [stage.name for stage in plan.values() if stage.state == "blocked"]
    assert len([name for name in plan if name.startswith("student")]) == 8
    small = (
        text.replace("[10240, 102400, 512000, 1024000]", "[12, 20]")
        .replace("shard_size: 1024\n", "shard_size: 8\n    execution: {threads: 1}\n")
        .replace("count: 10000\n    shard_size: 1000", "count: 24\n    shard_size: 8")
        .replace("steps: 100,", "steps: 3,")
        .replace("{method.loss: [l1, lpips]}", "{method.loss: [l1]}")
        .replace("steps: 50000, batch_size: 512", "steps: 4, batch_size: 8")
        .replace("warmup_steps: 5000", "warmup_steps: 1")
        .replace("samples: 50000", "samples: 30")
    )
    done = execute(small[: small.index("resources:")], tmp_path / "store", here)
    for count in (12, 20):
        metrics = done[f"quality[count={count},loss=l1]"].artifact.record["metrics"]
        assert metrics["sides"]["student"]["latent_mse"] > 0 and metrics["reference"]["images"] == 40
        assert "fid" not in metrics["sides"]["student"]
    read = PairReader.of(done["pairs[count=20]"].artifact).batch(range(12))
    assert np.array_equal(read.noise, PairReader.of(done["pairs[count=12]"].artifact).batch(range(12)).noise)
