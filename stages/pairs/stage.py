"""`kind: pairs`: the pair factory. Solves the teacher's ODE from random noise and stores noise, latent and prompt.

Shard k depends only on the settings, the teacher and k. The noise of a sample depends on its number, and batches begin
at fixed samples of the shard. So a tar always has the same bytes, whichever worker makes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Artifact, Extent, Input, Neutral, Progress, Stage, StageContext, StageError
from stages.data import pool
from stages.data.files import is_temporary
from stages.data.pool import PROMPTS, ListedShard, ShardPlan, plan_shards, write_list
from stages.data.prompts.config import Prompts
from stages.data.prompts.read import read_prompts
from stages.data.prompts.vocabulary import prompt_warnings
from stages.diffusion.config import PairsExecution, Sampler, Scale
from stages.diffusion.form import Form
from stages.teacher import Teacher

if TYPE_CHECKING:
    from stages.data.records import ShardFacts

SHARD_SIZE = 128
"""Default number of samples in a shard."""


class Pairs(Stage):
    """Solves the teacher's ODE from random noises, and stores the (noise, latent, prompt) of each sample in shards.
    Several workers make shards in parallel."""

    VERSION: ClassVar[int] = 2
    PARALLEL: ClassVar[bool] = True
    kind: Literal["pairs"]
    teacher: Annotated[str, Input("teacher")] = Field(description="teacher whose ODE is solved")
    prompts: Prompts | None = Field(
        None,
        description="a path, or digits or digit_scenes for the captions of that image set; sample i takes prompt i "
        "modulo the number of prompts; leave it out for an unconditional teacher, which gets empty prompts",
    )
    count: Annotated[int, Extent()] = Field(
        ge=1, description="number of pairs; if you raise it later, full shards are reused"
    )
    shard_size: int = Field(
        SHARD_SIZE, ge=1, description="pairs in a shard; a killed worker loses the shards that it was making"
    )
    sampler: Sampler = Field(Sampler(), description="how the ODE is solved; students learn to reproduce the results")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="precision in which the network computes"
    )
    storage_dtype: Literal["float16", "float32"] = Field("float16", description="precision of the arrays in the shards")
    path_timesteps: Annotated[list[int], Neutral()] = Field(
        [], description="timesteps of the sampler's grid, in descending order, at which z_t is also stored, as path.npy"
    )
    text_embeddings: Annotated[bool, Neutral()] = Field(
        False, description="whether the text encoder's states are also stored, as text_embedding.npy"
    )
    execution: PairsExecution = Field(
        PairsExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @model_validator(mode="after")
    def _path_descends(self) -> Self:
        if self.path_timesteps != sorted(set(self.path_timesteps), reverse=True):
            raise ValueError("path_timesteps must be in descending order, each given once")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        if self.shard_size > self.count and self.shard_size != SHARD_SIZE:  # only a size that was set is refused
            yield "shard_size", f"it is {self.shard_size}, but count is only {self.count}: no shard would be full"
        if self.prompts is None and self.sampler.guidance_scale != 1:
            yield "sampler.guidance_scale", "guidance needs prompts; give prompts, or set guidance_scale: 1"

        teacher = inputs["teacher"].stage
        bridge = teacher.bridge if isinstance(teacher, Teacher) else None
        if bridge and self.path_timesteps and self.path_timesteps[0] >= bridge.switch:
            yield "path_timesteps", f"a bridge samples latents of its host only below switch: {bridge.switch}"

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Warn about the first prompts of a file. Captions of image sets are not checked: they load slowly."""
        teacher = inputs["teacher"]
        assert isinstance(teacher.stage, Teacher)
        folder = teacher.stage.known(teacher.folder)
        if not folder or not self.prompts or not self.prompts.path:
            return
        with suppress(StageError):  # the stage itself reports prompts that cannot be read
            yield from prompt_warnings(folder, [next(read_prompts(self.prompts))[: self.count]])

    def damage(self, folder: Path) -> str | None:
        return pool.damage(folder)

    def parts(self, folder: Path) -> Mapping[str, str]:
        return pool.parts(folder)

    def damaged_parts(self, folder: Path) -> Mapping[str, str]:
        from stages.data.inspection import inspect_shards

        damaged: Mapping[str, str] = inspect_shards(str(folder), deep=True)["damaged"]
        return damaged

    def discard(self, pool_folder: Path, parts: Sequence[str]) -> None:
        pool.discard(pool_folder, parts)

    def progress_in(self, work: Path, pool_folder: Path) -> str | None:
        there = pool.receipted(pool_folder)
        plans = plan_shards(self.count, self.shard_size) if there else []
        done = sum(plan.place in there for plan in plans)
        return f"{done} of {len(plans)} shards are there" if done else None

    def run(self, context: StageContext) -> Mapping[str, Any]:
        from stages.data.prompts.table import PromptTable, write_table
        from stages.pairs.factory import ShardWorker

        context.pool.mkdir(parents=True, exist_ok=True)
        for leftover in list(filter(is_temporary, context.pool.rglob(".*"))):
            leftover.unlink(missing_ok=True)  # missing if a worker that outlived its driver has just published it
        files = (context.contents.get(f"prompts.{field}") for field in ("path", "images.path"))
        prompts_identity = next(filter(None, files), f"name:{self.prompts or ''}")
        plans = plan_shards(self.count, self.shard_size)
        teacher = context.inputs["teacher"].sha256
        missing = [plan for plan in plans if _facts(context.pool / plan.place, teacher) is None]
        if missing or not (context.pool / PROMPTS).exists():
            write_table(self.prompts, context.contents, context.pool / PROMPTS)
        if missing:
            for text in prompt_warnings(
                context.inputs["teacher"].folder, PromptTable(context.pool).batches(self.count)
            ):
                context.warn(text)
        done = self.count - sum(plan.stop - plan.start for plan in missing)
        reused, started = done, time.monotonic()
        context.progress(Progress(done, self.count, "pairs"))
        make = partial(
            ShardWorker,
            teacher_artifact=context.inputs["teacher"],
            teacher_sha256=teacher,
            prompts_identity=prompts_identity,
            sampler=self.sampler,
            path_timesteps=self.path_timesteps,
            text_embeddings=self.text_embeddings,
            dtype=self.dtype,
            storage_dtype=self.storage_dtype,
            execution=self.execution,
            pool=context.pool,
            seed=context.seed,
            threads=context.threads,
        )
        for plan, _ in context.map(make, missing):
            done += plan.stop - plan.start
            rate = (done - reused) / (time.monotonic() - started)
            context.progress(Progress(done, self.count, "pairs", {"per_second": rate}))
        return _seal(context, plans, teacher, reused)


def _facts(tar: Path, teacher: str) -> ShardFacts | None:
    """Return the description of a shard if it is valid and was made by the teacher with this sha256, else None.

    A teacher that is made again may have other bytes. Pairs of two teachers must not be mixed.
    """
    from stages.data.receipts import valid_facts

    facts = valid_facts(tar)
    return facts if facts and facts.provenance.get("teacher_sha256", teacher) == teacher else None


def guidance_scales(form: Form, sources: Sequence[Artifact]) -> list[Scale]:
    """Return the guidance scales that a student learns: those of its method, or those of the pairs that it is trained
    on. A range means that the student takes the scale as an input.

    Empty if the scale is unknown.
    """
    if form.scale is not None:
        return [form.scale]
    return list(dict.fromkeys(one.stage.sampler.guidance_scale for one in sources if isinstance(one.stage, Pairs)))


def stored_scale(sources: Sequence[Artifact]) -> float | None:
    """Return the guidance scale of pairs. None: their scales were drawn from a range, so each pair stores its own.

    Of several sources, it is that of the first. Sources with and without a range are never mixed."""
    assert isinstance(sources[0].stage, Pairs)
    scale = sources[0].stage.sampler.guidance_scale
    return None if isinstance(scale, tuple) else scale


def _seal(context: StageContext, plans: list[ShardPlan], teacher: str, reused: int) -> Mapping[str, Any]:
    """Check every shard once more, write the list of shards, and return statistics from the receipts.

    Raises StageError if a shard was removed or changed.
    """
    from stages.data.statistics import Moments

    listed: list[ListedShard] = []
    moments: dict[str, list[Moments]] = {}
    for plan in plans:
        tar = context.pool / plan.place
        facts = _facts(tar, teacher)
        if facts is None:
            raise StageError(f"{tar} was removed or changed while the stage ran; resume to make it again")
        listed.append(ListedShard(tar, facts.count, facts.bytes, facts.sha256))
        for name, array in facts.arrays.items():
            moments.setdefault(name, []).append(array.moments)
    write_list(context.output, context.pool, listed)
    return {
        "count": sum(s.count for s in listed),
        "shards": len(listed),
        "reused_count": reused,
        "bytes": sum(s.bytes for s in listed),
        **{f"{name}_mean": Moments.merged(parts).mean for name, parts in moments.items()},
        **{f"{name}_std": Moments.merged(parts).std for name, parts in moments.items()},
    }
