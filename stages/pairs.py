"""`kind: pairs`: the pair factory. Runs the teacher's ODE from stored noise and seals what came out.

Shard k is a pure function of (settings, teacher, k): of its noise, keyed by sample, and of batches cut
at fixed places inside the shard. Whoever makes it, and however often, its tar has the same bytes.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Content, Execution, Extent, Input, Progress, Stage, StageContext, StageError
from stages.diffusion.config import Sampler

if TYPE_CHECKING:
    from stages.data.pool import ListedShard, ShardPlan
    from stages.data.records import Pair


class PairsExecution(Execution):
    micro_batch: int = Field(64, ge=1, description="samples solved at once; guidance doubles what the network sees")
    compile: bool = Field(False, description="torch.compile the network")


class Pairs(Stage):
    VERSION: ClassVar[int] = 1
    PARALLEL: ClassVar[bool] = True
    kind: Literal["pairs"]
    teacher: Annotated[str, Input("teacher")]
    prompts: Annotated[str, Content(names=("digits",))]
    count: Annotated[int, Field(ge=1), Extent()]
    shard_size: int = Field(128, ge=1)
    sampler: Sampler = Sampler()
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="what the network computes in")
    storage_dtype: Literal["float16", "float32"] = "float16"
    execution: PairsExecution = PairsExecution()

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        from stages.data.prompts import problem

        found = problem(self.prompts)
        if found:
            yield "prompts", found

    def damage(self, folder: Path) -> str | None:
        from stages.data.pool import intact, read_list

        shards = read_list(folder)
        bad = [shard for shard in shards if not intact(shard)]
        return f"{len(bad)} of {len(shards)} shards are missing or changed, such as {bad[0].tar.name}" if bad else None

    def progress_in(self, work: Path, pool: Path) -> str | None:
        from stages.data.pool import plan_shards

        plans = plan_shards(self.count, self.shard_size)
        done = sum((pool / plan.place).with_suffix(".parquet").exists() for plan in plans)
        return f"{done} of {len(plans)} shards are there" if done else None

    def run(self, context: StageContext) -> Mapping[str, Any]:
        from stages.data import pool, shards

        context.pool.mkdir(parents=True, exist_ok=True)
        for left in context.pool.rglob(".*"):  # temporaries of a worker that was killed
            left.unlink()
        plans = pool.plan_shards(self.count, self.shard_size)
        have = {plan: shards.valid_facts(context.pool / plan.place) for plan in plans}
        missing = [plan for plan in plans if have[plan] is None]
        done = self.count - sum(plan.stop - plan.start for plan in missing)
        reused, started = done, time.monotonic()
        context.progress(Progress(done, self.count, "pairs"))
        make = partial(
            ShardWorker,
            self,
            context.inputs["teacher"],
            context.contents["prompts"],
            context.pool,
            context.seed,
            context.threads,
        )
        for plan, _ in context.map(make, missing):
            done += plan.stop - plan.start
            rate = (done - reused) / (time.monotonic() - started)
            context.progress(Progress(done, self.count, "pairs", {"per_second": rate}))
        return _seal(context, plans, reused)


def _seal(context: StageContext, plans: list[ShardPlan], reused: int) -> Mapping[str, Any]:
    """List the shards, each checked once more, and summarise their receipts."""
    from stages.data import pool, shards
    from stages.data.statistics import Moments

    listed: list[ListedShard] = []
    moments = {name: Moments() for name in shards.ARRAYS}
    for plan in plans:
        tar = context.pool / plan.place
        facts = shards.valid_facts(tar)
        if facts is None:
            raise StageError(f"{tar} was removed or changed while the stage ran; resume to make it again")
        listed.append(pool.ListedShard(tar, facts.count, facts.bytes, facts.sha256))
        for name in moments:
            moments[name] = moments[name].merge(Moments(**facts.arrays[name]["moments"]))
    pool.write_list(context.output, context.pool, listed)
    return {
        "count": sum(s.count for s in listed),
        "shards": len(listed),
        "reused_count": reused,
        "bytes": sum(s.bytes for s in listed),
        **{f"{name}_mean": m.mean for name, m in moments.items()},
        **{f"{name}_std": m.std for name, m in moments.items()},
    }


@dataclass
class ShardWorker:
    """Makes shards. The teacher is loaded once; while one thread writes a shard another may solve the next."""

    config: Pairs
    teacher_artifact: Artifact
    prompts_identity: str
    pool: Path
    seed: int
    threads: int
    _solving: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        import numpy as np

        from stages.data import prompts
        from stages.networks import teachers

        self._prepare()
        config = self.config
        self.teacher = teachers.load(
            self.teacher_artifact.folder,
            config.execution,
            dtype=config.dtype,
            compile=config.execution.compile,
        )
        self.prompts = prompts.load(config.prompts, self.prompts_identity)
        self.storage = np.dtype(config.storage_dtype)

    def __call__(self, plan: ShardPlan) -> str:
        from stages.data import shards

        self._prepare()
        with self._solving:
            started = time.monotonic()
            pairs = [
                pair
                for start in range(plan.start, plan.stop, self.config.execution.micro_batch)
                for pair in self._solve(range(start, min(start + self.config.execution.micro_batch, plan.stop)))
            ]
            seconds = time.monotonic() - started
        tar = self.pool / plan.place
        tar.parent.mkdir(parents=True, exist_ok=True)
        sampler = self.config.sampler.model_dump()
        return shards.write_shard(tar, pairs, {"sampler": sampler, "seed": self.seed}, self._provenance(seconds))

    def _solve(self, indices: range) -> Iterator[Pair]:
        """One batch: noise, the ODE, and out again. Raises StageError if the teacher's output is not finite."""
        import numpy as np

        from stages.data.noise import noise_for
        from stages.data.records import Pair
        from stages.networks.teachers import solve

        sampler, teacher = self.config.sampler, self.teacher
        noise = np.stack([noise_for(self.seed, i, teacher.latent_shape, self.storage) for i in indices])
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        with teacher.inference():
            solved = solve(teacher, noise, prompts, sampler)
        with np.errstate(over="ignore"):
            latents = teacher.to_numpy(solved).astype(self.storage)
        finite = np.isfinite(latents).reshape(len(latents), -1).all(1)
        if not finite.all():
            first = indices[int(np.argmin(finite))]
            raise StageError(
                f"the teacher's output for sample {first} (prompt {prompts[first - indices[0]]!r}) is not finite in "
                f"{self.storage}; {int((~finite).sum())} of this batch of {len(indices)} are affected. "
                f"Check the teacher with `retort sample`, or use dtype: float32"
            )
        for row, index in enumerate(indices):
            yield Pair(index, prompts[row], noise[row], latents[row])

    def _prepare(self) -> None:
        """In every thread that computes: a thread pool's setting belongs to the calling thread."""
        if (self.teacher_artifact.folder / "unet").exists():
            from stages.networks.compute import prepare

            prepare(self.threads)

    def _provenance(self, seconds: float) -> dict[str, Any]:
        from stages.data.noise import CONVENTION

        return {
            "sampler": self.config.sampler.model_dump(),
            "dtype": self.config.dtype,
            "execution": {**self.config.execution.model_dump(), "threads": self.threads},
            "noise": CONVENTION,
            "seed": self.seed,
            "prompts": self.prompts_identity,
            "pool": self.pool.name,
            "teacher": self.teacher_artifact.fingerprint,
            "device": self.teacher.device_name,
            "versions": versions(),
            "seconds": round(seconds, 3),
        }


def versions() -> dict[str, str]:
    """Of what may change a result."""
    from importlib.metadata import version

    names = ("retort", "torch", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
