"""The stage `optimize` and its evaluation, from a manifest to pages, and the errors of its plan."""

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from pipeline.runs import Run
from pipeline.store import Store
from pipeline.views.compare import collect
from stages.optimize.representations.base import FRAMES
from stages.reports.sections import sections
from tests.support.cli import ROOT
from tests.support.networks import stable_diffusion_layout
from tests.support.pipelines import GAUSSIAN, TINY, execute, plan_of

HEAD, _, _ = TINY.partition("  pairs:")
PARTICLES = (
    HEAD
    + """
  latent: &things
    kind: optimize
    representation: latent
    objective: {name: vsd, guidance_scale: 2.0, score: {lora: {rank: 2}}}
    teacher: teacher
    prompt: a red handwritten seven
    particles: 3
    training: {steps: 12, batch_size: 2}
    execution: {threads: 1, previews: 1}
  image: {<<: *things, representation: image, objective: {name: sds, guidance_scale: 2.0}}
  probe: {kind: probe, images: digits, limit: 200, steps: 100, execution: {threads: 1}}
  measured: &measured
    kind: evaluate
    particles: latent
    sampler: {steps: 3, guidance_scale: 2.0}
    real: probe
    execution: {threads: 1}
  measured_images: {<<: *measured, particles: image}
"""
)


@pytest.fixture(scope="module")
def made(tiny, quick_probes):
    store, _ = tiny
    return store, execute(PARTICLES, store, name="particles")


@pytest.mark.parametrize("representation", ["latent", "image"])
def test_particles_are_written_as_images_with_previews_and_history(made, representation):
    folder = made[1][representation].artifact.folder
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert Image.open(folder / "images" / "0000.png").size == (16, 16)
    assert Image.open(folder / "previews" / "step-0000012.png").size == (48, 16)
    assert (folder / "previews.png").exists()
    steps = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert steps == [10, 12]
    if representation == "latent":
        latents = np.load(folder / "latents.npy", allow_pickle=False)
        assert latents.shape[0] == 3 and latents.dtype == np.float32


def test_an_evaluation_measures_particles_beside_their_teacher_and_they_are_compared(made):
    store, _ = made
    evaluations, missing = collect([Run(Store(store), "particles")])
    assert not missing
    (section,) = sections(evaluations)
    assert [row.kind for row in section.rows] == ["teacher"] + ["student"] * 2
    assert section.rows[0].figures["network_calls"] == 6
    for row in section.rows:
        assert {"prompt_accuracy", "diversity", "saturation", "contrast", "image_distance"} <= row.figures.keys()
        assert 0 < row.figures["saturation"] < 1 and row.picture.exists()
    assert {row.name: row.figures["method"] for row in section.rows[1:]} == {"latent": "vsd", "image": "sds"}


def test_an_evaluation_measures_the_stored_particles(made):
    """The strip of an evaluation shows the images of the optimize stage."""
    folder, evaluation = (made[1][name].artifact.folder for name in ("image", "measured_images"))
    shown = json.loads((evaluation / "shown.json").read_text())["samples"]
    strip = np.asarray(Image.open(evaluation / "rows" / "particles.png"))
    wanted = [np.asarray(Image.open(folder / "images" / f"{number:04}.png")) for number in shown]
    assert np.array_equal(strip, np.concatenate(wanted, axis=1))


def wrong(text, *expected):
    with pytest.raises(ManifestError) as error:
        loads(text, "test.yaml")
    for words in expected:
        assert words in str(error.value)


ONE = (
    HEAD
    + """
  thing:
    kind: optimize
    teacher: teacher
    prompt: a red handwritten seven
    representation: latent
    objective: {name: sds, guidance_scale: 2.0}
    training: {steps: 2}
"""
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("representation: latent", "representation: latent\n    particles: 0", "greater than or equal to 1"),
        ("representation: latent", "representation: marble", "image, latent"),
        ("name: sds", "name: sd", "sds, vsd"),
        ("guidance_scale: 2.0}", "guidance_scale: 2.0, time_range: [0.9, 0.1]}", "the first less than the second"),
        (
            "representation: latent",
            "representation: {name: nerf, cameras: {field_of_view: [100, 200]}}",
            "two numbers from 1 to 170",
        ),
    ],
)
def test_wrong_settings_are_errors_of_the_manifest(old, new, expected):
    head, _, tail = ONE.partition("  thing:")
    wrong(head + "  thing:" + tail.replace(old, new), expected)


def test_a_teacher_that_makes_no_images_or_cannot_be_guided_is_an_error_of_the_plan(tmp_path):
    head, _, _ = GAUSSIAN.partition("  pairs:")
    thing = ONE.partition("  thing:")[2]
    with pytest.raises(ManifestError, match="makes no images"):
        plan_of(f"{head}  thing:{thing}", tmp_path)
    unguided = ONE.replace("denoiser: {", "drop_text: 0.0\n      denoiser: {")
    with pytest.raises(ManifestError, match="never without a prompt"):
        plan_of(unguided, tmp_path)
    plan_of(unguided.replace("guidance_scale: 2.0", "guidance_scale: 1.0"), tmp_path)


def test_settings_of_an_evaluation_that_do_not_apply_to_particles_are_errors(tmp_path):
    evaluation = "  measured: {kind: evaluate, particles: thing, samples: 50}\n"
    wrong(ONE + evaluation, "with particles, leave samples out")
    wrong(ONE + "  measured: {kind: evaluate, sampler: {steps: 2}}\n", "sampler applies to particles")
    probed = (
        ONE + "  probe: {kind: probe, images: digits}\n  measured: {kind: evaluate, particles: thing, real: probe}\n"
    )
    plan_of(probed, tmp_path)
    with pytest.raises(ManifestError, match="prompt accuracy needs a prompt that the probe knows: 'a horse'"):
        plan_of(probed.replace("prompt: a red handwritten seven", "prompt: a horse"), tmp_path)


def test_annealing_after_the_last_step_is_an_error_of_the_plan(tmp_path):
    annealed = ONE.replace("guidance_scale: 2.0", "guidance_scale: 2.0, anneal: {after: %s}")
    plan_of(annealed % 1, tmp_path)
    with pytest.raises(ManifestError, match="there are only 2 training steps"):
        plan_of(annealed % 2, tmp_path)


def test_guidance_without_a_prompt_and_unknown_words_of_views_are_warnings(tiny):
    store, _ = tiny
    nerf = ONE.replace("representation: latent", "representation: {name: nerf, view_prompts: %s}")

    def warned(text):
        stage = plan_of(text, store)["thing"].artifact
        return " ".join(stage.stage.warnings(stage.inputs))

    assert warned(nerf % "false") == ""
    assert "does not know" in warned(nerf % "true") and "'view'" in warned(nerf % "true")
    assert "guidance has no effect" in warned(ONE.replace("a red handwritten seven", '""'))


@pytest.mark.parametrize(("name", "thing"), [("sd15_dreamfusion", "hamburger"), ("sd15_prolificdreamer", "pineapple")])
def test_the_published_manifests_run_at_small_size(name, thing, tmp_path):
    sets = [
        f"teacher.from={stable_diffusion_layout(tmp_path / 'layout')}",
        "teacher.revision=null",
        f"{thing}.representation.resolution=8",
        f"{thing}.representation.shown=8",
        f"{thing}.representation.levels=2",
        f"{thing}.representation.samples=4",
        f"{thing}.representation.log2_table_size=8",
        f"{thing}.training.steps=2",
        f"{thing}.execution.threads=1",
        "quality.sampler.steps=2",
        "quality.execution.threads=1",
    ]
    if thing == "pineapple":
        sets.append("pineapple.objective.anneal.after=1")
    plan = execute(
        (ROOT / "manifests" / f"{name}.yaml").read_text(), tmp_path / "store", [f"stages.{line}" for line in sets]
    )
    folder = plan[thing].artifact.folder
    assert len(list((folder / "0000" / "frames").iterdir())) == FRAMES and (folder / "0000" / "turntable.webp").exists()
    (line,) = (json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines())
    prefix = "particles_" if "prolific" in name else ""
    assert {f"{prefix}matching", f"{prefix}sparsity"} <= set(line) and ("score_loss" in line) == bool(prefix)
    metrics = json.loads((plan["quality"].artifact.folder / "metrics.json").read_text())
    assert metrics["samples"] == 4 and metrics["sides"].keys() == {"teacher_2", "particles"}
