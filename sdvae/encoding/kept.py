"""Finished batches of shards under way, kept in the journal: an interruption costs a batch or two, not a shard.

A batch is a file of its own until its shard is committed. Each row has its digest, and the head its own: what is torn,
damaged, of another manifest or of other records is encoded again, and never read.
"""

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdvae import atomic, sealed
from sdvae.encoding.load_photo import Failure
from sdvae.store.records import Record, roster_line
from sdvae.store.roster import Task
from sdvae.store.shard import TensorPlaces, Tensors, file_sha256, row_sha256
from sdvae.store.store import Store

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedBatch:
    """What became of the records of a batch."""

    outcomes: tuple[str | Failure, ...]  # of each record: the digest of its row, or why it has none
    tensors: Tensors  # each (rows, C, h, w): those records that have one


class KeptBatches:
    """The batches that the journal of a store keeps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._manifest_sha256 = file_sha256(store.paths.manifest)

    def keep(self, task: Task, number: int, records: Sequence[Record], batch: EncodedBatch, rows: int | None) -> None:
        """Keep batch `number` of a shard; `rows` went through the network at once where memory was short.

        Nothing is synced: a power cut costs what the kernel has not written yet, and the digests find what it tore.
        A batch in which a photo could not be read is not kept: the next run may be able to.
        """
        if any(isinstance(outcome, Failure) and outcome.step == "read" for outcome in batch.outcomes):
            return
        head = self._head(task, records) | {
            "degraded": rows,
            "shape": batch.tensors["mean"].shape,
            "outcomes": [
                [outcome.step, outcome.reason] if isinstance(outcome, Failure) else outcome
                for outcome in batch.outcomes
            ],
        }
        chunks = [batch.tensors[name].data for name in sorted(batch.tensors)] if len(batch.tensors["mean"]) else []
        atomic.write_unsynced(self._store.paths.batch(task.number, number), sealed.seal(head), *chunks)

    def read(self, task: Task, batches: Sequence[Sequence[Record]], rows: int | None) -> dict[int, EncodedBatch]:
        """The batches of a shard that are kept whole, by number; those made with as many `rows` at once."""
        found: dict[int, EncodedBatch] = {}
        for path in self._store.paths.batches(task.number):
            _, number = _numbers(path)
            batch = self._read(path, task, batches[number], rows) if number < len(batches) else None
            if batch is not None:
                found[number] = batch
        return found

    def remove(self, number: int) -> None:
        """Forget the batches of a shard, which is committed."""
        atomic.remove(*self._store.paths.batches(number))

    def remove_stale(self) -> None:
        """Forget what nobody will take up: batches of committed shards and of other manifests, and torn ones."""
        wanted = {path for path, _ in self._wanted()}
        for path in self._store.paths.batches():
            if path not in wanted:
                atomic.remove(path)

    def num_records(self) -> int:
        """How many records are kept, those of committed shards not counted."""
        return sum(len(head["outcomes"]) for _, head in self._wanted())

    def _wanted(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The batches of shards that are still to be committed, each with its head."""
        for path in self._store.paths.batches():
            number, _ = _numbers(path)
            head = None if self._store.paths.done(number).exists() else _read_head(path)
            if head is not None and head.get("manifest_sha256") == self._manifest_sha256:
                yield path, head

    def _head(self, task: Task, records: Sequence[Record]) -> dict[str, Any]:
        lines = b"".join(roster_line(record, task.number) for record in records)
        return {"manifest_sha256": self._manifest_sha256, "records_sha256": hashlib.sha256(lines).hexdigest()}

    def _read(self, path: Path, task: Task, records: Sequence[Record], rows: int | None) -> EncodedBatch | None:
        try:
            line, _, data = path.read_bytes().partition(b"\n")
        except FileNotFoundError:  # another process has committed the shard
            return None
        except OSError as error:
            _LOG.warning("cannot read %s: %s; its batch is encoded again", path, error.strerror)
            return None
        head = sealed.unseal(line + b"\n")
        if head is None or not (self._head(task, records) | {"degraded": rows}).items() <= head.items():
            return None
        outcomes = tuple(outcome if isinstance(outcome, str) else Failure(*outcome) for outcome in head["outcomes"])
        places = TensorPlaces.of_manifest(self._store.manifest, head["shape"])
        if len(data) != places.tensor_bytes * len(places.names):
            return None
        values = np.frombuffer(data, places.dtype, len(places.names) * math.prod(places.shape))
        tensors = dict(zip(places.names, values.reshape(len(places.names), *places.shape), strict=True))
        digests = [row_sha256(tensors, row) for row in range(places.shape[0])]
        is_whole = digests == [outcome for outcome in outcomes if isinstance(outcome, str)]
        return EncodedBatch(outcomes, tensors) if is_whole else None


class TakenUp:
    """The batches that a run takes up, of each shard read once, so that who decodes and who encodes agree on them."""

    def __init__(self, read: Callable[[int], Mapping[int, EncodedBatch]]) -> None:
        self._read, self._lock = read, threading.Lock()
        self._found: dict[int, dict[int, EncodedBatch | None]] = {}

    def has(self, shard: int, number: int) -> bool:
        """Whether this batch need not be encoded, taken or not."""
        with self._lock:
            if shard not in self._found:
                self._found[shard] = dict(self._read(shard))
            return number in self._found[shard]

    def take(self, shard: int, number: int) -> EncodedBatch:
        """A batch that `has` told of, once: its memory is then the caller's."""
        batch = self._found[shard][number]
        assert batch is not None
        self._found[shard][number] = None
        return batch


def _read_head(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return sealed.unseal(file.readline())
    except FileNotFoundError:  # another process has committed its shard
        return None


def _numbers(path: Path) -> tuple[int, int]:
    """Of which shard a file holds which batch."""
    shard, _, batch = path.stem.partition("-")
    return int(shard), int(batch)
