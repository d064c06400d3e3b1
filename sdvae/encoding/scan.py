"""The scan: every photo of a source read once, for its sha256 and its size; findings survive a kill."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from sdvae.errors import ImageError
from sdvae.images.failures import muted_pillow
from sdvae.images.read import read_size
from sdvae.journal import Journal, read_journal
from sdvae.sources.entries import Entry, Source
from sdvae.store.records import Record

# Reads wait for disks and networks, and hashing leaves the lock of the interpreter: threads overlap both, without
# what a process costs to start or to lose.
NUM_THREADS = 8
_CHUNK = 32  # entries of one line of the journal; also neighbours in a tar or a Parquet file

# Of a record, what reading its photo tells: (source_bytes, source_sha256, original_px, step, reason).
_Finding = tuple[int | None, str | None, Any, str | None, str | None]


def scan(
    source: Source,
    entries: Sequence[Entry],
    max_pixels: int,
    journal_path: Path,
    progress: Callable[[int, int], None],
    num_threads: int = NUM_THREADS,
) -> list[Record]:  # one for each entry
    """Read every entry of `source` once: its sha256, and its size from the header.

    Findings go to a journal, and a file whose length and time are still those of the journal is not read
    again: a killed scan goes on where it was, and the scan of a later run costs a listing. The records are
    the same whatever the number of threads.
    """
    places = {entry.key: place for place, entry in enumerate(entries) if entry.reason is None}
    records: list[Record | None] = [_unread(entry) if entry.reason else None for entry in entries]
    for line in read_journal(journal_path):
        if line.get("reader") == _reader(max_pixels):
            for key, stamp, finding in line["found"]:
                place = places.get(key)
                if place is not None and stamp == _stamp(entries[place]):
                    records[place] = _record(entries[place], finding)
    left = [place for place, record in enumerate(records) if record is None]
    num_done = len(entries) - len(left)
    progress(num_done, len(entries))
    chunks = [left[start : start + _CHUNK] for start in range(0, len(left), _CHUNK)]
    with Journal(journal_path) as journal, ThreadPoolExecutor(num_threads, "sdvae-scan") as pool:
        look = partial(_look_at, source, max_pixels)
        coming = deque((chunk, pool.submit(look, [entries[place] for place in chunk])) for chunk in chunks)
        try:
            while coming:
                chunk, found = coming.popleft()
                lines = []
                for place, finding in zip(chunk, found.result(), strict=True):
                    records[place] = record = _record(entries[place], finding)
                    if record.step != "read":  # a missing right or a bad cable is mended without a trace in the file
                        lines.append((record.key, _stamp(entries[place]), finding))
                if lines:
                    journal.append({"reader": _reader(max_pixels), "found": lines})
                for _ in chunk:
                    num_done += 1
                    progress(num_done, len(entries))
        finally:
            pool.shutdown(cancel_futures=True)
    return [record for record in records if record is not None]


def _look_at(source: Source, max_pixels: int, entries: Sequence[Entry]) -> list[_Finding]:
    with muted_pillow():
        return [_look_at_one(source, max_pixels, entry.key) for entry in entries]


def _look_at_one(source: Source, max_pixels: int, key: str) -> _Finding:
    try:
        data = source.read(key)
    except OSError as error:
        return None, None, None, "read", f"cannot be read: {error.strerror}"
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return len(data), sha256, read_size(data, max_pixels=max_pixels), None, None
    except ImageError as error:
        return len(data), sha256, None, "decode", str(error)


def _stamp(entry: Entry) -> list[Any]:
    """What differs when the bytes of an entry may differ."""
    return [entry.num_bytes, entry.mtime_ns, entry.uri]


def _reader(max_pixels: int) -> list[Any]:
    """What else decides about a finding: what reads the header."""
    return [PIL.__version__, max_pixels]


def _unread(entry: Entry) -> Record:
    return _record(entry, (None, None, None, "scan", entry.reason))


def _record(entry: Entry, finding: _Finding) -> Record:
    source_bytes, source_sha256, size, step, reason = finding
    return Record(
        entry.key,
        source_bytes,
        source_sha256,
        size and (size[0], size[1]),
        step,
        reason,
        uri=entry.uri,
        caption=entry.caption,
        label=entry.label,
    )
