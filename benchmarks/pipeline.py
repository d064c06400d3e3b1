"""What `sdvae encode` adds to the network: how fast photos come in, how long the encoder waits, how soon it resumes."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from common import test_data, write_result

from sdvae.encoding.manifest import num_cores
from sdvae.sources.entries import Entry

BATCH_ROWS = 4  # what `sdvae encode` takes on a CPU


class NoCost:
    """A VAE whose network is nothing: what is left is everything else."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: Any, budget: int | None = None) -> Any:
        """Zeros, made once."""
        num_images, _, height, width = pixels.shape
        return _zeros(num_images, 4, height // 8, width // 8)


@cache
def _zeros(*shape: int) -> Any:
    import torch

    from sdvae.posterior import DiagonalGaussian

    return DiagonalGaussian(torch.zeros(shape), torch.zeros(shape))


class Some:
    """The first photos of a source, in an order that mixes its folders."""

    def __init__(self, source: Any, num_photos: int) -> None:
        self._source, self._num_photos = source, num_photos
        self.name, self.root, self.remarks = source.name, source.root, ()

    def entries(self) -> list[Entry]:
        """Every n-th."""
        entries = self._source.entries()
        return entries[:: max(1, len(entries) // self._num_photos)][: self._num_photos]

    def read(self, key: str) -> bytes:
        """The bytes of one."""
        return self._source.read(key)


def _cpu_s() -> float:
    """Of this process and the children that ended: on a busy machine it says more than the clock."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _encode(source: Any, vae: Any, num_workers: int, threads: int, **preprocess: Any) -> Any:
    from sdvae.encoding.encode import encode_dataset
    from sdvae.encoding.manifest import EncodeSettings
    from sdvae.encoding.tasks import Work
    from sdvae.store.geometry import Preprocess

    settings = EncodeSettings(Preprocess(512, **preprocess), batch_rows=BATCH_ROWS, num_threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        return encode_dataset(source, Path(folder) / "out", vae, settings, work=Work(num_workers))


@click.command()
@click.option("--photos", "num_photos", default=192, show_default=True, help="With a real network.")
@click.option("--no-network", "num_fast", default=2242, show_default=True, help="Photos without one.")
@click.option("--threads", type=int, default=num_cores, show_default="all cores", help="Of every network.")
@click.option("--write", is_flag=True, help="Write results/pipeline.json.")
def pipeline(num_photos: int, num_fast: int, threads: int, write: bool) -> None:
    """The pipeline without a network, with the embedded VAE, and beside a plain diffusers loop."""
    import torch

    from sdvae.sources.open import open_source
    from sdvae.vae import VAE

    source = open_source(test_data() / "train")
    vae = VAE.load(device="cpu")
    result: dict[str, Any] = {
        "dtype": str(vae.dtype),
        "no_network": [],
        "num_photos": num_photos,
        "num_threads": threads,
    }
    for preprocess in (
        {"resizer": "torch"},  # what `sdvae encode` takes where it can
        {"resizer": "torch", "decoder": "simplejpeg"},
        {"resizer": "pillow"},
        {"resizer": "pillow", "resample": "bicubic", "decoder": "simplejpeg"},
    ):
        before = _cpu_s()
        report = _encode(Some(source, num_fast), NoCost(vae), 2, threads, **preprocess)
        cpu_ms = (_cpu_s() - before) / report.num_written * 1000  # the scan included, which `images_per_s` leaves out
        found = {"preprocess": preprocess, "num_photos": report.num_written, "images_per_s": report.images_per_s}
        found |= {"cpu_ms_per_image": cpu_ms, "load_average": os.getloadavg()[0]}
        result["no_network"].append(found | {"shares": report.times.shares(), "slowest": report.times.slowest()})
        print(
            f"no network, {preprocess}: {report.images_per_s:.0f} images/s, "
            f"{cpu_ms:.1f} ms of a core each, load {os.getloadavg()[0]:.1f}"
        )
    some = Some(source, num_photos)
    torch.set_num_threads(threads)
    preloaded = _preloaded(some, vae)
    report = _encode(some, vae, 1, threads, resizer="torch")
    plain = _diffusers_loop(some, vae)
    waiting = report.times.waiting / report.times.all
    result["embedded"] = {
        "images_per_s": report.images_per_s,
        "preloaded_images_per_s": preloaded,
        "ratio_to_preloaded": report.images_per_s / preloaded,
        "waiting": waiting,
        "diffusers_loop_images_per_s": plain,
        "ratio_to_diffusers_loop": report.images_per_s / plain,
        "steps_s": report.times.steps(),
        "load_average": os.getloadavg()[0],
    }
    print(f"embedded VAE, {vae.dtype}: {report.images_per_s:.2f} images/s, waiting {waiting:.1%} of the time")
    print(f"preloaded tensors: {preloaded:.2f} images/s, so {report.images_per_s / preloaded:.2f}x")
    print(f"plain diffusers loop: {plain:.2f} images/s, so {report.images_per_s / plain:.2f}x")
    if write:
        print(write_result("pipeline", result))


def _crops(source: Any) -> Iterator[np.ndarray]:
    from sdvae.encoding.resize import apply
    from sdvae.images.read import read_image
    from sdvae.store.geometry import Preprocess, plan_geometry

    for entry in source.entries():
        image = read_image(source.read(entry.key))
        yield apply(image, plan_geometry(*image.shape[:2], Preprocess(512), 8))


def _preloaded(source: Any, vae: Any) -> float:
    """Images per second of the network alone, on tensors in memory."""
    from sdvae.pixels import to_device

    images = np.stack(list(_crops(source)))
    batches = [to_device(images[start : start + BATCH_ROWS], vae.device) for start in range(0, len(images), BATCH_ROWS)]
    vae.encode(batches[0])
    begun = time.perf_counter()
    for batch in batches:
        vae.encode(batch)
    return len(images) / (time.perf_counter() - begun)


def _diffusers_loop(source: Any, vae: Any) -> float:
    """Images per second of the loop that people write: open, resize, stack 8, encode, sample, save each."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        vae.save(folder)
        theirs = AutoencoderKL.from_pretrained(folder)
        paths = [source.root / entry.key for entry in source.entries()]
        begun = time.perf_counter()
        for start in range(0, len(paths), 8):
            arrays = []
            for path in paths[start : start + 8]:
                image = Image.open(path).convert("RGB")
                scale = 512 / min(image.size)
                image = image.resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
                )
                left, top = (image.width - 512) // 2, (image.height - 512) // 2
                arrays.append(np.asarray(image.crop((left, top, left + 512, top + 512))))
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                latents = theirs.encode(pixels).latent_dist.sample() * theirs.config.scaling_factor
            for row, latent in enumerate(latents):
                torch.save(latent.clone(), Path(folder) / f"{start + row}.pt")
        return len(paths) / (time.perf_counter() - begun)


# --- Resuming ---


class Dots:
    """Photos of 8x8 pixels that are nowhere."""

    name, root, remarks = "dots", None, ()

    def __init__(self, num_photos: int) -> None:
        self.num_photos = num_photos

    def entries(self) -> list[Entry]:
        """As a listing gives them."""
        return [Entry(f"{number // 1000:06d}/{number:09d}.pgm", 1000, 1) for number in range(self.num_photos)]

    def read(self, key: str) -> bytes:
        """One byte says which it is."""
        return b"P5 8 8 255\n" + bytes([int(key[-7:-4]) % 256]) * 64


@click.command()
@click.option("--shards", "num_shards", default=10_000, show_default=True)
@click.option("--rows", default=100, show_default=True, help="Records in each.")
@click.option("--write", is_flag=True, help="Write results/resume.json.")
def resume(num_shards: int, rows: int, write: bool) -> None:
    """How long it takes to go on with a store of many committed shards, until the first photo is decoded."""
    from sdvae.encoding.encode import encode_dataset
    from sdvae.encoding.manifest import EncodeSettings
    from sdvae.encoding.tasks import Work
    from sdvae.store.geometry import Preprocess
    from sdvae.store.store import Store
    from sdvae.vae import VAE

    source, vae = Dots(num_shards * rows), NoCost(VAE.load(device="cpu", dtype="fp32"))
    settings = EncodeSettings(Preprocess(None, "none"), shard_rows=rows, num_threads=1)
    out = Path(tempfile.mkdtemp()) / "out"
    try:
        with mock.patch("os.fsync"):  # only to have the store sooner
            _build(source, out, vae, settings)
        Store.open(out).paths.done(num_shards - 1).unlink()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        started: list[tuple[float, float]] = []

        def note(phase: str, num_done: int, num_all: int) -> None:
            if phase == "encode":
                started.append((time.perf_counter() - begun, time.process_time() - begun_cpu))

        report = encode_dataset(source, out, vae, settings, work=Work(num_workers=0), progress=note)
        assert report.num_written == num_shards * rows and report.times.num_images == rows
    finally:
        shutil.rmtree(out.parent)
    seconds = {"until_encoding_s": started[0][0], "until_encoding_cpu_s": started[0][1], "all_s": report.seconds}
    print(f"{num_shards} shards, {num_shards * rows} records: encoding begins after {started[0][0]:.1f} s", seconds)
    if write:
        print(write_result("resume", {"num_shards": num_shards, "num_records": num_shards * rows} | seconds))


def _build(source: Dots, out: Path, vae: Any, settings: Any) -> None:
    """The store, through its own functions, but without decoding."""
    from sdvae.encoding.encode import encode_dataset
    from sdvae.encoding.times import Times
    from sdvae.store.roster import Roster
    from sdvae.store.shard import commit_shard, row_sha256

    def commit(store: Any, numbers: Any, source: Any, vae: Any, work: Any, progress: Any) -> Times:
        roster = Roster(file.path for file in store.rosters)
        for number in numbers:
            task = roster.task(number)
            zeros = np.zeros((len(task.records), 4, 1, 1), np.float16)
            moments = {"mean": zeros, "logvar": zeros}
            line = {"status": "written", "latents_sha256": row_sha256(moments, 0)}
            lines = [record.to_json() | line | {"row": row} for row, record in enumerate(task.records)]
            commit_shard(store.paths, number, task.bucket_px, lines, moments)
        return Times()

    encode_dataset(source, out, vae, settings, runner=commit)
