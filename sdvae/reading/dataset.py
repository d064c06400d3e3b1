"""LatentDataset: a store as a training loop wants it; what it gives depends on seed, key and epoch alone."""

import bisect
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from sdvae.amounts import count, size_text
from sdvae.errors import ConfigError, DeviceError, ShapeError, StoreError, VerifyError
from sdvae.latents import scale, scaled_shape
from sdvae.notebook import card
from sdvae.posterior import DiagonalGaussian
from sdvae.reading.streams import StreamReader
from sdvae.store.buckets import Size
from sdvae.store.remote import local_copy
from sdvae.store.shard import Shard
from sdvae.store.store import Store, differences
from sdvae.store.streams import Stream, stream_names

if TYPE_CHECKING:
    from sdvae.vae import VAE

Index = SupportsIndex | tuple[SupportsIndex, int]  # a record, or (record, epoch)
Example = dict[str, Any]

_LOG = logging.getLogger(__name__)
_CHUNK_ROWS = 8  # rows converted at once: what stays in a core's cache is converted four times as fast


class LatentDataset(Dataset[Example]):
    """The written records of a finished store, as scaled latents with what a diffusion model is conditioned on.

    `dataset[i]` is a record in the epoch of `set_epoch`, `dataset[i, epoch]` in that one, and `dataset[[...]]` a
    batch of either. A record is a dict:

        latents        (C, h, w) float32, (latents - shift_factor) * scaling_factor, by the store's `latent_scaling`;
                       of FLUX.2 in patches, (4C, h/2, w/2)
        key, caption   str; the caption is "" where there is none
        label          index into `classes`, -1 where there is none
        original_size  (height, width) of the photo, as SDXL is conditioned; int64, like
        crop_top_left  (top, left) of the crop in the resized photo, and
        target_size    (height, width) of the crop
        is_flipped     whether these are the latents of the mirrored photo

    and for each of `streams` (names; all that the store has by default) its rows: "mask" (1, h, w) in [0, 1], a control
    (C, h, w) scaled as latents are, or what was attached; beside it NAME_length, the length of the first axis. In a
    batch shorter rows end in zeros. Where a record has none the length is 0, a mask ones and all else zeros.

    `sample` draws from the posterior, anew in each epoch; without it latents are the mean. Where the store holds
    mirrored photos, either is as likely. Both draws come from Philox on the CPU, keyed by (seed, key) at a counter
    from the epoch: no worker, rank, resumption, batch or device changes them.

    Records are those of the newest generation that is complete, or of an older `generation`. Numbers are read from
    memory maps, or before the first epoch with `preload`. Raises StoreError where that generation is not complete, or
    of another VAE than `expect_vae` (a VAE, or its fingerprint); VerifyError for a damaged store.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sample: bool = True,
        seed: int = 0,
        preload: Literal["ram", "cuda"] | None = None,
        expect_vae: "VAE | str | None" = None,
        streams: Sequence[str] | None = None,
        generation: int | None = None,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed}; it must be a number of 64 bits, 0 or above")
        if preload not in (None, "ram", "cuda"):
            raise ConfigError(f"preload is {preload!r}; choose 'ram', 'cuda' or None")
        if preload == "cuda" and not torch.cuda.is_available():
            raise DeviceError("preload='cuda' needs a CUDA device, and torch sees none; use preload='ram'")
        self.store = Store.open(local_copy(path))
        if expect_vae is not None:
            _require_vae(self.store, expect_vae)
        self.latent_scaling = self.store.latent_scaling
        self.sample, self.seed, self.preload = sample, seed, preload
        self.has_flips: bool = self.store.manifest["preprocess"].get("flip", False)
        self._shards, rows = _written_shards(self.store, generation)
        names = stream_names(self.store) if streams is None else streams
        self._streams = [
            StreamReader(Stream.open(self.store, name), self._shards, self.latent_scaling) for name in names
        ]
        self._starts = list(itertools.accumulate(map(len, rows), initial=0))
        # In shared memory: `set_epoch` reaches workers that live on from epoch to epoch.
        with torch.inference_mode(False):  # else `set_epoch` could not write to it
            epoch = torch.zeros((), dtype=torch.int64, device="cpu")
            self._epoch = epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._open: dict[int, _MappedShard] = {}
        self._classes: dict[Any, int] | None = None
        if preload:
            device, needed = ("cuda" if preload == "cuda" else "cpu"), (["mean", "logvar"] if sample else ["mean"])
            for position in range(len(self._shards)):
                self._opened(position).preload(device, needed)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(records)} of {size_text(*size)} px" for size, records in self.buckets.items())
        return f"LatentDataset({str(self.store.paths.root)!r}: {sizes}, {'sampled' if self.sample else 'means'})"

    def _repr_html_(self) -> str:
        sizes = {f"{size_text(*size)} px": count(len(records), "record") for size, records in self.buckets.items()}
        drawn = "sampled anew in each epoch" if self.sample else "means"
        return card(f"LatentDataset {self.store.paths.root}", {**sizes, "latents": drawn})

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def buckets(self) -> dict[Size, NDArray[np.int64]]:
        """The numbers of the records of each size (height, width) in pixels."""
        numbers: dict[Size, list[NDArray[np.int64]]] = {}
        for shard, (start, end) in zip(self._shards, itertools.pairwise(self._starts), strict=True):
            assert shard.bucket_px is not None
            numbers.setdefault(shard.bucket_px, []).append(np.arange(start, end))
        return {bucket_px: np.concatenate(found) for bucket_px, found in numbers.items()}

    @property
    def classes(self) -> list[Any]:
        """The labels of all records, sorted; the first look reads every index: some seconds for a million records."""
        return list(self._class_numbers())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of indexes that name none; `BucketBatchSampler` names it with each index."""
        self._epoch.fill_(epoch)

    def record(self, index: SupportsIndex) -> dict[str, Any]:
        """What the store's index says about a record, as the generation has it (docs/store.md)."""
        position, place = self._find(range(len(self))[index])
        return self._opened(position).record(place)

    def __getitem__(self, index: Index | Sequence[Index]) -> Example:
        if isinstance(index, list):
            return self._read(index)
        return {name: values[0] for name, values in self._read([index]).items()}  # type: ignore[list-item]

    def __getitems__(self, indices: Sequence[Index]) -> list[Example]:
        batch = self._read(indices)
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        # A map goes to no other process; a worker opens its own. What was preloaded, torch shares.
        return self.__dict__ | ({} if self.preload else {"_open": {}})

    def _read(self, indices: Sequence[Index]) -> Example:
        """Records of one size, each value stacked."""
        if self.preload == "cuda" and get_worker_info() is not None:
            raise DeviceError("latents on the GPU cannot be read by worker processes; give the loader num_workers=0")
        epoch_now, every = int(self._epoch), range(len(self))
        drawn = [index if isinstance(index, tuple) else (index, epoch_now) for index in indices]
        found = [self._find(every[record]) for record, _ in drawn]
        shards = [self._opened(position) for position, _ in found]
        places = [place for _, place in found]
        if len({shard.shape for shard in shards}) > 1:
            buckets = {self._shards[position].bucket_px for position, _ in found}
            sizes = sorted(size_text(*bucket) for bucket in buckets if bucket)
            raise ShapeError(f"a batch needs one size, this has {', '.join(sizes)}; draw with BucketBatchSampler")
        records = [shard.record(place) for shard, place in zip(shards, places, strict=True)]
        rows = [record["row"] for record in records]
        streams = [
            record_stream(self.seed, record["key"], epoch) if self.sample or self.has_flips else None
            for record, (_, epoch) in zip(records, drawn, strict=True)
        ]
        flips = [self.has_flips and stream is not None and bool(stream.random_raw() & 1) for stream in streams]
        batch = _conditions(records, flips)
        numbers = self._class_numbers() if any(record["label"] is not None for record in records) else {}
        labels = [-1 if record["label"] is None else numbers[record["label"]] for record in records]
        for reader in self._streams:
            batch |= reader.read([shard.shard for shard in shards], rows, flips)
        return {"latents": self._latents(shards, rows, flips, streams), "label": _numbers(labels)} | batch

    def _latents(
        self,
        shards: list["_MappedShard"],
        rows: list[int],
        flips: list[bool],
        streams: list[Philox | None],
    ) -> Tensor:  # (N, C, h, w) float32, scaled
        def stacked(name: str, chunk: slice) -> Tensor:
            places = zip(shards[chunk], rows[chunk], flips[chunk], strict=True)
            return torch.stack([shard.tensors[name + "_flip" * flip][row] for shard, row, flip in places]).float()

        device = "cuda" if self.preload == "cuda" else "cpu"
        shape = scaled_shape(shards[0].shape, self.latent_scaling)
        batch = torch.empty((len(rows), *shape), dtype=torch.float32, device=device)
        with torch.autocast(device, enabled=False):  # a CPU's in bf16 would round what is stacked in fp16
            for start in range(0, len(rows), _CHUNK_ROWS):
                chunk = slice(start, start + _CHUNK_ROWS)
                latents = stacked("mean", chunk)
                if self.sample:
                    posterior = DiagonalGaussian(latents, stacked("logvar", chunk))
                    latents = posterior.mean + posterior.std * _noise(streams[chunk], shards[0].shape).to(device)
                batch[chunk] = scale(latents, self.latent_scaling)
        return batch

    def _find(self, record: int) -> tuple[int, int]:  # (position in self._shards, number of the written record there)
        position = bisect.bisect(self._starts, record) - 1
        return position, record - self._starts[position]

    def _opened(self, position: int) -> "_MappedShard":
        if position not in self._open:
            self._open[position] = _MappedShard(self.store, self._shards[position])
        return self._open[position]

    def _class_numbers(self) -> dict[Any, int]:
        if self._classes is None:
            opened = map(self._opened, range(len(self._shards)))
            found = {shard.record(place)["label"] for shard in opened for place in range(len(shard.spans))} - {None}
            ordered = sorted(found, key=lambda label: (isinstance(label, str), label))
            self._classes = {label: number for number, label in enumerate(ordered)}
        return self._classes


def record_stream(seed: int, key: str, epoch: int) -> Philox:
    """The random bits of one record in one epoch: those of its key, wherever it lies and whoever asks first."""
    identity = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return Philox(key=seed << 64 | identity, counter=epoch << 192)


class _MappedShard:
    """A shard under memory maps: its numbers, and the lines of its index, read one by one.

    torch's maps keep no file open: numpy's and Python's do, and a million records in shards of 1,024 would ask
    for more files than a process may open.
    """

    def __init__(self, store: Store, shard: Shard) -> None:
        assert shard.tensors_file is not None
        self.shard = shard
        shard.require_whole_index()
        shard.tensors()  # checks length and header
        places, file = shard.places, shard.tensors_file
        starts = places.starts_in(file.path)
        self.shape = places.shape[1:]
        numbers = _map_file(file.path, file.num_bytes)
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[store.manifest["store_dtype"]]
        self.tensors = {
            name: numbers[start:][: places.tensor_bytes].view(dtype).view(places.shape)
            for name, start in starts.items()
        }
        self._index_path = shard.index_file.path
        self._text: NDArray[np.uint8] = _map_file(shard.index_file.path, shard.index_file.num_bytes).numpy()
        ends = np.flatnonzero(self._text == ord("\n")) + 1
        self.spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)  # of the line of each row
        self._rows: Sequence[int] = range(shard.num_rows)
        self._texts: dict[int, dict[str, Any]] = {}  # what newer generations say, by the number of the written record
        if shard.num_quarantined or shard.changes:
            rows: list[int | None] = [json.loads(self._line(span))["row"] for span in self.spans]
            retired = {record for record, change in shard.changes.items() if change.is_retired}
            kept = [record for record, row in enumerate(rows) if row is not None and record not in retired]
            self.spans = self.spans[kept]
            self._rows = [row for row in map(rows.__getitem__, kept) if row is not None]
            changed = ((place, shard.changes.get(record)) for place, record in enumerate(kept))
            self._texts = {place: change.texts for place, change in changed if change}

    def record(self, place: int) -> dict[str, Any]:
        """The line of a written record."""
        record: dict[str, Any] = json.loads(self._line(self.spans[place]))
        if record["row"] != self._rows[place]:
            raise VerifyError(f"{self._index_path} is damaged: its lines do not count its rows")
        return record | self._texts[place] if place in self._texts else record

    def preload(self, device: str, needed: list[str]) -> None:
        """Copy the numbers to where no disk is asked for them: those named, and the same of mirrored photos."""
        names = [name for name in self.tensors if name.removesuffix("_flip") in needed]
        self.tensors = {name: self.tensors[name].to(device, copy=True) for name in names}

    def _line(self, span: NDArray[np.int64]) -> str:
        return self._text[span[0] : span[1]].tobytes().decode()


def _map_file(path: Path, num_bytes: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def _noise(streams: list[Philox | None], shape: tuple[int, ...]) -> Tensor:  # (N, *shape), standard normal
    noise = np.empty((len(streams), *shape), np.float32)
    for values, stream in zip(noise, streams, strict=True):
        assert stream is not None
        Generator(stream).standard_normal(dtype=np.float32, out=values)
    return torch.from_numpy(noise)


def _conditions(records: list[dict[str, Any]], flips: list[bool]) -> Example:
    corners = []
    for record, is_flipped in zip(records, flips, strict=True):
        top, left, _, width = record["crop_px"]
        # Mirrored, the crop begins where it ended; a crop that is padded begins at the border.
        corners.append((top, max(0, record["resized_px"][1] - left - width) if is_flipped else left))
    return {
        "key": [record["key"] for record in records],
        "caption": [record["caption"] or "" for record in records],
        "original_size": _numbers([record["original_px"] for record in records]),
        "crop_top_left": _numbers(corners),
        "target_size": _numbers([record["bucket_px"] for record in records]),
        "is_flipped": torch.tensor(flips, dtype=torch.bool, device="cpu"),
    }


def _numbers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:  # int64
    return torch.from_numpy(np.array(values, np.int64))  # torch.tensor takes three times as long


def _written_shards(store: Store, generation: int | None) -> tuple[list[Shard], list[Sequence[int]]]:
    """The shards that have records in a view, and the rows of these."""
    complete, newest = store.newest_complete(), len(store.rosters) - 1
    shards = store.shards(generation)
    if complete is None or (generation is not None and generation > complete):
        raise StoreError(
            f"{store.paths.root} is not finished: {len(store.paths.committed())} of its {store.num_shards} shards are "
            "there; run sdvae encode to its end"
        )
    if generation is None and complete < newest:
        _LOG.warning("%s: generation %d is not encoded yet; this is generation %d", store.paths.root, newest, complete)
    written = [(shard, rows) for shard in shards if shard.bucket_px and (rows := shard.rows)]
    if not written:
        raise StoreError(f"{store.paths.root} holds no latents; its quarantine.jsonl says why")
    return [shard for shard, _ in written], [rows for _, rows in written]


def _require_vae(store: Store, expected: "VAE | str") -> None:
    stored = store.manifest["vae"]
    if isinstance(expected, str):
        wanted = stored | {"fingerprint": expected}
    else:
        config = json.loads(json.dumps(expected.config.to_diffusers()))
        wanted = {"fingerprint": expected.fingerprint, "config": config}
    found = differences({name: stored[name] for name in wanted}, wanted)
    if found:
        what = f"{store.paths.root} holds latents of another VAE than the one expected: {_in_short(stored, wanted)}"
        error = StoreError(what)
        for difference in found:
            error.add_note(difference)
        raise error


def _in_short(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two VAEs: names and first digits; the exception's notes say all."""
    told = []
    if stored["fingerprint"] != wanted["fingerprint"]:
        told.append(f"fingerprint {stored['fingerprint'][:12]}, not {wanted['fingerprint'][:12]}")
    before, now = stored["config"], wanted["config"]
    fields = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if fields:
        told.append(f"{len(fields)} field(s) of the config ({', '.join(fields[:2])}{', ...' * (len(fields) > 2)})")
    return "; ".join(told)
