"""A record: one photo of a source, and its line in roster and index. Only this file writes and reads those."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvae.sealed import canonical_json
from sdvae.store.buckets import Size
from sdvae.store.geometry import Geometry

Line = dict[str, Any]  # of an index: a record, and what became of it


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

    def to_json(self) -> Line:
        """The members that roster and index share."""
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

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Record":
        """The inverse of `to_json`."""
        size, resized, crop = line["original_px"], line["resized_px"], line["crop_px"]
        return cls(
            key=line["key"],
            source_bytes=line["source_bytes"],
            source_sha256=line["source_sha256"],
            original_px=size and (size[0], size[1]),
            step=line["step"],
            reason=line["reason"],
            geometry=resized and Geometry((resized[0], resized[1]), (crop[0], crop[1], crop[2], crop[3])),
            uri=line["uri"],
            caption=line["caption"],
            label=line["label"],
        )


def roster_line(record: Record, shard: int) -> bytes:
    """The line of a record in the roster."""
    return canonical_json(record.to_json() | {"shard": shard})


def written_line(record: Record, row: int, latents_sha256: str) -> Line:
    """The line of the index for a record whose latents are in `row`."""
    return record.to_json() | {"status": "written", "row": row, "latents_sha256": latents_sha256}


def quarantined_line(record: Record, step: str, reason: str) -> Line:
    """The line of the index for a record that has no latents."""
    what = {"status": "quarantined", "step": step, "reason": reason}
    return record.to_json() | what | {"row": None, "latents_sha256": None}


def pack_index(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """An index file."""
    return b"".join(map(canonical_json, lines))


def parse_index(data: bytes) -> list[Line]:
    """The lines of an index file."""
    return [json.loads(line) for line in data.splitlines()]


def written(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines of the records that have latents, in the order of their rows."""
    return (line for line in lines if line["row"] is not None)


def quarantine(lines: Iterable[Line]) -> list[Line]:
    """Key, step and reason of the records that have no latents, sorted by key: the lines of quarantine.jsonl."""
    found = [{name: line[name] for name in ("key", "step", "reason")} for line in lines if line["row"] is None]
    return sorted(found, key=lambda line: str(line["key"]))


def read_roster(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of the shards of a roster file, each with the number of its shard."""
    with path.open("rb") as lines:
        header = json.loads(next(lines))
        for line in map(json.loads, itertools.islice(lines, header["num_records"])):  # behind them are changes
            yield line["shard"], Record.from_json(line)
