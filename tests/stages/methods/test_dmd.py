"""DMD and DMD2: which players get gradients, terms computed by hand, states of backward simulation, turns and
resuming."""

import json
import math

import pytest
import torch

from pipeline.errors import ManifestError
from pipeline.manifest import loads
from stages.base import StageError
from stages.diffusion.grid import Grid
from stages.diffusion.schedule import NoiseSchedule
from stages.losses.config import Regression
from stages.losses.score import difference
from stages.methods.base import Materials, StudentTraining
from stages.methods.dmd.config import DMDConfig
from stages.methods.dmd2.config import DMD2Config, GanSettings
from stages.networks import build
from stages.networks.compute import checkpoint_activations
from stages.networks.condition import Condition
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.fake_score import FakeScore
from stages.networks.lora import LoraSettings
from stages.networks.student import Student
from stages.training import Player, TrainingExecution, Turn
from stages.training.figures import PATIENCE
from stages.training.loop import train
from tests.support.cli import ROOT, retort
from tests.support.networks import (
    adapter_around,
    drawn,
    photographs,
    shaken,
    stable_diffusion_layout,
    stable_diffusion_xl_layout,
)
from tests.support.pipelines import TINY, execute, plan_of

PROMPTS = ["a red handwritten seven", "a blue handwritten one", "a green handwritten two"]


def batch(teacher, count=6, seed=0):
    """Six samples of every stream."""
    generator = torch.Generator().manual_seed(seed)
    noise, latent, real = torch.randn(3, count, *teacher.latent_shape, generator=generator)
    prompts = (PROMPTS * count)[:count]
    return {
        "pairs": {"noise": noise, "latent": latent, "prompts": prompts},
        "latents": {"latent": real, "prompts": prompts[::-1]},
    }


def pairs_only(teacher, **options):
    return {"pairs": batch(teacher, **options)["pairs"]}


def latents_only(teacher, **options):
    return {"latents": batch(teacher, **options)["latents"]}


def materials(teacher, steps=3, lora=None, **training):
    settings = StudentTraining(steps=steps, learning_rate=1e-3, lora=lora, **training)
    return Materials(teacher, settings, guidance_scale=2.0, seed=3)


def dmd(teacher, given=None, **settings):
    return DMDConfig(**{"loss": Regression(name="mse"), **settings}).create(given or materials(teacher))


def dmd2(teacher, given=None, **settings):
    torch.manual_seed(0)  # the head's weights are random
    return DMD2Config(**{"guidance_scale": 2.0, **settings}).create(given or materials(teacher))


def stirred(method):
    """Change the weights of the fake score and of the student, so that both differ from the teacher and from each
    other."""
    shaken(method.student).requires_grad_(True)
    with torch.no_grad():
        for parameter in method.fake.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    return method


def gradients(module):
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


METHODS = {
    "dmd": (dmd, {}, pairs_only),
    "dmd2": (dmd2, {"fake_updates": 1}, latents_only),
    "dmd2 in two steps": (dmd2, {"fake_updates": 1, "steps": 2}, latents_only),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_turn_changes_only_its_own_player(teacher, name):
    made, settings, given = METHODS[name]
    method, rows = stirred(made(teacher, **settings)), given(teacher)
    student, fake = method.turns(0)
    before = [parameter.clone() for parameter in teacher.network.parameters()]
    student.loss(rows)[0].backward()
    assert gradients(method.student)
    assert not gradients(teacher.network) and not gradients(method.fake)
    for parameter in [*method.student.parameters(), *method.fake.parameters()]:
        parameter.grad = None
    fake.loss(rows)[0].backward()
    assert gradients(method.fake) and not gradients(method.student) and not gradients(teacher.network)
    assert all(torch.equal(now, then) for now, then in zip(teacher.network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_changes_student_and_fake_score_but_not_the_teacher(teacher, name, tmp_path):
    made, settings, given = METHODS[name]
    method = made(teacher, materials(teacher, steps=2), **settings)
    starts = {player: [p.clone() for p in of.module.parameters()] for player, of in method.players.items()}
    before = [parameter.clone() for parameter in teacher.network.parameters()]
    run(method, given(teacher), tmp_path)
    for player, of in method.players.items():
        changed = [not torch.equal(*pair) for pair in zip(of.module.parameters(), starts[player], strict=True)]
        assert sum(changed) > 0.9 * len(changed)
    assert all(torch.equal(now, then) for now, then in zip(teacher.network.parameters(), before, strict=True))


def run(method, rows, folder, every=100, stop=None):
    """Train to the end, or until `stop` reports of progress."""
    training = train(
        method,
        rows if callable(rows) else lambda step: rows,
        seed=3,
        checkpoints=folder,
        execution=TrainingExecution(checkpoint_every=every, threads=1, device="cpu"),
    )
    seen = 0
    while True:
        try:
            next(training)
        except StopIteration as stopped:
            return stopped.value
        seen += 1
        if seen == stop:
            training.close()
            return None


# --- The gradient of distribution matching ---


def test_an_untrained_fake_score_gives_no_gradient_without_guidance(teacher):
    """The fake score equals the teacher. This also holds if the real score can be guided, at guidance 1."""
    method = dmd2(teacher, guidance_scale=1.0, gan=None)
    x, prompts = torch.randn(4, *teacher.latent_shape), [*PROMPTS, ""]
    t = torch.tensor([20, 300, 700, 980])
    assert method.matching.at(x, prompts, t, torch.randn_like(x)).abs().max() < 1e-4
    guided = dmd2(teacher, gan=None).matching.at(x, prompts, t, torch.randn_like(x))
    assert guided[:3].abs().max() > 1e-2


def test_the_gradient_is_guided_on_the_real_side_only(teacher):
    """By hand, one sample at a time, from the networks' outputs."""
    method = stirred(dmd2(teacher, guidance_scale=3.0, gan=None))
    x, noise = torch.randn(2, 3, *teacher.latent_shape)
    t = torch.tensor([20, 500, 980])
    ours = method.matching.at(x, PROMPTS, t, noise)
    for k in range(3):
        level = teacher.schedule.at(int(t[k]))
        z = level.alpha * x[k : k + 1] + level.sigma * noise[k : k + 1]

        def x0(network, prompt, z=z, level=level):
            with torch.no_grad():
                v = teacher.predict(network, z, teacher.on_device(level), teacher.encode_prompts([prompt]))
            return level.alpha * z - level.sigma * v

        dropped, real = (x0(teacher.network, prompt) for prompt in ("", PROMPTS[k]))
        real = dropped + 3.0 * (real - dropped)
        wanted = difference(x[k : k + 1], real, x0(method.fake.network, PROMPTS[k]), level)
        torch.testing.assert_close(ours[k : k + 1], wanted, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["dmd", "dmd2"])
def test_the_students_times_are_from_20_to_980_and_the_fake_scores_from_0_to_999(teacher, monkeypatch, name):
    made, settings, _ = METHODS[name]
    method, seen = made(teacher, **settings), {"real": set(), "fake": set()}
    monkeypatch.setattr(method.matching, "at", lambda x, prompts, t, noise, fake, w: seen["real"].update(t.tolist()))
    torch.manual_seed(0)
    for _ in range(5):
        method.matching.gradient(torch.randn(4000, 1, 1, 1), [""])
        seen["fake"].update(method.fake.levels.draw(torch.randn(4000, 1, 1, 1))[0].tolist())
    assert (min(seen["real"]), max(seen["real"])) == (20, 980)
    assert (min(seen["fake"]), max(seen["fake"])) == (0, 999)
    errors, drawn = method.fake.errors, []
    method.fake.errors = lambda x, t, *rest: drawn.append(t) or errors(x, t, *rest)
    monkeypatch.setattr(
        method.fake.levels, "draw", lambda x, of=None: (torch.full((len(x),), 999), torch.zeros_like(x))
    )
    method.matching.at = lambda x, prompts, t, noise, fake, w: torch.zeros_like(x)
    for turn in method.turns(0):
        turn.loss(METHODS[name][2](teacher))
    assert drawn[0].tolist() == [999] * 6  # the fake score draws its own times


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("schedule", ["stable_diffusion", "flow", "zero_terminal_snr"])
def test_any_prediction_type_and_schedule_equal_hand_computed_values(prediction, schedule):
    """Converts the network's output to real and fake score by hand. Also checks the error for each weighting: output is
    the error of the network's output, snr that of the noise, edm (snr + 4) times that of x0."""
    adapter = of_schedule(prediction, schedule)
    if prediction == "epsilon" and adapter.schedule.alpha[-1] == 0:
        with pytest.raises(StageError, match="ends in pure noise"):
            FakeScore(adapter, adapter.network)
        return
    fake = FakeScore(adapter, adapter.network)
    real = TeacherDenoiser(adapter, Grid.trailing(adapter.schedule, 1000))
    x, noise = torch.randn(2, 3, 4, 8, 8)
    t, condition = torch.tensor([100, 700, 998]), Condition(3, {"text": torch.randn(3, 5, 12)})
    with torch.no_grad():
        alpha, sigma = fake.levels.at(t)
        z = fake.levels.noised(x, t, noise)
        torch.testing.assert_close(z, (alpha * x + sigma * noise).float())
        said = adapter.predict(adapter.network, z, fake.levels.at(t), condition).double()
        power = alpha**2 + sigma**2
        x0, noise_said = {
            "epsilon": lambda: ((z - sigma * said) / alpha, said),
            "v_prediction": lambda: ((alpha * z - sigma * said) / power, (sigma * z + alpha * said) / power),
            "sample": lambda: (said, (z - alpha * said) / sigma),
            "flow_prediction": lambda: ((z - sigma * said) / (alpha + sigma), (z + alpha * said) / (alpha + sigma)),
        }[prediction]()
        torch.testing.assert_close(fake.x0(z, t, condition), x0.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(real.x0(z, t + 1, condition), x0.float(), rtol=1e-3, atol=1e-3)
        target = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x,
            "sample": x,
            "flow_prediction": noise - x,
        }
        of_noise, of_x0 = (noise_said - noise).square(), (x0 - x).square()
        wanted = {"output": (said - target[prediction]).square(), "snr": of_noise, "edm": of_noise + 4 * of_x0}
        for weighting, values in wanted.items():
            ours = fake.errors(x, t, noise, condition, weighting)
            torch.testing.assert_close(ours, values.mean((1, 2, 3)).float(), rtol=1e-3, atol=1e-4)


def of_schedule(prediction, schedule):
    """A teacher around a small U-Net, of a prediction type and a schedule."""
    torch.manual_seed(0)
    adapter = adapter_around(build.unet(8, 12, (8, 16)))
    known = NoiseSchedule.flow(shift=3.0) if schedule == "flow" else NoiseSchedule.stable_diffusion()
    if schedule == "zero_terminal_snr":
        alpha = (known.alpha - known.alpha[-1]) * known.alpha[0] / (known.alpha[0] - known.alpha[-1])
        known = NoiseSchedule(alpha, (1 - alpha**2) ** 0.5)
    adapter.schedule, adapter.prediction, adapter.latent_shape = known, prediction, (4, 8, 8)
    adapter.dtype, adapter._called = torch.float32, adapter.network
    return adapter


# --- DMD ---


def test_dmds_loss_is_the_matching_loss_plus_the_weighted_regression(teacher):
    method, rows = stirred(dmd(teacher, regression_weight=0.7)), pairs_only(teacher)
    torch.manual_seed(5)
    loss, figures = method.student_loss(rows)
    pairs = rows["pairs"]
    regressed = method.student(pairs["noise"], teacher.encode_prompts(pairs["prompts"]))
    distance = (regressed - pairs["latent"]).square().mean()
    torch.testing.assert_close(figures["distance"], distance)
    torch.testing.assert_close(loss, figures["matching"].mean() + 0.7 * distance)
    assert figures["matching"].shape == (6,)
    alone = stirred(dmd(teacher, regression_weight=0))
    torch.manual_seed(5)
    torch.testing.assert_close(alone.student_loss(rows)[0], figures["matching"].mean())


def test_the_setting_prompts_replaces_the_prompts_of_the_pairs(teacher):
    method, rows = dmd(teacher), pairs_only(teacher)
    seen = []
    method.matching.gradient = lambda x, prompts, w=None: seen.append(prompts) or torch.zeros_like(x)
    method.student_loss(rows)
    method.student_loss({**rows, "prompts": {"prompts": PROMPTS[:2]}})
    assert seen == [rows["pairs"]["prompts"], PROMPTS[:2]]


def test_an_epsilon_student_computes_x0_in_float64(tmp_path):
    """At the last timestep of Stable Diffusion x0 = (z - sigma epsilon) / alpha multiplies rounding by 14.6."""
    from stages.networks.stable_diffusion import StableDiffusion

    student = dmd2(StableDiffusion(stable_diffusion_layout(tmp_path / "teacher")), gan=None).student
    assert student.prediction == "epsilon"
    noise, condition = torch.randn(2, 4, 8, 8), student.encode(["a", "b"])
    with torch.no_grad():
        epsilon = student._output(noise, 1, condition, None)
        alpha, sigma = student.grid.level(1)
        wanted = ((noise.double() - sigma * epsilon.double()) / alpha).float()
        assert torch.equal(student(noise, condition), wanted)


# --- DMD2 ---


def test_the_student_has_a_turn_before_every_fifth_of_the_fake_score(teacher):
    method = dmd2(teacher)
    assert [[turn.player for turn in method.turns(step)] for step in range(7)] == [
        ["student", "fake_score"] if step in (0, 5) else ["fake_score"] for step in range(7)
    ]
    warm = dmd2(teacher, fake_updates=2, fake_warmup_steps=3)
    assert [len(warm.turns(step)) for step in range(7)] == [1, 1, 1, 2, 1, 2, 1]


def test_both_turns_of_a_step_see_the_same_samples(teacher):
    method = stirred(dmd2(teacher, gan=None))
    rows, seen = latents_only(teacher), []
    errors = method.fake.errors
    method.fake.errors = lambda x, *rest: seen.append(x) or errors(x, *rest)
    student, fake = method.turns(0)
    gradient = method.matching.gradient
    method.matching.gradient = lambda x, prompts, w=None: seen.append(x.detach()) or gradient(x, prompts)
    student.loss(rows)
    fake.loss(rows)
    assert torch.equal(*seen)
    (alone,) = method.turns(1)
    alone.loss(rows)
    assert not torch.equal(seen[2], seen[1]) and not seen[2].requires_grad


def test_backward_simulation_visits_the_states_of_sampling(teacher):
    """With the same random numbers, the estimate after k calls is that of the student's own sampling."""
    method, rows = stirred(dmd2(teacher, steps=4)), latents_only(teacher, count=2)
    condition = method.student.encode(rows["latents"]["prompts"])
    for calls in range(4):
        torch.manual_seed(calls)
        x = method.sample(rows, calls)
        torch.manual_seed(calls)
        noise = torch.randn(2, *teacher.latent_shape)
        with torch.no_grad():
            states = list(method.student.states(noise, condition))
        assert torch.equal(x.detach(), states[calls][2]) and x.requires_grad
        assert calls or torch.equal(states[0][1], noise)  # the first state is the noise itself


def test_a_state_is_the_last_estimate_with_the_noise_of_its_level(teacher):
    """Over many samples: mean alpha x0 and deviation sigma."""
    method = stirred(dmd2(teacher, steps=2))
    student, count = method.student, 512
    x0 = torch.randn(1, *teacher.latent_shape)
    student.x0 = lambda z, i, condition, w=None: x0.expand(len(z), -1, -1, -1)
    torch.manual_seed(0)
    states = list(student.states(torch.randn(count, *teacher.latent_shape), Condition(count)))
    rest = states[1][1] - student.grid.level(1).alpha * x0
    assert rest.mean().abs() < 0.01
    assert float(rest.std()) == pytest.approx(student.grid.level(1).sigma, rel=0.01)


def test_only_the_last_call_of_a_rollout_has_gradients(teacher):
    method, called = stirred(dmd2(teacher, steps=4)), []
    method.student.network.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    method.sample(latents_only(teacher), 2)
    assert called == [False, False, True]


def test_the_length_of_a_rollout_depends_only_on_seed_and_step_and_takes_all_values(teacher):
    method, other = dmd2(teacher, steps=4), dmd2(teacher, steps=4)
    exits = [[turn.loss.keywords["calls"] for turn in method.turns(step)] for step in range(40)]
    assert all(len(set(found)) == 1 for found in exits)
    again = [other.turns(step)[0].loss.keywords["calls"] for step in range(40)]
    assert again == [found[0] for found in exits] and set(again) == {0, 1, 2, 3}


def test_without_backward_simulation_real_latents_are_noised(teacher):
    method, rows = stirred(dmd2(teacher, steps=4, backward_simulation=False)), latents_only(teacher)
    real, student = rows["latents"], method.student
    torch.manual_seed(2)
    x = method.sample(rows, 3)
    torch.manual_seed(2)
    noise = torch.randn_like(real["latent"])
    alpha, sigma = student.grid.level(1)
    z = alpha * real["latent"] + sigma * noise
    torch.testing.assert_close(x, student.x0(z, 1, student.encode(real["prompts"])))
    torch.manual_seed(2)
    pure = method.sample(rows, 0)
    torch.testing.assert_close(pure, student.x0(noise, 4, student.encode(real["prompts"])))


def test_the_gan_term_has_the_gradient_of_plain_autograd(teacher):
    """The loss detaches the samples. The gradient is the same as without detaching."""
    method, rows = stirred(dmd2(teacher, gan=GanSettings(weight=0.5))), latents_only(teacher)
    torch.manual_seed(1)
    loss, figures = method.student_loss(rows, calls=0)
    loss.backward()
    ours = [grad.clone() for grad in gradients(method.student)]
    method.student.zero_grad()
    torch.manual_seed(1)
    x = method.sample(rows, 0)
    gradient = method.matching.gradient(x, rows["latents"]["prompts"])
    (logits,) = method.fake.logits(x, *method.fake.levels.draw(x), method.fake.encode(rows["latents"]["prompts"]))
    gan = -logits.sigmoid().log().mean()
    plain = 0.5 * (x - (x - gradient).detach()).square().mean() + 0.5 * gan
    pull, push = (torch.autograd.grad(part, x, retain_graph=True)[0] for part in (0.5 * gan, plain - 0.5 * gan))
    assert float(figures["gan_ratio"]) == pytest.approx(float(pull.norm() / push.norm()), rel=1e-4)
    plain.backward()
    for mine, theirs in zip(ours, gradients(method.student), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(loss.detach(), plain.detach())


def test_the_head_reads_the_middle_block_of_the_noised_sample(teacher):
    fake = FakeScore.from_teacher(teacher, judges=True)
    x, noise = torch.randn(2, 2, *teacher.latent_shape)
    t, condition = torch.tensor([10, 900]), fake.encode(PROMPTS[:2])
    seen, read = [], []
    hook = fake.network.mid_block.register_forward_hook(lambda _m, _a, output: seen.append(output))
    output = fake.x0(fake.levels.noised(x, t, noise), t, condition)
    hook.remove()
    fake.head.register_forward_pre_hook(lambda _m, given: read.append(given[0]))
    decoded = []
    fake.network.up_blocks[0].register_forward_hook(lambda *_: decoded.append(1))
    (logits,) = fake.logits(x, t, noise, condition)
    assert torch.equal(read[0], seen[0]) and logits.shape == (2, 1, 1) and not decoded
    assert torch.equal(fake.x0(fake.levels.noised(x, t, noise), t, condition), output)  # it is still a denoiser


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_the_head_gives_one_logit_at_every_size(side):
    unet = build.unet(2 * side, 12, (8, 16))
    adapter = adapter_around(unet)
    adapter.latent_shape, adapter.prediction = (4, 2 * side, 2 * side), "epsilon"
    adapter.schedule = NoiseSchedule.stable_diffusion()
    fake = FakeScore(adapter, unet, judges=True)
    x, noise = torch.randn(2, 1, 4, 2 * side, 2 * side)
    (logits,) = fake.logits(x, torch.tensor([5]), noise, Condition(1, {"text": torch.randn(1, 3, 12)}))
    assert logits.shape == (1, 1, 1)


def test_the_discriminators_loss_equals_hand_computed_values(teacher):
    """softplus(-D(real)) + softplus(D(false)), each with its own prompts and noise, weighed against the errors."""
    rows = latents_only(teacher)
    method = stirred(dmd2(teacher, gan=GanSettings(discriminator_weight=0.5)))
    asked = []

    def logits(x, t, noise, condition):
        asked.append((x, condition))
        return [torch.full((len(x), 1, 1), 0.3 if len(asked) == 1 else -0.7)]

    method.fake.logits = logits
    torch.manual_seed(4)
    loss, figures = method.fake_loss(rows, calls=0)
    torch.manual_seed(4)
    x = method.sample(rows, 0).detach()
    condition = method.fake.encode(rows["latents"]["prompts"])
    errors = method.fake.errors(x, *method.fake.levels.draw(x), condition).mean()
    expected = math.log(1 + math.exp(-0.3)) + math.log(1 + math.exp(-0.7))
    assert float(loss.detach() - errors.detach()) == pytest.approx(0.5 * expected, rel=1e-4)
    assert torch.equal(asked[0][0], rows["latents"]["latent"]) and torch.equal(asked[1][0], x)
    assert [float(figures[name]) for name in ("real", "false")] == pytest.approx([0.3, -0.7])


def test_checkpointed_activations_give_the_head_the_same_gradients(teacher):
    """The decoder is not computed: an exception ends the forward pass after the middle block."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        fake = FakeScore.from_teacher(teacher, judges=True).train()
        if checkpointed:
            checkpoint_activations([fake])
        x, noise = torch.randn(2, 2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
        (logits,) = fake.logits(x.requires_grad_(), torch.tensor([10, 900]), noise, fake.encode(PROMPTS[:2]))
        logits.sum().backward()
        found.append([x.grad, *gradients(fake)])
        assert not gradients(fake.network.up_blocks)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", METHODS)
def test_killed_between_two_steps_and_resumed_it_gives_the_same_bits(teacher, name, tmp_path):
    """This also holds for a kill between two turns of the student."""
    made, settings, given = METHODS[name]
    settings = {**settings, **({"fake_updates": 3} if made is dmd2 else {})}

    def rows(step):
        return given(teacher, seed=step)

    whole = run(made(teacher, materials(teacher, steps=14), **settings), rows, tmp_path / "whole", every=4)
    run(made(teacher, materials(teacher, steps=14), **settings), rows, tmp_path / "killed", every=4, stop=1)
    again = run(made(teacher, materials(teacher, steps=14), **settings), rows, tmp_path / "killed", every=4)
    assert again.history == whole.history
    ours, theirs = (result.averages["student"].state_dict() for result in (again, whole))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", METHODS)
def test_lora_weights_of_student_and_fake_score_share_the_teachers(teacher, name, tmp_path):
    made, settings, given = METHODS[name]
    lora = LoraSettings(rank=2)
    method = made(
        teacher,
        materials(teacher, steps=2, lora=lora),
        **settings,
        fake_score={"lora": {"rank": 3}, "weighting": "snr"},
    )
    own = {id(parameter) for parameter in teacher.network.parameters()}
    for player in method.players.values():
        shared = [parameter for parameter in player.module.parameters() if id(parameter) in own]
        assert len(shared) > 20 and not any(parameter.requires_grad for parameter in shared)
    run(method, given(teacher), tmp_path)


def test_accumulated_halves_use_their_own_samples(teacher, tmp_path):
    method = dmd2(teacher, materials(teacher, steps=4, accumulate=2), fake_updates=2)
    run(method, lambda i: latents_only(teacher, seed=i), tmp_path)
    assert not method._samples


# --- Problems that are noticed early ---


class Scripted:
    """A method whose samples have the variance that a script says. None: the student has no turn."""

    def __init__(self, variances, warmup=0):
        self.variances, self.module = variances, torch.nn.Linear(1, 1)
        settings = StudentTraining(steps=len(variances), learning_rate=1e-9, warmup_steps=warmup)
        self.players = {"student": Player(self.module, settings), "other": Player(torch.nn.Linear(1, 1), settings)}

    def turns(self, step):
        value = self.variances[step]
        if value is None:
            return [Turn("other", lambda batch: (self.players["other"].module.weight.sum() * 0, {}))]
        figures = {"variance": torch.tensor(value), "data_variance": torch.tensor(2.0)}
        return [Turn("student", lambda batch: (self.module.weight.sum() * 0, figures))]

    def after_step(self, step):
        pass


def test_a_collapsed_student_is_stopped_after_50_turns(tmp_path):
    low, high = 0.019, 0.021  # near 1 % of the data's variance of 2.0
    message = "the student has collapsed: in the 50 turns up to step 79, its samples had less than 1% of the variance"
    with pytest.raises(StageError, match=message):
        run(Scripted([high] * 30 + [low] * 60), {}, tmp_path / "a")
    run(Scripted([high] * 30 + [low] * (PATIENCE - 1) + [high] + [low] * 20), {}, tmp_path / "b")
    folder = tmp_path / "c"  # the count continues after a kill
    run(Scripted([high] * 30 + [low] * 60), {}, folder, every=40, stop=5)
    with pytest.raises(StageError, match="to step 79"):
        run(Scripted([high] * 30 + [low] * 60), {}, folder, every=40)


def test_only_the_students_turns_after_the_warm_up_count_as_collapsed(tmp_path):
    turns = [value for _ in range(49) for value in (0.001, None, None)]
    run(Scripted(turns), {}, tmp_path / "a")
    with pytest.raises(StageError, match="collapsed"):
        run(Scripted([*turns, 0.001]), {}, tmp_path / "b")
    run(Scripted([0.001] * 60, warmup=20), {}, tmp_path / "c")


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_sample_is_trained(teacher, name, tmp_path):
    """It has no variance. Two equal real latents have none either, and stop nothing."""
    made, settings, given = METHODS[name]
    run(made(teacher, materials(teacher, steps=2), **settings), given(teacher, count=1), tmp_path / "one")
    rows = given(teacher, count=2)
    for stream in rows.values():
        stream["latent"][1] = stream["latent"][0]
    run(made(teacher, materials(teacher, steps=2), **settings), rows, tmp_path / "two")


def test_a_sample_that_is_not_finite_is_named(teacher, tmp_path):
    method = dmd(teacher, materials(teacher, steps=20))
    gradient = method.matching.gradient
    calls = []

    def broken(x, prompts, w):
        calls.append(1)
        found = gradient(x, prompts)
        if len(calls) == 5:
            found[4] = float("nan")
        return found

    method.matching.gradient = broken
    with pytest.raises(StageError, match="the student matching is nan at step 4, sample 4 of a batch"):
        run(method, pairs_only(teacher), tmp_path)


# --- The stage ---

PROMPTS_ONLY = (
    TINY.partition("  student:")[0]
    + """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  student:
    kind: distill
    latents: latents
    method: {name: dmd2, guidance_scale: 2.0, steps: 4, fake_updates: 2}
    training: {steps: 4, batch_size: 8, learning_rate: 1e-4}
    execution: {threads: 1}
"""
)


def test_plain_diffusers_runs_a_student_in_four_steps(tiny, teacher):
    folder = execute(PROMPTS_ONLY, tiny[0], name="dmd2")["student"].artifact.folder
    about = json.loads((folder / "student.json").read_text())
    assert about["timesteps"] == [999, 749, 499, 249] and about["sampler"] == "consistency"
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    assert "Plain diffusers cannot sample" not in (folder / "README.md").read_text()
    student = Student.load(folder, teacher)
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = student(noise, student.encode(PROMPTS[:2]), None, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    theirs = drawn(folder, noise, PROMPTS[:2], num_inference_steps=4, guidance_scale=0.0, generator=generator)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("latents: latents\n    method", "prompts: digits\n    teacher: teacher\n    method"),
         "method.gan: the GAN term compares with real images: give `latents`, or set gan: null"),
        (("guidance_scale: 2.0, steps: 4", "steps: 4"), "latents have no guidance_scale: set it in the method"),
        (("steps: 4, fake", "steps: 4, levels: [1000, 3, 2, 1], fake"), "1000 is not one of the teacher's 1000"),
        (("steps: 4, fake", "steps: 4, levels: [3, 2, 1], fake"), "steps: 4 needs 4 levels, not 3"),
        (("steps: 4, fake", "backward_simulation: false, fake"), "in one step there is nothing to simulate"),
        (("name: dmd2, guidance_scale: 2.0, steps: 4, fake_updates: 2", "name: dmd, guidance_scale: 2.0"),
         "dmd is trained on pairs or pairs and prompts or prompts, not on latents"),
        (("fake_updates: 2", "fake_updates: 2, fake_warmup_steps: 4"), "the student has no turn in 4 training steps"),
        (("fake_updates: 2", "fake_updates: 2, fake_score: {lora: {merged: true}}"), "the fake score is not exported"),
        (("fake_updates: 2", "fake_updates: 2, time_range: [0.5, 0.2]"), "the first less than the second"),
    ],
)  # fmt: skip
def test_a_plan_refuses(tiny, change, words):
    text = PROMPTS_ONLY.replace(*change)
    assert text != PROMPTS_ONLY
    with pytest.raises(ManifestError, match=words.replace("[", r"\[").replace("(", r"\(")):
        plan_of(text, tiny[0])


DMD = (
    TINY.partition("  student:")[0]
    + """
  student:
    kind: distill
    pairs: pairs
    prompts: digits
    method: {name: dmd, guidance_scale: 2.0}
    training: {steps: 3, batch_size: 8, learning_rate: 1e-4}
    held_out: 32
    execution: {threads: 1}
"""
)


def test_pairs_of_another_guidance_scale_give_a_warning(tiny, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(DMD.replace("guidance_scale: 2.0}\n    training", "guidance_scale: 4.0}\n    training"))
    said = retort("plan", str(path), "--store", str(tiny[0])).stderr
    assert "the real score has guidance_scale: 4" in said and "pairs of the regression have 2" in said
    path.write_text(DMD)
    assert "real score" not in retort("plan", str(path), "--store", str(tiny[0])).stderr


def test_pairs_are_needed_if_and_only_if_there_is_a_regression(tiny):
    with pytest.raises(ManifestError, match="without a regression, `pairs` are not used"):
        plan_of(DMD.replace("guidance_scale: 2.0}\n    tr", "regression_weight: 0}\n    tr"), tiny[0])
    prompts = DMD.replace("pairs: pairs\n    prompts: digits", "prompts: digits\n    teacher: teacher")
    with pytest.raises(ManifestError, match="the regression needs `pairs`"):
        plan_of(prompts.replace("    held_out: 32\n", ""), tiny[0])


def test_a_loss_without_a_name_is_e_latent_lpips(tiny):
    """Both the plan, which looks for the stage, and the validation accept the short form."""
    vgg = "  vgg: {kind: perceptual, from: nowhere}\n  student:"
    text = DMD.replace("  student:", vgg, 1).replace("name: dmd,", "name: dmd, loss: {perceptual: vgg},")
    assert plan_of(text, tiny[0])["student"].reads == ["pairs", "vgg"]
    assert DMDConfig.model_validate({"loss": {"perceptual": "vgg"}}).loss.name == "e_latent_lpips"
    assert DMDConfig().loss == Regression(name="mse")


def test_dmd_is_trained_on_pairs_and_prompts_from_a_manifest(tiny):
    record = execute(DMD, tiny[0], name="dmd")["student"].artifact.record
    assert record["metrics"]["held_out_mse"] > 0


# --- The manifests with published settings ---

SMALL = """
pairs.count=32
pairs.shard_size=8
pairs.sampler.steps=2
pairs.execution.threads=1
student.training.steps=3
student.training.batch_size=2
student.training.accumulate=2
student.execution.threads=1
quality.samples=20
quality.execution.threads=1
"""
"""Only sizes are changed: bf16, checkpointing, accumulation and weights are as published. The student has several
turns."""
PUBLISHED = {
    "sd15_dmd": "pairs.execution.compile=false student.method.loss=mse student.held_out=20",
    "sd15_dmd2": """
        latents.images.size=16 matched.training.steps=2 matched.training.batch_size=2 matched.training.accumulate=2
        matched.execution.threads=1 student.method.fake_updates=2 student.method.fake_warmup_steps=1""",
    "sdxl_dmd2_4step": "latents.images.size=16 student.method.fake_updates=1",
}
"""Manifest -> its own settings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_manifests_run_at_small_size(name, tmp_path):
    if name.startswith("sdxl"):
        teacher = stable_diffusion_xl_layout(tmp_path / "teacher", layers_per_block=1, transformer_layers_per_block=1)
    else:
        teacher = stable_diffusion_layout(tmp_path / "teacher")
    sets = [*PUBLISHED[name].split(), f"teacher.from={teacher}", *SMALL.split()]
    if name != "sd15_dmd":
        sets.append(f"latents.images.path={photographs(tmp_path / 'images.tar')}")
        sets.append("latents.execution.threads=1")
    text = (ROOT / "manifests" / f"{name}.yaml").read_text()
    text = text.replace("manifests/prompts", f"{ROOT}/manifests/prompts")
    stages = loads(text, "m.yaml").manifest.stages
    chosen = [stage for stage in stages if stage != "latent_vgg"]  # mse uses no perceptual network
    plan = execute(text, tmp_path / "store", [f"stages.{line}" for line in sets], only=chosen)
    student = plan["student"].artifact
    (line,) = (json.loads(line) for line in (student.folder / "history.jsonl").read_text().splitlines())
    assert {"student_matching", "fake_score_loss"} <= set(line)
    assert ("student_gan_ratio" in line) == (name != "sd15_dmd")
    assert "Plain diffusers cannot sample" not in (student.folder / "README.md").read_text()
