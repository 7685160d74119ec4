"""The latent VGG and its LPIPS, compared with torchvision and with the formula in float64; and properties of a
distance."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import vgg16_bn

from stages.base import StageError
from stages.networks.perceptual import ABOUT, LPIPS, WEIGHTS, About, read, write
from stages.networks.vgg import VGG, Classifier

ENDS = {"latents": (7, 14, 24, 34, 44), "pixels": (6, 13, 23, 33, 43)}
"""methods.md 2.2: in latents after the fourth and the fifth pool; in pixels before every pool, as LPIPS does."""
LIKE = {"latents": (4, 16), "pixels": (3, 32)}
"""Channels and side of the tests' inputs."""


def trained(space="latents", width=4, channels=None, seed=0):
    """A random VGG whose batch norms have seen a few batches, in evaluation mode."""
    torch.manual_seed(seed)
    vgg, (usual, side) = VGG(channels or LIKE[space][0], width, space), LIKE[space]
    with torch.no_grad():
        for layer in vgg.features:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2.0), layer.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            vgg(1.5 * torch.randn(4, channels or usual, side, side) + 0.3)
    return vgg.eval()


def unfolded(vgg, x):
    """Compute the taps layer by layer, with an unchanged copy of the network."""
    found = []
    for place, layer in enumerate(copy.deepcopy(vgg.features)):
        x = layer(x)
        if place + 1 in ENDS[vgg.space]:
            found.append(x)
    return found


def some_heads(vgg, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(channels, generator=generator) for channels in vgg.tap_channels]


def lpips(space="latents", width=4, **about):
    vgg = trained(space, width)
    return LPIPS(vgg, some_heads(vgg), About(space, vgg.channels, width, "random", **about))


def two(space="latents", batch=2, seed=2):
    channels, side = LIKE[space]
    return torch.randn(2, batch, channels, side, side, generator=torch.Generator().manual_seed(seed)).unbind()


def reference(vgg, heads, x0, x1):
    """sum_k mean_hw w_k . (f0/|f0| - f1/|f1|)^2 in float64, through the unfolded network."""
    vgg = copy.deepcopy(vgg).double()
    total = 0.0
    for f0, f1, w in zip(unfolded(vgg, x0), unfolded(vgg, x1), heads, strict=True):
        u0, u1 = (f / torch.sqrt(torch.sum(f**2, 1, keepdim=True) + 1e-8) for f in (f0, f1))
        total = total + ((u0 - u1) ** 2 * w.double()[:, None, None]).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def metric():
    return lpips()


# --- the network ---------------------------------------------------------------------------------------


def test_the_taps_of_a_latent_of_stable_diffusion():
    with torch.device("meta"):
        vgg, x = VGG(4), torch.zeros(1, 4, 64, 64)
    sizes = [(64, 64), (128, 64), (256, 64), (512, 32), (512, 16)]
    shapes = []
    for block in vgg.taps():
        x = block(x)
        shapes.append(tuple(x.shape))
    assert shapes == [(1, channels, side, side) for channels, side in sizes]
    assert vgg.tap_channels == [channels for channels, _ in sizes]
    assert vgg(torch.zeros(1, 4, 64, 64, device="meta")).shape == (1, 512, 16, 16)


def test_the_number_of_parameters():
    """Convolutions with biases, and the scales and shifts of the batch norms."""
    with torch.device("meta"):
        vgg = VGG(4)
    assert sum(p.numel() for p in vgg.parameters()) == 14_723_712
    assert sum(p.numel() for block in vgg.taps() for p in block.parameters()) == 14_723_712 - 2 * 4224


@pytest.mark.parametrize("space", ENDS)
def test_folding_changes_nothing_but_the_number_of_layers(space):
    vgg = trained(space)
    before = {name: value.clone() for name, value in vgg.state_dict().items()}
    x, _ = two(space)
    taps, y = vgg.taps(), x
    for block, expected in zip(taps, unfolded(vgg, x), strict=True):
        y = block(y)
        assert expected.std() > 0.01
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.Identity) for layer in taps.modules())
    assert not any(p.requires_grad for p in taps.parameters())
    assert all(p.requires_grad for p in vgg.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vgg.state_dict().items())


def test_folding_a_network_in_training_leaves_it_in_training():
    vgg = trained().train()
    taps = vgg.taps()
    assert all(layer.training for layer in vgg.modules()) and not any(layer.training for layer in taps.modules())
    x, _ = two()
    torch.testing.assert_close(taps[0](x), unfolded(vgg.eval(), x)[0], rtol=1e-4, atol=1e-5)


def test_in_pixels_the_network_equals_torchvisions():
    vgg = trained("pixels", width=64)
    with torch.device("meta"):
        stock = vgg16_bn().features
    stock.load_state_dict(vgg.features.state_dict(), assign=True)
    x, _ = two("pixels", batch=1)
    with torch.no_grad():
        assert torch.equal(vgg(x), stock.eval()(x))
        y = x
        for block, end in zip(vgg.taps(), ENDS["pixels"], strict=True):
            y = block(y)
            assert isinstance(stock[end], nn.MaxPool2d)
            torch.testing.assert_close(y, stock[:end](x), rtol=1e-4, atol=1e-4)


def test_in_latents_the_network_equals_torchvisions_without_three_pools():
    with torch.device("meta"):
        ours, stock = VGG(4).features, vgg16_bn().features
    assert len(ours) == len(stock) == 44
    assert [place for place in range(44) if type(ours[place]) is not type(stock[place])] == [6, 13, 23]
    different = {k for k, v in stock.state_dict().items() if ours.state_dict()[k].shape != v.shape}
    assert different == {"0.weight"} and ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("size, pooled", [((4, 4), (1, 1)), ((16, 24), (4, 6)), ((32, 64), (7, 7))])
def test_the_classifier(size, pooled):
    classifier = Classifier(VGG(4, 4), {"digit": 10, "colour": 6}, size)
    assert all(layer.training for layer in classifier.modules())
    linear = [tuple(layer.weight.shape) for layer in classifier.head if isinstance(layer, nn.Linear)]
    assert linear == [(256, 32 * math.prod(pooled)), (256, 256), (16, 256)]
    x = torch.randn(3, 4, *size)
    logits = classifier(x)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"digit": (3, 10), "colour": (3, 6)}
    sum(value.square().sum() for value in logits.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())


@pytest.mark.parametrize("space, smallest", [("latents", 4), ("pixels", 32)])
def test_inputs_that_are_too_small_for_the_pools_are_refused(space, smallest):
    vgg, side = VGG(4, 4, space), smallest - 1
    assert Classifier(vgg, {"class": 2}, (smallest,) * 2)(torch.zeros(2, 4, smallest, smallest))["class"].ndim == 2
    with pytest.raises(StageError, match=f"{space} of {side} x 64 are too small .* must be at least {smallest}"):
        Classifier(vgg, {"class": 2}, (side, 64))


def test_the_classifier_of_a_full_size_has_the_head_of_torchvision():
    with torch.device("meta"):
        ours, stock = Classifier(VGG(3, space="pixels"), {"class": 1000}, (224, 224)), vgg16_bn()
    shapes = [[p.shape for p in head.parameters()] for head in (ours.head, stock.classifier)]
    assert shapes[0] == shapes[1]


# --- the distance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ENDS)
def test_the_distance_is_the_formula(space):
    found, (x0, x1) = lpips(space), two(space, batch=3)
    expected = reference(trained(space), some_heads(trained(space)), x0.double(), x1.double())
    assert found(x0, x1).shape == (3,) and found(x0, x1).dtype == torch.float32
    torch.testing.assert_close(found(x0, x1), expected.float(), rtol=1e-4, atol=0)


@given(st.integers(1, 3), st.integers(4, 21), st.integers(4, 21), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_distance_is_symmetric_and_zero_for_equal_inputs(metric, batch, height, width, seed):
    x0, x1 = torch.randn(2, batch, 4, height, width, generator=torch.Generator().manual_seed(seed)).unbind()
    assert torch.equal(metric(x0, x0.clone()), torch.zeros(batch))
    distances = metric(x0, x1)
    assert torch.equal(distances, metric(x1, x0)) and (distances > 0).all()
    alone = torch.cat([metric(x0[i : i + 1], x1[i : i + 1]) for i in range(batch)])
    torch.testing.assert_close(distances, alone, rtol=1e-4, atol=1e-6)


def test_the_distance_is_linear_in_the_heads():
    vgg, (x0, x1) = trained(), two()
    a, b = some_heads(vgg, 1), some_heads(vgg, 2)
    about = About("latents", 4, 4, "random")
    parts = [LPIPS(vgg, heads, about)(x0, x1) for heads in (a, b, [p + q for p, q in zip(a, b, strict=True)])]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    only = [torch.zeros(channels) for channels in vgg.tap_channels]
    assert torch.equal(LPIPS(vgg, only, about)(x0, x1), torch.zeros(2))


@pytest.mark.parametrize("space", ENDS)
def test_gradients_are_those_of_the_formula(space):
    found, vgg, inputs = lpips(space), trained(space), two(space)
    ours = [x.clone().requires_grad_() for x in inputs]
    found(*ours).sum().backward()
    theirs = [x.double().requires_grad_() for x in inputs]
    reference(vgg, some_heads(vgg), *theirs).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert y.grad.abs().max() > 1e-3
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-3 * float(y.grad.abs().max()))


def test_the_gradient_is_finite_where_features_are_zero(metric):
    """The gradient is zero at equal inputs. A constant input has pixels without features in many taps."""
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    metric(x, x.detach().clone()).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    flat = torch.zeros(1, 4, 16, 16, requires_grad=True)
    metric(flat, torch.randn(1, 4, 16, 16)).sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().max() > 0


class Saved:
    """Tensors that autograd keeps, by their storage."""

    def __enter__(self):
        self.tensors = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def keep(self, tensor):
        self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("wanted", [0, 1])
def test_an_input_without_gradient_stores_no_activations(wanted):
    found, inputs, outputs = lpips(width=8), list(two()), []
    for layer in found.taps.modules():
        if isinstance(layer, nn.Conv2d | nn.ReLU):
            layer.register_forward_hook(lambda _, x, y: outputs.append((y, y.untyped_storage().data_ptr())))
    inputs[wanted].requires_grad_()
    with Saved() as saved:
        distances = found(*inputs)
    of_input = [outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]]
    assert len(of_input[0]) == len(of_input[1]) == 26
    assert all(place in saved.tensors for y, place in of_input[wanted] if y.requires_grad)
    assert not any(place in saved.tensors for _, place in of_input[1 - wanted])
    assert inputs[1 - wanted].untyped_storage().data_ptr() not in saved.tensors
    assert distances.requires_grad and not any(p.requires_grad for p in found.parameters())
    distances.sum().backward()
    assert inputs[1 - wanted].grad is None and inputs[wanted].grad is not None


def test_only_the_difference_of_each_tap_is_stored_besides_the_features():
    found, (x0, x1) = lpips(width=8), two()
    x0.requires_grad_()
    with Saved() as whole:
        found(x0, x1)
    with Saved() as trunk:
        taps = found.features(x0)
    kept, before = (sum(t.numel() for t in saved.tensors.values()) for saved in (whole, trunk))
    assert kept - before < 1.3 * sum(tap.numel() for tap in taps)


def test_without_gradients_nothing_is_stored(metric):
    with Saved() as saved:
        distances = metric(*two())
    assert not saved.tensors and not distances.requires_grad


def test_bfloat16_is_close_and_the_sum_is_float32():
    """The gradient is steep, and sensitive to precision, if nearly all features of a pixel are 0. The network is wide
    enough that this does not happen."""
    metric, (x0, x1) = lpips(width=16), two(batch=4)
    x0.requires_grad_()
    exact = metric(x0, x1)
    (wanted,) = torch.autograd.grad(exact.sum(), x0)
    with torch.autocast("cpu", torch.bfloat16):
        distances = metric(x0, x1)
        assert torch.equal(metric(x1, x1), torch.zeros(4))
    (found,) = torch.autograd.grad(distances.sum(), x0)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, exact, rtol=0.03, atol=0)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.97


def test_compiling_breaks_no_graph_and_changes_nothing(metric):
    x0, x1 = two()
    compiled = torch.compile(copy.deepcopy(metric), backend="aot_eager", fullgraph=True)
    results = []
    for function in (metric, compiled):
        x = x0.clone().requires_grad_()
        distances = function(x, x1)
        distances.sum().backward()
        results.append((distances.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_memory_order_does_not_matter(metric):
    x0, x1 = two()
    torch.testing.assert_close(metric(x0.contiguous(memory_format=torch.channels_last), x1), metric(x0, x1))
    torch.testing.assert_close(metric(x0.mT, x1.mT), metric(x0.mT.contiguous(), x1.mT.contiguous()))
    same = x1[:1].expand_as(x1)
    torch.testing.assert_close(metric(x0, same), metric(x0, same.clone()))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (4, 16, 16), (2, 4, 3, 16), (2, 4, 16, 3), (1, 4, 16, 16)])
def test_shapes_that_do_not_fit_are_refused(metric, shape):
    good, bad = torch.zeros(2, 4, 16, 16), torch.zeros(shape)
    for x0, x1 in [(good, bad), (bad, good), *([(bad, bad)] if shape != (1, 4, 16, 16) else [])]:
        with pytest.raises(StageError) as raised:
            metric(x0, x1)
        assert "latents of shape (B, 4, H, W), H and W at least 4" in str(raised.value)
        assert f"not {tuple(x0.shape)} with {tuple(x1.shape)}" in str(raised.value)


def test_pixel_inputs_have_a_larger_minimum_size():
    found = lpips("pixels")
    with pytest.raises(StageError, match=r"pixels of shape .*, H and W at least 16"):
        found(torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32))
    assert found(torch.zeros(1, 3, 16, 32), torch.zeros(1, 3, 16, 32)) == 0


@pytest.mark.parametrize("factor, warnings", [(1.0, 0), (5.5, 1), (0.18, 1), (1.5, 0)])
def test_unscaled_latents_give_one_warning(caplog, factor, warnings):
    found, (x0, x1) = lpips(std=0.9), two()
    x1 = factor * 0.9 * x1 / x1.std()
    for _ in range(3):
        found(x0, x1)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    if warnings:
        assert f"{factor:.2f} times" in caplog.text and "scaling factor" in caplog.text


def test_a_pixel_network_does_not_warn_of_unscaled_latents(caplog):
    found, (x0, x1) = lpips("pixels"), two("pixels")
    found(x0, 0.1 * x1)
    assert not caplog.records


# --- on disk -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    vgg = trained()
    write(tmp_path, vgg, some_heads(vgg), About("latents", 4, 4, "random", std=0.9))
    return tmp_path


@pytest.mark.parametrize("space", ENDS)
def test_a_saved_network_is_loaded_unchanged(tmp_path, space):
    vgg = trained(space).to(memory_format=torch.channels_last)
    heads, about = some_heads(vgg), About(space, vgg.channels, 4, "of a test", 0.7, "cc0-1.0")
    write(tmp_path, vgg, heads, about)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, ABOUT]
    trunk, found, same = read(tmp_path)
    assert same == about and not trunk.training
    assert all(map(torch.equal, found, heads))
    assert all(torch.equal(value, vgg.state_dict()[name]) for name, value in trunk.state_dict().items())
    assert torch.equal(LPIPS.load(tmp_path)(*two(space)), LPIPS(vgg, heads, about)(*two(space)))


def test_the_network_is_frozen_and_never_in_training(folder):
    found = LPIPS.load(folder)
    before = found(*two())
    assert not any(p.requires_grad for p in found.parameters())
    assert torch.equal(found.train()(*two()), before)


def rewritten(folder, **changes):
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | changes))


def with_heads(folder, change):
    trunk, heads, about = read(folder)
    write(folder, trunk, change(heads), about)


BREAKAGES = {
    "another folder": (lambda f: (f / ABOUT).unlink(), "has no perceptual.json: it is not a perceptual network; a"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no network.safetensors: it is not a perceptual network; a"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "can be read"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:9]), "can be read"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "can be read"),
    "no JSON": (lambda f: (f / ABOUT).write_text("{"), "can be read"),
    "a list": (lambda f: (f / ABOUT).write_text("[]"), "can be read"),
    "an unknown field": (lambda f: rewritten(f, colour=1), "colour"),
    "an unknown space": (lambda f: rewritten(f, space="latent"), "latents or pixels and std above 0, not 'latent'"),
    "no deviation": (lambda f: rewritten(f, std=0), "std above 0, not 'latents' and 0"),
    "another width": (lambda f: rewritten(f, width=8), "size mismatch"),
    "other channels": (lambda f: rewritten(f, channels=16), "size mismatch"),
    "negative heads": (lambda f: with_heads(f, lambda h: [h[0] - 1, *h[1:]]), "head 0 must have 4 weights, all finite"),
    "heads of nan": (lambda f: with_heads(f, lambda h: [*h[:4], h[4] * math.nan]), "head 4 must have 32 weights"),
    "infinite heads": (lambda f: with_heads(f, lambda h: [h[0] / 0, *h[1:]]), "head 0 must have 4 weights"),
    "short heads": (lambda f: with_heads(f, lambda h: [*h[:3], h[3][:5], h[4]]), "head 3 must have 32 weights"),
    "four heads": (lambda f: with_heads(f, lambda h: h[:4]), "has no 'heads.4'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKAGES)
def test_folders_without_a_valid_perceptual_network_are_refused(folder, what):
    breakage, message = BREAKAGES[what]
    breakage(folder)
    with pytest.raises(StageError) as raised:
        LPIPS.load(folder)
    assert message in str(raised.value) and str(folder) in str(raised.value)


def test_a_path_that_is_not_a_folder_is_refused(folder):
    for path in (folder / "nowhere", folder / WEIGHTS):
        with pytest.raises(StageError, match="is not a perceptual network"):
            LPIPS.load(path)


def test_weights_in_half_precision_are_read_as_float32(folder):
    trunk, heads, about = read(folder)
    write(folder, trunk.half(), [head.half() for head in heads], about)
    expected = LPIPS(trunk.float(), [head.half().float() for head in heads], about)(*two())
    torch.testing.assert_close(LPIPS.load(folder)(*two()), expected)
