"""`retort stats` and `retort shards`: reports on good shards, on every kind of damage, and on hostile shards."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.base import StageError
from stages.data.files import sha256_of
from stages.data.inspection import inspect_shards
from stages.data.receipts import receipt_of
from stages.data.statistics import histogram, ks_distance
from tests.support.cli import ROOT, command, retort
from tests.support.pipelines import GAUSSIAN, execute


@pytest.fixture
def pairs(tmp_path):
    return execute(GAUSSIAN, tmp_path / "store")["pairs"]


# --- Reports -----------------------------------------------------------------------------------------


def test_stats_of_an_intact_artifact(pairs):
    found = inspect_shards(str(pairs.artifact.folder), deep=True)
    assert (found["count"], found["shards"], found["damaged"]) == (40, 3, {})
    assert found["prompts"]["distinct"] == 40 and found["prompts"]["words"] == {"mean": 4.0, "std": 0.0, "most": 4.0}
    noise, latent = found["arrays"]["noise"], found["arrays"]["latent"]
    assert noise["ks_distance"] < 0.05 and noise["nonfinite"] == 0 and sum(noise["histogram"]) == 40 * 32
    assert [channel["mean"] == pytest.approx(0.5, abs=0.1) for channel in latent["channels"]] == [True, True]
    assert found["provenance"]["sampler"]["name"] == "ddim" and found["provenance"]["device"] == "cpu"


def test_the_ks_distance_to_the_normal_distribution_is_exact():
    values = np.random.default_rng(0).standard_normal(200_000)
    assert ks_distance(np.array(histogram(values))) < 0.005
    assert ks_distance(np.array(histogram(values + 0.5))) == pytest.approx(0.1974, abs=0.005)  # 2 Phi(1/4) - 1
    assert ks_distance(np.zeros(96, dtype=np.int64)) is None


def test_noise_that_occurs_twice_is_an_error(pairs, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for number in (0, 1):
        for suffix in (".tar", ".parquet"):
            shutil.copy(pairs.pool / f"00000{suffix}", both / f"0000{number}{suffix}")
    found = inspect_shards(str(both))
    assert found["repeated_noises"] == 16 and "16 samples repeat the noise of another" in found["damaged"]["noise"]
    assert retort("stats", both).returncode == 1


def test_a_run_an_artifact_and_a_folder_are_all_targets(pairs, tmp_path):
    for target in ("gaussian", pairs.artifact.folder, pairs.pool):
        done = retort("stats", target, "--store", tmp_path / "store", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["count"] == 40
    assert "no run 'other'" in retort("stats", "other", "--store", tmp_path / "store").stderr


def test_the_page_and_samples_of_a_network_teacher(tiny, tmp_path):
    folder = tiny[1]["pairs"].artifact.folder
    done = retort("stats", folder, "--html", tmp_path / "page.html", "--sample", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 32 and "<svg" in page and "http" not in page
    beside = sorted(path.name for path in tmp_path.glob("page-*"))
    assert beside == [f"page-{name}.{suffix}" for name in ("latent", "noise") for suffix in ("png", "svg")]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{i:05d}.png" for i in range(5)]
    assert rows[0]["text"] == "a red handwritten zero"
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (16, 16)


def test_latents_of_an_analytic_teacher_are_no_images(pairs, tmp_path):
    done = retort("stats", pairs.artifact.folder, "--sample", 2, "--out", tmp_path / "out")
    assert done.returncode == 2 and "it makes no images" in done.stderr


# --- Damage ------------------------------------------------------------------------------------------


def shard_files(pool: Path) -> list[Path]:
    return sorted([*pool.rglob("*.tar"), *pool.rglob("*.parquet")])


@pytest.mark.parametrize("victim", range(6))
@pytest.mark.parametrize("fault", ["deleted", "truncated", "flipped"])
def test_every_kind_of_damage_is_named_and_repaired(pairs, victim, fault):
    path = shard_files(pairs.pool)[victim]
    folder = pairs.artifact.folder
    sealed = {tar: sha256_of(tar) for tar in pairs.pool.rglob("*.tar")}
    rows = {tar: pq.read_table(receipt_of(tar)) for tar in sealed}
    content = path.read_bytes()
    if fault == "deleted":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 4]) + content[1001:])
    name = path.relative_to(pairs.pool).with_suffix(".tar").as_posix()
    without = inspect_shards(str(folder))["damaged"]
    assert list(without) == ([] if fault == "flipped" and path.suffix == ".tar" else [name])
    assert list(inspect_shards(str(folder), deep=True)["damaged"]) == [name]
    if (victim, fault) in ((0, "flipped"), (1, "truncated"), (5, "deleted")):  # each takes a process
        assert retort("verify", folder).returncode == 1
        done = retort("shards", "repair", folder, "--engine", "inline", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"repaired": [name], "changed": []}
        assert {tar: sha256_of(tar) for tar in pairs.pool.rglob("*.tar")} == sealed
        assert all(pq.read_table(receipt_of(tar)).equals(before) for tar, before in rows.items())
        assert retort("verify", folder).returncode == 0


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_of_a_receipt_is_noticed(pairs, data):
    receipt = pairs.pool / "00001.parquet"
    content = receipt.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = content[place] ^ data.draw(st.integers(1, 255))
    receipt.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    try:
        assert list(inspect_shards(str(pairs.artifact.folder))["damaged"]) == ["00001.tar"]
    finally:
        receipt.write_bytes(content)


def test_repair_unseals_the_artifact_before_it_removes_anything(pairs, monkeypatch):
    from pipeline.runs.repair import plan_repair
    from pipeline.store import load_artifact

    folder = pairs.artifact.folder
    (pairs.pool / "00001.tar").write_bytes(b"")
    repair = plan_repair(folder)
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        repair.unseal(waiting=None)
    monkeypatch.undo()
    assert not (folder / "artifact.json").exists() and (pairs.pool / "00001.tar").exists()
    done = retort("shards", "repair", folder, "--engine", "inline")  # begun again after the kill
    assert done.returncode == 0, done.stderr
    assert load_artifact(folder).fingerprint == pairs.artifact.fingerprint


def test_repair_is_refused_if_the_prompts_changed(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    plan = execute(GAUSSIAN.replace("prompts: digits", f"prompts: {prompts}"), tmp_path / "store")["pairs"]
    (plan.pool / "00000.tar").unlink()
    prompts.write_text("a dog\n")
    done = retort("shards", "repair", plan.artifact.folder)
    assert done.returncode == 2 and "cannot be made again as it was: p.txt changed" in done.stderr
    assert (plan.artifact.folder / "artifact.json").exists()


def test_a_folder_of_receipted_shards_says_what_is_missing(pairs):
    for suffix in (".tar", ".parquet"):
        (pairs.pool / f"00001{suffix}").unlink()
    assert inspect_shards(str(pairs.pool))["damaged"] == {"before tail-8/00002.tar": "missing: samples 16 to 31"}
    shutil.copy(pairs.pool / "00000.tar", pairs.pool / "00007.tar")
    (pairs.pool / "tail-8" / "00002.tar").unlink()
    found = inspect_shards(str(pairs.pool))
    assert (found["missing"], found["unreceipted"], found["corrupt"]) == (1, 1, 0)
    assert found["damaged"]["00007.tar"].startswith("unreceipted")
    assert inspect_shards(str(pairs.artifact.folder))["extra"] == 1


def test_the_loss_of_all_receipts_is_noticed(pairs):
    for receipt in pairs.pool.rglob("*.parquet"):
        receipt.unlink()
    assert inspect_shards(str(pairs.pool))["unreceipted"] == 3


def test_a_single_shard_is_checked_with_the_receipt_beside_it(pairs):
    tar = pairs.pool / "00001.tar"
    assert inspect_shards(str(tar), deep=True)["count"] == 16
    content = tar.read_bytes()
    tar.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    assert list(inspect_shards(str(tar), deep=True)["damaged"]) == ["00001.tar"]


def test_a_pool_that_two_counts_share_is_intact(pairs, tmp_path):
    execute(GAUSSIAN, tmp_path / "store", ["stages.pairs.count=46"])
    found = inspect_shards(str(pairs.pool))
    assert (found["count"], found["damaged"]) == (46, {})


def test_the_prompt_table_is_sealed(pairs):
    table = pairs.pool / "prompts.arrow"
    content = table.read_bytes()
    table.write_bytes(content.replace(b"red", b"RED", 1))
    folder = str(pairs.artifact.folder)
    assert inspect_shards(folder)["damaged"] == {}
    assert list(inspect_shards(folder, deep=True)["damaged"]) == ["prompts.arrow"]
    done = retort("shards", "repair", folder, "--engine", "inline")
    assert done.returncode == 0 and table.read_bytes() == content, done.stderr
    table.unlink()
    assert list(inspect_shards(folder)["damaged"]) == ["prompts.arrow"]


def test_other_parquet_files_are_not_taken_for_receipts(foreign):
    pq.write_table(pa.table({"url": ["x"]}), foreign / "a.parquet")
    found = inspect_shards(str(foreign))
    assert found["count"] == 6 and found["damaged"] == {}


def test_members_of_other_types_are_not_called_corrupt(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.names.npy", npy(np.array(["a", "b"])))
        add(tar, "0.jpg", picture())
        add(tar, "1.jpg", b"garbage")
    found = inspect_shards(str(tmp_path), deep=True)
    assert found["not_looked_into"] == {"names.npy": 1} and found["images"] == {"8x8": 1}
    assert found["damaged"] == {"*.jpg": "corrupt: 1 members are not what their name says"}


def test_a_tar_with_negative_sizes_does_not_loop(tmp_path):
    first, second = tarfile.TarInfo("a.txt"), tarfile.TarInfo("b.txt")
    header = bytearray(second.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (256**12 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(first.tobuf(tarfile.GNU_FORMAT) + bytes(header) + b"\0" * 1024)
    assert inspect_shards(str(tmp_path))["corrupt"] == 1


def test_shards_on_a_plain_web_server_are_read(foreign):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(foreign)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = inspect_shards(f"http://127.0.0.1:{server.server_port}/", deep=True)
    finally:
        server.shutdown()
    assert found["count"] == 6 and found["damaged"] == {}


# --- Export ------------------------------------------------------------------------------------------


def test_exported_parquet_has_all_values_and_one_row_group_per_shard(pairs, tmp_path):
    from stages.data.pool import read_list
    from stages.data.reader import PairReader

    out = tmp_path / "pairs.parquet"
    done = retort("shards", "export", pairs.artifact.folder, out, "--to", "parquet")
    assert done.returncode == 0, done.stderr
    assert pq.ParquetFile(out).num_row_groups == 3
    table = pq.read_table(out)
    batch = PairReader(read_list(pairs.artifact.folder)).batch(range(40))
    np.testing.assert_array_equal(table["latent"].combine_chunks().to_numpy_ndarray(), batch.latent)
    assert table["prompt"].to_pylist() == batch.prompts
    done = retort("shards", "export", pairs.artifact.folder, out, "--to", "parquet")
    assert done.returncode == 2 and "already exists" in done.stderr


def test_hugging_face_loads_the_exported_folder(pairs, tmp_path):
    datasets = pytest.importorskip("datasets")
    from stages.data.pool import read_list
    from stages.data.reader import PairReader

    done = retort("shards", "export", pairs.artifact.folder, tmp_path / "hf", "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    rows = list(datasets.load_dataset(str(tmp_path / "hf"), split="train", streaming=True))
    batch = PairReader(read_list(pairs.artifact.folder)).batch(range(40))
    assert [row["txt"] for row in rows] == batch.prompts
    np.testing.assert_array_equal(np.array(rows[3]["latent.npy"], dtype=np.float16), batch.latent[3])
    for tar in (tmp_path / "hf" / "data").iterdir():  # an edited export leaves the store as it is
        tar.write_bytes(b"edited")
    assert inspect_shards(str(pairs.artifact.folder), deep=True)["damaged"] == {}


# --- Shards by others --------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def npy(values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def foreign(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(6):
            add(tar, f"x/{i}.noise.npy", npy(np.random.default_rng(i).standard_normal((4, 8, 8)).astype("f2")))
            add(tar, f"x/{i}.txt", f"prompt {i % 2}".encode())
            add(tar, f"x/{i}.json", b'{"a": 1}')
            add(tar, f"x/{i}.jpg", picture())
            if i:
                add(tar, f"x/{i}.pth", b"\x80\x04cos\nsystem\n")
            buffer = io.BytesIO()
            np.savez(buffer, one=np.ones(3), two=np.zeros((2, 2)))
            add(tar, f"x/{i}.npz", buffer.getvalue())
    return folder


def test_stats_of_foreign_shards(foreign, tmp_path):
    found = inspect_shards(str(foreign), deep=True)
    assert found["count"] == 6 and found["damaged"] == {} and found["never_opened"] == {"pth": 5}
    assert found["incomplete"] == {"pth": 1} and found["members"]["jpg"]["count"] == 6
    assert found["prompts"]["distinct"] == 2
    assert found["arrays"]["noise"]["shape"] == [4, 8, 8] and found["arrays"]["noise"]["ks_distance"] < 0.1
    assert {"one", "two"} <= {name.rpartition("/")[2] for name in found["arrays"]}
    quick = retort("stats", foreign)
    assert quick.returncode == 0 and "--deep reads the values" in quick.stdout and "never opened" in quick.stdout
    done = retort("stats", foreign / "a.tar", "--sample", 3, "--out", tmp_path / "out")
    assert done.returncode == 0 and len(list((tmp_path / "out").glob("*.png"))) == 3


def test_values_that_are_not_finite_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.latent.npy", npy(np.array([1.0, np.nan, np.inf, 3.0], dtype="f4")))
    found = inspect_shards(str(tmp_path), deep=True)
    assert found["arrays"]["latent"]["nonfinite"] == 2 and found["arrays"]["latent"]["mean"] == 2.0
    assert "2 NOT FINITE" in retort("stats", tmp_path, "--deep").stdout


@pytest.mark.parametrize("keep", [100, 700, 3000])
def test_truncated_foreign_tars_are_noticed(foreign, keep):
    tar = foreign / "a.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    found = inspect_shards(str(foreign))
    assert found["corrupt"] == 1 and found["damaged"]["a.tar"].startswith("corrupt")


def hostile_members():
    names = st.sampled_from(
        ["0.npy", "0.json", "0.txt", "0.npz", "0.png", "../../evil.txt", "/etc/evil.npy", "0.pkl", ".npy", "a/../b.npy"]
    )
    headers = st.sampled_from(
        [
            npy(np.zeros(3))[:-8],
            npy(np.zeros(3)).replace(b"(3,)", b"(9,)"),
            npy(np.zeros(3)).replace(b"<f8", b"|O8"),
            b"\x93NUMPY\x01\x00\x10\x00{'descr': 1}    ",
            b"\x93NUMPY\x09\x00",
            b"[" * 5000,
            b'{"a": 1e999}',
            b"PK\x03\x04junk",
            b"",
        ]
    )
    return st.lists(st.tuples(names, st.one_of(headers, st.binary(max_size=200))), max_size=6)


@given(members=hostile_members(), cut=st.integers(0, 400), noise=st.binary(max_size=600))
@settings(max_examples=80, deadline=None)
def test_hostile_tars_crash_nothing_and_write_nothing(tmp_path_factory, members, cut, noise):
    folder = tmp_path_factory.mktemp("hostile") / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    raw = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(raw[: len(raw) - cut] + noise)
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    for deep in (False, True):
        json.dumps(inspect_shards(str(folder), deep=deep))
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


@given(content=st.binary(max_size=300), listed=st.one_of(st.none(), st.binary(max_size=100), st.just(b"[]")))
@settings(max_examples=60, deadline=None)
def test_hostile_receipts_and_lists_crash_nothing(tmp_path_factory, content, listed):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "00000.tar").write_bytes(b"\0" * 1024)
    (folder / "00000.parquet").write_bytes(content)
    (folder / "prompts.arrow").write_bytes(b"")  # the receipts show that Retort made the shards
    if listed is not None:
        (folder / "receipts.json").write_bytes(listed)
    try:
        assert inspect_shards(str(folder), deep=True)["corrupt"] == 1
    except StageError as error:
        assert "receipts.json cannot be read" in str(error)


def blank(width, height, form):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format=form)
    return buffer.getvalue()


def test_a_small_tar_of_large_images_takes_little_memory(tmp_path):
    """A tar of 3 MB holds twelve images of 265 MB each. Images that cannot be scaled down during decoding are left
    out."""
    huge, large = blank(9400, 9400, "PNG"), blank(3000, 1500, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            add(tar, f"{i:02}.png", huge)
        add(tar, "20.png", large)
        add(tar, "21.jpg", blank(9000, 4500, "JPEG"))
    done = subprocess.run(
        command("stats", tmp_path / "a.tar", "--html", tmp_path / "p.html", "--sample", 5, "--out", tmp_path / "out"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3,) * 2),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 not looked into" in done.stdout and (tmp_path / "p.html").read_text().count("data:image/png;base64,") == 2
    for number in (0, 1):
        with Image.open(tmp_path / "out" / f"{number:05d}.png") as image:
            assert image.size == (1024, 512)


def sealed(content):
    """Add the right seal to a receipt's bytes."""
    from stages.data.receipts import UNSEALED

    return content.replace(UNSEALED, UNSEALED[:-64] + hashlib.sha256(content).hexdigest().encode())


@pytest.mark.parametrize("footer", ["honest", "lying"])
def test_a_receipt_with_more_rows_than_its_tar_can_hold_is_refused(pairs, tmp_path, footer):
    """The receipt has two million rows in a few kilobytes. Its tar has 1024 bytes, but the receipt claims more."""
    from stages.data.receipts import METADATA, UNSEALED, read_facts

    million, groups = 1_000_000, 2
    says = million * groups if footer == "honest" else 2
    facts = read_facts(pairs.pool / "00000.parquet").model_copy(update={"count": says, "bytes": 512 * million * groups})
    zeros = {name: np.zeros(million, kind) for name, kind in (("index", "i8"), ("noise_hash", "u8"))}
    table = pa.table({**zeros, "prompt_hash": zeros["noise_hash"]})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table, row_group_size=million)
        writer.add_key_value_metadata({METADATA: facts.model_dump_json(), b"seal": UNSEALED})
    content = buffer.getvalue()
    if footer == "lying":  # of the whole file it says 2 rows, in as many bytes: thrift's zigzag varint
        assert content.count(bytes.fromhex("8092f401")) == 1
        content = content.replace(bytes.fromhex("8092f401"), bytes.fromhex("84808000"))
    (tmp_path / "00000.parquet").write_bytes(sealed(content))
    (tmp_path / "00000.tar").write_bytes(b"\0" * 1024)
    assert len(content) < 200_000
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        found = inspect_shards(str(tmp_path))
    finally:
        pa.set_memory_pool(before)
    assert "2000000 rows" in found["damaged"]["00000.tar"] and pool.max_memory() < 2_000_000


@pytest.mark.parametrize(
    ("column", "words"), [("noise_hash", "noise_hash does not hold numbers"), ("prompt", "prompts longer than a tar")]
)
def test_a_receipt_that_expands_to_gigabytes_is_refused(pairs, column, words):
    """2,000 rows refer to one string of 300 kB. If they were read, they would take 600 MB."""
    from stages.data.receipts import METADATA, UNSEALED, read_facts, read_receipt

    rows = 2000
    facts = read_facts(pairs.pool / "00000.parquet").model_copy(update={"count": rows, "bytes": rows * 512})
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 300_000]))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, pa.table({column: long}).schema) as writer:
        writer.write_table(pa.table({column: long}))
        writer.add_key_value_metadata({METADATA: facts.model_dump_json(), b"seal": UNSEALED})
    content = sealed(buffer.getvalue())
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match=words):
            read_receipt(content, [column], facts.bytes)
    finally:
        pa.set_memory_pool(before)
    assert len(content) < 50_000 and pool.max_memory() < 5_000_000


@pytest.mark.parametrize("place", ["../../../etc/passwd", "/etc/passwd", "a/../../x.tar"])
def test_a_list_with_paths_outside_of_its_pool_is_refused(pairs, place):
    path = pairs.artifact.folder / "receipts.json"
    listed = json.loads(path.read_text())
    listed["shards"][0]["tar"] = place
    path.write_text(json.dumps(listed))
    with pytest.raises(StageError, match="leads out of the pool"):
        inspect_shards(str(pairs.artifact.folder))


# --- URLs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def object_store():
    """A real HTTP server that speaks S3."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }  # fmt: skip
    yield settings
    server.stop()


def test_shards_in_an_object_store(pairs, foreign, object_store):
    import s3fs

    remote = s3fs.S3FileSystem(
        key="test", secret="test", client_kwargs={"endpoint_url": object_store["AWS_ENDPOINT_URL"]}
    )
    remote.mkdir("bucket")
    remote.put(str(pairs.pool), "bucket/pairs/pool/", recursive=True)
    remote.put(str(pairs.artifact.folder), "bucket/pairs/", recursive=True)
    remote.put(str(foreign), "bucket/", recursive=True)
    for target, count in ((f"pairs/{pairs.artifact.folder.name}", 40), ("pairs/pool", 40), ("foreign", 6)):
        done = retort("stats", f"s3://bucket/{target}", "--deep", "--json", **object_store)
        assert done.returncode == 0, done.stderr + done.stdout
        assert json.loads(done.stdout)["count"] == count
    remote.rm(f"bucket/pairs/pool/{pairs.pool.name}/00001.tar")
    done = retort("stats", f"s3://bucket/pairs/{pairs.artifact.folder.name}", **object_store)
    assert done.returncode == 1 and "00001.tar: missing" in done.stdout


def test_an_unreadable_url_is_an_error():
    done = retort("stats", "s3://no-such-bucket/x", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="x",
                  AWS_SECRET_ACCESS_KEY="x", AWS_MAX_ATTEMPTS="1")  # fmt: skip
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr
    done = retort("stats", "gopher://x/y")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert os.path.exists(ROOT)
