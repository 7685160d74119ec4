"""Distillation of guided models: its chain, one student for all strengths of guidance, and settings that are
refused."""

import json
import re

import pytest
import torch

from pipeline.commands.console import find_artifact
from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import loads
from pipeline.manifest.model import dump
from pipeline.store import load_artifact
from stages.base import StageError
from stages.diffusion.form import Form
from stages.methods.guided.config import GuidedConfig
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.student import Student
from stages.reports.sampling import draw
from tests.support.pipelines import TINY, execute, plan_of

CHAIN = """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  guided:
    kind: distill
    latents: latents
    method: {name: guided, start_steps: 4, end_steps: 2, w_range: [0.0, 4.0]}
    training: {steps: 8, batch_size: 16, learning_rate: 1e-3, ema_decay: 0.0}
    execution: {threads: 1}
  strengths:
    kind: pairs
    matrix: {sampler.guidance_scale: [1.0, 3.0]}
    teacher: teacher
    prompts: digits
    count: 24
    shard_size: 24
    sampler: {steps: 4}
    execution: {threads: 1}
  quality:
    kind: evaluate
    student: guided
    pairs: strengths
    samples: 20
    teacher_steps: []
    execution: {threads: 1}
"""


@pytest.fixture(scope="module")
def chain(tiny):
    return execute(TINY + CHAIN, tiny[0], name="guided")


def test_the_first_link_takes_as_many_steps_as_the_teacher():
    loaded = loads(TINY + CHAIN, "m.yaml")
    stages = loaded.manifest.stages
    links = [(n, s.method.start_steps, s.method.end_steps, s.start_from) for n, s in stages.items() if "guided" in n]
    assert links == [("guided/4", 4, 4, None), ("guided/2", 4, 2, "guided/4")]
    assert [n for n in stages if n.startswith("quality")] == [
        f"quality/{steps}[guidance_scale={scale}]" for steps in (4, 2) for scale in (1.0, 3.0)
    ]
    assert loads(dump(loaded.manifest), "again.yaml").manifest == loaded.manifest


def test_w_has_an_effect_only_after_training(chain, teacher):
    noise = torch.randn(2, *teacher.latent_shape)
    condition = teacher.encode_prompts(["a red handwritten seven", "a blue handwritten two"])
    new = Student.from_teacher(teacher, Form(steps=2, w_range=(0.0, 4.0)))
    trained = Student.load(chain["guided/2"].artifact.folder, teacher)
    with torch.no_grad():
        plain = Student.from_teacher(teacher, Form(steps=2))(noise, condition)
        low, high = (torch.full((2,), w) for w in (0.0, 4.0))
        assert torch.equal(new(noise, condition, low), new(noise, condition, high))
        torch.testing.assert_close(new(noise, condition, low), plain)
        assert (trained(noise, condition, low) - trained(noise, condition, high)).abs().max() > 1e-5
    with pytest.raises(ValueError, match="give w"):
        trained(noise, condition)


def test_one_student_is_evaluated_at_every_guidance_strength(chain):
    for steps in (4, 2):
        for scale in (1.0, 3.0):
            metrics = chain[f"quality/{steps}[guidance_scale={scale}]"].artifact.record["metrics"]
            assert metrics["student"] == chain[f"guided/{steps}"].artifact.fingerprint
            assert metrics["sides"]["student"]["network_calls"] == steps
            assert metrics["sides"]["teacher_4"]["network_calls"] == (4 if scale == 1 else 8)
    card = (chain["guided/2"].artifact.folder / "README.md").read_text()
    assert "any guidance_scale from 1 to 5" in card and "guidance_scale=3, num_inference_steps=2" in card


def test_the_first_link_learns_the_guided_teacher(tiny, teacher):
    """Uses guidance strengths that have an effect on this briefly trained teacher. A new student is the teacher without
    guidance."""
    text = TINY + CHAIN.split("  strengths")[0].replace("end_steps: 2", "end_steps: 4").replace("4.0]", "30.0]")
    text = text.replace("steps: 8,", "steps: 60,")
    folder = execute(text, tiny[0], name="learns")["guided/4"].artifact.folder
    assert find_artifact("learns/guided", str(tiny[0])) == folder, "a chain of one link needs no other name"
    student = Student.load(folder, teacher)
    untrained = Student.from_teacher(teacher, student.form)
    torch.manual_seed(0)
    z, condition = torch.randn(64, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"] * 64)
    i, w = torch.full((64,), 4), torch.full((64,), 25.0)
    target = TeacherDenoiser(teacher, student.grid).x0(z, i, condition, w)
    with torch.no_grad():
        before, after = (float((s.x0(z, i, condition, w) - target).square().mean()) for s in (untrained, student))
    assert after < 0.5 * before


def test_a_stochastic_chain_runs_and_its_card_says_that_diffusers_cannot_sample_it(tiny):
    text = TINY + CHAIN.split("  strengths")[0].replace("w_range", "sampler: stochastic, w_range")
    student = execute(text.replace("steps: 8,", "steps: 2,"), tiny[0], name="stochastic")["guided/2"].artifact
    assert json.loads((student.folder / "student.json").read_text())["sampler"] == "stochastic"
    card = (student.folder / "README.md").read_text()
    assert "Plain diffusers cannot sample this student: diffusers has no N-step stochastic sampler" in card
    assert "```python" not in card


def test_images_are_drawn_with_a_link_at_any_strength(chain, tiny, tmp_path):
    """The link is named as RUN/STAGE, although its stage name contains a slash."""
    from PIL import Image

    folder = find_artifact("guided/guided/2", str(tiny[0]))
    assert folder == chain["guided/2"].artifact.folder
    with pytest.raises(UsageError, match="several stages guided; name one: guided/4, guided/2"):
        find_artifact("guided/guided", str(tiny[0]))
    drawn = []
    for scale in (1.0, 1.0, 5.0):
        draw(load_artifact(folder), ["a red handwritten seven"], 2, 0, None, scale, tmp_path / "i.png", pytest.fail)
        drawn.append(Image.open(tmp_path / "i.png").tobytes())
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(StageError, match=r"from 1 to 5, not 7\.5"):
        draw(load_artifact(folder), ["a red handwritten seven"], 2, 0, None, 7.5, tmp_path / "i.png", pytest.fail)


@pytest.mark.parametrize(("old", "new", "words"), [
    ("[1.0, 3.0]", "[1.0, 5.5]", "guidance_scale: 5.5; the student takes scales of .1, 5."),
    ("w_range: [0.0, 4.0]", "w_range: 4.0", "method.w_range: should be a list, not 4.0"),
    ("w_range: [0.0, 4.0]", "w_range: [4.0, 4.0]", "w_range should be two numbers"),
    ("start_steps: 4", "start_steps: 5", "end_steps: should be start_steps: 5 halved one or more times, not 2"),
    ("    latents: latents\n", "    latents: latents\n    start_from: student\n", "the student in start_from takes 1"),
])  # fmt: skip
def test_contradictory_settings_are_errors_of_the_plan(tmp_path, old, new, words):
    assert old in CHAIN
    with pytest.raises(ManifestError, match=words):
        plan_of(TINY + CHAIN.replace(old, new), tmp_path)


def test_a_chain_with_start_from_has_no_guidance_link(tmp_path):
    """It cannot have training steps for a first link either."""
    settings = "method: {name: guided, start_steps: 4, end_steps: 1, w_range: [0.0, 4.0], training_steps: {%s}}"
    text = TINY + CHAIN.split("  strengths")[0]
    more = "  further:" + CHAIN.partition("  guided:")[2].split("  strengths")[0]
    more = re.sub("method: .*", settings, more).replace(
        "latents: latents\n", "latents: latents\n    start_from: guided/4\n"
    )
    plan = plan_of(text + more % "1: 3", tmp_path)
    assert [n for n in plan if n.startswith("further")] == ["further/2", "further/1"]
    with pytest.raises(ManifestError, match=r"training_steps.4: no round has this number of steps"):
        plan_of(text + more % "4: 20, 1: 3", tmp_path)
    for start, end, wrong in ((32, 1, True), (32, 8, True), (32, 16, False)):
        found = list(
            GuidedConfig(start_steps=start, end_steps=end).check_start(GuidedConfig(start_steps=32, end_steps=32))
        )
        assert [path for path, _ in found] == (["end_steps"] if wrong else [])


def test_a_teacher_that_cannot_be_guided_is_refused_when_planning(tmp_path):
    text = TINY.replace("      dataset: digits\n", "      dataset: digits\n      drop_text: 0.0\n") + CHAIN
    with pytest.raises(ManifestError, match="needs guidance, but the teacher was trained with drop_text: 0"):
        plan_of(text, tmp_path)
    for classes, words in ((None, "the teacher is unconditional"), (3, "no null class")):
        folder = tmp_path / f"pixels-{classes}"
        pixel_teacher(folder, classes)
        text = f"name: pixels\nstages:\n  teacher: {{kind: teacher, from: {folder}}}\n"
        text += CHAIN.split("  strengths")[0].replace("images: digits", "images: {name: digits, size: 16}")
        with pytest.raises(ManifestError, match=words):
            plan_of(text, tmp_path)


def pixel_teacher(folder, classes):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, num_class_embeds=classes,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    if classes:
        index = folder / "model_index.json"
        index.write_text(
            json.dumps({**json.loads(index.read_text()), "id2label": {str(i): f"c{i}" for i in range(classes)}})
        )
