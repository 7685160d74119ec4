"""Importing published E-LatentLPIPS weights, tested with random weights in the published layout."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.vgg import make_layers

from stages.base import StageError
from stages.networks.perceptual import LPIPS, WEIGHTS
from stages.perceptual.importing import import_weights
from tests.support.cli import retort

WIDTH = 4
SLICES = ((0, 7), (7, 14), (14, 24), (24, 34), (34, 44))
HEAD = "model.1.weight"


def latent_vgg(channels):
    """Return a narrow vgg16_bn of torchvision, changed for latents as its publisher did, with random weights."""
    stock = (64, 64, "M", 128, 128, "M", *(256, 256, 256, "M"), *(512, 512, 512, "M"), *(512, 512, 512, "M"))
    features = make_layers([x if x == "M" else x * WIDTH // 64 for x in stock], batch_norm=True)
    features[0] = nn.Conv2d(channels, WIDTH, 3, padding=1)
    pools = [place for place, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    for place in pools[:3]:
        features[place] = nn.Identity()
    torch.manual_seed(channels)
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return features.eval()


def published(features):
    """The layout of NAME_latest_vgg16_tuned.pth: slices of the trunk, and each head twice."""
    tensors = {}
    for number, (start, end) in enumerate(SLICES, 1):
        for place in range(start, end):
            for name, value in features[place].state_dict().items():
                tensors[f"net.slice{number}.{place}.{name}"] = value
    heads = [torch.rand(1, factor * WIDTH, 1, 1) for factor in (1, 2, 4, 8, 8)]
    return (
        tensors
        | {f"lin{k}.{HEAD}": head for k, head in enumerate(heads)}
        | {f"lins.{k}.{HEAD}": head for k, head in enumerate(heads)}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The path of a checkpoint, its tensors, and the network that they belong to."""
    features = latent_vgg(4)
    path, tensors = tmp_path_factory.mktemp("published") / "sd15_latest_vgg16_tuned.pth", published(features)
    torch.save(tensors, path)
    return path, tensors, features


@pytest.mark.parametrize("channels", [4, 16])
def test_features_equal_those_of_torchvisions_network(channels, tmp_path):
    features = latent_vgg(channels)
    tensors = published(features)
    torch.save(tensors, tmp_path / "mine.pth")
    import_weights(tmp_path / "mine.pth", tmp_path / "out")
    network, x, y = LPIPS.load(tmp_path / "out"), *torch.randn(2, 2, channels, 16, 16)
    expected = torch.zeros(2)
    with torch.no_grad():
        f0, f1 = x, y
        for k, (start, end) in enumerate(SLICES):
            f0, f1 = features[start:end](f0), features[start:end](f1)
            torch.testing.assert_close(network.features(x)[k], f0, rtol=1e-4, atol=1e-5)
            unit0, unit1 = (f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in (f0, f1))
            expected += (tensors[f"lins.{k}.{HEAD}"] * (unit0 - unit1).square()).sum(1).mean((1, 2))
        torch.testing.assert_close(network(x, y), expected, rtol=1e-4, atol=1e-5)


def test_import_weights_writes_a_folder_with_its_source_and_licence(checkpoint, tmp_path):
    path, tensors, features = checkpoint
    out = tmp_path / "new" / "sd15"
    done = retort("import-weights", path, out)
    assert done.returncode == 0 and str(out) in done.stdout and "cc-by-nc-4.0" in done.stdout, done.stderr
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "network.safetensors", "perceptual.json"]
    about = json.loads((out / "perceptual.json").read_text())
    trunk = about.pop("trunk")
    assert re.fullmatch(r"elatentlpips, sd15_latest_vgg16_tuned.pth, sha256 [0-9a-f]{64}", trunk)
    assert (about.pop("licence"), about.pop("images")) == ("cc-by-nc-4.0", "imagenet")
    assert about == {"space": "latents", "channels": 4, "width": WIDTH, "std": 1.0}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    assert "https://github.com/mingukkang/elatentlpips" in card and trunk.split()[-1] in card
    assert "latents of Stable Diffusion 1.5: z * 0.18215" in card
    written = load_file(out / WEIGHTS)
    for name, value in features.state_dict().items():
        assert torch.equal(written.pop(f"features.{name}"), value), name
    for k in range(5):
        assert torch.equal(written.pop(f"heads.{k}"), tensors[f"lins.{k}.{HEAD}"].flatten())
    assert not written
    again = retort("import-weights", path, out)
    assert again.returncode == 2 and "already exists" in again.stderr


def test_without_internet_the_error_names_the_file_to_download(tmp_path):
    done = retort("import-weights", "flux", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    url = "https://huggingface.co/Mingguksky/elatentlpips/resolve/main/elatentlpips_ckpt/flux_latest_vgg16_tuned.pth"
    assert "flux cannot be downloaded" in done.stderr and url in done.stderr
    done = retort("import-weights", "sd1.5", tmp_path / "out")
    assert done.returncode == 2 and "did you mean 'sd15'?" in done.stderr
    assert not (tmp_path / "out").exists()


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


def reshaped(name, *shape):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


REFUSALS = {
    "a head is missing": (without("lins.3."), "it lacks lins.3.model.1.weight"),
    "a block is missing": (without("slice4"), "it lacks net.slice4.24.bias, net.slice4.24.weight and 19 more"),
    "unexpected": (lambda t: t | {"augment.p": torch.ones(1)}, "it has augment.p, which were not expected"),
    "other layout": (
        lambda t: {k.replace("net.slice1.", "features."): v for k, v in t.items()},
        "expected net.slice1.0.weight and other tensors net.* and lins.*, found features.0.bias",
    ),
    "stock vgg16_bn": (
        reshaped("net.slice1.0.weight", WIDTH, 3, 3, 3),
        "has shape (4, 3, 3, 3); expected (64, C, 3, 3), where C is the number of latent channels, 4 or 16",
    ),
    "wrong shape": (
        lambda t: t | {"net.slice2.7.weight": torch.zeros(8, 4, 1, 1), "net.slice2.7.bias": torch.zeros(9)},
        "net.slice2.7.bias has shape (9,), expected (8,); 1 more have a wrong shape",
    ),
    "negative": (reshaped("lins.2.model.1.weight", 1, 16, 1, 1), None),
    "classifier": (lambda t: {"state_dict": t, "best_acc1": 69.9}, "these have no calibrated heads; expected NAME"),
    "a list": (lambda t: list(t.values()), "holds no mapping of names to tensors"),
    "an object": (lambda t: t | {"made": Exception("x")}, "holds more than tensors"),
    "a number": (lambda t: t | {"made": 3}, "holds more than tensors: made; expected only tensors"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_checkpoints_are_refused_and_no_files_are_left(case, checkpoint, tmp_path):
    change, words = REFUSALS[case]
    tensors = change(checkpoint[1])
    if case == "negative":
        tensors["lins.2.model.1.weight"][0, 3], words = -0.1, "lins.2 has weights that are negative or not finite"
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(StageError, match=re.escape(words)) as refused:
        import_weights(tmp_path / "other.pth", tmp_path / "out")
    assert str(refused.value).startswith(str(tmp_path / "other.pth")) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["other.pth"]


class _Writes:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code_is_refused(checkpoint, tmp_path):
    torch.save(checkpoint[1] | {"made": _Writes(str(tmp_path / "ran"))}, tmp_path / "other.pth")
    with pytest.raises(StageError, match="holds more than tensors"):
        import_weights(tmp_path / "other.pth", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["other.pth"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None])
def test_damaged_checkpoints_are_refused(content, checkpoint, tmp_path):
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint[0].read_bytes()[:4000] if content is None else content)
    with pytest.raises(StageError, match="cannot be read"):
        import_weights(damaged, tmp_path / "out")


def test_a_failed_write_leaves_no_files(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        import_weights(checkpoint[0], tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("")
    with pytest.raises(OSError):
        import_weights(checkpoint[0], tmp_path / "full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "kept.txt"]
