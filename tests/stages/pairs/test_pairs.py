"""Making pairs: their distribution, reproducible bytes, and recovery from faults."""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.engines import InlineEngine
from pipeline.errors import StageFailed
from stages.base import Execution
from stages.data import receipts
from stages.data.files import sha256_of
from stages.data.images.config import Digits
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.data.records import ShardFacts
from tests.support.cli import ROOT, command, retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of

SLOW = GAUSSIAN.replace("delay: 0.0", "delay: 0.015")


def hashes(pool: Path) -> dict[str, str]:
    return {str(tar.relative_to(pool)): sha256_of(tar) for tar in sorted(pool.rglob("*.tar"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, str]:
    """Hashes of every tar of SLOW, made by the inline engine without interruption."""
    return hashes(execute(SLOW, tmp_path_factory.mktemp("whole"))["pairs"].pool)


def test_latents_follow_the_linear_map_of_ddim(tmp_path):
    """Regressing latents on noise gives the mean and the product of DDIM's factors (methods.md 0.2 and 1)."""
    text = GAUSSIAN.replace("count: 40", "count: 64\n    storage_dtype: float32")
    plan = execute(text, tmp_path)
    reader = PairReader(read_list(plan["pairs"].artifact.folder))
    batch = reader.batch(range(64))
    slope, intercept = np.polyfit(batch.noise.ravel(), batch.latent.ravel(), 1)

    from stages.diffusion.samplers import timesteps
    from stages.diffusion.schedule import NoiseSchedule

    schedule, std, mean = NoiseSchedule.stable_diffusion(), 0.6, 0.5
    points = [schedule.at(t) for t in [*timesteps(1000, 10), -1]]
    vectors = [np.array([alpha * std, sigma]) for alpha, sigma in points]
    product = np.prod([s @ t / (t @ t) for t, s in itertools.pairwise(vectors)])
    assert slope == pytest.approx(product, rel=1e-4)
    assert intercept == pytest.approx(mean - product * points[0].alpha * mean, rel=1e-4)
    np.testing.assert_allclose(batch.latent, slope * batch.noise + intercept, atol=1e-4)


def test_stored_noise_gives_the_stored_latents_again(tiny):
    """Solving again from the stored float16 noise gives the stored latents, bit for bit."""
    from stages.networks import teachers
    from stages.networks.compute import prepare

    _, plan = tiny
    pairs = plan["pairs"].artifact
    prepare(
        pairs.stage.execution.threads
    )  # the number of threads decides the last bits, and another test may have changed it
    reader = PairReader(read_list(pairs.folder))
    teacher = teachers.load(pairs.inputs["teacher"].folder, Execution(device="cpu"))
    held = reader.batch(range(32, 48))
    assert held.prompts == [list(Digits().captions())[i % 60] for i in range(32, 48)]
    with teacher.inference():
        again = teachers.solve(teacher, held.noise, held.prompts, pairs.stage.sampler)
    np.testing.assert_array_equal(teacher.to_numpy(again).astype(np.float16), held.latent)


def test_raising_the_count_reuses_every_full_shard(tmp_path):
    first = execute(GAUSSIAN, tmp_path)["pairs"]
    assert sorted(hashes(first.pool)) == ["00000.tar", "00001.tar", "tail-8/00002.tar"]
    before = {p: p.stat().st_mtime_ns for p in first.pool.rglob("*.parquet")}
    more = execute(GAUSSIAN, tmp_path, ["stages.pairs.count=64"])["pairs"]
    assert more.artifact.record["metrics"]["reused_count"] == 32
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert [s.count for s in read_list(more.artifact.folder)] == [16] * 4
    assert [s.count for s in read_list(first.artifact.folder)] == [16, 16, 8]


class CountingFacts(InlineEngine):
    """Counts the shard records in memory when the work begins."""

    found = -1

    def map(self, *arguments):
        self.found = sum(type(thing) is ShardFacts for thing in gc.get_objects())
        yield from super().map(*arguments)


def test_a_waiting_driver_keeps_no_shard_records_in_memory(tmp_path):
    execute(GAUSSIAN, tmp_path)
    gc.collect()
    before = sum(type(thing) is ShardFacts for thing in gc.get_objects())
    engine = CountingFacts()
    execute(GAUSSIAN, tmp_path, ["stages.pairs.count=64"], engine)
    assert engine.found == before


def test_receipts_record_how_shards_were_made(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)
    facts = receipts.read_facts(plan["pairs"].pool / "00000.parquet")
    assert facts.provenance["teacher"] == plan["teacher"].artifact.fingerprint
    assert facts.provenance["sampler"]["steps"] == 10
    assert facts.provenance["execution"]["micro_batch"] == 8
    assert {"noise", "dtype", "device", "versions", "seconds", "seed"} <= set(facts.provenance)


def solving(pool: Path) -> bool:
    return pool.exists()


def one_shard_done(pool: Path) -> bool:
    return (pool / "00000.parquet").exists()


def second_shard_done(pool: Path) -> bool:
    return (pool / "00001.parquet").exists()


def writing(pool: Path) -> bool:
    """A temporary of a shard or of its receipt."""
    return any(pool.glob(".0000*"))


def tar_without_receipt(pool: Path) -> bool:
    return any(not tar.with_suffix(".parquet").exists() for tar in pool.glob("0000*.tar"))


@pytest.mark.parametrize("moment", [solving, one_shard_done, writing, tar_without_receipt, second_shard_done])
def test_a_driver_killed_at_any_moment_is_resumed_to_the_same_bytes(tmp_path, moment, uninterrupted):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(SLOW)
    store = tmp_path / "store"
    pool = plan_of(SLOW, store)["pairs"].pool
    process = subprocess.Popen(
        command("submit", manifest, "--store", store, "--engine", "inline"),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not moment(pool) and process.poll() is None:
        pass  # without sleeping: some of the moments last for a few milliseconds
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (pool / "tail-8" / "00002.parquet").exists()
    done = retort("resume", "gaussian", "--store", store, "--engine", "inline")
    assert done.returncode == 0, done.stderr
    assert hashes(pool) == uninterrupted
    assert not list(pool.rglob(".*"))


def test_a_truncated_shard_is_made_again(tmp_path, uninterrupted):
    plan = execute(SLOW, tmp_path)["pairs"]
    tar = plan.pool / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    execute(SLOW, tmp_path)
    assert hashes(plan.pool) == uninterrupted


@pytest.fixture
def broken_teacher(tiny, tmp_path) -> Path:
    """A real diffusers folder whose U-Net has one NaN in its last layer."""
    _, plan = tiny
    folder = tmp_path / "broken"
    shutil.copytree(plan["teacher"].artifact.folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] = np.full_like(tensors["conv_out.bias"], np.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def test_a_teacher_that_yields_nan_fails_with_one_sentence(broken_teacher, tmp_path):
    text = GAUSSIAN.replace("gaussian: {mean: 0.5, std: 0.6, shape: [2, 4, 4], delay: 0.0}", f"from: {broken_teacher}")
    with pytest.raises(StageFailed, match=r"shard 00000: the teacher's output for sample 0 \(prompt 'a red"):
        execute(text.replace("steps: 10", "steps: 2"), tmp_path / "store")
    pool = tmp_path / "store" / "pairs" / "pool"
    assert not list(pool.rglob("*.parquet")) and not list(pool.rglob("*.tar"))


def test_an_unwritable_store_gives_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    manifest = tmp_path / "m.yaml"
    manifest.write_text(GAUSSIAN)
    done = retort("submit", manifest, "--store", tmp_path / "file" / "store", "--engine", "inline")
    assert done.returncode == 2
    assert done.stderr.startswith("retort: store ") and "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_gives_one_sentence_and_exit_code_1_and_can_be_resumed(tmp_path, uninterrupted):
    """The disk is a real file system of 96 KB, in its own mount namespace."""
    manifest = tmp_path / "m.yaml"
    manifest.write_text(SLOW)
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = " ".join(map(str, command("submit", manifest, "--store", disk, "--engine", "inline")))
    again = " ".join(map(str, command("resume", "gaussian", "--store", disk, "--engine", "inline")))
    script = (
        f"mount -t tmpfs -o size=96k none {disk} && {inside}; echo code $?; ls -A {disk}/pairs/pool/*; "
        f"mount -o remount,size=10m {disk} && {again}; echo code $?; sha256sum {disk}/pairs/pool/*/*.tar"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "code 1\n" in done.stdout and "code 0\n" in done.stdout, done.stdout + done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert all(sha in done.stdout for name, sha in uninterrupted.items() if "tail" not in name)


def test_stats_describe_the_dataset_and_its_damage(tmp_path):
    plan = execute(GAUSSIAN, tmp_path)["pairs"]
    done = retort("stats", plan.artifact.folder, "--json", "--deep")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["count"] == 40 and found["shards"] == 3
    assert found["prompts"]["distinct"] == 40 and found["repeated_noises"] == 0 and found["damaged"] == {}
    assert found["arrays"]["noise"]["std"] == pytest.approx(1.0, abs=0.05)
    assert found["provenance"]["sampler"]["steps"] == 10
    assert "repeated noises" in retort("stats", plan.pool).stdout
    tar = plan.pool / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[-3000] ^= 1
    tar.write_bytes(content)
    assert retort("stats", plan.artifact.folder).returncode == 0
    done = retort("stats", plan.artifact.folder, "--deep")
    assert done.returncode == 1 and "00001.tar: corrupt: its content is not what the receipt says" in done.stdout
    done = retort("stats", tmp_path / "nothing")
    assert done.returncode == 2 and "nothing does not exist" in done.stderr
    done = retort("stats", ROOT / "manifests")
    assert done.returncode == 2 and "holds no shards" in done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_solvers_state_is_float32_even_in_half_precision(tiny, dtype):
    """The solver starts from the stored noise. Only the network rounds, not the solver."""
    import torch

    from stages.networks import teachers

    pairs = tiny[1]["pairs"].artifact
    folder = pairs.inputs["teacher"].folder
    held = PairReader(read_list(pairs.folder)).batch(range(8))
    exact, half = (teachers.load(folder, Execution(device="cpu"), dtype=d) for d in ("float32", dtype))
    assert half.network.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(half.to_numpy(half.to_device(held.noise)), held.noise.astype(np.float32))
    with half.inference():
        a, b = (teachers.solve(t, held.noise, held.prompts, pairs.stage.sampler) for t in (exact, half))
    assert b.dtype == torch.float32
    error = float((a - b).square().mean() ** 0.5)
    assert 0 < error < {"float16": 5e-3, "bfloat16": 5e-2}[dtype]


def test_a_compiled_network_gives_the_same_latents(tiny):
    from stages.networks import teachers

    pairs = tiny[1]["pairs"].artifact
    folder = pairs.inputs["teacher"].folder
    held = PairReader(read_list(pairs.folder)).batch(range(4))
    plain, compiled = (teachers.load(folder, Execution(device="cpu"), compile=c) for c in (False, True))
    with plain.inference():
        a, b = (teachers.solve(t, held.noise, held.prompts, pairs.stage.sampler) for t in (plain, compiled))
    np.testing.assert_allclose(b.numpy(), a.numpy(), atol=1e-3)


def test_a_shard_made_again_with_other_bytes_is_sealed_again(tmp_path):
    """This happens after the repair of another artifact on other hardware. Readers refuse the shard until it is sealed
    again."""
    from stages.data.receipts import read_facts
    from stages.data.records import Pair
    from stages.data.shards import write_shard

    pairs = execute(GAUSSIAN, tmp_path)["pairs"]
    tar = pairs.pool / "00000.tar"
    batch = PairReader(read_list(pairs.artifact.folder)).batch(range(16))
    other = [
        Pair(i, batch.prompts[i], {"noise": batch.noise[i], "latent": np.nextafter(batch.latent[i], np.float16(9))})
        for i in range(16)
    ]
    facts = read_facts(tar.with_suffix(".parquet"))
    write_shard(tar, other, {"sampler": facts.provenance["sampler"], "seed": 0}, facts.provenance)
    assert tar.stat().st_size == facts.bytes
    plan = plan_of(GAUSSIAN, tmp_path)["pairs"]
    assert plan.state == "resume" and "1 of 3 shards are missing or changed, such as 00000.tar" in plan.why
    again = execute(GAUSSIAN, tmp_path)["pairs"].artifact
    now = PairReader(read_list(again.folder)).batch(range(16)).latent
    np.testing.assert_array_equal(now, [pair.arrays["latent"] for pair in other])
    assert plan_of(GAUSSIAN, tmp_path)["pairs"].state == "reuse"
