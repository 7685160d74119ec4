"""Compares the time of E-LatentLPIPS and its augmentation with that of decoding and LPIPS, and with the public package
`elatentlpips`.

    python -m tests.benchmarks.perceptual_speed [--elatentlpips PYTHON] [--device cpu|cuda] [--batch N] [--repeats K]

Every loss is timed forward and backward in float32, with a gradient for the student's latent and none for the target's.
Each side runs in its own process. The sides take turns, so that other load of the machine slows all of them.

- Size: latents 4x64x64 of Stable Diffusion 1.5 at full width; its VAE (random weights) and `lpips` (which must be
  installed) at 512x512. Decoding takes a minute and 6 GB a sample on a small CPU: it has K // 5 turns, at least one,
  after a warm-up on smaller latents. Its operations are counted on tensors without contents.
- Augmentation: the share of the whole loss that is spent on drawing, on transforming both inputs, and on the backward
  pass through that.
- Package, with --elatentlpips: PYTHON belongs to a virtual environment that has `elatentlpips` and setuptools<81, and
  sees this environment's packages. Both get the same weights, tensors and groups, and both are frozen. The L1 term of
  the package is off. Its network for random weights is corrected (first convolution, pools). `distance` is the distance
  of both for the same inputs without augmentation.

Seconds are the median (and the minimum) of K turns after a warm-up. `cpu_seconds` are the seconds that processors
spent. With --threads 1, they are more reliable if others use the machine. Memory is the peak minus the memory after the
imports: resident memory, or allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LATENT, WIDTH, GROUPS = (4, 64, 64), 64, "bg"
SCALE = 0.18215
PLACES = ((0, 7), (7, 14), (14, 24), (24, 34), (34, 44))
"""The layers of the trunk in each of the five slices of `elatentlpips`."""
IMPORTS = {
    "pixels": ["diffusers.models.autoencoders.autoencoder_kl", "lpips", "stages.losses.decoded"],
    "latents": ["stages.losses.perceptual"],
    "package": ["elatentlpips"],
}
PARTS = ("size", "augmentation", "package")


# --- The sides: each builds its networks and returns named functions to time ---------------------------


def tensors(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's latents and the target's."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, batch, *LATENT, generator=generator).to(device)
    return x.requires_grad_(), target


def pixels(batch: int, device: str, groups: str, weights: Path) -> dict[str, Callable[[], Any]]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from lpips import LPIPS

    from stages.losses.decoded import Decoded

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=LATENT[0],
    )
    vae.encoder = vae.quant_conv = None
    distance = Decoded(lambda z: vae.decode(z / SCALE).sample, LPIPS(net="vgg", pnet_rand=True, verbose=False))
    parts = nn.ModuleList([vae, distance]).eval().requires_grad_(False).to(device)

    def loss(side: int = LATENT[1], place: str = device) -> None:
        x, target = (latent[..., :side, :side].detach().to(place) for latent in tensors(batch, device))
        distance(x.requires_grad_(), target).mean().backward()

    def operations() -> int:
        parts.to("meta")
        return counted(lambda: loss(place="meta"))

    return {"warm": lambda: loss(side=16), "loss": loss, "operations": operations}


def latents(batch: int, device: str, groups: str, weights: Path) -> dict[str, Callable[[], Any]]:
    from stages.losses.augmentation import Augmentation
    from stages.losses.perceptual import PerceptualLoss
    from stages.networks.perceptual import LPIPS

    augment = Augmentation(groups)
    distance = PerceptualLoss(LPIPS.load(weights), augment).to(device)
    x, target = tensors(batch, device)
    gradient = torch.randn_like(x)

    def loss() -> None:
        x.grad = None
        distance(x, target).mean().backward()

    def augmentation() -> None:
        x.grad = None
        draw = augment.draw(x)
        augment(target, draw)
        augment(x, draw).backward(gradient)

    return {
        "warm": loss,
        "loss": loss,
        "augmentation": augmentation,
        "operations": lambda: counted(loss),
        "distance": lambda: distance.metric(x, target).tolist(),
    }


def package(batch: int, device: str, groups: str, weights: Path) -> dict[str, Callable[[], Any]]:
    from elatentlpips import ELatentLPIPS
    from safetensors.torch import load_file

    distance = ELatentLPIPS(pretrained=False, pnet_rand=True, encoder="sd15", augment=groups, verbose=False)
    distance.net.slice1[0] = nn.Conv2d(LATENT[0], WIDTH, 3, padding=1)
    for number, pool in ((1, "6"), (2, "13"), (3, "23")):
        setattr(getattr(distance.net, f"slice{number}"), pool, nn.Identity())
    loaded = load_file(weights / "network.safetensors")
    renamed = {name: value for name, value in distance.state_dict().items() if name.startswith("augment.")}
    for name, value in loaded.items():
        kind, place, *rest = name.split(".")
        if kind == "heads":
            for published in (f"lin{place}", f"lins.{place}"):
                renamed[f"{published}.model.1.weight"] = value.reshape(1, -1, 1, 1)
        else:
            number = next(k for k, (start, end) in enumerate(PLACES, 1) if start <= int(place) < end)
            renamed[".".join([f"net.slice{number}", place, *rest])] = value
    distance.load_state_dict(renamed)
    distance.eval().requires_grad_(False).to(device)
    x, target = tensors(batch, device)

    def loss() -> None:
        x.grad = None
        distance(x, target, add_l1_loss=False).mean().backward()

    def plain() -> Any:
        return distance(x, target, add_l1_loss=False, ensembling=False).flatten().tolist()

    return {"warm": loss, "loss": loss, "operations": lambda: counted(loss), "distance": plain}


SIDES = {"pixels": pixels, "latents": latents, "package": package}


def counted(function: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions, matrix products and attention: two for a product and its sum."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# --- A side in its own process: it reads a line for each request and answers with a line ---------------


def serve(side: str, batch: int, device: str, groups: str, weights: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # so that output of libraries is not read as an answer
    for name in IMPORTS[side]:
        importlib.import_module(name)
    torch.manual_seed(0)
    before = memory(device)
    asked = SIDES[side](batch, device, groups, weights)
    forget_peak(device)
    asked["warm"]()
    for line in map(str.strip, sys.stdin):
        synchronise(device)
        started, busy = time.perf_counter(), time.process_time()
        result = peak(device) - before if line == "memory" else asked[line]()
        synchronise(device)
        seconds = (time.perf_counter() - started, time.process_time() - busy)
        print(json.dumps({"seconds": seconds, "result": result}), file=answers, flush=True)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else status_of("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_of("VmHWM")


def forget_peak(device: str) -> None:
    """Reset the memory peak, which was reached while the networks were built."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def status_of(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Side:
    """A side that runs in its own process, as seen from this process."""

    def __init__(self, side: str, batch: int, settings: argparse.Namespace, groups: str = GROUPS) -> None:
        python = settings.elatentlpips if side == "package" else sys.executable
        words = ["--side", side, "--batch", batch, "--device", settings.device, "--groups", groups]
        words += ["--threads", settings.threads, "--weights", settings.weights]
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "tests.benchmarks.perceptual_speed", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def ask(self, what: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with exit code {self._process.wait()}, asked for {what}")
        answer = json.loads(line)
        self.seconds.setdefault(what, []).append(answer["seconds"])
        return answer["result"]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


# --- What is measured ---------------------------------------------------------------------------------


def row(what: str, side: Side, batch: int, asked: str = "loss") -> dict[str, Any]:
    """Return the seconds of a timed function, and for a whole loss also its memory and operations."""
    wall, cpu = zip(*side.seconds[asked], strict=True)
    found = {"what": what, "batch": batch, "seconds": statistics.median(wall), "least": min(wall)}
    found["cpu_seconds"] = statistics.median(cpu)
    if asked == "loss":
        found |= {"megabytes": side.ask("memory") / 1e6, "gflop": side.ask("operations") / 1e9}
    return found


def ratio(what: str, above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    shared = [name for name in above if name in below and name not in ("what", "batch")]
    return {"what": what, "batch": above["batch"]} | {name: above[name] / below[name] for name in shared}


def size(settings: argparse.Namespace) -> list[dict[str, Any]]:
    batch, turns = settings.batch, max(1, settings.repeats // 5)
    with Side("pixels", batch, settings) as decoded, Side("latents", batch, settings) as latent:
        for turn in range(turns + 1):
            for _ in range(settings.repeats):
                latent.ask("loss")
            if turn < turns:
                decoded.ask("loss")
        rows = [row("decode + LPIPS", decoded, batch), row("E-LatentLPIPS, bg", latent, batch)]
    return [*rows, ratio("  times", *rows)]


def augmentation(settings: argparse.Namespace) -> list[dict[str, Any]]:
    rows, batch = [], settings.batch
    for groups in ("bg", "bgco"):
        with Side("latents", batch, settings, groups) as side:
            for _ in range(settings.repeats):
                side.ask("loss")
                side.ask("augmentation")
            whole = row(f"E-LatentLPIPS, {groups}", side, batch)
            alone = row(f"  its augmentation, {groups}", side, batch, "augmentation")
        rows += [whole, alone, ratio("  share", alone, whole)]
    return rows


def against_package(settings: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 8):
        with Side("package", batch, settings) as theirs, Side("latents", batch, settings) as ours:
            for _ in range(settings.repeats):
                theirs.ask("loss")
                ours.ask("loss")
            pair = [row("elatentlpips, bg", theirs, batch), row("E-LatentLPIPS, bg", ours, batch)]
            for found, side in zip(pair, (theirs, ours), strict=True):
                found["distance"] = side.ask("distance")[0]
        rows += [*pair, ratio("  times", *pair)]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["what", "batch", "seconds", "least", "cpu_seconds", "megabytes", "gflop", "distance"]
    lines = [columns, *([cell(found.get(name)) for name in columns] for found in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.rjust(width) for text, width in zip(line, widths, strict=True)][1:] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *rest]) for line, rest in zip(lines, padded, strict=True))


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elatentlpips", metavar="PYTHON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="of size and augmentation; the package is given 1 and 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", action="store_true")
    for name, kind in (("--side", str), ("--groups", str), ("--weights", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.side:
        serve(settings.side, settings.batch, settings.device, settings.groups, settings.weights)
        return
    measure = {"size": size, "augmentation": augmentation} | (
        {"package": against_package} if settings.elatentlpips else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        settings.weights = Path(folder)
        write_weights(settings.weights)
        rows = [found for part in settings.parts if part in measure for found in measure[part](settings)]
    about = {"device": device_name(settings.device), "threads": settings.threads, "torch": torch.__version__}
    print(json.dumps(about | {"rows": rows}) if settings.json else f"{about}\n{table(rows)}")


def write_weights(folder: Path) -> None:
    """Write a random network, which all sides read."""
    from stages.networks.perceptual import About, write
    from stages.networks.vgg import VGG

    torch.manual_seed(0)
    trunk = VGG(LATENT[0], WIDTH)
    heads = [torch.rand(channels) for channels in trunk.tap_channels]
    write(folder, trunk, heads, About("latents", LATENT[0], WIDTH, "of a benchmark"))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
