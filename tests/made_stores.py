"""Latent stores made of random numbers, without a VAE: for tests of what reads stores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae import sealed
from sdvae.config import FAMILIES, VAEConfig
from sdvae.store.buckets import Size
from sdvae.store.paths import StorePaths
from sdvae.store.shard import STORE_DTYPES, commit_shard, row_sha256
from sdvae.store.store import FORMAT, VERSION, Store, commit_roster

LABELS = ("cat", "dog", "owl")


def make_store(
    root: Path,
    num_records: Mapping[Size, int],
    *,
    has_flips: bool = False,
    shard_rows: int = 4,
    store_dtype: str = "fp16",
    latent_space: str = "sd1",
    config: VAEConfig = FAMILIES["sd1"],
    broken: tuple[str, ...] = (),
    is_labelled: bool = True,
    evidence: Mapping[str, Any] | None = None,
    has_scaling: bool = True,
) -> Store:
    """A finished store with so many records of each size; those whose keys are in `broken` are quarantined.

    Keys are "LABEL/NNN.png", captions "a LABEL, NNN"; the photo was twice as large as the crop from its middle.
    Without `has_scaling` the manifest is as older stores have it.
    """
    paths = StorePaths(root)
    paths.make_folders()
    shards = [
        (bucket_px, range(start, min(start + shard_rows, count)))
        for bucket_px, count in sorted(num_records.items())
        for start in range(0, count, shard_rows)
    ]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "latents": "raw",
        "pixel_range": [-1, 1],
        "vae": {"fingerprint": "0" * 64, "latent_space": latent_space, "config": config.to_diffusers()}
        | ({"evidence": evidence} if evidence else {}),
        "preprocess": {"size_px": 64, "crop": "center", "flip": has_flips},
        "store_dtype": store_dtype,
    }
    if has_scaling:
        manifest["latent_scaling"] = config.latent_scaling.to_json()
    sealed.write_json(paths.manifest, manifest)
    make_generation(Store.open(root), sum(num_records.values()), len(shards))
    place = 0
    for number, (bucket_px, members) in enumerate(shards):
        keys = [f"{LABELS[(place + i) % len(LABELS)]}/{place + i:03d}.png" for i in range(len(members))]
        place += len(members)
        num_rows = sum(key not in broken for key in keys)
        height, width = (side // config.downscale for side in bucket_px)
        moments = _moments((num_rows, config.latent_channels, height, width), has_flips, store_dtype, number)
        lines = _lines(keys, bucket_px, broken, is_labelled, moments)
        commit_shard(paths, number, bucket_px, lines, moments if num_rows else {})
    store = Store.open(root)
    store.finalise()
    return store


def make_generation(store: Store, num_records: int, num_shards: int) -> None:
    """Commit a first generation of so many shards, whose roster names no record."""
    header = {"generation": 0, "previous": None, "first_shard": 0, "num_shards": num_shards, "num_records": num_records}
    commit_roster(store, [sealed.canonical_json(header), b"the records\n"])


def _moments(shape: tuple[int, ...], has_flips: bool, store_dtype: str, seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    moments = {}
    for name in sorted(["mean", "logvar"] + ["mean_flip", "logvar_flip"] * has_flips):
        center, spread = (3.0, 5.0) if name.startswith("mean") else (-2.0, 1.0)
        values = center + spread * random.standard_normal(shape, np.float32)
        moments[name] = values.astype(STORE_DTYPES[store_dtype])
    return moments


def _lines(
    keys: list[str], bucket_px: Size, broken: tuple[str, ...], is_labelled: bool, moments: dict[str, NDArray[Any]]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    row = 0
    height, width = bucket_px
    for key in keys:
        label, _, name = key.partition("/")
        is_broken = key in broken
        lines.append(
            {
                "key": key,
                "uri": key,
                "source_bytes": 1,
                "source_sha256": "1" * 64,
                "original_px": (2 * height, 2 * width + 12),
                "resized_px": (height, width + 6),
                "crop_px": (0, 2, height, width),
                "bucket_px": bucket_px,
                "caption": f"a {label}, {name[:3]}" if is_labelled else None,
                "label": label if is_labelled else None,
                "status": "quarantined" if is_broken else "written",
                "step": "decode" if is_broken else None,
                "reason": "the file is truncated" if is_broken else None,
                "row": None if is_broken else row,
                "latents_sha256": None if is_broken else row_sha256(moments, row),
            }
        )
        row += not is_broken
    return lines
