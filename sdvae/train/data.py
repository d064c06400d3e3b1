"""The photos of a run, and the crops of each step: functions of seed, step and key, so that nothing else is kept.

The batch of a step is the same for any number of ranks: each takes every n-th row of it.
"""

import hashlib
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from sdvae import atomic
from sdvae.encoding.load_photo import Failure
from sdvae.encoding.manifest import num_cores
from sdvae.encoding.pipeline import Decoders
from sdvae.encoding.resize import choose_resizer
from sdvae.encoding.scan import scan
from sdvae.encoding.times import Times
from sdvae.errors import ConfigError, TrainError
from sdvae.pixels import to_device
from sdvae.progress import Progress
from sdvae.sealed import seal, unseal
from sdvae.sources.entries import Source
from sdvae.store.buckets import Size
from sdvae.store.geometry import Geometry, Preprocess, plan_geometry
from sdvae.store.records import Record
from sdvae.train.config import DataConfig, Rung

_LOG = logging.getLogger(__name__)

_MAX_WORKERS = 16


def seed_of(*parts: object) -> int:
    """63 bits that depend on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_numbers(*parts: object) -> np.random.Generator:
    """A generator of its own for each combination of parts."""
    return np.random.default_rng(seed_of(*parts))


# --- The photos ---


@dataclass(frozen=True)
class Photos:
    """The records of a run: those that it trains on, and those held out. Fixed when it begins."""

    train: list[Record]
    held_out: list[Record]

    def to_lines(self) -> list[bytes]:
        """One sealed line a photo."""
        both = [(True, self.train), (False, self.held_out)]
        return [
            seal(record.to_json() | {"is_trained_on": is_train}) for is_train, records in both for record in records
        ]

    @classmethod
    def from_file(cls, path: Path) -> "Photos":
        """What `to_lines` wrote; TrainError for a damaged line."""
        records: dict[bool, list[Record]] = {True: [], False: []}
        with path.open("rb") as lines:
            for line in map(unseal, lines):
                if line is None:
                    raise TrainError(
                        f"{path} is damaged, it names the photos of this run; begin the run anew elsewhere"
                    )
                records[line["is_trained_on"]].append(Record.from_json(line))
        return cls(records[True], records[False])


def find_photos(source: Source, data: DataConfig, seed: int, journal: Path, progress: Progress) -> Photos:
    """Scan `source` and hold some photos out: which ones depends on seed and key, so that a grown source keeps them."""
    entries = source.entries()
    for remark in source.remarks:
        _LOG.warning("%s: %s", source.name, remark)
    records = scan(source, entries, Preprocess().max_pixels, journal, partial(progress, "scan"))
    sound = [record for record in records if record.reason is None]
    for record in records:
        if record.reason is not None:
            _LOG.warning("%s is left out: %s", record.key, record.reason)
    sound.sort(key=lambda record: seed_of(seed, "split", record.key))
    photos = Photos(sound[data.held_out :], sound[: data.held_out])
    if not photos.train:
        raise TrainError(
            f"{source.name} has {len(sound)} readable photos, and {data.held_out} are held out: none is left to train "
            "on; give more photos, or a smaller data.held_out"
        )
    return Photos(*(sorted(part, key=lambda record: record.key) for part in (photos.train, photos.held_out)))


# --- The crops ---


@dataclass(frozen=True)
class Crop:
    """One image of a batch."""

    record: Record  # with its geometry
    is_flipped: bool
    draw: int  # seed of all noise that belongs to this image


class Sampler:
    """Which crops make the batch of each step: every photo once an epoch, in an order of that epoch.

    Photos smaller than a rung's crops are left out of that rung. Epochs count within a rung.
    """

    def __init__(self, records: Sequence[Record], data: DataConfig, seed: int, downscale: int) -> None:
        self._data, self._seed = data, seed
        self._firsts = [rung.first_step for rung in data.ladder]
        self._records: list[list[Record]] = []
        self._orders: dict[tuple[int, int], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        for rung in data.ladder:
            if rung.size_px % downscale:
                raise ConfigError(
                    f"data.ladder has {rung.size_px} px, no multiple of {downscale}, which a latent covers"
                )
            large = [record for record in records if record.original_px and min(record.original_px) >= rung.size_px]
            if not large:
                raise TrainError(
                    f"no photo has {rung.size_px} px on its shorter side; give larger ones, or smaller crops"
                )
            if len(large) < len(records):
                few = len(records) - len(large)
                _LOG.warning("%d of %d photos are smaller than crops of %d px", few, len(records), rung.size_px)
            self._records.append(large)

    def rung(self, step: int) -> Rung:
        """The rung that a step is on."""
        return self._data.ladder[bisect_right(self._firsts, step) - 1]

    def epoch(self, step: int) -> float:
        """How often the photos of its rung have been seen before a step."""
        rung = self.rung(step)
        return (step - rung.first_step) * rung.batch_size / len(self._records[self._data.ladder.index(rung)])

    def batch(self, step: int) -> list[Crop]:
        """The crops of a step, those of all ranks."""
        rung = self.rung(step)
        place = self._data.ladder.index(rung)
        first = (step - rung.first_step) * rung.batch_size
        return [self._crop(place, rung.size_px, number) for number in range(first, first + rung.batch_size)]

    def _crop(self, place: int, size_px: int, number: int) -> Crop:
        records = self._records[place]
        epoch, row = divmod(number, len(records))
        if (place, epoch) not in self._orders:
            self._orders.clear()
            self._orders[place, epoch] = random_numbers(self._seed, "order", place, epoch).permutation(len(records))
        record = records[self._orders[place, epoch][row]]
        draw = seed_of(self._seed, place, epoch, record.key)
        random = random_numbers(draw, "crop")
        assert record.original_px is not None
        geometry = random_geometry(record.original_px, size_px, self._data.max_shrink, random)
        is_flipped = self._data.flip and bool(random.random() < 0.5)
        return Crop(replace(record, geometry=geometry), is_flipped, draw)


def random_geometry(original_px: Size, size_px: int, max_shrink: float | None, random: np.random.Generator) -> Geometry:
    """A random square of a photo, as `size_px` x `size_px`.

    With `max_shrink` None the photo is resized to cover it, as `encode` does; else half of the squares are cut as they
    are, and half up to `max_shrink` as large.
    """
    shorter = min(original_px)
    side = shorter
    if max_shrink is not None:
        largest = min(shorter, int(size_px * max_shrink))
        side = size_px if random.random() < 0.5 else int(random.integers(size_px, largest + 1))
    resized = tuple(max(size_px, (2 * extent * size_px + side) // (2 * side)) for extent in original_px)
    top, left = (int(random.integers(0, extent - size_px + 1)) for extent in resized)
    return Geometry((resized[0], resized[1]), (top, left, size_px, size_px))


def held_out_geometry(record: Record, size_px: int, downscale: int) -> Geometry:
    """The centre of a held-out photo, as `encode` cuts it."""
    assert record.original_px is not None
    return plan_geometry(*record.original_px, Preprocess(size_px), downscale, record.key)


# --- The pixels ---


@dataclass(frozen=True)
class Batch:
    """What goes through the network at once."""

    pixels: Tensor  # (N, 3, H, W) in [-1, 1]
    draws: list[int]  # of each image, the seed of its noise


def memory_format(device: torch.device) -> torch.memory_format:
    """How networks and pixels lie in memory while a VAE is trained.

    On a CPU contiguous: there the backward pass of convolutions takes 1.8 times as long in channels_last (oneDNN, fp32,
    AVX2), and the forward pass as long in both.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


class Loader:
    """Iterates over the micro-batches of this rank from `first_step` on, decoded while the network computes.

    A photo that cannot be read any more is replaced by another of its batch, with one warning.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        data: DataConfig,
        steps: range,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler, self._steps = sampler, steps
        self._num_parts, self._rank, self._world_size = data.micro_batches, rank, world_size
        num_parts = data.micro_batches * world_size
        for rung in data.ladder:
            if rung.batch_size % num_parts:
                raise ConfigError(
                    f"a batch of {rung.batch_size} images cannot be split into {data.micro_batches} micro-batches on "
                    f"{world_size} ranks; give a batch_size in data.ladder that is a multiple of {num_parts}"
                )
        workers = min(_MAX_WORKERS, max(1, num_cores() // 2)) if data.workers is None else data.workers
        self.times = Times(num_workers=workers)
        most = max(rung.batch_size // num_parts * rung.size_px**2 * 3 for rung in data.ladder)
        self._decoders: Decoders[Tensor] = Decoders(
            source,
            Preprocess(resizer=choose_resizer("lanczos")),
            self._plan(),
            slot_bytes=most,
            stage=partial(to_device, device=device),
            times=self.times,
        )
        self._planned: deque[list[Crop]] = deque()  # what the thread that decodes has begun
        self._told: set[str] = set()

    def __enter__(self) -> "Loader":
        self._decoders.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoders.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Batch]:
        for pixels, failures in self._decoders:
            part = self._planned.popleft()
            pixels = self._replace(pixels, part, failures)
            for row, crop in enumerate(part):
                if crop.is_flipped:
                    pixels[row] = pixels[row].flip(-1)
            yield Batch(pixels.to(memory_format=memory_format(pixels.device)), [crop.draw for crop in part])

    def _plan(self) -> Iterator[tuple[Size, list[Record]]]:
        stride = self._num_parts * self._world_size
        for step in self._steps:
            crops = self._sampler.batch(step)
            size_px = self._sampler.rung(step).size_px
            for number in range(self._num_parts):
                part = crops[number * self._world_size + self._rank :: stride]
                self._planned.append(part)
                yield (size_px, size_px), [crop.record for crop in part]

    def _replace(self, pixels: Tensor, part: list[Crop], failures: list[Failure | None]) -> Tensor:
        good = [row for row, failure in enumerate(failures) if failure is None]
        for row, failure in enumerate(failures):
            if failure is None:
                continue
            key = part[row].record.key
            if not good:
                raise TrainError(
                    f"no photo of a batch can be read, {key} for one: {failure.reason}; restore the photos"
                )
            if key not in self._told:
                self._told.add(key)
                _LOG.warning("%s is left out of its batches: %s", key, failure.reason)
            pixels[row] = pixels[good[row % len(good)]]
        return pixels


def write_photos(path: Path, photos: Photos) -> None:
    """Fix the photos of a run."""
    atomic.write_bytes(path, *photos.to_lines())
