"""Losses that use networks, with random weights: the terms of each loss."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from stages.losses.adversarial import r1_penalty
from stages.losses.augmentation import Augmentation
from stages.losses.config import LOSSES, LossMaterials
from stages.losses.decoded import Decoded
from stages.losses.perceptual import PerceptualLoss, warn_of_another_space
from stages.losses.regression import l1, mse, pseudo_huber
from stages.networks import perceptual
from stages.networks.perceptual import LPIPS, About
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.vgg import VGG


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    trunk = VGG(4, 4, "latents").eval()
    about = About(space="latents", channels=4, width=4, trunk="random", images="none", std=1.0)
    return trunk, [torch.rand(channels) for channels in trunk.tap_channels], about


@pytest.fixture(scope="module")
def metric(network):
    return LPIPS(*network)


X, Y = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_regression_losses_equal_hand_computed_values():
    """The differences are 3 and -4. The mean of |d| is 3.5, that of d^2 is 12.5, and the norm is 5, with c = 0.00054
    sqrt(2)."""
    a, b, c = torch.tensor([[4.0, -2.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]]), 0.00054 * 2**0.5
    torch.testing.assert_close(l1(a, b), torch.tensor([3.5, 0.0]))
    torch.testing.assert_close(mse(a, b), torch.tensor([12.5, 0.0]))
    expected = ((25 + c**2) ** 0.5 - c) / 2**0.5
    torch.testing.assert_close(pseudo_huber(a, b), torch.tensor([expected, 0.0]))
    near = pseudo_huber(torch.tensor([[1e-5, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    assert float(near) == pytest.approx(1e-10 / (2 * c) / 2**0.5, rel=1e-3)  # quadratic below c


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_perceptual_loss_is_its_metric_plus_the_weighted_l1_term(metric, weight):
    expected = metric(X, Y) + weight * (X - Y).abs().mean((1, 2, 3))
    torch.testing.assert_close(PerceptualLoss(metric, l1_weight=weight)(X, Y), expected)


def test_the_ensemble_transforms_the_input_of_the_metric_but_not_of_the_l1_term(metric):
    augmentation = Augmentation("bg")
    torch.manual_seed(3)
    found = PerceptualLoss(metric, augmentation, 0.5)(X, Y)
    torch.manual_seed(3)
    draw = augmentation.draw(X)
    expected = metric(augmentation(X, draw), augmentation(Y, draw)) + 0.5 * (X - Y).abs().mean((1, 2, 3))
    torch.testing.assert_close(found, expected)


def test_a_decoded_loss_tracks_gradients_of_the_target_only_if_needed():
    decoder = nn.Conv2d(4, 3, 1)
    wanted = []
    loss = Decoded(decoder, lambda image, target: wanted.append(target.requires_grad) or mse(image, target))
    output = X.clone().requires_grad_()
    found = loss(output, Y)
    torch.testing.assert_close(found, (decoder(X) - decoder(Y)).square().mean((1, 2, 3)))
    loss(output, Y.clone().requires_grad_())
    assert wanted == [False, True]
    assert torch.autograd.grad(found.sum(), output)[0].abs().max() > 0


def test_r1_of_a_discriminator_of_matrix_products_is_in_full_precision_inside_autocast():
    """D(x) = |A x|^2 / 2 has the gradient A^T A x; bfloat16 is wrong by a percent."""
    torch.manual_seed(0)
    a, x = torch.randn(48, 48), torch.randn(5, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(lambda x: [(x.flatten(1) @ a.T).square().sum(1)[:, None, None] / 2], x, 2.0)
    assert penalty.dtype == torch.float32
    expected = (x.flatten(1) @ a.T @ a).square().sum(1).mean()
    assert float(penalty.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.fixture
def teachers(tiny, tmp_path):
    """Records of three teachers, and a network that was trained on latents of the first. The last teacher has another
    VAE."""

    def sealed(name, vae, unet, readme):
        (tmp_path / name).mkdir()
        files = {"vae/w.safetensors": vae, "vae/README.md": readme, "unet/w.safetensors": unet}
        record = {"files": {file: {"sha256": content} for file, content in files.items()}}
        (tmp_path / name / "artifact.json").write_text(json.dumps(record))
        return replace(tiny[1]["teacher"].artifact, folder=tmp_path / name)

    own, alike, other = sealed("own", "1", "a", "x"), sealed("alike", "1", "b", "y"), sealed("other", "2", "a", "x")
    latents = replace(own, inputs={"teacher": own})
    return replace(own, fingerprint="net", inputs={"latents": latents}), own, alike, other


def test_the_named_decoder_makes_the_compared_images(tiny, tmp_path):
    torch.manual_seed(0)
    trunk = VGG(3, 4, "pixels").eval()
    about = About(space="pixels", channels=3, width=4, trunk="random", images="none", std=1.0)
    heads = [torch.rand(channels) for channels in trunk.tap_channels]
    perceptual.write(tmp_path, trunk, heads, about)
    blocks = {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}
    blocks |= {f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")}
    decoder = AutoencoderTiny(**blocks).eval()
    decoder.save_pretrained(tmp_path / "tiny")
    teacher = tiny[1]["teacher"].artifact
    settings = {"name": "pixel_lpips", "perceptual": "net", "tiny_vae": str(tmp_path / "tiny")}
    inputs = {"perceptual": replace(teacher, folder=tmp_path)}
    materials = LossMaterials(StableDiffusion(teacher.folder), inputs, {"tiny_vae": "sha256:0"})
    distance = LOSSES["pixel_lpips"].model_validate(settings).create(materials)
    x, y = X[..., :8, :8], Y[..., :8, :8]
    expected = LPIPS(trunk, heads, about)(decoder.decode(x).sample, decoder.decode(y).sample)
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-6)


def test_only_another_vae_gives_a_warning(teachers, caplog):
    network, own, alike, other = teachers
    with caplog.at_level(logging.WARNING):
        for same in (own, alike):
            warn_of_another_space(network, same.folder)
        assert not caplog.messages
        warn_of_another_space(network, other.folder)
    assert len(caplog.messages) == 1 and "perceptual/net" in caplog.text


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "pixel_lpips", "perceptual": "p", "tiny_vae_revision": "main"}, "needs a tiny_vae"),
    ({"name": "e_latent_lpips", "perceptual": "p", "augment": "gb"}, "augment"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LOSSES[settings["name"]].model_validate(settings)


def test_a_tiny_vae_with_its_revision_is_taken():
    settings = {"name": "pixel_lpips", "perceptual": "p", "tiny_vae": "owner/name", "tiny_vae_revision": "main"}
    assert LOSSES["pixel_lpips"].model_validate(settings).tiny_vae == "owner/name"


def test_a_loss_uses_the_named_network_and_only_the_ensemble_transforms(tiny, tmp_path, network, metric):
    perceptual.write(tmp_path, *network)
    teacher = tiny[1]["teacher"].artifact
    materials = LossMaterials(StableDiffusion(teacher.folder), {"perceptual": replace(teacher, folder=tmp_path)}, {})
    plain, ensemble = (
        LOSSES[name].model_validate({"name": name, "perceptual": "net"}).create(materials)
        for name in ("latent_lpips", "e_latent_lpips")
    )
    assert plain.augmentation is None and ensemble.augmentation.groups == "bg"
    torch.testing.assert_close(plain(X, Y), metric(X, Y))


def test_losses_in_closed_form():
    a, b = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 2.0)
    assert l1(a, b).tolist() == [2.0, 2.0] and mse(a, b).tolist() == [4.0, 4.0]
    far = torch.full((2, 1, 3, 3), 1e4)
    assert pseudo_huber(a, far).tolist() == pytest.approx([1e4, 1e4], rel=1e-3)
    near = pseudo_huber(a, a + 1e-6)
    assert (near > 0).all() and (near < 1e-6).all()
