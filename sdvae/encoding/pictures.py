"""Pictures beside the photos, a mask or a control of each, as streams of their store.

Each goes through the geometry of its photo: resized, cropped and mirrored alike. A mask becomes one channel in [0, 1]
of the latents' size, a control what the VAE makes of it.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.encoding.attach import StreamReport, count_rows, finished_store
from sdvae.encoding.load_photo import Failure
from sdvae.encoding.manifest import fixed_threads, require_same_vae
from sdvae.encoding.pipeline import Decoders
from sdvae.encoding.prepare import list_entries
from sdvae.encoding.scan import scan
from sdvae.encoding.tasks import Work, choose_workers
from sdvae.encoding.times import Times
from sdvae.pixels import fit_channels, to_device
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source
from sdvae.sources.open import open_source
from sdvae.store.buckets import Size
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record, written
from sdvae.store.roster import rows_in_batch
from sdvae.store.shard import STORE_DTYPES, Shard
from sdvae.store.store import Store
from sdvae.store.streams import Declaration, Row, Stream
from sdvae.vae import VAE

_BLACK = (0, 0, 0)  # under a transparent mask: what is clear does not count


def encode_pictures(
    path: str | Path, name: str, pictures: str | Path | Source, vae: VAE, work: Work | None = None,
    progress: Progress = silent,
) -> StreamReport:  # fmt: skip
    """A stream of the finished store `path` from a picture of each record: masks if `name` is "mask", else controls.

    The picture of `cats/a.jpg` is `cats/a.jpg` of `pictures`, or else the only one called `cats/a` but for its suffix.
    A record without one, or with one that has another aspect ratio or cannot be read, has no row. Shards that have
    their rows already are left as they are. Raises StoreError where the store was made by another VAE.
    """
    store, source = finished_store(path), open_source(pictures)
    if name != "mask":
        require_same_vae(store, vae)
    run = _Run(store, name, vae, work or Work())
    return run.encode(source, progress)


@dataclass(frozen=True)
class _Batch:
    """So many rows of a shard from `first` on, and the pictures of those that have one, by row."""

    first: int
    num_rows: int
    pictures: dict[int, Record]


class _Run:
    """What `encode_pictures` does: one shard after the other, while the next pictures are decoded."""

    def __init__(self, store: Store, name: str, vae: VAE, work: Work) -> None:
        self.store, self.vae, self.work = store, vae, work
        self.is_mask = name == "mask"
        manifest = store.manifest
        preprocess = Preprocess.from_json(manifest["preprocess"])
        self.preprocess = replace(preprocess, background=_BLACK) if self.is_mask else preprocess
        self.dtype = STORE_DTYPES["fp16" if self.is_mask else manifest["store_dtype"]]
        code = f"F{8 * self.dtype.itemsize}"
        told = Declaration("mask", code, "mirror") if self.is_mask else Declaration("control", code, "same")
        self.has_flips = preprocess.flip and not self.is_mask
        self.stream = Stream.begin(store, name, replace(told, flip="stored") if self.has_flips else told)
        self.missing: Counter[str] = Counter()  # reason -> records

    def encode(self, source: Source, progress: Progress) -> StreamReport:
        """All shards that lack their rows."""
        shards = [shard for shard in self.store.shards() if not self.stream.has(shard.number)]
        if shards:
            found = self._scan(source, progress)
            plan = {shard.number: list(self._plan(shard, found)) for shard in shards}
            compute = self.store.manifest["compute"]
            with fixed_threads(compute["num_threads"]), self.vae.deterministic(compute.get("images_at_once", 0)):
                self._encode(source, shards, plan, progress)
        num_records, num_missing = count_rows(self.store, self.stream)
        if num_before := num_missing - self.missing.total():
            self.missing["none in an earlier run"] = num_before
        return StreamReport(self.stream.name, num_records, dict(self.missing.most_common()))

    def _scan(self, source: Source, progress: Progress) -> dict[str, Record | str]:
        """The picture of each record, or why it has none."""
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "scan.jsonl"
            entries = list_entries(source)
            pictures = scan(source, entries, self.preprocess.max_pixels, journal, partial(progress, "scan"))
        return pair(
            (Record.from_json(line) for shard in self.store.shards() for line in written(shard.records())), pictures
        )

    def _plan(self, shard: Shard, found: dict[str, Record | str]) -> Iterator[_Batch]:
        keys = {line["row"]: line["key"] for line in written(shard.records())}
        size = rows_in_batch(shard.bucket_px, self.store.manifest["compute"]["batch_rows"]) if shard.bucket_px else 1
        for first in range(0, shard.num_rows, size):
            num_rows = min(size, shard.num_rows - first)
            pictures: dict[int, Record] = {}
            for row in range(first, first + num_rows):
                picture = found[keys[row]] if row in keys else None
                if isinstance(picture, Record):
                    pictures[row] = picture
                elif picture is not None:
                    self.missing[picture] += 1
            yield _Batch(first, num_rows, pictures)

    def _encode(
        self, source: Source, shards: Sequence[Shard], plan: dict[int, list[_Batch]], progress: Progress
    ) -> None:
        num_workers = choose_workers(self.vae.device) if self.work.num_workers is None else self.work.num_workers
        wanted = [(shard, batch) for shard in shards for batch in plan[shard.number] if batch.pictures]
        sizes = [len(batch.pictures) * _area(shard.bucket_px) for shard, batch in wanted]
        decoders = Decoders(
            source,
            self.preprocess,
            ((shard.bucket_px, list(batch.pictures.values())) for shard, batch in wanted if shard.bucket_px),
            max(sizes, default=0) * self.preprocess.num_channels,
            self._to_masks if self.is_mask else partial(to_device, device=self.vae.device),
            Times(num_workers=num_workers),
        )
        num_done, num_all = 0, sum(shard.num_rows for shard in shards)
        with decoders:
            ready = iter(decoders)
            for shard in shards:
                rows: list[Row] = [None] * shard.num_rows
                flipped: list[Row] = [None] * shard.num_rows
                for batch in plan[shard.number]:
                    if batch.pictures:
                        self._fill(batch, *next(ready), rows, flipped)
                    num_done += batch.num_rows
                    progress(f"encode {self.stream.name}", num_done, num_all)
                self.stream.commit(shard, rows, flipped if self.has_flips else None)

    def _fill(
        self, batch: _Batch, made: Tensor, failures: Sequence[Failure | None], rows: list[Row], flipped: list[Row]
    ) -> None:
        """Put what a batch gave into its rows."""
        values = [made.numpy()] if self.is_mask else self._encode_batch(batch, made)
        for place, (row, failure) in enumerate(zip(batch.pictures, failures, strict=True)):
            of_row = [np.ascontiguousarray(one[place]) for one in values]
            if failure is None and not all(np.isfinite(one).all() for one in of_row):
                failure = Failure("encode", "its latents are not finite")
            if failure is not None:
                self.missing[failure.reason] += 1
                continue
            rows[row], flipped[row] = of_row[0], of_row[-1]

    def _encode_batch(self, batch: _Batch, pixels: Tensor) -> list[NDArray[Any]]:
        """The latents of a batch, and of its mirror where the store has mirrored photos.

        Where pictures are missing the batch has black ones, so that these change no bit of the others.
        """
        full = pixels.new_full((batch.num_rows, *pixels.shape[1:]), -1.0)
        places = [row - batch.first for row in batch.pictures]
        full[places] = pixels
        full = fit_channels(full, self.vae.config.in_channels)
        found = [full, full.flip(3)] if self.has_flips else [full]
        means = [self.vae.encode(one, self.work.budget_bytes).mean[places] for one in found]
        with np.errstate(over="ignore"):
            return [mean.cpu().numpy().astype(self.dtype) for mean in means]

    def _to_masks(self, images: NDArray[np.uint8]) -> Tensor:  # (N, H, W, 3) -> (N, 1, h, w) in [0, 1]
        """The mean of all pixels that one latent stands for, by torch's area filter."""
        levels = torch.from_numpy(images.mean(3, dtype=np.float32) / 255)[:, None]
        return torch.nn.functional.avg_pool2d(levels, self.vae.config.downscale).to(torch.float16)


def pair(photos: Iterable[Record], pictures: Iterable[Record]) -> dict[str, Record | str]:
    """By the key of each photo its picture, which has the photo's geometry, or why it has none."""
    photos = list(photos)
    by_key = {picture.key: picture for picture in pictures}
    by_stem: defaultdict[str, list[Record]] = defaultdict(list)
    for picture in by_key.values():
        by_stem[_stem(picture.key)].append(picture)
    sharing = Counter(_stem(photo.key) for photo in photos if photo.key not in by_key)
    found: dict[str, Record | str] = {}
    for photo in photos:
        alike = [by_key[photo.key]] if photo.key in by_key else by_stem[_stem(photo.key)]
        if not alike:
            found[photo.key] = "no picture of this name"
        elif len(alike) > 1 or (photo.key not in by_key and sharing[_stem(photo.key)] > 1):
            found[photo.key] = "several pictures or photos of this name"
        else:
            found[photo.key] = _fit(photo, alike[0])
    return found


def _fit(photo: Record, picture: Record) -> Record | str:
    """The picture with the geometry of its photo; a reason where it shows something else or cannot be read."""
    if picture.reason is not None or picture.original_px is None or photo.original_px is None:
        return picture.reason or "no size"
    (height, width), (photo_height, photo_width) = picture.original_px, photo.original_px
    # By up to one pixel of the picture, which may be smaller than the photo, its sides are rounded.
    if abs(height * photo_width - width * photo_height) > max(photo_height, photo_width):
        return "another aspect ratio than its photo"
    return replace(picture, geometry=photo.geometry)


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()


def _area(size: Size | None) -> int:
    return size[0] * size[1] if size else 0
