"""The roster: which record of a source goes to which shard and batch, fixed before anything is encoded."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdvae.errors import ImageError
from sdvae.sealed import canonical_json
from sdvae.store.buckets import Size
from sdvae.store.generations import Change
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.store.records import Record, roster_line

REFERENCE_PX = 512 * 512  # a batch of larger photos has fewer rows, in proportion


@dataclass(frozen=True, slots=True)
class Task:
    """Shard `number` and its records, all of one `bucket_px`; None for those that have none."""

    number: int
    bucket_px: Size | None
    records: tuple[Record, ...]

    @property
    def num_images(self) -> int:
        """Records that go through the network."""
        return len(self.records) if self.bucket_px else 0

    def batches(self, batch_rows: int) -> list[Sequence[Record]]:
        """The records in batches; only the records decide which, so that no restart changes a batch."""
        if self.bucket_px is None:
            return []
        num_rows = rows_in_batch(self.bucket_px, batch_rows)
        return [self.records[start : start + num_rows] for start in range(0, len(self.records), num_rows)]


def rows_in_batch(bucket_px: Size, batch_rows: int) -> int:
    """Records in a batch of this size, where `batch_rows` are meant for 512x512 pixels."""
    return max(1, min(batch_rows, batch_rows * REFERENCE_PX // (bucket_px[0] * bucket_px[1])))


def plan_records(records: Iterable[Record], preprocess: Preprocess, downscale: int) -> Iterator[Record]:
    """The records with their geometry, or with the reason why they have none."""
    return (_plan(record, preprocess, downscale) for record in records)


def place(records: Iterable[Record], rows_of: Callable[[Size | None], int], first_shard: int = 0) -> list[Task]:
    """Cut planned records into shards of one size each, of at most `rows_of(size)` rows.

    A pure function of the set of records: sizes in ascending order, in them keys in ascending order; the
    records without a size come last.
    """
    series: dict[Size | None, list[Record]] = {}
    for record in records:
        series.setdefault(record.bucket_px, []).append(record)
    tasks: list[Task] = []
    for bucket_px in sorted(series, key=lambda size: size or (float("inf"),)):
        members = sorted(series[bucket_px], key=lambda record: record.key)
        num_rows = rows_of(bucket_px)
        for start in range(0, len(members), num_rows):
            tasks.append(Task(first_shard + len(tasks), bucket_px, tuple(members[start : start + num_rows])))
    return tasks


def roster_lines(
    tasks: Sequence[Task],
    generation: int = 0,
    previous: str | None = None,
    first_shard: int = 0,
    changes: Sequence[Change] | None = (),
) -> list[bytes]:
    """The roster file of a generation: a header, every record with its shard, in order of shards and batches, changes.

    `previous` is the sha256 of the roster of the generation before. `changes` is None in a store of version 1, which
    has none.
    """
    shards = [b"".join(roster_line(record, task.number) for record in task.records) for task in tasks]
    header: dict[str, object] = {
        "generation": generation,
        "previous": previous,
        "first_shard": first_shard,
        "num_shards": len(tasks),
        "num_records": sum(len(task.records) for task in tasks),
        "shards": [
            {"bucket_px": task.bucket_px, "num_records": len(task.records), "num_bytes": len(lines)}
            for task, lines in zip(tasks, shards, strict=True)
        ],
    }
    if changes is None:
        return [canonical_json(header), *shards]
    data = b"".join(change.line() for change in changes)
    header["changes"] = {
        "num_changes": len(changes), "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    return [canonical_json(header), *shards, data]


class Roster:
    """The roster files of a store, opened: what is in each shard, and its records where they are asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shards: list[PlannedShard] = []
        for path in paths:
            with path.open("rb") as file:
                header = json.loads(file.readline())
                start = file.tell()
            for shard in header["shards"]:
                size = shard["bucket_px"]
                bucket_px = size and (size[0], size[1])
                self.shards.append(PlannedShard(bucket_px, shard["num_records"], path, start, shard["num_bytes"]))
                start += shard["num_bytes"]

    def task(self, number: int) -> Task:
        """Shard `number` and its records."""
        shard = self.shards[number]
        with shard.path.open("rb") as file:
            file.seek(shard.start)
            lines = file.read(shard.num_bytes).splitlines()
        return Task(number, shard.bucket_px, tuple(Record.from_json(json.loads(line)) for line in lines))


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """What a roster says of a shard, and where its records are."""

    bucket_px: Size | None
    num_records: int
    path: Path
    start: int
    num_bytes: int

    @property
    def num_images(self) -> int:
        """Records that go through the network."""
        return self.num_records if self.bucket_px else 0


def _plan(record: Record, preprocess: Preprocess, downscale: int) -> Record:
    if record.original_px is None:
        return record
    try:
        return replace(record, geometry=plan_geometry(*record.original_px, preprocess, downscale, record.key))
    except ImageError as error:
        return replace(record, step="preprocess", reason=str(error))
