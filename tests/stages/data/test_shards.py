"""Shards, receipts, the reader, and the statistics in receipts."""

import itertools
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.base import StageError
from stages.data import receipts, shards
from stages.data.files import sha256_of
from stages.data.noise import hash64, noise_for
from stages.data.order import ShuffledOrder
from stages.data.pool import ListedShard, plan_shards
from stages.data.reader import PairReader
from stages.data.records import Pair
from stages.data.statistics import Moments, histogram
from tests.support.pipelines import flip


def pair(index: int, prompt: str, noise: np.ndarray, latent: np.ndarray) -> Pair:
    return Pair(index, prompt, {"noise": noise, "latent": latent})


def make_pairs(start: int, stop: int, dtype: str = "float16") -> list[Pair]:
    shape = (2, 4, 4)
    return [
        pair(i, f"prompt {i} ü", noise_for(7, i, shape, np.dtype(dtype)), noise_for(8, i, shape, np.dtype(dtype)))
        for i in range(start, stop)
    ]


def write(folder, number: int, pairs: list[Pair]) -> ListedShard:
    tar = folder / f"{number:05d}.tar"
    sha = shards.write_shard(tar, pairs, {"seed": 7}, {"seconds": 1.0})
    return ListedShard(tar, len(pairs), tar.stat().st_size, sha)


def test_webdataset_reads_a_shard(tmp_path):
    pairs = make_pairs(0, 5)
    shard = write(tmp_path, 0, pairs)
    read = list(wds.WebDataset(str(shard.tar), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [pair.key for pair in pairs] == [f"{i:09d}" for i in range(5)]
    for sample, pair in zip(read, pairs, strict=True):
        np.testing.assert_array_equal(sample["noise.npy"], pair.arrays["noise"])
        np.testing.assert_array_equal(sample["latent.npy"], pair.arrays["latent"])
        assert sample["txt"] == pair.prompt
        assert sample["json"] == {"index": pair.index, "seed": 7}


def test_a_shards_bytes_depend_only_on_its_pairs(tmp_path):
    (tmp_path / "again").mkdir()
    assert write(tmp_path, 0, make_pairs(0, 4)).sha256 == write(tmp_path / "again", 0, make_pairs(0, 4)).sha256
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert {member.mtime for member in archive} == {0}


def test_a_receipt_has_offsets_statistics_and_hashes(tmp_path):
    pairs = make_pairs(3, 9)
    shard = write(tmp_path, 0, pairs)
    facts = receipts.read_facts(receipts.receipt_of(shard.tar))
    assert (facts.count, facts.bytes, facts.sha256) == (6, shard.bytes, sha256_of(shard.tar))
    noise = np.stack([pair.arrays["noise"] for pair in pairs]).astype(np.float64)
    moments = facts.arrays["noise"].moments
    assert moments.mean == pytest.approx(noise.mean()) and moments.std == pytest.approx(noise.std())
    assert sum(facts.arrays["noise"].histogram) == noise.size
    rows = receipts.read_rows(receipts.receipt_of(shard.tar)).to_pylist()
    assert [row["index"] for row in rows] == [3, 4, 5, 6, 7, 8]
    assert rows[0]["noise_hash"] == hash64(pairs[0].arrays["noise"].tobytes())
    raw = shard.tar.read_bytes()
    at = rows[2]["latent_offset"]
    assert raw[at : at + pairs[2].arrays["latent"].nbytes] == pairs[2].arrays["latent"].tobytes()


@pytest.mark.parametrize("damage", ["no receipt", "truncated receipt", "truncated tar", "no tar"])
def test_a_shard_without_valid_receipt_does_not_exist(tmp_path, damage):
    shard = write(tmp_path, 0, make_pairs(0, 4))
    assert receipts.valid_facts(shard.tar) is not None
    victim = shard.tar if "tar" in damage else receipts.receipt_of(shard.tar)
    if damage.startswith("no"):
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert receipts.valid_facts(shard.tar) is None


def test_a_failed_write_leaves_no_shard(tmp_path):
    bad = pair(0, "x", np.array([object()]), np.zeros(1))
    with pytest.raises(ValueError, match="Object arrays"):
        shards.write_shard(tmp_path / "00000.tar", [bad], {}, {})
    assert list(tmp_path.iterdir()) == []


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_reader_returns_every_pair_bit_for_bit(tmp_path_factory, counts, data):
    folder = tmp_path_factory.mktemp("pool")
    dtype = data.draw(st.sampled_from(["float16", "float32"]))
    ends = np.cumsum(counts).tolist()
    parts = [make_pairs(end - count, end, dtype) for count, end in zip(counts, ends, strict=True)]
    reader = PairReader([write(folder, k, part) for k, part in enumerate(parts)])
    everything = [pair for part in parts for pair in part]
    assert len(reader) == len(everything)
    indices = data.draw(st.lists(st.integers(0, len(everything) - 1), min_size=1, max_size=9))
    batch = reader.batch(indices)
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(batch.noise[row], everything[index].arrays["noise"])
        np.testing.assert_array_equal(batch.latent[row], everything[index].arrays["latent"])
        assert batch.prompts[row] == everything[index].prompt


def test_the_reader_refuses_shards_that_changed(tmp_path):
    shard = write(tmp_path, 0, make_pairs(0, 4))
    shard.tar.write_bytes(shard.tar.read_bytes()[:-512])
    with pytest.raises(StageError, match="missing or changed since it was sealed"):
        PairReader([shard])
    shard.tar.unlink()
    with pytest.raises(StageError, match="missing or changed since it was sealed"):
        PairReader([shard])


@given(count=st.integers(1, 500), size=st.integers(1, 60), more=st.integers(0, 300))
def test_shards_cover_every_sample_once_and_counts_share_full_shards(count, size, more):
    plans = plan_shards(count, size)
    assert [i for plan in plans for i in range(plan.start, plan.stop)] == list(range(count))
    places = {plan.place for plan in plans}
    assert len(places) == len(plans)
    full = {plan.place for plan in plans if plan.stop - plan.start == size}
    assert full <= {plan.place for plan in plan_shards(count + more, size)}


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), min_size=1, max_size=5))
def test_merged_moments_equal_those_of_all_values(parts):
    merged = Moments()
    for part in parts:
        merged = merged.merge(Moments.of(np.array(part)))
    whole = np.concatenate([np.array(part) for part in parts])
    assert merged.count == whole.size and merged.absmax == np.abs(whole).max()
    assert merged.mean == pytest.approx(whole.mean(), abs=1e-9)
    assert merged.std == pytest.approx(whole.std(), abs=1e-6)


def test_histograms_also_count_values_outside_of_the_edges():
    counts = histogram(np.array([-100.0, 0.0, 0.01, 100.0]))
    assert sum(counts) == 4 and counts[0] == counts[-1] == 1


def test_noise_is_normal_and_depends_only_on_seed_and_index():
    shape, dtype = (4, 8, 8), np.dtype("float16")
    np.testing.assert_array_equal(noise_for(1, 5, shape, dtype), noise_for(1, 5, shape, dtype))
    assert (
        hash64(noise_for(1, 5, shape, dtype).tobytes())
        != hash64(noise_for(1, 6, shape, dtype).tobytes())
        != hash64(noise_for(2, 5, shape, dtype).tobytes())
    )
    many = np.stack([noise_for(0, i, shape, dtype) for i in range(1000)]).astype(np.float64)
    assert abs(many.mean()) < 4 / many.size**0.5 and abs(many.std() - 1) < 4 / (2 * many.size) ** 0.5


@given(length=st.integers(1, 40), batch=st.integers(1, 17), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_epoch_draws_every_sample_once_for_any_number_of_ranks(length, batch, world, seed):
    whole = ShuffledOrder(length, batch, seed)
    steps = -(-length // batch)
    drawn = np.concatenate([whole.batch(step) for step in range(steps)])
    assert sorted(drawn[:length].tolist()) == list(range(length))
    ranks = [ShuffledOrder(length, batch, seed, rank, world) for rank in range(world)]
    for step in range(steps):
        together = np.concatenate([rank.batch(step) for rank in ranks])
        assert sorted(together.tolist()) == sorted(whole.batch(step).tolist())


def test_records_are_plain_json(tmp_path):
    shard = write(tmp_path, 0, make_pairs(0, 2))
    facts = receipts.read_facts(receipts.receipt_of(shard.tar))
    assert json.loads(json.dumps(facts.model_dump())) == facts.model_dump()


def test_the_reader_refuses_another_shard_of_the_same_size(tmp_path):
    sealed = write(tmp_path, 0, make_pairs(0, 4))
    other = write(
        tmp_path, 0, [pair(p.index, p.prompt, p.arrays["latent"], p.arrays["noise"]) for p in make_pairs(0, 4)]
    )
    assert other.bytes == sealed.bytes and other.sha256 != sealed.sha256
    with pytest.raises(StageError, match="changed since it was sealed"):
        PairReader([sealed]).batch([0])


def test_the_reader_refuses_a_tar_with_a_flipped_bit(tmp_path):
    shard, whole = write(tmp_path, 0, make_pairs(0, 4)), write(tmp_path, 1, make_pairs(4, 8))
    reader = PairReader([shard, whole])
    flip(shard.tar, 4000)
    assert reader.batch([4]).prompts == ["prompt 4 ü"], "what is not read is not hashed"
    with pytest.raises(
        StageError, match=r"00000\.tar .* changed since .*`retort shards repair ARTIFACT` makes it again"
    ):
        reader.batch([0])
    flip(shard.tar, 4000)
    np.testing.assert_array_equal(reader.batch([3]).noise[0], make_pairs(3, 4)[0].arrays["noise"])


def test_a_receipt_of_another_version_is_invalid(tmp_path):
    shard = write(tmp_path, 0, make_pairs(0, 4))
    receipt = receipts.receipt_of(shard.tar)
    table = pq.read_table(receipt)
    facts = json.loads(pq.read_metadata(receipt).metadata[receipts.METADATA])
    with pq.ParquetWriter(receipt, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({receipts.METADATA: json.dumps({**facts, "later": 1})})
    assert receipts.valid_facts(shard.tar) is None


@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    batch=st.integers(1, 17),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_a_mixture_has_exact_shares_and_each_source_its_own_epochs(lengths, weights, batch, seed):
    ends = np.cumsum([0, *lengths]).tolist()
    ranges = [range(*pair) for pair in itertools.pairwise(ends)]
    weights = weights[: len(ranges)]
    order = ShuffledOrder(ranges, batch, seed, weights=weights)
    drawn = np.concatenate([order.batch(step) for step in range(-(-2048 // batch))])[:2048]
    for source, weight in zip(ranges, weights, strict=True):
        mine = drawn[(drawn >= source.start) & (drawn < source.stop)]
        assert len(mine) == pytest.approx(2048 * weight / sum(weights), abs=2)
        for epoch in range(len(mine) // len(source)):
            assert sorted(mine[epoch * len(source) : (epoch + 1) * len(source)].tolist()) == list(source)


def test_a_source_that_would_never_be_drawn_is_refused():
    with pytest.raises(ValueError, match="would never be drawn"):
        ShuffledOrder([range(3), range(3, 6)], 2, 0, weights=[1.0, 1e-6])


@given(count=st.integers(4, 90), batch=st.integers(1, 4), stop=st.integers(0, 30), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_four_interrupted_and_resumed_ranks_see_each_sample_once(tmp_path_factory, count, batch, stop, seed):
    """Four readers read an epoch. They are killed after `stop` steps, and four new ones continue."""
    folder = tmp_path_factory.mktemp("pool")
    shards = [write(folder, k, make_pairs(s, min(s + 16, count))) for k, s in enumerate(range(0, count, 16))]
    size = 4 * batch
    steps = -(-count // size)
    seen = []
    for rank in range(4):
        for part in (range(min(stop, steps)), range(min(stop, steps), steps)):
            reader, order = PairReader(shards), ShuffledOrder(count, size, seed, rank, 4)
            for step in part:
                places = np.arange(step * size, (step + 1) * size)[rank::4]
                prompts = reader.batch(order.batch(step)).prompts
                seen += [text for text, place in zip(prompts, places, strict=True) if place < count]
    assert sorted(seen) == sorted(f"prompt {i} ü" for i in range(count))


def test_pairs_of_several_shapes_are_not_mixed(tmp_path):
    small = write(tmp_path, 0, make_pairs(0, 4))
    large = write(tmp_path, 1, [pair(i, "x", np.zeros((2, 8, 8), "f2"), np.zeros((2, 8, 8), "f2")) for i in range(4)])
    reader = PairReader([small, large])
    assert len(reader.batch([0, 1]).prompts) == 2
    with pytest.raises(StageError, match="different shapes cannot be mixed"):
        reader.batch([0, 5])
