"""The roster: which record of a source goes to which shard and batch, fixed before anything is encoded."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdvae.atomic import canonical_json
from sdvae.data.preprocess import Geometry, Preprocess, plan_geometry
from sdvae.errors import ImageError, StoreError

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one photo before it is encoded; one with a `reason` never will be.

    `step` says where it failed: "scan" (must not be opened), "read" (the file system), "decode" (no
    readable image), "preprocess" (no geometry for its size). `geometry` is set by `place`.
    """

    key: str
    source_bytes: int | None = None
    source_sha256: str | None = None
    original_px: Size | None = None  # upright
    step: str | None = None
    reason: str | None = None
    geometry: Geometry | None = None
    uri: str | None = None  # where its bytes are, relative to the source; None says `key`
    caption: str | None = None
    label: str | None = None

    @property
    def bucket_px(self) -> Size | None:
        """The size that enters the VAE."""
        return None if self.geometry is None else self.geometry.crop_px[2:]

    def to_json(self) -> dict[str, Any]:
        """The record as the roster spells it, and the index, which adds what became of it."""
        return {
            "key": self.key,
            "uri": self.uri or self.key,
            "source_bytes": self.source_bytes,
            "source_sha256": self.source_sha256,
            "original_px": self.original_px,
            "resized_px": self.geometry and self.geometry.resized_px,
            "crop_px": self.geometry and self.geometry.crop_px,
            "bucket_px": self.bucket_px,
            "caption": self.caption,
            "label": self.label,
            "step": self.step,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Task:
    """Shard `number` and its records, all of one `bucket_px`; None for those that have none."""

    number: int
    bucket_px: Size | None
    records: tuple[Record, ...]


def place(
    records: Iterable[Record], preprocess: Preprocess, downscale: int, rows_of: Callable[[Size | None], int]
) -> list[Task]:
    """Cut the records into shards of one size each, of at most `rows_of(size)` rows.

    A pure function of the set of records: sizes in ascending order, in them keys in ascending order; the
    records without a size come last.
    """
    series: dict[Size | None, list[Record]] = {}
    for record in records:
        planned = _plan(record, preprocess, downscale)
        series.setdefault(planned.bucket_px, []).append(planned)
    tasks: list[Task] = []
    for bucket_px in sorted(series, key=lambda size: size or (float("inf"),)):
        members = sorted(series[bucket_px], key=lambda record: record.key)
        num_rows = rows_of(bucket_px)
        for start in range(0, len(members), num_rows):
            tasks.append(Task(len(tasks), bucket_px, tuple(members[start : start + num_rows])))
    return tasks


def roster_lines(tasks: Sequence[Task]) -> Iterator[bytes]:
    """The roster file: a header, then every record with its shard, in order of shards and batches."""
    num_records = sum(len(task.records) for task in tasks)
    yield canonical_json(
        {"generation": 0, "previous": None, "first_shard": 0, "num_shards": len(tasks), "num_records": num_records}
    )
    for task in tasks:
        yield b"".join(canonical_json(record.to_json() | {"shard": task.number}) for record in task.records)


def read_roster(path: Path) -> list[dict[str, Any]]:
    """The records of a roster file, without its header."""
    with path.open("rb") as lines:
        next(lines)
        return [json.loads(line) for line in lines]


def require_same_records(stored: Sequence[dict[str, Any]], tasks: Sequence[Task]) -> None:
    """Raise StoreError, with names, unless the source still holds what a store's roster says."""
    now = {record.key: json.loads(canonical_json(record.to_json())) for task in tasks for record in task.records}
    before = {line["key"]: line for line in stored}
    new = sorted(now.keys() - before.keys())
    gone = sorted(before.keys() - now.keys())
    changed = [key for key in sorted(now.keys() & before.keys()) if now[key] != _without_shard(before[key])]
    if gone or changed:
        found = [f"{_count(keys)} {verb}" for keys, verb in ((changed, "changed"), (gone, "vanished")) if keys]
        raise StoreError(
            f"since this store was begun, {' and '.join(found)} in the source; put back what was there, "
            "or start again with --restart"
        )
    if new:
        raise StoreError(
            f"since this store was begun, {_count(new)} came to the source; encode the new ones into a store "
            "of their own, or start again with --restart"
        )


def _plan(record: Record, preprocess: Preprocess, downscale: int) -> Record:
    if record.original_px is None:
        return record
    try:
        return replace(record, geometry=plan_geometry(*record.original_px, preprocess, downscale))
    except ImageError as error:
        return replace(record, step="preprocess", reason=str(error))


def _without_shard(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "shard"}


def _count(keys: Sequence[str]) -> str:
    names = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{len(keys)} file{'s' * (len(keys) != 1)} ({names})"
