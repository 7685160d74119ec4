"""Exports sealed pairs to Parquet and to Hugging Face datasets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Artifact, StageError
from stages.data.files import publish, sha256_once, temporary_of
from stages.data.pool import read_list
from stages.data.reader import CHANGED, PairReader
from stages.data.receipts import read_facts, read_rows, receipt_of


def to_parquet(artifact: Artifact, out: Path) -> None:
    """Write one Parquet file with one row group for each shard. Raises StageError for damaged shards.

    Columns: index, key, prompt, and one for each array, as Arrow's fixed-shape tensors. Readers that do not support
    tensors see lists of fixed length.
    """
    shards = read_list(artifact.folder)
    names = list(read_facts(receipt_of(shards[0].tar)).arrays)
    reader, start = PairReader(shards, names), 0
    writer: pq.ParquetWriter | None = None
    temporary = temporary_of(out)
    try:
        for shard in shards:
            rows = read_rows(receipt_of(shard.tar), ["index", "key", "prompt"])
            batch = reader.batch(range(start, start + shard.count))
            start += shard.count
            for name, values in batch.arrays.items():
                scalars = values.ndim == 1
                column = pa.array(values) if scalars else pa.FixedShapeTensorArray.from_numpy_ndarray(values)
                rows = rows.append_column(name, column)
            writer = writer or pq.ParquetWriter(temporary, rows.schema)
            writer.write_table(rows, row_group_size=max(1, shard.count))
        if writer:
            writer.close()
        publish(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def to_huggingface(artifact: Artifact, out: Path) -> None:
    """Write a folder that `datasets.load_dataset(folder)` reads: the tars and a dataset card.

    The tars are copies, not links: an edit of the export must not change the sealed artifact. Raises StageError for
    damaged shards.
    """
    shards = read_list(artifact.folder)
    PairReader(shards)  # raises if a shard is missing
    temporary = temporary_of(out)
    try:
        (temporary / "data").mkdir(parents=True)
        for number, shard in enumerate(shards):
            if sha256_once(shard.tar) != shard.sha256:
                raise StageError(f"{shard.tar} {CHANGED}")
            shutil.copyfile(shard.tar, temporary / "data" / f"train-{number:05d}-of-{len(shards):05d}.tar")
        (temporary / "README.md").write_text(_card(artifact), encoding="utf-8")
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _card(artifact: Artifact) -> str:
    record = artifact.record
    facts = read_facts(receipt_of(read_list(artifact.folder)[0].tar))
    licence = artifact.inputs["teacher"].record.get("metrics", {}).get("licence")
    shapes = {name: "x".join(map(str, array.shape)) or "()" for name, array in facts.arrays.items()}
    arrays = "\n".join(f"| `{name}.npy` | {facts.arrays[name].dtype} | {shape} |" for name, shape in shapes.items())
    metrics = record["metrics"]
    return f"""---
license: {licence or "unknown"}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.tar
tags:
- webdataset
- diffusion-distillation
---
# {metrics["count"]:,} (noise, latent, prompt) pairs

Retort solved the ODE of a diffusion teacher from the stored noise (pairs/{artifact.fingerprint}).

| member | dtype | shape |
|---|---|---|
{arrays}
| `txt` | | the prompt |
| `json` | | index, seed, sampler |

Sampler: `{json.dumps(facts.provenance.get("sampler"))}`. Teacher:
teacher/{artifact.inputs["teacher"].fingerprint}. Latents include the VAE's scaling factor.

```python
from datasets import load_dataset

pairs = load_dataset("THIS FOLDER", split="train", streaming=True)
```
"""


EXPORTS: dict[str, Callable[[Artifact, Path], None]] = {"parquet": to_parquet, "huggingface": to_huggingface}
