"""Arrays of a program, one a record, into a store: text embeddings, scores, maps."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ShapeError, StoreError
from sdvae.store.buckets import Size
from sdvae.store.records import written
from sdvae.store.remote import url_of
from sdvae.store.shard import Shard
from sdvae.store.store import Store
from sdvae.store.streams import Declaration, Row, Stream

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StreamReport:
    """What became of a stream: how many records have a row of it, and how many have none, by reason."""

    name: str
    num_records: int
    missing: dict[str, int]  # reason -> records


def attach(
    path: str | Path,
    name: str,
    records: "Iterable[tuple[str, NDArray[Any] | Tensor]]",
    *,
    mirror: bool = False,
    made_from: str | None = None,
) -> StreamReport:
    """Keep an array of each record in the finished store `path`, as its stream `name`; `LatentDataset` returns it.

    `records` gives (key, array or tensor), each of at least one axis and one row. All have one dtype; those of records
    of one size (`target_size`) may differ in the first axis alone. In the order of the store's records one shard is
    in memory at a time. A record that is not among them has no row, one that is in quarantine is passed over.
    `mirror`: of a mirrored photo the last axis is reversed. `made_from` says for people what the arrays are.

    To attach the same again mends what is damaged, and adds the rows of a store that has grown. Raises StoreError for
    keys that the store does not have or that come twice, and where other rows were attached before; ShapeError for
    arrays that do not agree.
    """
    store = finished_store(path)
    places = _Places(store)
    gathered: dict[int, list[Row]] = {}  # of shards whose rows are not all there yet
    num_gathered: Counter[int] = Counter()
    stream: Stream | None = None
    shapes: dict[Size | None, tuple[int, ...]] = {}
    for key, value in records:
        array, dtype = _to_array(key, value)
        place = places.take(key)
        if place is None:
            continue
        if stream is None:
            stream = Stream.begin(store, name, Declaration("tensor", dtype, "mirror" if mirror else "same", made_from))
        _require_like(key, array, dtype, stream, shapes.setdefault(place.shard.bucket_px, array.shape[1:]))
        rows = gathered.setdefault(place.shard.number, [None] * place.shard.num_rows)
        rows[place.row] = array
        num_gathered[place.shard.number] += 1
        if num_gathered[place.shard.number] == len(rows):
            stream.commit(place.shard, gathered.pop(place.shard.number))
    if stream is None:
        raise StoreError(f"nothing was attached to {store.paths.root}: no record came that it has")
    for shard in store.shards():
        if shard.number in gathered or not stream.has(shard.number):
            stream.commit(shard, gathered.get(shard.number, [None] * shard.num_rows))
    num_records, num_missing = count_rows(store, stream)
    return StreamReport(name, num_records, {"not attached": num_missing} if num_missing else {})


def count_rows(store: Store, stream: Stream) -> tuple[int, int]:
    """How many records have a row of a finished stream, and how many have none."""
    num_records = num_missing = 0
    for shard in store.shards():
        lengths = stream.lengths(shard.number)
        there = [bool(lengths[line["row"]]) for line in written(shard.records())]
        num_records, num_missing = num_records + sum(there), num_missing + len(there) - sum(there)
    return num_records, num_missing


def finished_store(path: str | Path) -> Store:
    """The store whose records a stream belongs to; StoreError where it is elsewhere, or not finished."""
    if url := url_of(path):
        raise StoreError(f"a stream needs a store in a local folder, not {url}")
    store = Store.open(Path(path))
    if not store.is_finished:
        raise StoreError(
            f"{store.paths.root} is not finished, so its records have no places; run sdvae encode to its end"
        )
    return store


@dataclass(frozen=True)
class _Place:
    shard: Shard
    row: int


class _Places:
    """Where the row of each record belongs. A key of several generations is that of the last."""

    def __init__(self, store: Store) -> None:
        self._root = store.paths.root
        self._places: dict[str, _Place | None] = {}  # None for those in quarantine
        for shard in store.shards():
            for line in shard.records():
                self._places[line["key"]] = None if line["row"] is None else _Place(shard, line["row"])
        self._taken: set[str] = set()

    def take(self, key: str) -> _Place | None:
        """The place of a record, None in quarantine; StoreError for an unknown key, and for one that came before."""
        if key not in self._places:
            raise StoreError(f"{self._root} has no record {key!r}; keys are those of LatentDataset.record(i)['key']")
        if key in self._taken:
            raise StoreError(f"two arrays came for the record {key!r}; give one")
        self._taken.add(key)
        return self._places[key]


def _to_array(key: str, value: Any) -> tuple[NDArray[Any], str]:
    """The values, or the bits of those that numpy lacks, and their dtype by safetensors' name."""
    if hasattr(value, "detach"):
        import torch

        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            array, dtype = tensor.view(torch.int16).numpy(), "BF16"
        else:
            array = tensor.numpy()
            dtype = _CODES.get(array.dtype.str.lstrip("<|"), "")
    else:
        array = np.ascontiguousarray(value)
        dtype = _CODES.get(array.dtype.newbyteorder("<").str.lstrip("<|"), "")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if not dtype:
        raise ShapeError(f"the array of {key} is {array.dtype}; take floats of 16 to 64 bits, integers, or booleans")
    if np.ndim(value) == 0 or not len(array):
        raise ShapeError(
            f"the array of {key} is {array.shape}; it needs an axis and a row, so give a number as [number]"
        )
    return array, dtype


_CODES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "b1": "BOOL",
}


def _require_like(key: str, array: NDArray[Any], dtype: str, stream: Stream, expected: tuple[int, ...]) -> None:
    """Raise ShapeError where an array does not agree with those before it."""
    if dtype != stream.declaration.dtype:
        raise ShapeError(f"the array of {key} is {dtype}, those of {stream.folder} are {stream.declaration.dtype}")
    if array.shape[1:] != expected:
        shape = ", ".join(map(str, ("n", *expected)))
        raise ShapeError(
            f"the array of {key} is {array.shape}, one before it ({shape}): those of records of one size may differ "
            "in the first axis alone"
        )
