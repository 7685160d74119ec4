"""Progressive distillation: its arithmetic in closed form, its chain of stages, kills, its export."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from pipeline.manifest.model import dump
from stages.base import StageError
from stages.data.files import sha256_of
from stages.data.latents import read_latents
from stages.diffusion.few_step import ddim_step, implied_x0, sample
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.diffusion.halving import two_step_target
from stages.diffusion.prediction import both_to_x0
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.weighting import weights
from stages.methods.base import Materials
from stages.methods.progressive.config import ProgressiveConfig
from stages.networks.denoiser import ManyStep
from stages.networks.exporting import scheduler_of, why_not_plain
from stages.networks.latent import LatentTeacher
from stages.networks.student import Student, export
from stages.training import TrainingSettings
from tests.support.cli import ROOT, command
from tests.support.networks import SCHEDULER, drawn, shaken, stable_diffusion_layout
from tests.support.pipelines import TINY, execute, plan_of

CHAIN = """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  fewer:
    kind: distill
    latents: latents
    method: {name: progressive, start_steps: 8, end_steps: 1, guidance_scale: 2.0, training_steps: {1: 6}}
    training: {steps: 4, batch_size: 16, learning_rate: 1e-4, ema_decay: 0.0}
    execution: {threads: 1}
  quality:
    kind: evaluate
    student: fewer
    pairs: pairs
    samples: 20
    teacher_steps: [2]
    execution: {threads: 1}
"""
TABLE = {
    1.0: {1: 0.0, 2: 0.5, 4: 0.72855, 8: 0.85623, 16: 0.92568, 64: 0.98091, 1024: 0.99880, 8192: 0.99985},
    0.6: {1: 0.0, 2: 0.26471, 4: 0.41725, 8: 0.50297, 16: 0.54968, 64: 0.58703, 1024: 0.59918, 8192: 0.59990},
}
"""The standard deviation that N steps of DDIM leave of data N(m, S^2), on the cosine schedule: S -> N -> it."""
MEAN = 1.5


@pytest.fixture(scope="module")
def chain(tiny):
    return execute(TINY + CHAIN, tiny[0], name="chain")


# --- Arithmetic ----------------------------------------------------------------------------------------


class Linear:
    """Estimates x0 as a + b z at each point of a grid, as the data N(MEAN, S^2) makes it or as was fitted."""

    def __init__(self, grid, a, b):
        self.grid, self.a, self.b = grid, a, b

    @classmethod
    def exact(cls, steps, std):
        grid = Grid.cosine(steps)
        alpha, sigma = torch.from_numpy(grid.alpha), torch.from_numpy(grid.sigma)
        b = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return cls(grid, MEAN - b * alpha * MEAN, b)

    def __call__(self, z, j):
        a, b = (table[j].view(-1, 1, 1, 1) for table in (self.a, self.b))
        return a + b * z

    def halved(self):
        """Least squares through targets at three z of each point: the fit is exact."""
        steps, seen = self.grid.steps // 2, torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
        i, z = torch.arange(1, steps + 1).repeat_interleave(3), seen.repeat(steps).view(-1, 1, 1, 1)
        target = two_step_target(self, z, i, self.grid).view(steps, 3)
        slope = (target[:, 2] - target[:, 0]) / 4
        assert (target[:, 1] - target.mean(1)).abs().max() < 1e-9
        a, b = (torch.cat([torch.zeros(1, dtype=torch.float64), table]) for table in (target[:, 1], slope))
        return Linear(Grid.cosine(steps), a, b)

    def std(self):
        z = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(-1, 1, 1, 1)
        low, high = sample("ddim", self, z, self.grid).flatten().tolist()
        assert low + high == pytest.approx(2 * MEAN)
        return (high - low) / 2


@pytest.mark.parametrize("std", TABLE)
def test_students_that_fit_exactly_do_what_their_first_teacher_did(std):
    """At every N, and to any number of steps: even one of a teacher of 8,192."""
    for steps, expected in TABLE[std].items():
        teacher = Linear.exact(steps, std)
        alpha, sigma = teacher.grid.alpha * std, teacher.grid.sigma
        dots = (alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]) / (alpha[1:] ** 2 + sigma[1:] ** 2)
        assert teacher.std() == pytest.approx(float(np.prod(dots)), abs=1e-9)
        assert teacher.std() == pytest.approx(expected, abs=1e-5)
    student, halvings = teacher, 0
    while student.grid.steps > 1:
        student, halvings = student.halved(), halvings + 1
        if student.grid.steps <= 1024:
            assert student.std() == pytest.approx(teacher.std(), abs=1e-6)
    assert halvings == 13


def test_one_step_with_the_target_is_two_of_the_teachers():
    generator = torch.Generator().manual_seed(0)
    noise = {j: torch.randn(64, 4, 2, 2, generator=generator, dtype=torch.float64) for j in "zab"}
    estimates = iter((noise["a"], noise["b"]))
    grid, i = Grid.cosine(64), torch.arange(1, 33).repeat(2)
    target = two_step_target(lambda z, j: next(estimates), noise["z"], i, grid)
    level = [[torch.from_numpy(t)[2 * i - k].view(-1, 1, 1, 1) for t in (grid.alpha, grid.sigma)] for k in (0, 1, 2)]
    half = ddim_step(noise["z"], noise["a"], level[0], level[1])
    end = ddim_step(half, noise["b"], level[1], level[2])
    torch.testing.assert_close(ddim_step(noise["z"], target, level[0], level[2]), end, atol=1e-12, rtol=0)
    assert torch.equal(target[i == 1], noise["b"][i == 1])  # to clean data: the teacher's own estimate
    torch.testing.assert_close(implied_x0(noise["z"], half, level[0], level[1]), noise["a"], atol=1e-9, rtol=0)


def test_the_target_of_a_gaussian_in_closed_form():
    std, steps = 0.6, 8
    teacher, i = Linear.exact(2 * steps, std), torch.arange(1, steps + 1)
    z = torch.randn(steps, 1, 1, 1, dtype=torch.float64)
    target = two_step_target(teacher, z, i, teacher.grid).flatten()
    alpha, sigma = torch.from_numpy(teacher.grid.alpha), torch.from_numpy(teacher.grid.sigma)

    def factor(t, s):
        return (alpha[t] * alpha[s] * std**2 + sigma[t] * sigma[s]) / (alpha[t] ** 2 * std**2 + sigma[t] ** 2)

    here, middle, there = 2 * i, 2 * i - 1, 2 * i - 2
    r = sigma[there] / sigma[here]
    slope = (factor(here, middle) * factor(middle, there) - r) / (alpha[there] - r * alpha[here])
    torch.testing.assert_close(target, MEAN + slope * (z.flatten() - alpha[here] * MEAN), atol=1e-12, rtol=0)


def test_weights_are_errors_of_noise_and_of_v():
    generator = torch.Generator().manual_seed(0)
    x, other, noise = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in "abc")
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        z = alpha * x + sigma * noise
        of_x = (other - x).square()
        of_noise = ((z - alpha * other) / sigma - noise).square()
        of_v = ((alpha * z - other) / sigma - (alpha * noise - sigma * x)).square()
        one = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
        torch.testing.assert_close(weights("snr", *one) * of_x, of_noise)
        torch.testing.assert_close(weights("snr_plus_one", *one) * of_x, of_v)
        torch.testing.assert_close(weights("truncated_snr", *one) * of_x, max(1.0, (alpha / sigma) ** 2) * of_x)
    alpha, sigma = (torch.sigmoid(torch.tensor(sign * 20.0, dtype=torch.float64)).sqrt() for sign in (-1, 1))
    assert float(weights("snr", alpha, sigma)) == pytest.approx(2.06e-9, rel=1e-2)
    assert float(weights("truncated_snr", alpha, sigma)) == 1.0
    torch.testing.assert_close(both_to_x0(x, noise, z, one[0], one[1]), x)  # both right: so is what they come to


def test_few_steps_of_a_mixture_follow_the_ode_and_one_step_follows_it_worse():
    """Small networks on two dimensions, a mixture of four normals, from 8 steps down."""
    torch.manual_seed(0)
    means, std = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]), 0.2

    def exact(grid):
        def denoise(z, j):
            alpha, sigma = (torch.from_numpy(t).float()[j].view(-1, 1) for t in (grid.alpha, grid.sigma))
            flat, variance = z.flatten(1), alpha**2 * std**2 + sigma**2
            away = flat[:, None] - alpha[:, None] * means
            share = (-away.square().sum(2) / (2 * variance)).softmax(1)[..., None]
            return (share * (means + (alpha * std**2 / variance)[:, None] * away)).sum(1).view_as(z)

        return denoise

    def learned(network, grid):
        def denoise(z, j):
            flat = z.flatten(1)
            level = (j * torch.ones(len(z)) / grid.steps).view(-1, 1)
            return network(torch.cat([flat, level, torch.sin(3 * level)], 1)).view_as(z)

        return denoise

    noise = torch.randn(500, 2, 1, 1)
    grid = Grid.cosine(8)
    teacher = exact(grid)
    truth = sample("ddim", lambda z, j: teacher(z, torch.full((len(z),), j)), noise, grid)
    network = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    errors = {}
    for steps in (4, 2, 1):
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        own = Grid.cosine(steps)
        for _ in range(300):
            x = means[torch.randint(4, (256,))] + std * torch.randn(256, 2)
            i = torch.randint(1, steps + 1, (256,))
            alpha, sigma = (torch.from_numpy(t).float()[i].view(-1, 1) for t in (own.alpha, own.sigma))
            z = (alpha * x + sigma * torch.randn_like(x)).view(-1, 2, 1, 1)
            with torch.no_grad():
                target = two_step_target(teacher, z, i, grid).float()
            (learned(network, own)(z, i) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        grid, teacher = own, learned(copy.deepcopy(network).requires_grad_(False), own)
        errors[steps] = float((sample("ddim", teacher, noise, own) - truth).square().mean())
    plain = exact(Grid.cosine(1))
    collapsed = sample("ddim", lambda z, j: plain(z, torch.full((len(z),), j)), noise, Grid.cosine(1))
    assert errors[2] < errors[1] < 0.3 * float((collapsed - truth).square().mean())


# --- Grids, and teachers whose schedule does not end in noise --------------------------------------------


def test_grids_halve():
    own = NoiseSchedule.stable_diffusion()
    for make in (lambda n: Grid.trailing(own, n), Grid.cosine):
        for n in (1, 3, 16, 125):
            fine, coarse = make(2 * n), make(n)
            for name in ("timesteps", "alpha", "sigma"):
                np.testing.assert_allclose(getattr(fine.subsample(2), name), getattr(coarse, name), atol=1e-15)
            assert fine.train_steps == coarse.train_steps
    assert Grid.trailing(own, 4).timesteps.tolist() == [-1, 249, 499, 749, 999]
    assert Grid.cosine(4).timesteps.tolist() == [-1, 255, 511, 767, 1023] and Grid.cosine(8192).train_steps == 1024
    assert Grid.cosine(8).level(8) == (0.0, 1.0) and Grid.cosine(8).level(0) == (1.0, 0.0)
    with pytest.raises(ValueError, match="has 1000 timesteps, too few for 1024 steps"):
        Grid.trailing(own, 1024)


def test_the_last_point_is_trained_on_noise_alone_whatever_the_schedule_ends_in(teacher):
    """Stable Diffusion's own ends at alpha = 0.068: there a student sees what sampling begins with, and what it learns
    is what its teacher does when it is begun there."""
    x, noise = torch.randn(2, 3, *teacher.latent_shape)
    for schedule, alpha in (("teacher", 0.0683), ("cosine", 0.0)):
        student = Student.from_teacher(teacher, Form(steps=4, schedule=schedule))
        assert student.grid.level(4)[0] == pytest.approx(alpha, abs=1e-4)
        z = student.noised(x, noise, torch.tensor([4, 3, 4]))
        assert torch.equal(z[0], noise[0]) and torch.equal(z[2], noise[2]) and not torch.equal(z[1], noise[1])
    condition = teacher.encode_prompts(["a red handwritten seven"] * 3)
    first = teacher.denoiser(["a red handwritten seven"] * 3, 1.0)(noise, 999)
    alpha, sigma = teacher.schedule.at(999)
    for grid in (Grid.trailing(teacher.schedule, 4), Grid.cosine(4)):
        x0 = ManyStep(teacher, grid).x0(noise, torch.full((3,), 4), condition)
        torch.testing.assert_close(x0, alpha * noise - sigma * first, atol=1e-5, rtol=1e-5)


def test_a_teacher_is_asked_where_its_ratio_of_data_to_noise_is_the_grids(teacher):
    asked = ManyStep(teacher, Grid.cosine(64))
    log_snr = 2 * (asked.alpha / asked.sigma).log()
    grid, known = Grid.cosine(64), teacher.schedule.log_snr
    wanted = (2 * np.log(grid.alpha[1:-1] / grid.sigma[1:-1])).clip(known[-1])
    torch.testing.assert_close(log_snr[1:-1], torch.from_numpy(wanted), atol=1e-9, rtol=0)
    own = ManyStep(teacher, Grid.trailing(teacher.schedule, 50))
    assert own.timesteps[1:].tolist() == Grid.trailing(teacher.schedule, 50).timesteps[1:].tolist()


def test_teachers_of_noise_and_students_of_anything(teacher, tmp_path):
    """An epsilon teacher is asked for x0."""
    of_noise = LatentTeacher(stable_diffusion_layout(tmp_path / "sd"))
    z, i = torch.randn(3, *of_noise.latent_shape), torch.tensor([2, 3, 4])
    condition, grid = of_noise.encode_prompts(["a", "b", ""]), Grid.trailing(of_noise.schedule, 4)
    x0 = ManyStep(of_noise, grid).x0(z, i, condition)
    for k in range(3):
        alpha, sigma = grid.level(int(i[k]))
        output = of_noise.unet(z[k : k + 1], int(grid.timesteps[i[k]]), condition[k : k + 1]).sample
        torch.testing.assert_close(x0[k : k + 1], (z[k : k + 1] - sigma * output) / alpha, atol=1e-4, rtol=1e-4)


def test_beyond_its_cleanest_level_a_teacher_is_read_at_the_grids(teacher, monkeypatch):
    """Of 8,192 steps the first lie nearer to data than its timestep 0: there an estimate of x0 is nearly z."""
    grid = Grid.cosine(8192)
    z, condition = torch.randn(1, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"])
    alpha, sigma = grid.level(1)
    assert sigma < 0.1 * teacher.schedule.at(0)[1]
    with torch.no_grad():
        output = teacher.unet(z, torch.zeros(1), condition).sample
    for prediction, wanted in (("epsilon", (z - sigma * output) / alpha), ("v_prediction", alpha * z - sigma * output)):
        monkeypatch.setattr(teacher, "prediction", prediction)
        torch.testing.assert_close(ManyStep(teacher, grid).x0(z, torch.tensor([1]), condition), wanted)


def test_a_teacher_computes_in_its_own_precision_whatever_the_student_trains_in(teacher):
    z, condition = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["a red handwritten seven"] * 2)
    many, i = ManyStep(teacher, Grid.trailing(teacher.schedule, 4), 5.0), torch.tensor([4, 2])
    wanted = many.x0(z, i, condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(many.x0(z, i, condition), wanted)


# --- The chain ------------------------------------------------------------------------------------------


def test_a_chain_is_a_stage_for_each_halving():
    loaded = loads(TINY + CHAIN, "m.yaml")
    names = ["fewer/4", "fewer/2", "fewer/1"]
    assert [n for n in loaded.order if n.startswith("fewer")] == names
    stages = loaded.manifest.stages
    assert [(stages[n].method.start_steps, stages[n].method.end_steps) for n in names] == [(8, 4), (4, 2), (2, 1)]
    assert [stages[n].start_from for n in names] == [None, "fewer/4", "fewer/2"]
    assert [stages[n].training.steps for n in names] == [4, 4, 6]
    assert [stages[f"quality/{n}"].student for n in (4, 2, 1)] == names
    assert loads(dump(loaded.manifest), "again.yaml").manifest == loaded.manifest


def test_a_chain_of_every_member_of_a_matrix_and_of_what_it_reads():
    seeds = TINY + CHAIN.replace("    latents: latents\n", "    latents: latents\n    matrix: {seed: [0, 1]}\n")
    names = [n for n in loads(seeds, "m.yaml").order if n.startswith("quality")]
    assert sorted(names) == sorted(f"quality/{n}[seed={seed}]" for n in (4, 2, 1) for seed in (0, 1))
    teachers = (TINY + CHAIN).replace("    kind: teacher\n", "    kind: teacher\n    matrix: {seed: [0, 1]}\n")
    stages = loads(teachers, "m.yaml").manifest.stages
    assert stages["fewer/2[seed=1]"].start_from == "fewer/4[seed=1]"
    assert stages["quality/2[seed=1]"].student == "fewer/2[seed=1]"
    alone = (TINY + CHAIN).replace("student: fewer", "student: fewer/2")
    assert loads(alone, "m.yaml").manifest.stages["quality"].student == "fewer/2"


@pytest.mark.parametrize("varied", ["fewer", "teacher"])
def test_a_link_of_every_member_and_the_chain_of_one_can_be_read(varied):
    matrix = "    matrix: {seed: [0, 1]}\n"
    line = {"fewer": "    latents: latents\n", "teacher": "    kind: teacher\n"}[varied]
    text = (TINY + CHAIN).replace(line, line + matrix)
    text = text.replace("pairs: pairs\n    samples", "samples").replace("latents: latents\n", "pairs: pairs\n")

    def read(reference):
        stages = loads(text.replace("student: fewer", f"student: '{reference}'"), "m.yaml").manifest.stages
        return {n: s.student for n, s in stages.items() if n.startswith("quality")}

    assert read("fewer[seed=1]") == {f"quality/{n}": f"fewer/{n}[seed=1]" for n in (4, 2, 1)}
    link = "" if varied == "fewer" else "/2"  # which is then a stage, that comes to several
    assert read("fewer/2") == {f"quality{link}[seed={seed}]": f"fewer/2[seed={seed}]" for seed in (0, 1)}
    assert read("fewer/2[seed=1]") == {"quality": "fewer/2[seed=1]"}
    assert len(read("fewer")) == 6
    for wrong in ("fewer/3", "fewer[seed=2]"):
        with pytest.raises(ManifestError, match="there is no stage"):
            read(wrong)


def test_a_link_does_not_depend_on_where_its_chain_ends(tmp_path):
    """Nor on its name: a chain of one link has one."""
    longer = plan_of(TINY + CHAIN, tmp_path)
    shorter = plan_of((TINY + CHAIN).replace("end_steps: 1", "end_steps: 2").replace("{1: 6}", "{2: 4}"), tmp_path)
    by_hand = (TINY + CHAIN.split("  quality")[0]).replace(
        "start_steps: 8, end_steps: 1", "start_steps: 8, end_steps: 4"
    )
    by_hand = plan_of(by_hand.replace(", training_steps: {1: 6}", ""), tmp_path)
    assert longer["fewer/2"].artifact.fingerprint == shorter["fewer/2"].artifact.fingerprint
    assert by_hand["fewer/4"].artifact.fingerprint == longer["fewer/4"].artifact.fingerprint


def test_links_are_sealed_measured_and_go_on_from_each_other(chain, teacher):
    assert chain["quality/2"].artifact.inputs["student"] == chain["fewer/2"].artifact
    for steps in (4, 2, 1):
        artifact = chain[f"fewer/{steps}"].artifact
        about = json.loads((artifact.folder / "student.json").read_text())
        assert about["steps"] == steps == len(about["timesteps"]) and about["guidance_scale"] == 2.0
        metrics = chain[f"quality/{steps}"].artifact.record["metrics"]
        assert metrics["sides"]["student"]["network_calls"] == steps
        assert f"student, {steps} step" in (chain[f"quality/{steps}"].artifact.folder / "index.html").read_text()
        assert f"num_inference_steps={steps}" in (artifact.folder / "README.md").read_text()
    assert chain["fewer/1"].artifact.inputs["start_from"] == chain["fewer/2"].artifact
    one, two = (Student.load(chain[f"fewer/{n}"].artifact.folder, teacher).state_dict() for n in (1, 2))
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


def test_it_learns_what_its_teacher_does_in_twice_the_steps(tiny, teacher):
    text = (
        (TINY + CHAIN.split("  quality")[0])
        .replace("end_steps: 1", "end_steps: 4")
        .replace("steps: {1: 6}", "steps: {4: 40}")
    )
    plan = execute(text.replace("learning_rate: 1e-4", "learning_rate: 1e-3"), tiny[0], name="learns")
    student = Student.load(plan["fewer/4"].artifact.folder, teacher)
    untrained = Student.from_teacher(teacher, student.form)
    prompts = read_latents(plan["latents"].artifact.folder, held_out=True).captions[:32]
    noise = torch.randn(32, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = teacher.encode_prompts(prompts)
    eight = Grid.trailing(teacher.schedule, 8)
    many = ManyStep(teacher, eight, 2.0)
    with torch.no_grad():
        wanted = sample("ddim", lambda z, j: many.x0(z, torch.full((len(z),), j), condition), noise, eight)
        errors = [float((s(noise, condition) - wanted).square().mean()) for s in (untrained, student)]
    assert errors[1] < 0.75 * errors[0]


def test_a_killed_chain_goes_on_to_the_same_bytes(chain, tiny, tmp_path):
    """SIGKILL inside the first round, then between it and the next."""
    store, manifest = tmp_path / "store", tmp_path / "m.yaml"
    text = "  fewer" + CHAIN.partition("  fewer")[2].partition("  quality")[0]
    text = "name: killed\nstages:\n" + text.replace("start_steps: 8", "start_steps: 4")
    text = text.replace("latents: latents", f"latents: {chain['latents'].artifact.folder}")
    text = text.replace("{threads: 1}", "{threads: 1, checkpoint_every: 1}")
    manifest.write_text(text)
    execute(text, tiny[0], name="unkilled")
    submit = command("submit", manifest, "--store", store, "--engine", "inline")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def killed_when(seen):
        process = subprocess.Popen(submit, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not seen():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    killed_when(lambda: list(store.glob("work/*/checkpoints/step-*2")))
    assert not list(store.glob("distill/*/artifact.json"))
    killed_when(lambda: list(store.glob("distill/*/artifact.json")))
    (first,) = (path.parent for path in store.glob("distill/*/artifact.json"))
    assert json.loads((first / "student.json").read_text())["steps"] == 2
    execute(text, store)
    for student in (store / "distill").iterdir():
        for file in ("unet/diffusion_pytorch_model.safetensors", "history.jsonl"):
            assert sha256_of(student / file) == sha256_of(tiny[0] / "distill" / student.name / file)
    assert len(list((store / "distill").iterdir())) == 2


# --- Plain diffusers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "schedule", "prediction"), [
    (1, "teacher", "v_prediction"), (4, "teacher", "v_prediction"), (16, "teacher", "v_prediction"),
    (3, "teacher", "sample"), (4, "cosine", "v_prediction"), (16, "cosine", "v_prediction"), (1, "cosine", "sample"),
])  # fmt: skip
def test_plain_diffusers_steps_as_retort_does(teacher, tmp_path, steps, schedule, prediction):
    """Also where the steps do not divide the teacher's 1,000 timesteps, and where the schedule ends in pure noise."""
    student = shaken(Student.from_teacher(teacher, Form(steps=steps, schedule=schedule, prediction=prediction)))
    export(student, teacher, tmp_path, "a card")
    prompts = ["a red handwritten seven", "a blue handwritten two"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Student.load(tmp_path, teacher)(noise, teacher.encode_prompts(prompts))
    latents = drawn(tmp_path, noise, prompts, num_inference_steps=steps, guidance_scale=7.5)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [SCHEDULER, {"_class_name": "DDPMScheduler", "thresholding": True}])
@pytest.mark.parametrize("form", [
    Form(), Form(steps=4), Form(steps=3), Form(steps=4, schedule="cosine"), Form(steps=4, w_range=(0.0, 14.0)),
    Form(steps=4, sampler="consistency"),
], ids=str)  # fmt: skip
def test_what_a_published_scheduler_leaves_out_is_not_its_students_default(tmp_path, scheduler, form):
    folder = stable_diffusion_layout(tmp_path / "sd")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    teacher = LatentTeacher(folder)
    assert teacher.prediction == "epsilon"
    student = shaken(Student.from_teacher(teacher, form))
    export(student, teacher, tmp_path / "student", "a card")
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    w = torch.full((2,), 7.0)
    with torch.no_grad():
        ours = student(noise, teacher.encode_prompts(["a", "b"]), w, torch.Generator().manual_seed(1))
    more = {"num_inference_steps": form.steps, "generator": torch.Generator().manual_seed(1)}
    latents = drawn(tmp_path / "student", noise, ["a", "b"], guidance_scale=8.0, **more)
    torch.testing.assert_close(latents, ours, atol=1e-4, rtol=1e-4)
    assert reason(teacher, form) is None


def test_a_student_of_both_is_read_as_both(teacher, tmp_path):
    """And says that plain diffusers cannot."""
    student = shaken(Student.from_teacher(teacher, Form(steps=2, prediction="both")))
    export(student, teacher, tmp_path, "a card")
    loaded = Student.load(tmp_path, teacher)
    noise, condition = torch.randn(2, *teacher.latent_shape), teacher.encode_prompts(["", "a red handwritten seven"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(noise, condition), student(noise, condition))
        output = loaded.unet(noise, 999.0, condition).sample
        alpha, sigma = loaded.grid.level(2)
        x0 = sigma**2 * output[:, :4] + alpha * (noise - sigma * output[:, 4:])
        torch.testing.assert_close(loaded.x0(noise, 2, condition), x0)
    assert "knows nothing" in reason(teacher, student.form)


def reason(teacher, form):
    grid = Grid.of(form.schedule, teacher.schedule, form.steps)
    return why_not_plain(form, grid, scheduler_of(form, grid, teacher.folder))


@pytest.mark.parametrize(("form", "words"), [
    (Form(steps=4096, schedule="cosine"), "no whole numbers"),
    (Form(steps=512, schedule="cosine"), None),
    (Form(steps=48), "rounds the timesteps of 48 steps otherwise"),
    (Form(steps=61), "rounds the timesteps of 61 steps otherwise"),
    (Form(steps=3), None),
    (Form(steps=16), None),
    (Form(steps=2, sampler="stochastic"), "Retort's own"),
    (Form(steps=1, sampler="stochastic"), None),  # a last step adds no noise
    (Form(steps=4, sampler="consistency"), None),
])  # fmt: skip
def test_what_plain_diffusers_cannot_do_is_said(teacher, form, words):
    found = reason(teacher, form)
    assert found is None if words is None else words in found


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "words"), [
    ("start_steps: 8", "start_steps: 12", "end_steps: should be start_steps: 12 halved one or more times, not 1"),
    ("start_steps: 8, end_steps: 1", "start_steps: 8, end_steps: 8", "nothing is halved: give fewer end_steps"),
    ("start_steps: 8", "start_steps: 1024", "method.start_steps: 1024 are more than the teacher's 1000 timesteps"),
    ("{1: 6}", "{1: null}", "training_steps.1: should be a valid integer, not None"),
    ("start_steps: 8", "start_steps: 2097152", "start_steps: should be less than or equal to 524288"),
    ("{1: 6}", "{3: 6}", "training_steps.3: should be the number of steps of a round, not '3'"),
    ("training_steps: {1: 6}", "schedule: cosine, weighting: snr", "snr is 0 in pure noise"),
    ("    latents: latents\n", "    latents: latents\n    pairs: pairs\n", "give either pairs or latents"),
    ("{name: progressive, ", "{name: knowledge_distillation, ", "unknown key"),
    (" guidance_scale: 2.0,", "", "latents say nothing of guidance_scale: give it, 1 for none"),
    ("student: fewer\n    pairs: pairs", "student: fewer", "it was trained on latents; give `pairs`"),
    ("guidance_scale: 2.0", "guidance_scale: 3.0", "has guidance_scale: 3 built in; the pairs have 2"),
    ("student: fewer", "student: fewer/16", "there is no stage 'fewer/16'; did you mean 'fewer/1'"),
])  # fmt: skip
def test_contradictions_are_errors_of_the_plan(tmp_path, old, new, words):
    assert old in CHAIN
    with pytest.raises(ManifestError, match=words):
        plan_of(TINY + CHAIN.replace(old, new), tmp_path)


@pytest.mark.parametrize(("scale", "guided"), [(None, False), (1.0, False), (1.5, True)])
def test_only_a_scale_above_one_asks_the_teacher_without_a_prompt(scale, guided):
    config = ProgressiveConfig(start_steps=4, end_steps=2, guidance_scale=scale)
    assert config.uses_guidance == guided
    assert config.step_count_error(2) is None and "steps are 2, not 4" in config.step_count_error(4)


def test_the_ratio_of_data_to_noise_is_no_weight_where_the_teachers_schedule_ends_in_pure_noise(tiny):
    teacher = LatentTeacher(tiny[1]["teacher"].artifact.folder)
    config, training = ProgressiveConfig(start_steps=4, end_steps=2, weighting="snr"), TrainingSettings(steps=1)
    assert config.create(Materials(teacher, training)).student.alpha[-1] > 0
    teacher.schedule.alpha[-1], teacher.schedule.sigma[-1] = 0.0, 1.0
    with pytest.raises(StageError, match="snr is 0 in pure noise, where the teacher's schedule ends"):
        config.create(Materials(teacher, training))


def test_guidance_needs_a_teacher_that_knows_no_prompt(tmp_path):
    text = (TINY + CHAIN).replace("      dataset: digits\n", "      dataset: digits\n      drop_text: 0.0\n")
    with pytest.raises(ManifestError, match="needs guidance, but the teacher was trained with drop_text: 0"):
        plan_of(text, tmp_path)


def test_guidance_is_that_of_the_pairs_where_nothing_else_is_said(tiny, teacher):
    """And the method's bare name is a chain of its own: from 32 steps."""
    text = TINY.replace("{name: knowledge_distillation}", "progressive")
    assert list(plan_of(text, tiny[0]))[2:] == [f"student/{steps}" for steps in (16, 8, 4, 2, 1)]
    text = TINY.replace("{name: knowledge_distillation}", "{name: progressive, start_steps: 4, end_steps: 2}")
    student = execute(text.replace("steps: 24", "steps: 1"), tiny[0], name="of_pairs")["student/2"].artifact
    assert "held_out_mse" in student.record["metrics"]
    assert json.loads((student.folder / "student.json").read_text())["guidance_scale"] == 2.0
    assert "Guidance 2 is built in." in (student.folder / "README.md").read_text()
    materials = Materials(teacher, TrainingSettings(steps=1), guidance_scale=2.0)
    assert materials.teacher_denoiser(Form(steps=2)).default_w == 1.0
    assert materials.teacher_denoiser(Form(steps=2, guidance_scale=4.0)).default_w == 3.0


def test_guidance_that_is_that_of_the_pairs_is_checked_as_any_other(tmp_path):
    first, rest = TINY.partition("  pairs:")[::2]
    pairs, student = rest.partition("  student:")[::2]
    student = student.replace("{name: knowledge_distillation}", "{name: progressive, start_steps: 4, end_steps: 2}")
    other = pairs.replace("guidance_scale: 2.0", "guidance_scale: 5.0") + "    seed: 7\n"
    text = f"{first}  pairs:{pairs}  other:{other}  student:{student}"
    assert plan_of(text, tmp_path)["student/2"]

    def refused(text, words):
        with pytest.raises(ManifestError, match=words):
            plan_of(text, tmp_path)

    second = "  second:" + student.replace("pairs: pairs", "pairs: other\n    start_from: student/2")
    second = second.replace("start_steps: 4, end_steps: 2", "start_steps: 2, end_steps: 1")
    refused(text + second, "the student to go on from has guidance_scale: 2, this one 5")
    assert plan_of(text + second.replace("pairs: other", "pairs: pairs"), tmp_path)["second/1"]
    refused(
        text + "  quality: {kind: evaluate, student: student, pairs: other, samples: 20, teacher_steps: []}",
        "the student has guidance_scale: 2 built in; the pairs have 5",
    )
    mixed = text.replace("pairs: pairs\n", "pairs: [pairs, other]\n")
    refused(mixed, "the pairs have guidance_scale: 2 and 5; give the student's")
    assert plan_of(mixed.replace("end_steps: 2", "end_steps: 2, guidance_scale: 2.0"), tmp_path)["student/2"]
    one_step = re.sub("{name: progressive.*}", "knowledge_distillation", mixed)
    refused(one_step, "the pairs have guidance_scale: 2 and 5; a student of them has one")


def test_one_step_methods_take_pairs_only(tmp_path):
    text = TINY.replace("    pairs: pairs\n", "    latents: latents\n") + CHAIN.split("  fewer")[0]
    with pytest.raises(ManifestError, match="knowledge_distillation is trained on pairs, not on latents") as refusal:
        plan_of(text, tmp_path)
    assert "guidance_scale" not in str(refusal.value)


def test_a_chain_that_goes_on_from_another(tmp_path):
    more = CHAIN.split("  quality")[0].replace("fewer:", "further:").replace("start_steps: 8", "start_steps: 4")
    more = more.split("{threads: 1}}\n")[1].replace(
        "    latents: latents", "    start_from: fewer/4\n    latents: latents"
    )
    plan = plan_of(TINY + CHAIN + more, tmp_path)
    assert plan["further/1"].artifact.fingerprint == plan["fewer/1"].artifact.fingerprint
    with pytest.raises(ManifestError, match="the student in start_from takes 2"):
        plan_of(TINY + CHAIN + more.replace("fewer/4", "fewer/2"), tmp_path)
