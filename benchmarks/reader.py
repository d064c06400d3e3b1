#!/usr/bin/env python
"""What it costs to read a dataset of latents into a training loop: latents per second, and memory.

benchmarks/reader.py [--write]    # also: benchmarks/dataset.py reader
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from common import write_result
from torch.utils.data import DataLoader

from sdvae import LatentDataset, sealed
from sdvae.config import FAMILIES
from sdvae.reading.samplers import BucketBatchSampler
from sdvae.store.paths import StorePaths
from sdvae.store.shard import commit_shard, row_sha256
from sdvae.store.store import FORMAT, VERSION, Store, commit_roster

SHARD_ROWS, BATCH_SIZE = 1024, 256
READER_FLOOR_PER_S = 20_000


def make_store(root: Path, num_records: int) -> Store:
    """A store of random latents as of photos of 512x512, under SD 1's config."""
    paths = StorePaths(root)
    paths.make_folders()
    num_shards = num_records // SHARD_ROWS
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "vae": {"fingerprint": "0" * 64, "latent_space": "sd1", "config": FAMILIES["sd1"].to_diffusers()},
        "preprocess": {"flip": False},
        "store_dtype": "fp16",
        "latent_scaling": FAMILIES["sd1"].latent_scaling.to_json(),
    }
    sealed.write_json(paths.manifest, manifest)
    header = {"generation": 0, "previous": None, "first_shard": 0, "num_shards": num_shards, "num_records": num_records}
    commit_roster(Store.open(root), [sealed.canonical_json(header)])
    random = np.random.default_rng(0)
    for shard in range(num_shards):
        noise = random.standard_normal((2, SHARD_ROWS, 4, 64, 64), np.float32)
        moments = {"logvar": (noise[0] - 5.0).astype(np.float16), "mean": (5.0 * noise[1]).astype(np.float16)}
        commit_shard(paths, shard, (512, 512), [_line(shard, row, moments) for row in range(SHARD_ROWS)], moments)
    return Store.open(root)


def _line(shard: int, row: int, moments: dict[str, Any]) -> dict[str, Any]:
    key = f"n{shard:08d}/photo-{row:06d}.jpg"
    sizes = {"original_px": [768, 1024], "resized_px": [512, 683], "crop_px": [0, 85, 512, 512]}
    return sizes | {
        "key": key,
        "uri": key,
        "source_bytes": 123_456,
        "source_sha256": "0" * 64,
        "bucket_px": [512, 512],
        "caption": "a photo of something, of about the length that captions have",
        "label": f"n{shard:08d}",
        "status": "written",
        "step": None,
        "reason": None,
        "row": row,
        "latents_sha256": row_sha256(moments, row),
    }


@click.command()
@click.option("--records", default=8192, show_default=True, help="Records of the store, 64 KiB each.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--write", is_flag=True, help="Write results/dataset-reader.json.")
def reader(records: int, epochs: int, write: bool) -> None:
    """4x64x64 latents per second on one core, from page cache: shuffled, scaled, copied to float32 batches."""
    torch.set_num_threads(1)
    process = psutil.Process()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "store"), records)
        _compare(store)
        for mode, loading in [("mean", "batches"), ("mean", "records"), ("sample", "batches")]:
            dataset = LatentDataset(store.paths.root, sample=mode == "sample")
            sampler = BucketBatchSampler(dataset, BATCH_SIZE)
            whole: dict[str, Any] = {"sampler": sampler, "batch_size": None}
            loader = DataLoader(dataset, **(whole if loading == "batches" else {"batch_sampler": sampler}))
            for epoch in range(epochs):
                begun, cpu_begun, checksum = time.perf_counter(), time.process_time(), 0.0
                for batch in loader:
                    checksum += float(batch["latents"].sum())
                wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
                rows.append(
                    {
                        "latents": mode,
                        "loaded_as": loading,
                        "epoch": epoch,
                        "latents_per_s": round(records / wall_s),
                        "latents_per_cpu_s": round(records / cpu_s),
                        "checksum": checksum,
                        # What the process holds of its own; mapped pages of the store are the page cache's.
                        "own_mib": round((process.memory_info().rss - process.memory_info().shared) / 2**20),
                    }
                )
                click.echo(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    best = max(row["latents_per_s"] for row in rows if row["latents"] == "mean")
    click.echo(f"{best} latents/s by the clock, floor {READER_FLOOR_PER_S}")
    if write:
        click.echo(f"written to {write_result('dataset-reader', {'records': records, 'epochs': rows})}")


def _compare(store: Store) -> None:
    """The same numbers by another way, before anything is timed."""
    dataset = LatentDataset(store.paths.root, sample=False)
    numbers = [7, len(dataset) - 1, 1030 % len(dataset)]
    batch = dataset[numbers]
    for number, latents, key in zip(numbers, batch["latents"], batch["key"], strict=True):
        shard, row = divmod(number, SHARD_ROWS)
        expected = store.shard(shard).moments()[0][row].astype(np.float32) * np.float32(0.18215)
        assert key == store.shard(shard).records()[row]["key"]
        assert np.array_equal(latents.numpy(), expected)


if __name__ == "__main__":
    reader()
