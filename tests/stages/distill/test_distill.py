"""Students: their initial weights, export to plain diffusers, and resuming after a kill."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import ManifestError
from stages.data.files import sha256_of
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.form import Form
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.cli import ROOT, command, retort
from tests.support.networks import stable_diffusion_layout
from tests.support.pipelines import PROGRESSIVE, TINY, execute, plan_of


def held_out(tiny):
    return PairReader(read_list(tiny[1]["pairs"].artifact.folder)).batch(range(64, 96))


def test_the_error_falls_on_held_out_pairs(tiny, teacher):
    held = held_out(tiny)
    target = torch.from_numpy(held.latent).float()

    def error(student):
        x0 = student(teacher.to_device(held.noise), teacher.encode_prompts(held.prompts))
        return float((x0 - target).square().mean())

    with torch.no_grad():
        before = error(Student.from_teacher(teacher, Form()))
        after = error(Student.load(tiny[1]["student"].artifact.folder, teacher))
    assert after < before
    assert after == pytest.approx(tiny[1]["student"].artifact.record["metrics"]["held_out_mse"], rel=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_plain_diffusers_runs_the_export_in_one_step_at_any_guidance(tiny, teacher, guidance_scale):
    from diffusers import DiffusionPipeline

    folder = tiny[1]["student"].artifact.folder
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    held = held_out(tiny)
    noise, prompts = teacher.to_device(held.noise[:3]), held.prompts[:3]
    images = pipeline(
        prompts, latents=noise, num_inference_steps=1, guidance_scale=guidance_scale, output_type="np"
    ).images
    with torch.no_grad():
        x0 = Student.load(folder, teacher)(noise, teacher.encode_prompts(prompts))
    ours = ((teacher.decode(x0) + 1) / 2).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, ours, atol=1e-5)


def test_the_model_card_describes_the_student(tiny):
    student = tiny[1]["student"].artifact
    card = (student.folder / "README.md").read_text()
    assert "num_inference_steps=1" in card and student.fingerprint in card
    assert tiny[1]["teacher"].artifact.fingerprint in card and "license: apache-2.0" in card
    assert json.loads((student.folder / "student.json").read_text())["timesteps"] == [999]
    assert not list(student.folder.rglob("*.bin")) and not (student.folder / "checkpoints").exists()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_epsilon_teacher_of_stable_diffusions_own_layout(tmp_path, prediction):
    """Uses CLIP's tokenizer and PNDM's scheduler config, as in the published folders. Plain diffusers runs the exported
    student of either prediction type."""
    from diffusers import DiffusionPipeline

    text = f"""
name: sd
stages:
  teacher: {{kind: teacher, from: {stable_diffusion_layout(tmp_path / "sd")}}}
  pairs: {{kind: pairs, teacher: teacher, prompts: digits, count: 40, sampler: {{steps: 2}}}}
  student:
    kind: distill
    pairs: pairs
    method: {{name: knowledge_distillation, prediction: {prediction}}}
    training: {{steps: 2, batch_size: 8}}
    held_out: 8
"""
    plan = execute(text, tmp_path / "store")
    teacher = StableDiffusion(plan["teacher"].artifact.folder)
    assert teacher.prediction == "epsilon" and teacher.tokenizer.model_max_length == 77
    pipeline = DiffusionPipeline.from_pretrained(plan["student"].artifact.folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *teacher.latent_shape)
    images = pipeline(["a b", "b"], latents=noise, num_inference_steps=1, output_type="np").images
    with torch.no_grad():
        student = Student.load(plan["student"].artifact.folder, teacher)
        ours = teacher.decode(student(noise, teacher.encode_prompts(["a b", "b"])))
    np.testing.assert_allclose(images, ((ours + 1) / 2).permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_bf16_training_keeps_conditions_in_float32(tiny):
    bf16 = "training: {steps: 3, batch_size: 16, mixed_precision: bf16}"
    plan = execute(TINY.replace("training: {steps: 24, batch_size: 16}", bf16), tiny[0])
    assert plan["student"].artifact.record["metrics"]["held_out_mse"] > 0
    teacher = StableDiffusion(tiny[1]["teacher"].artifact.folder)
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher.encode_prompts(["a red handwritten seven"])
    fresh = StableDiffusion(tiny[1]["teacher"].artifact.folder).encode_prompts(["a red handwritten seven"])
    assert torch.equal(inside.tensors["text"], fresh.tensors["text"])


def test_training_twice_gives_the_same_bytes(tiny, tmp_path):
    again = execute(TINY, tmp_path)
    for name in ("teacher", "student"):
        ours, theirs = again[name].artifact.folder, tiny[1][name].artifact.folder
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert sha256_of(ours / weights) == sha256_of(theirs / weights)


def test_a_killed_driver_resumes_training_to_the_same_bytes(tiny, tmp_path):
    """The driver gets SIGKILL after two checkpoints. The resumed student equals the uninterrupted one."""
    store = tmp_path / "store"
    pairs = tiny[1]["pairs"].artifact.folder
    text = TINY.replace("pairs: pairs", f"pairs: {pairs}")
    start, end = text.index("  teacher:"), text.index("  student:")
    manifest = tmp_path / "m.yaml"
    manifest.write_text(text[:start] + text[end:])
    submit = command("submit", manifest, "--store", store, "--engine", "inline")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(submit, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(p.name[5:]) for p in store.glob("work/*/checkpoints/step-*")]
        if steps and max(steps) >= 14:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not list(store.glob("distill/*/artifact.json"))
    assert retort("resume", "--store", store, "--engine", "inline").returncode == 0
    (student,) = (store / "distill").iterdir()
    for file in ("unet/diffusion_pytorch_model.safetensors", "history.jsonl"):
        assert sha256_of(student / file) == sha256_of(tiny[1]["student"].artifact.folder / file)


def test_a_student_starts_from_another_student(tiny, teacher):
    """With a learning rate of almost 0, the student stays equal to the first one. Plain diffusers runs its export."""
    text = TINY.replace("    held_out: 32\n", "    held_out: 32\n    start_from: first\n").replace(
        "  student:\n", "  first:\n" + TINY.split("  student:\n")[1] + "  student:\n"
    )
    still = ["stages.student.training={steps: 1, batch_size: 16, learning_rate: 1e-30}"]
    plan = execute(text, tiny[0], still, name="goes_on")
    first, second = (plan[name].artifact for name in ("first", "student"))
    assert first.fingerprint == tiny[1]["student"].artifact.fingerprint != second.fingerprint
    assert second.inputs["start_from"].fingerprint == first.fingerprint
    assert f"Training continued from distill/{first.fingerprint}" in (second.folder / "README.md").read_text()
    ours, theirs = (Student.load(a.folder, teacher).state_dict() for a in (second, first))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    third = TINY.split("  student:\n")[1].replace("held_out: 32", "held_out: 32\n    start_from: student")
    still.append(still[0].replace("student", "third"))
    third = execute(f"{text}  third:\n{third}", tiny[0], still, name="goes_on")["third"].artifact
    seen = [(artifact.folder / "history.jsonl").read_text() for artifact in (second, third)]
    assert seen[0] != seen[1], "the same weights, trained on other pairs"

    with pytest.raises(ManifestError, match="in start_from has prediction: v_prediction, this one has prediction: eps"):
        plan_of(text, tiny[0], ["stages.student.method.prediction=epsilon"])
    with pytest.raises(ManifestError, match="trained on 16 of the 48 noises that are held out, as part of pairs"):
        plan_of(text, tiny[0], ["stages.student.held_out=48"])
    sampler = "sampler: {steps: 2, guidance_scale: 2.0}"
    big = f"  big: {{kind: pairs, teacher: teacher, prompts: digits, count: 200, {sampler}}}\n"
    with pytest.raises(ManifestError, match="trained on 32 of the 32 noises that are held out, as part of big"):
        plan_of(text + big, tiny[0], ["stages.first.pairs=big"])
    other = text.replace("stages:\n", "stages:\n  other: {kind: teacher, from: digit_scenes}\n")
    first_pairs = "  first:\n    kind: distill\n    pairs: more"
    other = other.replace("  first:\n    kind: distill\n    pairs: pairs", first_pairs)
    other = other.replace(
        "  first:\n",
        "  more: {kind: pairs, teacher: other, prompts: digits, count: 64, sampler: {steps: 2}}\n  first:\n",
        1,
    )
    with pytest.raises(ManifestError, match="first is the student of another teacher than that of `pairs`"):
        plan_of(other, tiny[0])


def test_gradient_checkpointing_changes_no_bytes(tiny, tmp_path):
    text = TINY.replace("checkpoint_every: 7}", "checkpoint_every: 7, gradient_checkpointing: true}")
    text = text.replace("pairs: pairs", f"pairs: {tiny[1]['pairs'].artifact.folder}")
    start, end = text.index("  teacher:"), text.index("  student:")
    student = execute(text[:start] + text[end:], tmp_path)["student"].artifact
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sha256_of(student.folder / weights) == sha256_of(tiny[1]["student"].artifact.folder / weights)


MIXED = TINY.replace(
    "  student:\n    kind: distill\n    pairs: pairs\n",
    """  more:
    kind: pairs
    teacher: teacher
    prompts: digits
    seed: 5
    count: 64
    shard_size: 32
    sampler: {steps: 5, guidance_scale: 2.0}
    execution: {micro_batch: 16, threads: 1}
  student:
    kind: distill
    pairs: [pairs, more]
""",
)


def test_a_student_of_several_pairs(tiny):
    sources = "[{pairs: pairs, weight: 1.0}, {pairs: more, weight: 9.0}]"
    plan = execute(MIXED, tiny[0], [f"stages.student.pairs={sources}"], name="mixed")
    student = plan["student"].artifact
    assert {field: a.fingerprint for field, a in student.inputs.items()} == {
        "pairs.0.pairs": plan["pairs"].artifact.fingerprint,
        "pairs.1.pairs": plan["more"].artifact.fingerprint,
    }
    assert plan["pairs"].artifact.fingerprint != plan["more"].artifact.fingerprint
    assert f"from {96 + 64 - 32} pairs" in (student.folder / "README.md").read_text()
    assert student.record["metrics"]["held_out_mse"] > 0


def test_the_weights_of_pairs_change_the_fingerprint(tiny):
    sources = "[{{pairs: pairs, weight: {}}}, {{pairs: more, weight: 1.0}}]"
    weights = [plan_of(MIXED, tiny[0], [f"stages.student.pairs={sources.format(w)}"])["student"] for w in (3.0, 4.0)]
    assert weights[0].artifact.fingerprint != weights[1].artifact.fingerprint


def test_invalid_mixtures_are_refused_when_planning(tiny):
    one_seed = MIXED.replace("    seed: 5\n", "    storage_dtype: float32\n")
    with pytest.raises(ManifestError, match="two of them have the same seed, and so the same noises"):
        plan_of(one_seed, tiny[0])
    for value, words in (
        ("[{pairs: pairs, weight: 2.0}, more]", "give each of the pairs a weight, or none"),
        ("[{pairs: pairs, weight: 1.0}, {pairs: more, weight: 0.0001}]", "more has less than 1/1024 of the weight"),
        ("[{pairs: pairs, wieght: 1.0}, more]", "unknown key; did you mean 'weight'"),
        ("[pairs, mor]", "did you mean 'more'"),
    ):
        with pytest.raises(ManifestError, match=words):
            plan_of(MIXED, tiny[0], [f"stages.student.pairs={value}"])


def test_pairs_of_several_teachers_are_refused(tiny):
    text = MIXED.replace(
        "  more:\n    kind: pairs\n    teacher: teacher", "  more:\n    kind: pairs\n    teacher: other"
    )
    text = text.replace("stages:\n", "stages:\n  other: {kind: teacher, from: digit_scenes}\n")
    with pytest.raises(ManifestError, match="they were made with several teachers; a student has one"):
        plan_of(text, tiny[0])


def test_one_step_methods_take_pairs_only(tmp_path):
    text = TINY.replace("    pairs: pairs\n", "    latents: latents\n") + PROGRESSIVE.split("  fewer")[0]
    with pytest.raises(ManifestError, match="knowledge_distillation is trained on pairs, not on latents") as refusal:
        plan_of(text, tmp_path)
    assert "guidance_scale" not in str(refusal.value)


def test_previews_show_fixed_noises_while_a_student_is_trained(tiny):
    """One strip for each preview, from the same noises; the evaluation's page shows them all."""
    text = TINY.replace("execution: {threads: 1, checkpoint_every: 7}", "execution: {threads: 1, previews: PREVIEWS}")
    text += "  quality: {kind: evaluate, student: student, samples: 20, teacher_steps: [], execution: {threads: 1}}\n"
    plan = execute(text.replace("PREVIEWS", "2").replace("steps: 24,", "steps: 23,"), tiny[0], name="previews")
    folder = plan["student"].artifact.folder
    strips = sorted(path.name for path in (folder / "previews").iterdir())
    assert strips == ["step-0000010.png", "step-0000020.png", "step-0000023.png"]
    sizes = {Image.open(folder / "previews" / name).size for name in strips}
    assert sizes == {(8 * 16, 16)}
    pixels = [np.asarray(Image.open(folder / "previews" / name)) for name in strips]
    assert not np.array_equal(pixels[0], pixels[1])
    page = (plan["quality"].artifact.folder / "index.html").read_text()
    assert "While it was trained" in page
    none = execute(text.replace("PREVIEWS", "0").replace("steps: 24,", "steps: 22,"), tiny[0], name="none")
    assert not (none["student"].artifact.folder / "previews").exists()
    assert "While it was trained" not in (none["quality"].artifact.folder / "index.html").read_text()
