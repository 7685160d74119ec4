"""The worker that makes and publishes shards of pairs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.base import Artifact, StageError
from stages.data.noise import CONVENTION, guidance_scale_for, noise_for
from stages.data.pool import ShardPlan
from stages.data.prompts.table import PromptTable
from stages.data.provenance import versions
from stages.data.records import Pair
from stages.data.shards import write_shard
from stages.diffusion.config import PairsExecution, Sampler
from stages.diffusion.samplers import timesteps
from stages.networks import gaussian, teachers
from stages.networks.adapter import Adapter
from stages.networks.teachers import Dtype


@dataclass
class ShardWorker:
    """Makes shards. It loads the teacher once. One thread can write a shard while another solves the next one.

    Raises StageError if `path_timesteps` are not on the sampler's grid, or if the teacher's noise is larger than its
    latents.
    """

    teacher_artifact: Artifact
    teacher_sha256: str
    prompts_identity: str
    sampler: Sampler
    path_timesteps: list[int]
    text_embeddings: bool
    dtype: Dtype
    storage_dtype: str
    execution: PairsExecution
    pool: Path
    seed: int
    threads: int
    _solving: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._prepare()
        self.teacher = teachers.load(
            self.teacher_artifact.folder, self.execution, dtype=self.dtype, compile=self.execution.compile
        )
        self.prompts = PromptTable(self.pool)
        self.storage = np.dtype(self.storage_dtype)
        noise, latent = self.teacher.noise_shape, self.teacher.latent_shape
        if noise != latent:
            raise StageError(
                f"the teacher samples latents of shape {latent} from noise of shape {noise}, but a student takes noise "
                "of the shape of its latents; make the teacher with the larger latents the host"
            )
        grid = timesteps(len(self.teacher.schedule), self.sampler.steps, self.sampler.timestep_spacing)
        off = next((t for t in self.path_timesteps if t not in grid), None)
        if off is not None:
            raise StageError(f"path_timesteps: {off} is not a timestep of the sampler; its timesteps are {grid}")

    def __call__(self, plan: ShardPlan) -> str:
        self._prepare()
        size = self.execution.micro_batch
        with self._solving:
            started = time.monotonic()
            pairs = [
                pair
                for start in range(plan.start, plan.stop, size)
                for pair in self._solve(range(start, min(start + size, plan.stop)))
            ]
            seconds = time.monotonic() - started
        tar = self.pool / plan.place
        tar.parent.mkdir(parents=True, exist_ok=True)
        facts = {"sampler": self.sampler.model_dump(), "seed": self.seed}
        return write_shard(tar, pairs, facts, self._provenance(seconds))

    def _solve(self, indices: range) -> Iterator[Pair]:
        """Draw the noises of a batch, and its guidance scales if the sampler has a range. Solve the ODE and yield the
        pairs. Raises StageError if one is not finite."""
        teacher, scale = self.teacher, self.sampler.guidance_scale
        noise = np.stack([noise_for(self.seed, i, teacher.latent_shape, self.storage) for i in indices])
        texts = self.prompts.of(indices)
        scales = (
            np.array([guidance_scale_for(self.seed, i, *scale) for i in indices]) if isinstance(scale, tuple) else None
        )
        kept: dict[int, np.ndarray] = {}
        with teacher.inference(), np.errstate(over="ignore"):
            for t, z in teachers.trajectory(teacher, noise, texts, self.sampler, scales):
                if t == -1 or t in self.path_timesteps:
                    kept[t] = teacher.to_numpy(z).astype(self.storage)
        arrays = {"noise": noise, "latent": kept[-1]}
        if scales is not None:
            arrays["guidance_scale"] = scales
        if self.path_timesteps:
            arrays["path"] = np.stack([kept[t] for t in self.path_timesteps], axis=1)
        if self.text_embeddings:
            arrays["text_embedding"] = self._embedded(texts)
        finite = np.logical_and.reduce([np.isfinite(a).reshape(len(a), -1).all(1) for a in arrays.values()])
        if not finite.all():
            first = indices[int(np.argmin(finite))]
            raise StageError(
                f"the teacher's output for sample {first} (prompt {texts[first - indices[0]]!r}) is not finite in "
                f"{self.storage}; {int((~finite).sum())} of this batch of {len(indices)} are affected. "
                f"Check the teacher with `retort sample`, or set dtype: float32"
            )
        for row, index in enumerate(indices):
            yield Pair(index, texts[row], {name: array[row, ...] for name, array in arrays.items()})

    def _embedded(self, texts: list[str]) -> np.ndarray:
        if not isinstance(self.teacher, Adapter):
            raise StageError("text_embeddings: the teacher has no text encoder")
        return self.teacher.to_numpy(self.teacher.text_states(texts)).astype(self.storage)

    def _prepare(self) -> None:
        """Set the number of threads. Called in every thread that computes, because the setting is per thread."""
        if not (self.teacher_artifact.folder / gaussian.FILE).exists():
            from stages.networks.compute import prepare

            prepare(self.threads)

    def _provenance(self, seconds: float) -> dict[str, Any]:
        return {
            "sampler": self.sampler.model_dump(),
            "path_timesteps": self.path_timesteps,
            "dtype": self.dtype,
            "execution": {**self.execution.model_dump(), "threads": self.threads},
            "noise": CONVENTION,
            "seed": self.seed,
            "prompts": self.prompts_identity,
            "pool": self.pool.name,
            "teacher": self.teacher_artifact.fingerprint,
            "teacher_sha256": self.teacher_sha256,
            "device": self.teacher.device_name,
            "versions": versions(),
            "seconds": round(seconds, 3),
        }
