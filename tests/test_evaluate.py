"""The comparison of a student with its teacher, small."""

import json

import pytest

from pipeline.errors import ManifestError
from tests.conftest import TINY, execute, plan_of

PROBE = TINY + "  probe: {kind: probe, images: digits, steps: 150, execution: {threads: 1}}\n"
QUALITY = PROBE + "  quality: {kind: evaluate, student: student, real: probe, samples: 120, teacher_steps: [2, 1]}\n"


@pytest.fixture(scope="module")
def quality(tiny):
    return execute(QUALITY, tiny[0])["quality"].artifact


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
        assert 0 <= values["precision"] <= 1 and 0 <= values["recall"] <= 1 and values["diversity"] > 0
    assert metrics["probe_accuracy"] > 0.9
    assert metrics["references"]["real"]["prompt_accuracy"] > 0.9
    assert metrics["references"]["real"]["frechet_distance"] < metrics["sides"]["teacher_1"]["frechet_distance"]
    assert quality.record["metrics"] == metrics


def test_held_out_pairs_are_taken_and_the_rest_is_solved_as_the_factory_would(quality, tiny):
    """32 held-out pairs, 60 samples: the other 28 are what pairs 96 to 123 would be."""
    import torch

    from stages.base import Execution
    from stages.data.pool import read_list
    from stages.data.reader import PairReader
    from stages.distill import sources
    from stages.evaluation.sides import sample_sides

    student = tiny[1]["student"].artifact
    steps = sample_sides(sources(student.inputs)[0], student, None, 60, [], Execution(device="cpu"))
    try:
        while True:
            next(steps)
    except StopIteration as end:
        sides, setting = end.value
    more = execute(TINY, tiny[0], ["stages.pairs.count=128", "stages.student.held_out=33"], only=["pairs"])["pairs"]
    truth = PairReader(read_list(more.artifact.folder)).batch(range(64, 124))
    assert setting.prompts == truth.prompts
    assert (setting.noise == truth.noise).all()
    error = (sides[0].latents - torch.from_numpy(truth.latent).float()).abs().max()
    assert error < 2e-2  # float16 storage, other batches


def test_the_page_is_self_contained(quality):
    page = (quality.folder / "index.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert "student, 1 step" in page and "VAE reconstruction" in page and "They are not FID" in page
    assert (quality.folder / "grid.png").exists()


def test_contradictions_are_found_when_planning(tmp_path):
    with pytest.raises(ManifestError, match="5 is not fewer than the 5 steps of the pairs themselves"):
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


def test_without_real_images_only_the_teacher_is_compared_with(tiny):
    text = TINY + "  quality: {kind: evaluate, student: student, samples: 20, teacher_steps: []}\n"
    artifact = execute(text, tiny[0])["quality"].artifact
    metrics = json.loads((artifact.folder / "metrics.json").read_text())
    assert set(metrics["sides"]["student"]) == {
        "network_calls", "seconds_per_image", "latent_mse", "latent_mse_se",
    }  # fmt: skip


def test_pairs_alone_show_their_teacher_in_few_steps_through_the_same_probe(quality, tiny):
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


def test_a_student_or_pairs_or_both(tiny):
    with pytest.raises(ManifestError, match="give student, pairs or both"):
        plan_of(TINY + "  quality: {kind: evaluate}\n", tiny[0])
    text = TINY + "  quality: {kind: evaluate, student: student, pairs: others, samples: 20, teacher_steps: []}\n"
    sampler = "sampler: {steps: 2, guidance_scale: 2.0}"
    others = f"  others: {{kind: pairs, teacher: teacher, prompts: digits, count: 20, seed: 9, {sampler}}}\n"
    metrics = execute(text + others, tiny[0], name="others")["quality"].artifact.record["metrics"]
    assert list(metrics["sides"]) == ["teacher_2", "student"]  # all of them are held out: it never saw any
    with pytest.raises(ManifestError, match="they are of another teacher than student's"):
        scenes = "  scenes: {kind: teacher, from: digit_scenes}\n"
        plan_of(text + scenes + others.replace("teacher: teacher", "teacher: scenes"), tiny[0])
