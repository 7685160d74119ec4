"""Evaluations of a student and its teacher, at a small size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ManifestError
from pipeline.runs import Reporter
from stages.base import StageError
from stages.data.images.config import Digits
from stages.data.images.load import load
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.distill import sources
from stages.evaluate import Evaluate, figures, parts
from stages.evaluate.config import EvaluationExecution
from stages.evaluate.noises import VALIDATION, Noises, held_out
from stages.evaluate.parts import Part
from stages.evaluate.real import two_real_sets
from stages.evaluate.sides import Measurer
from stages.metrics.distances import frechet_distance
from stages.networks.probe import Classifier, batches
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.cli import ROOT
from tests.support.pipelines import PARTS, TINY, execute, plan_of, without_seconds

pytestmark = pytest.mark.usefixtures("quick_probes")

PROBE = TINY + "  probe: {kind: probe, images: digits, steps: 200, execution: {threads: 1}}\n"
QUALITY = PROBE + "  quality: {kind: evaluate, student: student, real: probe, samples: 120, teacher_steps: [2, 1]}\n"


@pytest.fixture(scope="module")
def quality(tiny, quick_probes):
    return execute(QUALITY, tiny[0])["quality"].artifact


def sampled(pairs, student, samples, **execution):
    """Return the test samples, and the latents of the teacher in full steps and of the student."""
    noises = held_out(pairs, student, "test", samples)
    settings = EvaluationExecution(device="cpu", **execution)
    measurer = Measurer(pairs, student, None, noises, None, [], None, None, settings, Path("unused"), 1)
    drawn = measurer.drawn(Part(0, samples))
    return drawn, *(measurer.latents(side, drawn) for side in measurer.sides)


def test_every_side_is_measured_on_the_same_prompts_and_noise(quality):
    metrics = json.loads((quality.folder / "metrics.json").read_text())
    assert list(metrics["sides"]) == ["teacher_5", "teacher_2", "teacher_1", "student"]
    assert [side["network_calls"] for side in metrics["sides"].values()] == [10, 4, 2, 1]
    assert metrics["sides"]["teacher_5"]["latent_mse"] == 0
    assert 0 < metrics["sides"]["teacher_2"]["latent_mse"] < metrics["sides"]["teacher_1"]["latent_mse"]
    assert metrics["features"] == "digits_probe_64" and metrics["samples"] == metrics["distance_samples"] == 120
    for values in (*metrics["sides"].values(), *metrics["references"].values()):
        for name in ("prompt_accuracy", "frechet_distance", "kernel_distance"):
            assert values[f"{name}_se"] >= 0
        assert values["prompt_accuracy"] <= min(values["accuracy_of_digit"], values["accuracy_of_colour"])
        assert 0 <= values["precision"] <= 1 and 0 <= values["recall"] <= 1 and values["diversity"] > 0
    assert metrics["probe_accuracy"] > 0.9
    assert metrics["references"]["real"]["prompt_accuracy"] > 0.9
    assert metrics["references"]["real"]["frechet_distance"] < metrics["sides"]["teacher_1"]["frechet_distance"]
    assert quality.record["metrics"] == metrics


def test_missing_samples_are_solved_like_those_of_a_pairs_stage(quality, tiny):
    """32 pairs are held out, and there are 60 samples. The other 28 equal pairs 96 to 123, which are not stored."""
    student = tiny[1]["student"].artifact
    samples, latents, _ = sampled(sources(student.inputs)[0], student, 60)
    more = execute(TINY, tiny[0], ["stages.pairs.count=128", "stages.student.held_out=33"], only=["pairs"])["pairs"]
    truth = PairReader(read_list(more.artifact.folder)).batch(range(64, 124))
    assert samples.prompts == truth.prompts
    assert (samples.noise == truth.noise).all()
    error = (latents - torch.from_numpy(truth.latent).float()).abs().max()
    assert error < 2e-2  # float16 storage, other batches


def test_the_page_is_self_contained(quality):
    page = (quality.folder / "index.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert "student, 1 step" in page and "VAE reconstruction" in page and "They are not FID" in page
    assert page.count("<img") == 4 * 16 + 1  # a cell for each image of four sides, and the previews of training
    assert "10 network calls" in page


def test_contradictory_settings_are_errors_of_the_plan(tmp_path):
    with pytest.raises(ManifestError, match="5 is not fewer than the 5 steps of the pairs"):
        plan_of(QUALITY, tmp_path, ["stages.quality.teacher_steps=[5]"])
    with pytest.raises(ManifestError, match="a number of steps is given twice"):
        plan_of(QUALITY, tmp_path, ["stages.quality.teacher_steps=[2, 2]"])
    with pytest.raises(ManifestError, match="need at least 100 samples"):
        plan_of(QUALITY, tmp_path, ["stages.quality.samples=64"])
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    refused = r"stages\.quality\.real: prompt accuracy needs pairs with prompts: "
    with pytest.raises(ManifestError, match=f"{refused}digits, not .*p.txt"):
        plan_of(QUALITY, tmp_path, [f"stages.pairs.prompts={prompts}"])
    with pytest.raises(ManifestError, match=f"{refused}digit_scenes, not 'digits'"):
        plan_of(QUALITY, tmp_path, ["stages.probe.images=digit_scenes"])


def test_without_real_images_only_distances_to_the_teacher_are_measured(tiny):
    text = TINY + "  quality: {kind: evaluate, student: student, samples: 20, teacher_steps: []}\n"
    artifact = execute(text, tiny[0])["quality"].artifact
    metrics = json.loads((artifact.folder / "metrics.json").read_text())
    assert set(metrics["sides"]["student"]) == {
        "network_calls", "seconds_per_image", "latent_mse", "latent_mse_se",
    }  # fmt: skip


def test_pairs_alone_measure_their_teacher_in_few_steps(quality, tiny):
    text = PROBE + "  quality: {kind: evaluate, pairs: pairs, real: probe, samples: 120, teacher_steps: [1]}\n"
    assert plan_of(text, tiny[0])["probe"].state == "reuse"
    artifact = execute(text, tiny[0])["quality"].artifact
    metrics = json.loads((artifact.folder / "metrics.json").read_text())
    assert metrics["references"]["real"] == quality.record["metrics"]["references"]["real"]
    assert list(metrics["sides"]) == ["teacher_5", "teacher_1"] and metrics["student"] is None
    assert metrics["sides"]["teacher_1"]["latent_mse"] > 0
    assert "student" not in (artifact.folder / "index.html").read_text().partition("</style>")[2].replace(
        "Student and teacher", ""
    )


def test_an_evaluation_needs_a_student_or_pairs_or_both(tiny):
    with pytest.raises(ManifestError, match="give student, pairs or both"):
        plan_of(TINY + "  quality: {kind: evaluate}\n", tiny[0])
    text = TINY + "  quality: {kind: evaluate, student: student, pairs: others, samples: 20, teacher_steps: []}\n"
    sampler = "sampler: {steps: 2, guidance_scale: 2.0}"
    others = f"  others: {{kind: pairs, teacher: teacher, prompts: digits, count: 20, seed: 9, {sampler}}}\n"
    metrics = execute(text + others, tiny[0], name="others")["quality"].artifact.record["metrics"]
    assert list(metrics["sides"]) == [
        "teacher_2",
        "student",
    ]  # all are held out, because the student was trained on none of them
    with pytest.raises(ManifestError, match="they were made by another teacher than student's"):
        scenes = "  scenes: {kind: teacher, from: digit_scenes}\n"
        plan_of(text + scenes + others.replace("teacher: teacher", "teacher: scenes"), tiny[0])


# --- What is held out ---

STUDENT = TINY.partition("  student:\n")[2]
OTHERS = "  others: {kind: pairs, teacher: teacher, prompts: digits, %s}\n"
SAMPLER = "sampler: {steps: 2, guidance_scale: 2.0}"
ON_OTHERS = "  quality: {kind: evaluate, student: student, pairs: others, samples: 20}\n"


@pytest.mark.parametrize("settings", [
    "count: 20, sampler: {name: dpmpp_2m, steps: 5, guidance_scale: 2.0}",
    f"count: 200, {SAMPLER}",
    f"count: 20, storage_dtype: float32, {SAMPLER}",
])  # fmt: skip
def test_pairs_that_repeat_training_noises_are_refused_by_name(tmp_path, settings):
    text = TINY + OTHERS % settings + ON_OTHERS
    count = 64 if "200" in settings else 20
    words = (
        rf"stages\.quality\.pairs: others has {count} of the noises of pairs, which student was trained on: both have "
        "seed 0; give others a `seed:` of its own"
    )
    with pytest.raises(ManifestError, match=words):
        plan_of(text, tmp_path)
    assert plan_of(text, tmp_path, ["stages.others.seed=1"])["quality"]
    assert plan_of(text.replace("pairs: others", "pairs: pairs"), tmp_path)["quality"]


def test_noises_of_a_mixture_and_of_earlier_students_are_refused_too(tmp_path):
    more = OTHERS.replace("others", "more") % f"count: 50, seed: 5, {SAMPLER}"
    text = TINY + more + OTHERS % f"count: 20, seed: 5, {SAMPLER}" + ON_OTHERS
    words = "others has 20 of the noises of more, which student was trained on: both have seed 5"
    with pytest.raises(ManifestError, match=words):
        plan_of(text, tmp_path, ["stages.student.pairs=[pairs, more]"])
    first = f"  first:\n{STUDENT.replace('pairs: pairs', 'pairs: more')}"
    assert plan_of(text + first, tmp_path)["quality"]
    with pytest.raises(ManifestError, match=words.replace("20", "18")):  # 50 noises, of which `first` holds out 32
        plan_of(text + first, tmp_path, ["stages.student.start_from=first"])


def test_held_out_noises_follow_all_noises_of_the_student_and_earlier_students(tmp_path):
    """The student has pairs of 96 noises, 32 of them held out. An earlier student had 40 noises, 8 of them held out."""
    small = OTHERS.replace("others", "small") % f"count: 40, {SAMPLER}"
    mixed = OTHERS.replace("others", "mixed") % f"count: 50, seed: 5, {SAMPLER}"
    first = STUDENT.replace("pairs: pairs", "pairs: small").replace("held_out: 32", "held_out: 8")
    settings = ["stages.student.pairs=[pairs, mixed]", "stages.student.start_from=first"]
    plan = plan_of(f"{TINY}{small}{mixed}  first:\n{first}", tmp_path, settings)
    pairs, small, mixed, first, student = (
        plan[name].artifact for name in ("pairs", "small", "mixed", "first", "student")
    )
    assert held_out(pairs, student, "test", 60) == Noises(range(64, 96), range(96, 124))
    assert held_out(pairs, student, "test", 20) == Noises(range(76, 96), range(96, 96))
    assert held_out(small, student, "test", 20) == Noises(range(40, 40), range(64, 84))
    assert held_out(mixed, student, "test", 20) == Noises(range(50, 50), range(50, 70))
    assert held_out(small, first, "test", 20) == Noises(range(32, 40), range(40, 52))
    assert held_out(pairs, first, "test", 80) == Noises(range(32, 96), range(96, 112))
    assert held_out(pairs, None, "test", 20) == Noises(range(76, 96), range(96, 96))  # like students of these pairs


def test_all_pairs_are_held_out_for_a_student_of_latents(tmp_path):
    latents = "  latents: {kind: latents, teacher: teacher, images: digits}\n"
    method = "{name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 2.0}"
    text = TINY.replace("    pairs: pairs\n", "    latents: latents\n").replace(
        "{name: knowledge_distillation}", method
    )
    text += latents + "  quality: {kind: evaluate, student: student/2, pairs: pairs, samples: 20}\n"
    plan = plan_of(text, tmp_path)
    student, pairs = (plan["quality"].artifact.inputs[name] for name in ("student", "pairs"))
    assert held_out(pairs, student, "test", 100) == Noises(range(96), range(96, 100))


def test_a_source_without_held_out_pairs_is_evaluated_on_new_noises(tiny):
    more = OTHERS.replace("others", "more") % f"count: 24, seed: 5, {SAMPLER}"
    text = f"{TINY}{more}  quality: {{kind: evaluate, student: student, pairs: more, samples: 20}}\n"
    sets = ["stages.student.pairs=[pairs, more]", "stages.student.training.steps=2", "stages.quality.teacher_steps=[]"]
    shown = json.loads(
        (execute(text, tiny[0], sets, name="more")["quality"].artifact.folder / "shown.json").read_text()
    )
    assert set(shown["samples"]) <= set(range(24, 44))


def test_validation_and_test_share_no_sample(tiny):
    made = {
        split: execute(
            TINY + "  quality: {kind: evaluate, student: student, samples: 40, teacher_steps: []}\n",
            tiny[0],
            [f"stages.quality.split={split}"],
            name=split,
        )["quality"].artifact
        for split in ("validation", "test")
    }
    assert made["test"].fingerprint != made["validation"].fingerprint
    shown = {split: json.loads((one.folder / "shown.json").read_text()) for split, one in made.items()}
    assert set(shown["validation"]["samples"]) <= set(range(VALIDATION, VALIDATION + 40))
    assert set(shown["test"]["samples"]) <= set(range(64, 104))
    assert all(one.record["metrics"]["split"] == split for split, one in made.items())
    pairs, student = tiny[1]["pairs"].artifact, tiny[1]["student"].artifact
    for samples in (20, 2000, 10**9):  # test noises follow the pairs, and have lower numbers than validation noises
        test, validation = (held_out(pairs, student, split, samples) for split in ("test", "validation"))
        assert test.count == validation.count == samples and not validation.stored
        assert test.fresh.stop <= validation.fresh.start


@pytest.mark.parametrize(("manifest", "split"), [("gan_weight", "validation"), ("ablation", "test")])
def test_validation_and_test_of_a_matrix_use_different_samples(tmp_path, manifest, split):
    plan = plan_of((ROOT / "manifests" / f"{manifest}.yaml").read_text(), tmp_path)
    stages = [planned.artifact.stage for planned in plan.values()]
    assert {stage.split for stage in stages if isinstance(stage, Evaluate)} == {split}


# --- Real images, cost ---


def test_the_real_images_are_held_out_ones(quality):
    reference, other = two_real_sets(load(Digits(), held_out=True), 120)
    assert not set(reference.origins) & set(other.origins) and len(reference) == len(other) == 120
    classifier = Classifier.load(quality.inputs["real"].folder, "cpu")
    seen = [classifier.look(batches(images))[0] for images in (reference, other)]
    found = quality.record["metrics"]["references"]["real"]["frechet_distance"]
    assert found == pytest.approx(frechet_distance(*seen), rel=1e-4)


def test_too_few_real_images_for_a_distance_are_an_error():
    few = load(Digits(), held_out=True).take(np.arange(150))
    with pytest.raises(StageError, match=r"holds out 150 real images, which make two sets of 75; .* at least 100"):
        two_real_sets(few, 120)


def test_both_sides_use_the_dtype_of_the_pairs_and_the_micro_batch(tiny):
    text = TINY + OTHERS % f"count: 12, seed: 9, dtype: bfloat16, {SAMPLER}"  # the other 8 are solved by the evaluation
    pairs = execute(text, tiny[0], only=["others"], name="bfloat16")["others"].artifact
    student = tiny[1]["student"].artifact
    seen = set()

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            seen.add((module.weight.dtype, inputs[0].dtype, len(inputs[0])))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        samples, _, drawn = sampled(pairs, student, 20, micro_batch=8)
    finally:
        hook.remove()
    assert {(weight, given) for weight, given, _ in seen} == {(torch.bfloat16, torch.bfloat16)}
    assert {count for *_, count in seen} == {16, 8, 4}  # 16: doubled by guidance; 4: the rest of 20
    exact = StableDiffusion(pairs.inputs["teacher"].folder)
    with torch.no_grad():
        wanted = Student.load(student.folder, exact)(
            exact.to_device(samples.noise), exact.encode_prompts(samples.prompts)
        )
    assert 0 < (drawn - wanted).abs().max() < 0.1


def test_the_micro_batch_is_recorded_and_makes_nothing_stale(tiny):
    text = TINY + "  quality: {kind: evaluate, student: student, samples: 21, teacher_steps: []}\n"
    made = execute(text, tiny[0], ["stages.quality.execution={micro_batch: 8}"])["quality"].artifact
    assert plan_of(text, tiny[0])["quality"].artifact.fingerprint == made.fingerprint
    assert (made.record["metrics"]["micro_batch"], made.record["metrics"]["dtype"]) == (8, "float32")
    told = "in batches of 8, computed in float32"
    assert told in (made.folder / "index.html").read_text() and told in figures.legend(made.record["metrics"])[2]


# --- Parts ---

PARTED = PROBE + PARTS


class InterruptedAfter(Reporter):
    """Interrupts (Ctrl-C) after a number of measured samples, and records all progress."""

    def __init__(self, samples: int = 10**9) -> None:
        self.samples = samples
        self.seen: list[int] = []

    def progress(self, stage, progress):
        if stage == "parted" and progress.unit == "samples":
            self.seen.append(progress.done)
            if progress.done >= self.samples:
                raise KeyboardInterrupt


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 32)


def test_an_interrupted_evaluation_keeps_its_measured_parts(tiny, small_parts):
    whole = execute(PARTED, tiny[0], force=["parted"], name="whole")["parted"].artifact.record["metrics"]
    shutil.rmtree(plan_of(PARTED, tiny[0])["parted"].artifact.folder)
    with pytest.raises(KeyboardInterrupt):
        execute(PARTED, tiny[0], name="cut", reporter=InterruptedAfter(64))
    going_on = InterruptedAfter()
    again = execute(PARTED, tiny[0], name="cut", reporter=going_on)["parted"].artifact
    assert going_on.seen == [96, 100]
    assert without_seconds(again.record["metrics"]) == without_seconds(whole)
    assert not list(again.folder.rglob("*.safetensors"))


def test_parts_of_another_size_change_rounding_only(tiny, quality, monkeypatch):
    text = QUALITY.replace("  quality:", "  again:")
    monkeypatch.setattr(parts, "SIZE", 50)
    found = execute(text, tiny[0], force=["again"], name="fifty")["again"].artifact
    before = quality.record["metrics"]["sides"]
    for side, values in found.record["metrics"]["sides"].items():
        for name in ("latent_mse", "prompt_accuracy", "frechet_distance", "diversity"):
            assert values[name] == pytest.approx(before[side][name], rel=1e-3, abs=1e-5)
    assert json.loads((found.folder / "shown.json").read_text())["samples"]
