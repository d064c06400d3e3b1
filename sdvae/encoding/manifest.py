"""What the bytes of a store depend on, besides the photos: recorded by the first run, held against every later one."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sdvae import atomic, sealed
from sdvae.encoding.resize import choose_resizer
from sdvae.engine.plan import IMAGES_AT_ONCE
from sdvae.engine.precision import DTYPES
from sdvae.engine.selfcheck import trusted_kernels
from sdvae.errors import ConfigError, StoreError
from sdvae.store import store as stores
from sdvae.store.buckets import Size
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.store.paths import StorePaths
from sdvae.store.shard import STORE_DTYPES
from sdvae.store.store import Store, differences
from sdvae.vae import VAE

MAX_SHARD_BYTES = 2**27  # of each tensor: a shard is in memory until it is written

_BATCH_ROWS = {"cpu": 4}  # larger batches only cost memory there
_GPU_BATCH_ROWS = 16


@dataclass(frozen=True)
class EncodeSettings:
    """What decides about the bytes of a store, besides the VAE and the photos.

    `batch_rows` and `num_threads` are chosen for the machine where None, and then belong to the store.
    """

    preprocess: Preprocess = field(default_factory=Preprocess)
    store_dtype: Literal["fp16", "fp32"] = "fp16"
    shard_rows: int = 1024
    batch_rows: int | None = None
    num_threads: int | None = None


def recorded_settings(store: Store) -> EncodeSettings:
    """The settings that a store was begun with."""
    manifest = store.manifest
    return EncodeSettings(
        Preprocess.from_json(manifest["preprocess"]),
        manifest["store_dtype"],
        manifest["shard_rows"],
        manifest["compute"]["batch_rows"],
        manifest["compute"]["num_threads"],
    )


def fit_settings(settings: EncodeSettings, vae: VAE) -> EncodeSettings:
    """The settings for this VAE: one of four channels sees the alpha of photos.

    Raises ConfigError for settings that nothing can be encoded with, before anything is read.
    """
    for name in ("shard_rows", "batch_rows", "num_threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if settings.store_dtype not in STORE_DTYPES:
        raise ConfigError(f"store_dtype is {settings.store_dtype!r}; choose {' or '.join(STORE_DTYPES)}")
    if vae.config.in_channels not in (1, 3, 4):
        raise ConfigError(
            f"{vae.name} takes images of {vae.config.in_channels} channels; photos have 3, 1 as grey, or 4 with alpha"
        )
    if vae.config.in_channels == 4:
        settings = replace(settings, preprocess=replace(settings.preprocess, background=None, resizer="pillow"))
    # It says now what it would say after the scan.
    plan_geometry(512, 512, settings.preprocess, vae.config.scaled_downscale)
    return settings


def identify_run(
    vae: VAE, settings: EncodeSettings, recorded: Mapping[str, Any], num_neighbours: int = 1
) -> dict[str, Any]:
    """What the manifest of a run is held against; `recorded` is the compute block of the store to continue.

    `num_neighbours` processes share this machine's cores.
    """
    return {
        "format": stores.FORMAT,
        "version": stores.VERSION,
        "latents": "raw",  # scaling belongs to whoever trains on them
        "latent_scaling": vae.config.latent_scaling.to_json(),
        "pixel_range": [-1, 1],
        "vae": {"fingerprint": vae.fingerprint, "config": vae.config.to_diffusers()},  # its space follows from these
        "preprocess": settings.preprocess.to_json(),
        "decoder": decoder_identity(settings.preprocess),
        "store_dtype": settings.store_dtype,
        "shard_rows": settings.shard_rows,
        "compute": _identify_compute(vae, settings, recorded, num_neighbours),
    }


def _identify_compute(
    vae: VAE, settings: EncodeSettings, recorded: Mapping[str, Any], num_neighbours: int
) -> dict[str, Any]:
    kind = vae.device.type
    batch_rows = settings.batch_rows or recorded.get("batch_rows") or _BATCH_ROWS.get(kind, _GPU_BATCH_ROWS)
    compute = {
        "device": _device_model(vae.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == vae.dtype),
        "batch_rows": batch_rows,
        "num_threads": settings.num_threads or recorded.get("num_threads") or max(1, num_cores() // num_neighbours),
    }
    if kind == "cuda" and (not recorded or "kernels" in recorded):
        compute["kernels"] = trusted_kernels(vae.device).NAME
    if not recorded:
        return compute | {"images_at_once": min(IMAGES_AT_ONCE, batch_rows) if kind == "cpu" else 0}
    return compute | {key: recorded[key] for key in ("images_at_once",) if key in recorded}  # older stores had none


def require_same_vae(store: Store, vae: VAE) -> None:
    """Raise StoreError, with all differences, unless this VAE on this machine may add shards to a store."""
    require_same_run(store, identify_run(vae, recorded_settings(store), store.manifest["compute"]))


def require_same_run(store: Store, identity: dict[str, Any]) -> None:
    """Raise StoreError, with all differences, unless a run like this one began the store."""
    now = json.loads(sealed.canonical_json(identity | {"version": store.version}))  # older stores go on as they are
    stored = {name: store.manifest.get(name) for name in now}
    stored["vae"] = {name: store.manifest["vae"].get(name) for name in now["vae"]}
    found = differences(stored, now)
    if found:
        raise StoreError(
            f"{store.paths.root} was begun with other settings, and a store holds one kind of latents: "
            f"{'; '.join(found)}. Encode as before, or into another folder, or start again with --restart"
        )


def begin(paths: StorePaths, identity: dict[str, Any], vae: VAE) -> Store:
    """Write the manifest. From there on the folder is a store, without a generation."""
    with fixed_threads(identity["compute"]["num_threads"]):
        latent_error = vae.latent_error()
        space = {"latent_space": vae.latent_space, "evidence": vae.verdict.to_json()}
    manifest = sealed.seal(identity | {"vae": identity["vae"] | space, "latent_error": latent_error})
    return write_manifest(paths, manifest)


def write_manifest(paths: StorePaths, manifest: bytes) -> Store:
    """Put a sealed manifest in its place, unless there is one."""
    atomic.write_bytes(paths.journal / "manifest.json", manifest)  # a copy: nothing else could restore it
    atomic.create_bytes(paths.manifest, manifest)
    return Store.open(paths.root)


def max_rows(vae: VAE, settings: EncodeSettings, bucket_px: Size | None) -> int:
    """Most records in a shard of this size."""
    if bucket_px is None:
        return settings.shard_rows
    return min(settings.shard_rows, max(1, MAX_SHARD_BYTES // row_bytes(vae, settings, bucket_px)))


def row_bytes(vae: VAE, settings: EncodeSettings, bucket_px: Size) -> int:
    """The bytes of one photo of this size in each tensor."""
    num_latents = vae.config.latent_channels * bucket_px[0] * bucket_px[1] // vae.config.downscale**2
    return num_latents * STORE_DTYPES[settings.store_dtype].itemsize


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def fixed_threads(num_threads: int) -> Iterator[None]:
    """Set torch's threads: they decide about the order of sums, whatever a launcher exported."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_model(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{device.type} ({platform.machine()})"


_CODECS = ("libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif", "zlib", "littlecms2")


def decoder_identity(preprocess: Preprocess) -> dict[str, Any]:
    """Which libraries make pixels of a file, with versions, for a manifest; ConfigError where one is missing."""
    from importlib.metadata import PackageNotFoundError, version

    import PIL
    from PIL import features

    codecs = {name: features.version(name) for name in _CODECS}
    identity: dict[str, Any] = {"library": "pillow", "version": PIL.__version__, "codecs": codecs}
    if preprocess.decoder == "simplejpeg":
        try:
            identity["jpeg"] = {"library": "simplejpeg", "version": version("simplejpeg")}
        except PackageNotFoundError as error:
            raise ConfigError("the decoder 'simplejpeg' is not installed; pip install 'sdvae[fast]'") from error
    if preprocess.resizer == "torch":
        if choose_resizer(preprocess.resample) != "torch":
            raise ConfigError(
                f"photos are to be resized by torch, but torch {version('torch')} has no {preprocess.resample} for "
                "bytes; install torch 2.13, or for a new store give --resizer pillow"
            )
        identity["resizer"] = {"library": "torch", "version": version("torch")}
    return identity
