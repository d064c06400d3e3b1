"""Latents to image files: a store, a folder of latent files or one such file in, a folder of images out."""

import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae import atomic
from sdvae.engine.memory import parse_bytes
from sdvae.errors import LatentsError, OutputError, StoreError
from sdvae.images.provenance import Provenance
from sdvae.images.write import encode_image
from sdvae.progress import Progress, silent
from sdvae.reading.declaration import Scaling, declared_files
from sdvae.reading.latent_files import FoundLatents, list_latent_files, read_latents
from sdvae.reading.names import plan_names
from sdvae.reading.spaces import require_space, warn_of_denied
from sdvae.reading.spread import Spread
from sdvae.sources.kinds import is_junk
from sdvae.staging import download
from sdvae.store.buckets import Size
from sdvae.store.records import written
from sdvae.store.store import Store
from sdvae.vae import VAE

Format = Literal["png", "jpeg", "webp"]

SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
# Pixels that go through the network at once: enough to fill a GPU with 8 GiB; a CPU gains nothing from batches.
_AUTO_PIXELS = {"cuda": 4 * 512**2}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeSettings:
    """What `sdvae decode` was asked for.

    `latents` speaks for files that do not say it themselves; `space`, for the latents and the VAE, where it is not
    proved that they have one. `has_metadata`: the image files name the VAE, its latent space and sdvae's version.
    """

    format: Format = "png"
    latents: Scaling | None = None
    batch_size: int | None = None  # None: chosen for the device
    budget_bytes: int | None = None  # None: what the device has free
    space: str | None = None
    has_metadata: bool = True

    def __post_init__(self) -> None:
        if self.budget_bytes is not None:
            parse_bytes(self.budget_bytes)


@dataclass(frozen=True)
class DecodeReport:
    """What was done."""

    num_written: int
    seconds: float
    skipped: tuple[str, ...] = ()  # what is wrong with each file of a folder that was left out
    remarks: tuple[str, ...] = ()  # what looks wrong, but was decoded

    @property
    def images_per_s(self) -> float:
        """Images written per second, loading of the VAE not counted."""
        return self.num_written / self.seconds


@dataclass(frozen=True)
class _Series:
    """Latents of one shape: whose they are, and how to read some of them."""

    latents_px: tuple[int, int]  # (h, w)
    keys: list[str]
    sizes_px: list[Size]  # of each image, (height, width), without what was padding
    read: Callable[[slice], Tensor]  # rows -> (rows, C, h, w) raw


def decode_dataset(
    source: str | Path,
    out: str | Path,
    vae: VAE,
    settings: DecodeSettings | None = None,
    progress: Progress = silent,
) -> DecodeReport:
    """Decode every image of `source` to a file in `out`, named after its key (see `plan_names`).

    Files of latents are all checked before the first image is written; those of a folder that cannot be decoded are
    left out and reported. `out` must be new, empty, or hold nothing but files of the same names, which are written
    anew; or, for one image, a file name of a picture. Raises LatentsError where nothing can be decoded, StoreError,
    and UnsafeFileError for any file that could run code.
    """
    source, out, settings = Path(source), Path(out), settings or DecodeSettings()
    is_store = (source / "manifest.json").exists()
    spread = Spread(vae.config)
    skipped: tuple[str, ...] = ()
    if is_store:
        series = _open_store(source, vae, settings.space)
    else:
        series, skipped = _open_files(source, vae, settings.latents, spread)
    remarks = tuple(spread.doubts())
    for remark in remarks:
        _LOG.warning("%s: %s", source, remark)
    keys = [key for one in series for key in one.keys]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise LatentsError(f"two images of {source} would both be called {twice[0]}; rename or move that file")
    if out.suffix.lower() in _FORMATS and not out.is_dir():
        if len(keys) > 1:
            raise OutputError(f"{out} names one picture, but {source} holds {len(keys)} images; give a folder")
        format, out, names = _FORMATS[out.suffix.lower()], out.parent.absolute(), {keys[0]: out.name}
    else:
        format = settings.format
        names = dict(zip(keys, plan_names(keys, SUFFIXES[format]), strict=True))
        _claim(out, set(names.values()))
        out = out.absolute()

    if not is_store:
        warn_of_denied(vae, settings.space)
    provenance = Provenance(vae.fingerprint, vae.told_space) if settings.has_metadata else None

    def write(key: str, image: NDArray[np.uint8]) -> None:
        path = out / names[key]
        atomic.make_folder(path.parent)
        atomic.write_bytes(path, encode_image(image, format, provenance))

    start = time.perf_counter()
    num_written = 0
    progress("decode", 0, len(keys))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # to compress a PNG takes longer than a GPU's decode
        pending: list[Future[None]] = []
        for batch in _decode(series, vae, settings):
            num_written += _finish(pending)
            pending = [pool.submit(write, key, image) for key, image in batch]
            progress("decode", num_written, len(keys))
        num_written += _finish(pending)
    progress("decode", num_written, len(keys))
    return DecodeReport(num_written, time.perf_counter() - start, skipped, remarks)


def _decode(
    series: list[_Series], vae: VAE, settings: DecodeSettings
) -> Iterator[list[tuple[str, NDArray[np.uint8]]]]:  # batches of (key, image)
    for one in series:
        image_pixels = math.prod(one.latents_px) * vae.config.downscale**2
        num_rows = settings.batch_size or max(1, _AUTO_PIXELS.get(vae.device.type, 512**2) // image_pixels)
        batches = [slice(first, first + num_rows) for first in range(0, len(one.keys), num_rows)]
        pixels = (vae.decode(one.read(rows), settings.budget_bytes) for rows in batches)
        for rows, images in zip(batches, download(pixels), strict=True):
            cropped = [image[: size[0], : size[1]] for image, size in zip(images, one.sizes_px[rows], strict=True)]
            yield list(zip(one.keys[rows], cropped, strict=True))


def _finish(pending: list[Future[None]]) -> int:
    for future in pending:
        future.result()
    return len(pending)


def _open_store(root: Path, vae: VAE, space: str | None) -> list[_Series]:
    store = Store.open(root)
    require_space(store, vae, space)
    num_there = len(store.paths.committed())
    if num_there < store.num_shards:
        _LOG.warning("%s is not finished: %d of its %d shards are there", root, num_there, store.num_shards)
    series = []
    for shard in store.shards():
        lines = list(written(shard.records()))
        if not lines:
            continue
        mean, _ = shard.moments()
        rows = [line["row"] for line in lines]
        sizes = [without_padding(line["resized_px"], line["crop_px"]) for line in lines]
        series.append(_Series(mean.shape[2:], [line["key"] for line in lines], sizes, partial(_read_rows, mean, rows)))
    if not series:
        raise StoreError(f"{root} holds no image; run sdvae encode to its end, or see its quarantine.jsonl")
    return series


def without_padding(resized_px: Size, crop_px: tuple[int, int, int, int]) -> Size:
    """The part of a crop that lies inside the resized photo."""
    top, left, height, width = crop_px
    return min(height, resized_px[0] - top), min(width, resized_px[1] - left)


def _read_rows(mean: NDArray[np.floating[Any]], rows: list[int], places: slice) -> Tensor:
    return torch.from_numpy(mean[rows[places]].astype(np.float32))


def _open_files(source: Path, vae: VAE, told: Scaling | None, spread: Spread) -> tuple[list[_Series], tuple[str, ...]]:
    """The latents of each size, and what is wrong with the files of a folder that hold none for this VAE."""
    declared = declared_files(source)
    held: dict[Path, FoundLatents] = {}  # the last file: one of many images is read once for all of its batches

    def load(path: Path) -> FoundLatents:
        place = path.absolute()  # which holds when the program leaves its folder; messages name the path as given
        if place not in held:
            held.clear()
            held[place] = read_latents(path, vae.config, told, declared)
        return held[place]

    def read(places: list[tuple[Path, int]], rows: slice) -> Tensor:
        return torch.stack([load(path).raw[row] for path, row in places[rows]])

    keys: defaultdict[Size, list[str]] = defaultdict(list)
    places: defaultdict[Size, list[tuple[Path, int]]] = defaultdict(list)
    skipped: list[str] = []
    for path in list_latent_files(source):
        try:
            found = load(path)
        except LatentsError as error:
            if path == source:
                raise
            skipped.append(str(error))
            continue
        spread.add(found)
        num_images, _, height, width = found.raw.shape
        name = path.relative_to(source).as_posix() if path != source else path.name
        keys[height, width] += [name] if num_images == 1 else [_numbered(name, row) for row in range(num_images)]
        places[height, width] += [(path.absolute(), row) for row in range(num_images)]
    if not keys:
        raise LatentsError(f"{source} holds no file that can be decoded; of {len(skipped)}, the first: {skipped[0]}")
    downscale = vae.config.downscale
    series = [
        _Series((h, w), keys[h, w], [(h * downscale, w * downscale)] * len(keys[h, w]), partial(read, places[h, w]))
        for h, w in keys
    ]
    return series, tuple(skipped)


def _numbered(name: str, row: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{row:05d}{path.suffix}"))


def _claim(out: Path, names: set[str]) -> None:
    """Refuse an output folder that holds anything but files of these names, and what desktops leave.

    A link counts, wherever it leads.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder for the images")
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        is_ours = path.is_file() and (name in names or is_junk(name))
        if path.is_symlink() or not (is_ours or path.is_dir()):
            raise OutputError(
                f"{out} holds {path.relative_to(out)}, which this command did not write; give an empty folder"
            )
    atomic.make_folder(out)
    atomic.sweep(out)
