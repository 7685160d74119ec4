"""Diffusion2GAN: the inputs of its discriminator, its losses in closed form, its mismatched triples, and resuming."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pipeline.errors import ManifestError
from stages.base import StageError
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from stages.losses.config import Regression
from stages.methods.base import Materials, StudentTraining
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.diffusion2gan.mix_and_match import mix_and_match
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.networks import build
from stages.networks.compute import checkpoint_activations
from stages.networks.condition import Condition
from stages.networks.discriminator import DiffusionDiscriminator
from stages.networks.pixel import PixelDiffusion
from stages.networks.stable_diffusion import StableDiffusion
from stages.training import TrainingExecution
from stages.training.loop import train
from tests.support.cli import ROOT
from tests.support.networks import adapter_around, stable_diffusion_layout
from tests.support.pipelines import TINY, execute, plan_of

MSE = Regression(name="mse")


def sd15(size=16, text=12):
    """Stable Diffusion 1.5's layout with a fortieth of its width."""
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(8, 16, 24, 24),
        cross_attention_dim=text,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def by_class(classes=10):
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=classes,
    )


LAYOUTS = {
    "digits": (lambda: build.unet(8, 12, (8, 16)), {"text": torch.randn(2, 5, 12)}, [4, 8]),
    "sd15": (sd15, {"text": torch.randn(2, 5, 12)}, [2, 4, 8, 16]),
    "one scale": (lambda: build.unet(4, 12, (8,)), {"text": torch.randn(2, 5, 12)}, [4]),
    "classes": (by_class, {"class": torch.tensor([3, 7])}, [4, 8]),
    "unconditional": (lambda: by_class(None), {}, [4, 8]),
}


def discriminator(layout="sd15", seed=0, **switches):
    torch.manual_seed(seed)
    unet = LAYOUTS[layout][0]()
    family = PixelDiffusion if isinstance(unet, UNet2DModel) else StableDiffusion
    return DiffusionDiscriminator(adapter_around(unet, family), unet, **switches)


def inputs(d, layout="sd15", seed=1):
    torch.manual_seed(seed)
    config = d.network.config
    shape = (2, config["in_channels"], config["sample_size"], config["sample_size"])
    return torch.randn(shape), torch.randn(shape), Condition(2, LAYOUTS[layout][1])


def awake(d):
    """Return the discriminator with random weights in the layers of its new inputs, as after some training steps. They
    start as zeros."""
    for parameter in [*d.resized.parameters(), *(d.noise.parameters() if d.noise else [])]:
        nn.init.normal_(parameter, std=0.1)
    return d


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scale_of_the_decoder_has_three_maps(layout):
    d = discriminator(layout)
    maps = d(*inputs(d, layout))
    assert [tuple(m.shape) for m in maps] == [(2, n, n) for n in LAYOUTS[layout][2] for _ in range(3)]
    (only,) = (e := discriminator(layout, multi_scale=False))(*inputs(e, layout))
    finest = LAYOUTS[layout][2][-1]
    assert only.shape == (2, finest, finest) and not len(e.resized)


def test_the_discriminator_judges_the_features_of_the_unet():
    """The test's own hooks record the output of the middle block, the skips of the encoder, and the input of the output
    layer."""
    d = awake(discriminator())
    seen = {}
    unet = d.network
    unet.mid_block.register_forward_hook(lambda m, a, out: seen.update({"below 0": out}))
    skips = []
    for block in unet.down_blocks:
        block.register_forward_hook(lambda m, a, out: skips.extend(out[1]))
    unet.conv_norm_out.register_forward_pre_hook(lambda m, a: seen.update({"last": a[0]}))
    judged = []
    for head in d.heads:
        head.register_forward_pre_hook(lambda m, a: judged.append(a[0]))
    d(*inputs(d))
    assert len(judged) == 12
    assert judged[1] is seen["below 0"] and judged[-1] is seen["last"]
    for k in range(4):  # the decoder reads the skips of a scale in reverse order
        assert judged[3 * k] is [out for out in skips if out.shape[-1] == 2 << k][-1]
        if k:
            assert judged[3 * k + 1].shape[-1] == 2 * judged[3 * k - 1].shape[-1]  # upsampled in between


def test_a_map_changes_only_with_its_own_branch_and_earlier_ones():
    d = awake(discriminator())
    before = d(*inputs(d))

    def changed():
        return [not torch.equal(a, b) for a, b in zip(before, d(*inputs(d)), strict=True)]

    for k, head in enumerate(d.heads):
        kept = head[2].bias.data.clone()
        head[2].bias.data += 1
        assert changed() == [i == k for i in range(12)]
        head[2].bias.data.copy_(kept)
    for k, layer in enumerate(
        d.resized
    ):  # finer skips are computed before this input enters; all other maps depend on it
        kept = layer.bias.data.clone()
        layer.bias.data += 1
        finer = {3 * scale for scale in range(3 - k, 4)}
        assert changed() == [i not in finer for i in range(12)]
        layer.bias.data.copy_(kept)
    assert not any(changed())


def test_a_new_discriminator_is_the_teachers_unet_and_ignores_the_noise():
    d = discriminator()
    x, z, c = inputs(d)
    assert all(torch.equal(a, b) for a, b in zip(d(x, z, c), d(x, z + 1, c), strict=True))
    features = []
    d.heads[-1].register_forward_pre_hook(lambda m, a: features.append(a[0]))
    torch.manual_seed(0)
    plain = sd15()
    plain.conv_norm_out.register_forward_pre_hook(lambda m, a: features.append(a[0]))
    plain(x, 0, c.tensors["text"])
    d(x, z, c)
    assert torch.equal(*features)
    generator_loss(d(x, z, c)).backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in (d.noise, *d.resized))
    awake(d)
    assert not torch.equal(d(x, z, c)[-1], d(x, z + 1, c)[-1])
    blind = discriminator(noise=False)
    assert blind.noise is None and torch.equal(blind(x, z, c)[0], blind(x, z + 1, c)[0])


def test_a_copied_discriminator_reads_its_own_unet():
    d = awake(discriminator())
    twin = copy.deepcopy(d)
    for parameter in d.parameters():
        nn.init.zeros_(parameter)
    assert all(float(m.detach().abs().max()) > 0 for m in twin(*inputs(d)))
    assert all(float(m.detach().abs().max()) == 0 for m in d(*inputs(d)))


def test_losses_are_small_if_the_logits_are_right():
    """A positive logit means that the discriminator judges the input as real."""
    yes, no = [torch.full((2, 4, 4), 3.0)], [torch.full((2, 4, 4), -3.0)]
    small, large = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    assert float(generator_loss(yes)) == pytest.approx(small) and float(generator_loss(no)) == pytest.approx(large)
    assert float(discriminator_loss(yes, no)) == pytest.approx(2 * small)
    assert float(discriminator_loss(no, yes)) == pytest.approx(2 * large)


def test_losses_at_logits_of_zero():
    nothing = [torch.zeros(3, 4, 4), torch.zeros(3, 8, 8)]
    assert float(generator_loss(nothing)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(discriminator_loss(nothing, nothing)) == pytest.approx(2 * math.log(2), abs=1e-6)


def test_all_maps_have_the_same_weight():
    small, large = torch.full((1, 1, 1), 3.0), torch.full((1, 50, 50), -3.0)
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert float(generator_loss([small, large])) == pytest.approx(expected, rel=1e-6)


def test_r1_of_a_linear_discriminator_in_closed_form():
    """For D(x) = w . x, spread over the positions of a map, the penalty is weight / 2 |w|^2 for any x. Its gradient in
    w is weight times w. The penalty of several maps is that of their mean, whatever their sizes."""
    w, u = (torch.randn(3, 4, 4, requires_grad=True) for _ in "wu")
    x = torch.randn(5, 3, 4, 4)
    penalty = r1_penalty(lambda x: [(x * w).sum(1)], x, 7.0)
    assert float(penalty.detach()) == pytest.approx(3.5 * float(w.detach().square().sum()), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(w.grad, 7.0 * w.detach())
    two = r1_penalty(lambda x: [(x * w).sum(1), (x * u).sum((1, 2, 3)).view(-1, 1, 1)], x, 7.0)
    assert float(two.detach()) == pytest.approx(3.5 * float(((w + u) / 2).detach().square().sum()), rel=1e-5)


def test_r1_grows_with_the_number_of_positions():
    """The discriminator of the test treats all positions alike. The penalty grows with their number, so larger latents
    need a smaller weight."""
    judge = nn.Conv2d(3, 1, 1)
    small, large = (
        float(r1_penalty(lambda x: [judge(x)[:, 0]], torch.randn(2, 3, n, n), 1.0).detach()) for n in (8, 32)
    )
    assert small == pytest.approx(0.5 * 64 * float(judge.weight.detach().square().sum()), rel=1e-5)
    assert large == pytest.approx(16 * small, rel=1e-5)


def test_the_mean_r1_of_single_samples_equals_that_of_the_batch():
    d = awake(discriminator("digits"))
    x, z, c = inputs(d, "digits")
    whole = r1_penalty(lambda real: d(real, z, c), x, 1.0)
    singles = [
        r1_penalty(lambda real, at=slice(i, i + 1): d(real, z[at], c.select(at)), x[i : i + 1], 1.0)
        for i in range(len(x))
    ]
    assert float(torch.stack(singles).mean()) == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_gives_the_same_gradients_second_order_too(layout):
    def gradients(checkpointed):
        d = awake(discriminator(layout))
        if checkpointed:
            checkpoint_activations([d])
            calls = []
            d.network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda m, a: calls.append(a))
        x, z, c = inputs(d, layout)
        with torch.enable_grad():
            loss = discriminator_loss(d(x, z, c), d(z, x, c)) + r1_penalty(lambda real: d(real, z, c), x, 1.0)
        loss.backward()
        assert not checkpointed or len(calls) > 3  # computed again
        return [p.grad for p in d.parameters() if p.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


def false(rows=64, share=0.5, sees_noise=True, texts=True, seed=0):
    """Each row has its own number, and generated rows have negative ones. `texts`: all different, or a list, or
    None."""
    torch.manual_seed(seed)
    own = torch.arange(1.0, rows + 1)
    real, noise, made = (t.view(-1, 1, 1, 1).expand(-1, 2, 2, 2) for t in (own, 100 * own, -own))
    c = None if texts is None else own if texts is True else torch.tensor(texts)
    condition = Condition(rows, {} if c is None else {"text": c})
    x, z, false_c = mix_and_match(made, real, noise, condition, share, sees_noise)
    return own, x[:, 0, 0, 0], z[:, 0, 0, 0] / 100, c, false_c.tensors.get("text")


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0, 1), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_mixed_rows_are_real_and_exactly_one_part_is_another_rows(seed, rows, share, sees_noise, few_texts):
    texts = [i % 3 for i in range(rows)] if few_texts else True
    own, x, z, c, false_c = false(rows, share, sees_noise, texts, seed)
    for i in range(rows):
        n = own[i].item()
        another_noise, another_text = z[i].item() != n, false_c[i] != c[i]
        if x[i] < 0:
            assert x[i] == -n and not another_noise and not another_text  # a generated row with its own noise and text
        elif x[i] != n:
            assert not another_noise and not another_text
            assert sees_noise or c[int(x[i]) - 1] != c[i]  # otherwise the row would match
        else:
            assert another_noise != another_text and (sees_noise or not another_noise)


@pytest.mark.parametrize(
    ("sees_noise", "texts", "parts"),
    [
        (True, True, (1 / 2, 1 / 6, 1 / 6, 1 / 6)),
        (False, True, (1 / 2, 1 / 4, 0, 1 / 4)),
        (True, None, (1 / 2, 1 / 6, 1 / 3, 0)),
        (False, None, (1, 0, 0, 0)),
    ],
)
def test_the_share_of_mixed_rows_equals_the_setting(sees_noise, texts, parts):
    counts = torch.zeros(4)
    for seed in range(40):
        own, x, z, c, false_c = false(sees_noise=sees_noise, texts=texts, seed=seed)
        another_text = torch.zeros(64) if c is None else c != false_c
        counts += torch.tensor([(x < 0).sum(), ((x > 0) & (x != own)).sum(), (z != own).sum(), another_text.sum()])
    torch.testing.assert_close(counts / counts.sum(), torch.tensor(parts, dtype=torch.float), atol=0.03, rtol=0)


def test_nothing_is_mixed_with_share_0_or_in_a_batch_of_one():
    for rows, share in ((64, 0.0), (1, 1.0)):
        own, x, z, c, false_c = false(rows, share)
        assert torch.equal(x, -own) and torch.equal(z, own) and torch.equal(c, false_c)


# --- The method on the digits teacher ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(tiny):
    reader = PairReader(read_list(tiny[1]["pairs"].artifact.folder))

    def rows(numbers):
        drawn = reader.batch(list(numbers))
        noise, latent = (torch.from_numpy(array).float() for array in (drawn.noise, drawn.latent))
        return {"pairs": {"noise": noise, "latent": latent, "prompts": drawn.prompts, "w": torch.zeros(len(noise))}}

    return rows


def made(teacher, steps=8, gan_weight=0.5, accumulate=1, mixed_precision="no", **of_discriminator):
    torch.manual_seed(0)
    training = StudentTraining(
        steps=steps, batch_size=8, learning_rate=1e-3, accumulate=accumulate, mixed_precision=mixed_precision
    )
    given = {"discriminator": {"r1_every": 3, "r1_weight": 1.0, **of_discriminator}} if gan_weight else {}
    config = Diffusion2GANConfig(loss=MSE, gan_weight=gan_weight, **given)
    return config.create(Materials(teacher, training))


def trained(method, batches, folder, stop=None, every=2, checkpointing=False):
    execution = TrainingExecution(checkpoint_every=every, device="cpu", gradient_checkpointing=checkpointing)
    steps = train(method, batches, seed=1, checkpoints=folder, execution=execution)
    if stop:
        list(itertools.islice(steps, stop))
        return None
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


def weights(result):
    return result.averages["student"].state_dict()


def test_without_the_gan_it_equals_knowledge_distillation(teacher, batch, tmp_path):
    settings = StudentTraining(steps=4, batch_size=8, learning_rate=1e-3)
    plain = KnowledgeDistillationConfig(loss=MSE).create(Materials(teacher, settings))
    batches = [batch(range(8 * i, 8 * i + 8)) for i in range(4)]
    expected = weights(trained(plain, batches.__getitem__, tmp_path / "plain"))
    alone = made(teacher, steps=4, gan_weight=0)
    assert set(alone.players) == {"student"}
    ours = weights(trained(alone, batches.__getitem__, tmp_path / "ours"))
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


class Recorder(nn.Module):
    """Wraps a discriminator, and keeps its inputs and outputs."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator, self.encode, self.asked, self.said = discriminator, discriminator.encode, [], []

    def forward(self, x, z, c):
        self.asked.append((x.detach(), z, c.tensors["text"]))
        self.said.append(self.discriminator(x, z, c))
        return self.said[-1]


def test_the_discriminators_real_and_fake_inputs_and_the_input_of_r1(teacher, batch):
    method = made(teacher, mix_and_match=1.0)
    recorder = method.discriminator = Recorder(method.discriminator)
    rows = batch(range(8))
    student, critic = method.turns(0)
    student.loss(rows)
    shown_to_student = recorder.asked.pop()
    critic.loss(rows)
    (x, z, c), (one_x, one_z, one_c) = recorder.asked
    pairs = rows["pairs"]
    truth = pairs["latent"], pairs["noise"], teacher.encode_prompts(pairs["prompts"]).tensors["text"]
    assert all(torch.equal(half[:8], true) for half, true in zip((x, z, c), truth, strict=True))
    assert torch.equal(shown_to_student[1], truth[1]) and torch.equal(shown_to_student[2], truth[2])
    for i in range(8, 16):  # all rows are mixed: real latents with one mismatched part
        assert any(torch.equal(x[i], real) for real in truth[0])
        assert not all(torch.equal(part[i], true[i - 8]) for part, true in zip((x, z, c), truth, strict=True))
    assert len(one_x) == 1
    (at,) = [i for i in range(8) if torch.equal(truth[0][i], one_x[0])]
    assert torch.equal(one_z[0], truth[1][at]) and torch.equal(one_c[0], truth[2][at])


def minus_log(probabilities):
    """Return the mean of -log of probabilities over the positions of each map, then over maps."""
    return sum(float(-p.double().log().mean()) for p in probabilities) / len(probabilities)


@pytest.mark.parametrize("gan_weight", [0.3, 2.0])
def test_both_losses_equal_hand_computed_values(teacher, batch, gan_weight):
    """distance + gan_weight * E[-log D(false)], and E[-log D(real)] + E[-log(1 - D(false))]."""
    method = made(teacher, gan_weight=gan_weight, mix_and_match=0)
    recorder, rows = Recorder(awake(method.discriminator)), batch(range(8))
    with torch.no_grad():
        for head in method.discriminator.heads:
            head[2].bias += 0.7
    method.discriminator = recorder
    student, critic = method.turns(1)  # a step without a penalty
    loss, figures = student.loss(rows)
    distance = float((recorder.asked[0][0] - rows["pairs"]["latent"]).square().mean())
    gan = minus_log([logits.detach().sigmoid() for logits in recorder.said[0]])
    assert float(loss.detach()) == pytest.approx(distance + gan_weight * gan, rel=1e-5)
    assert {name: float(value.detach()) for name, value in figures.items()} == pytest.approx(
        {"distance": distance, "gan": gan}, rel=1e-5
    )
    loss, figures = critic.loss(rows)
    real, false = zip(*(logits.detach().chunk(2) for logits in recorder.said[1]), strict=True)
    expected = minus_log([logits.sigmoid() for logits in real]) + minus_log([(-logits).sigmoid() for logits in false])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    means = {
        name: sum(float(logits.mean()) for logits in maps) / len(maps)
        for name, maps in (("real", real), ("false", false))
    }
    assert {name: float(value.detach()) for name, value in figures.items()} == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_discriminator_and_student_lower_their_losses(teacher, batch):
    method = made(teacher, r1_weight=0, mix_and_match=0)
    rows = batch(range(8))
    critic = torch.optim.Adam(method.discriminator.parameters(), 1e-3)
    seen = []
    for _ in range(12):
        method.student_loss(rows)
        loss, figures = method.discriminator_loss(rows, with_r1=False)
        critic.zero_grad()
        loss.backward()
        critic.step()
        seen.append({"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in figures.items()}})
    first, last = seen[0], seen[-1]
    assert last["loss"] < first["loss"] and last["real"] - last["false"] > first["real"] - first["false"] + 0.1
    student = torch.optim.Adam(method.student.parameters(), 1e-4)
    pleased = []
    for _ in range(5):
        figures = method.student_loss(rows)[1]
        student.zero_grad()
        figures["gan"].backward()
        student.step()
        pleased.append(float(figures["gan"].detach()))
    assert pleased[-1] < pleased[0]


def test_every_third_step_is_penalised_beginning_with_the_first(teacher, batch):
    method = made(teacher)
    due = []
    for step in range(7):
        (student, critic) = method.turns(step)
        student.loss(batch(range(8)))
        _, figures = critic.loss(batch(range(8)))
        due.append("r1" in figures)
        if due[-1]:
            torch.manual_seed(0)
            student.loss(batch(range(8)))
            torch.manual_seed(0)
            unpenalised, _ = method.discriminator_loss(batch(range(8)), with_r1=False)
            student.loss(batch(range(8)))
            torch.manual_seed(0)
            again, figures = method.discriminator_loss(batch(range(8)), with_r1=True)
            assert float(again - unpenalised) == pytest.approx(3 * float(figures["r1"]), rel=1e-2, abs=1e-6)
    assert due == [True, False, False, True, False, False, True]
    method = made(teacher, r1_weight=0)
    student, critic = method.turns(0)
    student.loss(batch(range(8)))
    assert "r1" not in critic.loss(batch(range(8)))[1]


def test_killed_between_two_steps_and_resumed_it_gives_the_same_bits(teacher, batch, tmp_path):
    """The state has two optimizers, an average, the number of steps to the next penalty, and the last logged
    figures."""

    def batches(step):
        return batch(range(8 * (step % 8), 8 * (step % 8) + 8))

    whole = trained(made(teacher, steps=14), batches, tmp_path / "whole", every=4)
    assert {"discriminator_r1", "student_gan", "discriminator_real"} <= set(whole.history[0])
    trained(made(teacher, steps=14), batches, tmp_path / "killed", stop=1, every=4)  # after 10; the last checkpoint: 8
    again = trained(made(teacher, steps=14), batches, tmp_path / "killed", every=4)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert again.history == whole.history


def test_two_accumulated_halves_equal_one_batch(teacher, batch, tmp_path):
    """Each half of the discriminator's turn gets the latents that the student made from the same half."""
    switches = {"r1_weight": 0, "mix_and_match": 0}
    whole = trained(made(teacher, 3, **switches), lambda step: batch(range(16)), tmp_path / "whole")
    halves = made(teacher, 3, accumulate=2, **switches)
    parts = trained(halves, lambda i: batch(range(8) if i % 2 == 0 else range(8, 16)), tmp_path / "halves")
    assert not halves._generated
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=2e-5, rtol=1e-3)


def test_training_runs_in_bf16_with_checkpointing(teacher, batch, tmp_path):
    result = trained(
        made(teacher, 4, mixed_precision="bf16"), lambda step: batch(range(8)), tmp_path, checkpointing=True
    )
    assert all(math.isfinite(value) for line in result.history for value in line.values())


def test_only_the_player_of_the_turn_gets_gradients_and_the_student_from_both_terms(teacher, batch):
    method = made(teacher)
    student, critic = method.turns(1)
    critic_module = method.discriminator.requires_grad_(False)
    student.loss(batch(range(8)))[0].backward()
    assert all(p.grad is None for p in critic_module.parameters())
    total = torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])
    method.student.zero_grad()
    pairs = batch(range(8))["pairs"]
    method.distance(
        method.student(pairs["noise"], teacher.encode_prompts(pairs["prompts"])), pairs["latent"]
    ).mean().backward()
    alone = torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])
    assert not torch.allclose(total, alone)
    method.student.zero_grad()
    method.discriminator.requires_grad_(True)
    critic.loss(batch(range(8)))[0].backward()
    assert all(p.grad is None for p in method.student.parameters())


GAN = TINY.replace(
    "method: {name: knowledge_distillation}",
    "method: {name: diffusion2gan, loss: mse, discriminator: {r1_every: 5}}",
)


def test_the_stage_runs_and_exports_a_student(tiny):
    student = execute(GAN, tiny[0], name="gan")["student"].artifact
    assert student.record["metrics"]["held_out_mse"] > 0
    assert "diffusion2gan" in (student.folder / "README.md").read_text()
    lines = (student.folder / "history.jsonl").read_text()
    assert "discriminator_r1" in lines and "student_distance" in lines


def test_a_loss_is_needed_and_checked(tiny):
    with pytest.raises(ManifestError, match=r"method\.loss: .*missing|missing"):
        plan_of(GAN.replace("loss: mse, ", ""), tiny[0])
    with pytest.raises(ManifestError, match="did you mean 'mix_and_match'"):
        plan_of(GAN.replace("r1_every: 5", "mix_and_math: 0.5"), tiny[0])


SMALL = """
teacher.revision=null
imagenet.images.size=16
latent_vgg.width=4
latent_vgg.classification.training={steps: 2, batch_size: 8, mixed_precision: bf16}
latent_vgg.triplets={name: synthetic, count: 60, test_count: 60}
latent_vgg.calibration.training={steps: 2, batch_size: 8}
cfg3.count=24
cfg3.shard_size=8
cfg3.sampler.steps=2
cfg3.execution.compile=false
cfg8.count=16
cfg8.shard_size=16
cfg8.sampler.steps=2
cfg8.execution.compile=false
student.matrix.pairs=[cfg3]
student.training.steps=2
student.training.batch_size=4
student.training.accumulate=2
student.held_out=8
quality.samples=20
imagenet.execution.threads=1
latent_vgg.execution.threads=1
cfg3.execution.threads=1
cfg8.execution.threads=1
student.execution.threads=1
quality.execution.threads=1
"""


def test_the_manifest_for_stable_diffusion_runs_at_small_size(tmp_path):
    """Only sizes and outside files differ: bf16, checkpointing, accumulation, E-LatentLPIPS and R1 are as published."""
    torch.manual_seed(0)
    folder = stable_diffusion_layout(tmp_path / "sd", sd15(8, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 16, 16, 3), dtype=np.uint8)
    for name, of_class in zip("ab", pixels, strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i, image in enumerate(of_class):
            Image.fromarray(image).save(tmp_path / "train" / name / f"{i}.png")
    outside = [f"teacher.from={folder}", f"imagenet.images.path={tmp_path / 'train'}"]
    sets = [f"stages.{line}" for line in [*outside, *SMALL.split("\n")[1:-1]]]
    text = (ROOT / "manifests" / "sd15_diffusion2gan.yaml").read_text()
    plan = execute(text.replace("manifests/prompts", f"{ROOT}/manifests/prompts"), tmp_path / "store", sets)
    student = plan["student[pairs=cfg3]"].artifact
    (line,) = (json.loads(line) for line in (student.folder / "history.jsonl").read_text().splitlines())
    assert {"student_distance", "student_gan", "discriminator_r1"} <= set(line)


def test_discriminator_settings_without_a_discriminator_are_refused(tiny):
    with pytest.raises(ManifestError, match="gan_weight: 0 trains no discriminator"):
        plan_of(GAN.replace("loss: mse,", "loss: mse, gan_weight: 0,"), tiny[0])


def test_blocks_that_pass_images_are_refused_by_name():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
    )
    with pytest.raises(StageError, match="its SkipDownBlock2D passes an image"):
        DiffusionDiscriminator(adapter_around(unet, PixelDiffusion), unet)
