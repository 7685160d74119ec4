"""Samples and measures the parts of an evaluation on workers.

The sides are the teacher, the teacher in fewer steps, and the student. All have the same prompts and noises. A part is
a range of samples, or the real images. Its figures do not depend on the worker, so any number of workers gives the same
evaluation. Images are dropped after they are measured: only their features are kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.base import SCRATCH, Artifact, StageError
from stages.data.images.load import load
from stages.data.images.sealed import images_of
from stages.data.noise import guidance_scale_for, noise_for
from stages.data.pool import pool_of
from stages.data.prompts.table import PromptTable
from stages.data.reader import PairReader
from stages.evaluate import page
from stages.evaluate.config import EvaluationExecution
from stages.evaluate.noises import Noises
from stages.evaluate.parts import Part, write
from stages.evaluate.real import two_real_sets
from stages.metrics.protocols import DIVERSITY_IMAGES, PROTOCOLS
from stages.networks import standard
from stages.networks.compute import prepare
from stages.networks.exact import Exact
from stages.networks.probe import Classifier, batches
from stages.networks.student import Student
from stages.networks.teachers import load_network, solve
from stages.pairs import Pairs
from stages.probe import Probe
from stages.reference import Reference

if TYPE_CHECKING:
    from stages.evaluate.parts import Arrays


@dataclass(frozen=True)
class Samples:
    """Some samples of an evaluation. numbers: the samples' numbers, which determine noise, prompt and guidance scale.

    noise: (B, C, h, w) in the pairs' storage dtype. scales: (B,), or None if all have the sampler's. solved: the
    latents of the first samples, which are stored in the pairs.
    """

    numbers: list[int]
    prompts: list[str]
    noise: NDArray[np.floating]
    scales: NDArray[np.float32] | None
    solved: Tensor


Sample = Callable[[Samples, slice], Tensor]
"""Returns latents (B, C, h, w) of a slice of the samples."""


@dataclass
class Measurer:
    """Measures parts of an evaluation. It loads the networks once. Raises StageError if they do not fit together.

    student_steps: None for the student's own number of steps. guidance_scale: None for that of each pair. folder: where
    the parts are written.
    """

    pairs: Artifact
    student: Artifact | None
    student_steps: int | None
    noises: Noises
    guidance_scale: float | None
    teacher_steps: list[int]
    probe: Artifact | None
    reference: Artifact | None
    execution: EvaluationExecution
    folder: Path
    threads: int
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        prepare(self.threads)
        stage = self.pairs.stage
        assert isinstance(stage, Pairs)
        # computes in the dtype that the pairs were made with
        self.teacher = load_network(self.pairs.inputs["teacher"].folder, self.execution, dtype=stage.dtype)
        self.sampler = stage.sampler
        if self.guidance_scale:
            self.sampler = self.sampler.model_copy(update={"guidance_scale": self.guidance_scale})
        height, width = (side * self.teacher.down_sampling for side in self.teacher.latent_shape[1:])
        self.size = height, width
        self.shown = set(page.columns(self.noises.count, self.size[1]))
        self.classifier = self._probe() if self.probe else None
        self.eyes = None
        if self.reference:
            assert isinstance(self.reference.stage, Reference)
            networks = self.reference.folder / standard.FOLDER
            self.eyes = standard.Eyes(networks, PROTOCOLS[self.reference.stage.preset], self.teacher.device)
        self.sides = dict(self._teacher_sides())
        if self.student:
            network = Student.load(self.student.folder, self.teacher, self.student_steps)
            if self.teacher.dtype != torch.float32:
                network.compute_in(self.teacher.dtype)
            self.sides["student"] = self._few_steps(network)

    def __call__(self, part: Part) -> str:
        with self._busy:
            prepare(self.threads)  # the number of threads is a setting of each thread
            measure = {"samples": self._samples, "real": self._real, "prompts": self._prompts}[part.what]
            return write(self.folder, part, *measure(part))

    def _probe(self) -> Classifier:
        assert self.probe and isinstance(self.probe.stage, Probe)
        side = self.probe.stage.images.size
        if self.size != (side, side):
            raise StageError(
                f"the probe's images are {side} pixels wide, the teacher's {self.size[1]} x {self.size[0]}"
            )
        return Classifier.load(self.probe.folder, self.teacher.device)

    def _teacher_sides(self) -> Iterator[tuple[str, Sample]]:
        for steps in (self.sampler.steps, *self.teacher_steps):
            sampler = self.sampler.model_copy(update={"steps": steps})

            def ode(samples: Samples, rows: slice, sampler: Any = sampler) -> Tensor:
                scales = None if samples.scales is None else samples.scales[rows]
                found: Tensor = solve(self.teacher, samples.noise[rows], samples.prompts[rows], sampler, scales)
                return found

            yield f"teacher_{steps}", ode

    def _few_steps(self, student: Student) -> Sample:
        """Return the sampler of the student. Each sample has its own generator for noise between steps, so that results
        do not depend on the batch."""
        scale = self.sampler.guidance_scale

        def sampled(samples: Samples, rows: slice) -> Tensor:
            noise = self.teacher.to_device(samples.noise[rows])
            scales = samples.scales[rows] if samples.scales is not None else np.full(len(noise), scale, np.float32)
            generators = [torch.Generator().manual_seed(number) for number in samples.numbers[rows]]
            w = self.teacher.to_device(scales - 1)
            return student(noise, student.encode(samples.prompts[rows]), w, generators)

        return sampled

    def _samples(self, part: Part) -> tuple[Arrays, dict[str, Any]]:
        """Sample and measure all sides of a part."""
        samples = self.drawn(part)
        arrays: Arrays = {}
        seconds = {}
        full = torch.empty(0)
        for name, sampler in self.sides.items():
            latents = self.latents(name, samples)
            full = latents if not len(full) else full
            arrays[f"{name}/latent_mse"] = (latents - full).square().mean((1, 2, 3)).double().numpy()
            arrays |= self._seen(name, latents, part, samples.prompts)
            if part.start == 0:
                seconds[name] = self._seconds(sampler, samples)
        device = {"dtype": str(self.teacher.dtype).removeprefix("torch."), "device": self.teacher.device_name}
        return arrays, {"numbers": samples.numbers, "prompts": samples.prompts, "seconds": seconds, **device}

    def drawn(self, part: Part) -> Samples:
        """Read the stored noises and prompts of a part, and draw the fresh ones.

        The latents of the pairs are kept if they have the guidance scale of the evaluation."""
        return self._of(*(list(numbers) for numbers in self.noises.part(part.start, part.stop)))

    def _of(self, stored: list[int], fresh: list[int]) -> Samples:
        """Return samples by their numbers. Those of `stored` are in the pairs."""
        stage, seed, numbers = self.pairs.stage, self.pairs.seed, [*stored, *fresh]
        assert isinstance(stage, Pairs)
        noise = np.empty((len(numbers), *self.teacher.latent_shape), stage.storage_dtype)
        solved: NDArray[np.floating] = noise[:0]
        prompts: list[str] = []
        if stored:
            held = PairReader.of(self.pairs).batch(stored)
            noise[: len(stored)], solved, prompts = held.noise, held.latent, held.prompts
        if fresh:
            prompts += PromptTable(pool_of(self.pairs.folder)).of(fresh)
        for place, number in enumerate(fresh, len(stored)):
            noise[place] = noise_for(seed, number, self.teacher.latent_shape, noise.dtype)
        scale = self.sampler.guidance_scale
        scales = None
        if isinstance(scale, tuple):
            scales = np.array([guidance_scale_for(seed, number, *scale) for number in numbers])
        if scale != stage.sampler.guidance_scale:
            solved = solved[:0]
        return Samples(numbers, prompts, noise, scales, torch.from_numpy(solved).float())

    def latents(self, side: str, samples: Samples) -> Tensor:
        """Return the latents of a side (B, C, h, w), float32, on the CPU. Those that are solved already are kept."""
        known = samples.solved if side == next(iter(self.sides)) else samples.solved[:0]
        latents, size = [known], self.execution.micro_batch
        with torch.inference_mode():
            for start in range(len(known), len(samples.noise), size):
                latents.append(self.sides[side](samples, slice(start, start + size)).float().cpu())
        return torch.cat(latents)

    def _seconds(self, sampler: Sample, samples: Samples) -> float:
        """Measure the seconds for an image, without decoding, on a batch after a warm-up batch."""
        first = slice(self.execution.micro_batch)
        with torch.inference_mode():
            sampler(samples, first).cpu()
            started = time.perf_counter()
            sampler(samples, first).cpu()
        return (time.perf_counter() - started) / min(self.execution.micro_batch, len(samples.noise))

    def _seen(self, name: str, latents: Tensor, part: Part, prompts: list[str]) -> Arrays:
        """Return the measurements of the images of a side, and the images that the page shows."""
        arrays: Arrays = {}
        if isinstance(self.teacher, Exact):
            arrays[f"{name}/nearest_mse"] = self.teacher.nearest(latents).double().cpu().numpy()
        shown = [i - part.start for i in range(part.start, part.stop) if i in self.shown]
        if shown:
            arrays[f"{name}/shown"] = self.teacher.decode(latents[shown]).numpy()
        found: dict[str, list[NDArray[Any]]] = {}
        for start in range(0, len(latents), self.execution.micro_batch):
            rows = slice(start, start + self.execution.micro_batch)
            images = self.teacher.decode(latents[rows])
            for what, values in {
                **self._features(name, [images]),
                **self._standard(name, images, prompts[rows]),
            }.items():
                found.setdefault(what, []).append(values)
        return {**arrays, **{what: np.concatenate(values) for what, values in found.items()}}

    def _features(self, name: str, images: Iterable[Tensor]) -> Arrays:
        """Return the probe's features and predictions for batches of images (B, 3, H, W) in [-1, 1]."""
        if not self.classifier:
            return {}
        features, predicted = self.classifier.look(images)
        return {f"{name}/features": features, **{f"{name}/label/{k}": classes for k, classes in predicted.items()}}

    def _standard(self, name: str, images: Tensor, prompts: list[str]) -> Arrays:
        """Return the features and scores of images (B, 3, H, W) in [-1, 1] for the standard metrics."""
        if not self.eyes:
            return {}
        saved = in_bytes(images)
        found: Arrays = {f"{name}/{what}": values for what, values in self.eyes.features(saved).items()}
        scores = self.eyes.clip_scores(saved, prompts) if any(prompts) else None
        return found if scores is None else {**found, f"{name}/clip_score": scores}

    def _prompts(self, part: Part) -> tuple[Arrays, dict[str, Any]]:
        """Measure the LPIPS distance between images of one prompt, for some prompts, from new noises."""
        assert self.eyes
        table = PromptTable(pool_of(self.pairs.folder))
        first = max(self.noises.stored.stop, self.noises.fresh.stop)  # no other sample has these numbers
        distances: dict[str, list[float]] = {side: [] for side in self.sides}
        for prompt in range(part.start, min(part.stop, len(table))):
            start = first + (prompt - first) % len(table)
            samples = self._of([], [start + n * len(table) for n in range(DIVERSITY_IMAGES)])
            for side, found in distances.items():
                distance = self.eyes.diversity(in_bytes(self.teacher.decode(self.latents(side, samples))))
                found += [] if distance is None else [distance]
        return {f"{side}/lpips_diversity": np.array(found) for side, found in distances.items() if found}, {}

    def _real(self, _: Part) -> tuple[Arrays, dict[str, Any]]:
        """Measure two sets of real images that share no original, and the second set after encoding and decoding."""
        assert self.probe and isinstance(self.probe.stage, Probe)
        scratch = self.folder / SCRATCH
        unseen = load(images_of(self.probe), held_out=True, limit=self.probe.stage.limit, scratch=scratch)
        reference, other = two_real_sets(unseen, self.noises.count)
        latents = torch.cat([self.teacher.encode(x).cpu() for x in batches(other)])
        rebuilt = map(self.teacher.decode, latents.split(self.execution.micro_batch))
        arrays = {
            **self._features("reference", batches(reference)),
            **self._features("real", batches(other)),
            **self._features("vae_reconstruction", rebuilt),
            "reference/origins": reference.origins,
            "real/origins": other.origins,
            **{f"real/wanted/{name}": classes for name, classes in other.labels.items()},
        }
        if isinstance(self.teacher, Exact):
            arrays["vae_reconstruction/nearest_mse"] = self.teacher.nearest(latents).double().cpu().numpy()
        return arrays, {"captions": other.captions}


def in_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 in 0 to 255 on the CPU, as pipelines save them."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
