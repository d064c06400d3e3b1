"""The scan: every photo of a source read once, for its sha256 and its size; findings survive a kill."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL

from sdvae.atomic import Journal, read_journal
from sdvae.data.entries import Entry, Source
from sdvae.data.roster import Record
from sdvae.errors import ImageError
from sdvae.images import read_size


def scan(
    source: Source,
    entries: Sequence[Entry],
    max_pixels: int,
    journal_path: Path,
    progress: Callable[[int, int], None],
) -> list[Record]:  # one for each entry
    """Read every entry of `source` once: its sha256, and its size from the header.

    Findings go to a journal, and a file whose length and time are still those of the journal is not read
    again: a killed scan goes on where it was, and the scan of a later run costs a listing.
    """
    known = {line["key"]: line for line in read_journal(journal_path)}
    records: list[Record] = []
    with Journal(journal_path) as journal:
        for entry in entries:
            # What decides about the findings: the file, and what reads its header.
            stamp = [entry.num_bytes, entry.mtime_ns, max_pixels, PIL.__version__]
            line = known.get(entry.key)
            record = Record(entry.key, uri=entry.uri, caption=entry.caption, label=entry.label)
            if entry.reason is not None:
                record = replace(record, step="scan", reason=entry.reason)
            elif line is not None and line["stamp"] == stamp:
                record = replace(record, **_from_journal(line))
            else:
                record = _look_at(source, record, max_pixels)
                if record.step != "read":  # a missing right or a bad cable may be mended without a trace in the file
                    journal.append(_to_journal(record) | {"stamp": stamp})
            records.append(record)
            progress(len(records), len(entries))
    return records


def _look_at(source: Source, record: Record, max_pixels: int) -> Record:
    try:
        data = source.read(record.key)
    except OSError as error:
        return replace(record, step="read", reason=f"cannot be read: {error.strerror}")
    record = replace(record, source_bytes=len(data), source_sha256=hashlib.sha256(data).hexdigest())
    try:
        return replace(record, original_px=read_size(data, max_pixels=max_pixels))
    except ImageError as error:
        return replace(record, step="decode", reason=str(error))


_FOUND = ("source_bytes", "source_sha256", "original_px", "step", "reason")


def _to_journal(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("key", *_FOUND)}


def _from_journal(line: dict[str, Any]) -> dict[str, Any]:
    values = {name: line[name] for name in _FOUND}
    size = values["original_px"]
    return values | {"original_px": size and (size[0], size[1])}
