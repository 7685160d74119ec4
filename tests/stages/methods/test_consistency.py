"""Consistency distillation: the target, the averaged weights, and a student sampled in fewer steps."""

import json

import pytest
import torch

from pipeline.errors import ManifestError
from stages.methods.base import Materials, StudentTraining
from stages.methods.consistency.config import ConsistencyConfig
from stages.training import TrainingExecution, checkpoint
from stages.training.loop import train
from tests.support.cli import retort
from tests.support.networks import shaken
from tests.support.pipelines import TINY, execute, plan_of

LCM = (
    TINY.partition("  student:")[0]
    + """
  student:
    kind: distill
    pairs: pairs
    method: {name: consistency, steps: 4, solver_steps: 20, w_range: [0.0, 4.0]}
    training: {steps: 6, batch_size: 16, learning_rate: 1e-4, ema_decay: 0.9}
    held_out: 32
    execution: {threads: 1}
  quality:
    {kind: evaluate, student: student, samples: 20, teacher_steps: [], execution: {threads: 1}}
  fewer:
    {kind: evaluate, student: student, steps: 2, samples: 20, teacher_steps: [], execution: {threads: 1}}
"""
)


@pytest.fixture(scope="module")
def plan(tiny):
    return execute(LCM, tiny[0], name="lcm")


def batch(teacher, count=6):
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(count, *teacher.latent_shape, generator=generator)
    return {"latents": {"latent": latent, "prompts": ["a red handwritten seven"] * count}}


def method_of(teacher, **settings):
    config = ConsistencyConfig(steps=2, solver_steps=10, **settings)
    return config.create(Materials(teacher, StudentTraining(steps=3, learning_rate=1e-3)))


def test_a_student_is_trained_on_more_points_than_it_is_sampled_at(teacher):
    student = method_of(teacher).student
    assert student.grid.steps == 10 and student.form.steps == 2
    called = []
    student.network.register_forward_pre_hook(lambda _, arguments: called.append(float(arguments[1])))
    with torch.no_grad():
        student(torch.randn(1, *teacher.latent_shape), teacher.encode_prompts([""]))
    assert called == [999.0, 499.0]


@pytest.mark.parametrize("guidance", [{"guidance_scale": 2.0}, {"w_range": (0.0, 4.0)}])
def test_the_target_is_the_averaged_students_output_at_the_teachers_next_point(teacher, guidance):
    """Computes the loss by hand, with the random numbers of the loop. At the point next to clean data, the target is
    the teacher's estimate. With a range of w, teacher, target and student get the same w."""
    method, given = method_of(teacher, **guidance), batch(teacher)
    shaken(method.target)
    shaken(shaken(method.student))
    torch.manual_seed(5)
    loss, _ = method.loss(given)
    torch.manual_seed(5)
    x, prompts, grid = given["latents"]["latent"], given["latents"]["prompts"], method.student.grid
    i, condition = torch.randint(1, 11, (6,)), teacher.encode_prompts(prompts)
    assert 1 in i
    strengths = 4 * torch.rand(6) if "w_range" in guidance else None
    noise = torch.randn_like(x)
    distances = []
    for k in range(6):
        here, there = tuple(grid.level(int(i[k]))), tuple(grid.level(int(i[k]) - 1))
        z = noise[k : k + 1] if i[k] == 10 else here[0] * x[k : k + 1] + here[1] * noise[k : k + 1]
        t, w = int(grid.timesteps[i[k]]), None if strengths is None else strengths[k : k + 1]
        with torch.no_grad():
            output = teacher.denoiser(prompts[:1], 2.0 if w is None else 1 + float(w))(z, t)
            x0 = here[0] * z - here[1] * output
            nearer = there[0] * x0 + there[1] * (here[0] * output + here[1] * z)
            target = x0 if i[k] == 1 else method.target.x0(nearer, i[k : k + 1] - 1, condition.select(slice(1)), w)
            distances.append(method.distance(method.student.x0(z, i[k : k + 1], condition.select(slice(1)), w), target))
    torch.testing.assert_close(loss, torch.cat(distances).mean(), atol=1e-5, rtol=1e-4)


def test_the_target_moves_towards_the_student_by_its_decay(teacher):
    method = method_of(teacher, target_decay=0.75)
    shaken(method.student)
    before = [value.clone() for value in method.target.parameters()]
    method.after_step(0)
    for mean, old, value in zip(method.target.parameters(), before, method.student.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * value)
    assert [name for name, player in method.players.items() if player.averaged] == ["student"]


def test_a_student_can_be_sampled_in_steps_that_divide_its_points():
    config = ConsistencyConfig(steps=4, solver_steps=20)
    assert [steps for steps in range(1, 21) if config.step_count_error(steps) is None] == [1, 2, 4, 5, 10, 20]


def test_the_target_follows_the_student_and_is_kept_in_checkpoints(teacher, tmp_path):
    def run():
        torch.manual_seed(0)
        method = method_of(teacher, target_decay=0.5)
        start = method.student.network.conv_out.weight.clone()
        execution = TrainingExecution(device="cpu", checkpoint_every=1)
        progress = train(method, lambda step: batch(teacher), seed=0, checkpoints=tmp_path / "c", execution=execution)
        try:
            while True:
                next(progress)
        except StopIteration:
            pass
        return method, start

    method, start = run()
    student, target = (m.network.conv_out.weight for m in (method.student, method.target))
    assert not torch.equal(target, start) and not torch.equal(target, student)
    tensors, state = checkpoint.latest(tmp_path / "c")
    assert state["step"] == 3 and torch.equal(tensors["target/module/network.conv_out.weight"], target)
    again, _ = run()  # the last checkpoint is that of the last step
    assert torch.equal(again.target.network.conv_out.weight, target)


def test_the_student_is_trained_and_evaluated(plan):
    metrics = plan["quality"].artifact.record["metrics"]
    assert metrics["sides"]["student"]["network_calls"] == 4 and metrics["sides"]["student"]["latent_mse"] > 0
    about = json.loads((plan["student"].artifact.folder / "student.json").read_text())
    assert about["timesteps"] == [999, 749, 499, 249] and about["w_range"] == [0.0, 4.0]
    assert "held_out_mse" not in plan["student"].artifact.record["metrics"]  # the sampler draws more noise


def test_the_number_of_steps_does_not_change_the_training(plan, tiny, tmp_path):
    own, fewer = (plan[name].artifact.record["metrics"]["sides"]["student"] for name in ("quality", "fewer"))
    assert (own["network_calls"], fewer["network_calls"]) == (4, 2) and own["latent_mse"] != fewer["latent_mse"]
    found = json.loads(retort("compare", "lcm", "--store", tiny[0], "--html", tmp_path / "c.html", "--json").stdout)
    names = [row["name"] for row in found["sections"][0]["rows"] if row["kind"] == "student"]
    assert names == ["student", "student[steps=2]"]
    other = "{name: consistency, steps: 10, solver_steps: 20, w_range: [0.0, 4.0]}, training: {steps: 1}, held_out: 32"
    text = LCM + f"  other: {{kind: distill, pairs: pairs, start_from: student, method: {other}}}\n"
    assert plan_of(text, tiny[0])["other"]
    draw = ("sample", plan["student"].artifact.folder, "-p", "a red handwritten seven", "-n", 1, "--out")
    images = [tmp_path / f"{steps}.png" for steps in (4, 2)]
    assert retort(*draw, images[0]).returncode == retort(*draw, images[1], "--steps", 2).returncode == 0
    assert images[0].read_bytes() != images[1].read_bytes()
    done = retort(*draw, tmp_path / "no.png", "--steps", 3)
    assert done.returncode == 2 and "was trained at 20 points, which is not a multiple of 3 steps" in done.stderr


@pytest.mark.parametrize(("old", "new", "words"), [
    ("steps: 2, samples", "steps: 3, samples", "fewer.steps: the student was trained at 20 points, which is not a m"),
    ("student: student, steps: 2", "pairs: pairs, steps: 2", "steps applies to a student"),
    ("solver_steps: 20", "solver_steps: 18", "solver_steps: 18 is not a multiple of steps: 4"),
    ("w_range: [0.0, 4.0]", "w_range: [0.0, 4.0], guidance_scale: 2.0", "give either guidance_scale or w_range"),
    ("w_range: [0.0, 4.0]", "w_range: [2.0, 4.0]", "guidance_scale: 2; the student takes scales of .3, 5."),
    ("w_range: [0.0, 4.0]", "guidance_scale: 3.0", "the pairs have guidance_scale: 2; the student has learned 3"),
])  # fmt: skip
def test_contradictory_settings_are_errors_of_the_plan(tmp_path, old, new, words):
    assert old in LCM
    with pytest.raises(ManifestError, match=words):
        plan_of(LCM.replace(old, new), tmp_path)


def test_more_steps_than_the_teacher_has_timesteps_are_an_error_of_the_plan(tmp_path):
    text = LCM.replace("solver_steps: 20", "solver_steps: 1004")
    with pytest.raises(ManifestError, match="solver_steps: 1004 are more than the teacher's 1000 timesteps"):
        plan_of(text, tmp_path)
