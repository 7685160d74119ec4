"""`kind: pairs`: the pair factory. Runs the teacher's ODE from stored noise and seals what came out.

Shard k is a pure function of (settings, teacher, k): of its noise, keyed by sample, and of batches cut
at fixed places inside the shard. Whoever makes it, and however often, its tar has the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Content, Extent, Input, Progress, Stage, StageContext, StageError
from stages.data import prompts
from stages.data.pool import ListedShard, ShardPlan, intact, plan_shards, read_list, write_list
from stages.diffusion.config import PairsExecution, Sampler


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
        found = prompts.problem(self.prompts)
        if found:
            yield "prompts", found

    def damage(self, folder: Path) -> str | None:
        shards = read_list(folder)
        bad = [shard for shard in shards if not intact(shard)]
        return f"{len(bad)} of {len(shards)} shards are missing or changed, such as {bad[0].tar.name}" if bad else None

    def progress_in(self, work: Path, pool: Path) -> str | None:
        plans = plan_shards(self.count, self.shard_size)
        done = sum((pool / plan.place).with_suffix(".parquet").exists() for plan in plans)
        return f"{done} of {len(plans)} shards are there" if done else None

    def run(self, context: StageContext) -> Mapping[str, Any]:
        from stages.data import shards
        from stages.factory import ShardWorker

        context.pool.mkdir(parents=True, exist_ok=True)
        for left in context.pool.rglob(".*"):  # temporaries of a worker that was killed
            left.unlink()
        plans = plan_shards(self.count, self.shard_size)
        have = {plan: shards.valid_facts(context.pool / plan.place) for plan in plans}
        missing = [plan for plan in plans if have[plan] is None]
        done = self.count - sum(plan.stop - plan.start for plan in missing)
        reused, started = done, time.monotonic()
        context.progress(Progress(done, self.count, "pairs"))
        make = partial(
            ShardWorker,
            teacher_artifact=context.inputs["teacher"],
            prompts_source=self.prompts,
            prompts_identity=context.contents["prompts"],
            sampler=self.sampler,
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
        return _seal(context, plans, reused)


def _seal(context: StageContext, plans: list[ShardPlan], reused: int) -> Mapping[str, Any]:
    """List the shards, each checked once more, and summarise their receipts."""
    from stages.data import shards
    from stages.data.statistics import Moments

    listed: list[ListedShard] = []
    moments = {name: Moments() for name in shards.ARRAYS}
    for plan in plans:
        tar = context.pool / plan.place
        facts = shards.valid_facts(tar)
        if facts is None:
            raise StageError(f"{tar} was removed or changed while the stage ran; resume to make it again")
        listed.append(ListedShard(tar, facts.count, facts.bytes, facts.sha256))
        for name in moments:
            moments[name] = moments[name].merge(Moments(**facts.arrays[name]["moments"]))
    write_list(context.output, context.pool, listed)
    return {
        "count": sum(s.count for s in listed),
        "shards": len(listed),
        "reused_count": reused,
        "bytes": sum(s.bytes for s in listed),
        **{f"{name}_mean": m.mean for name, m in moments.items()},
        **{f"{name}_std": m.std for name, m in moments.items()},
    }
