"""A store written anew: the newest view of another one as a single generation. Rows are copied, nothing is encoded."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae import sealed
from sdvae.encoding.manifest import MAX_SHARD_BYTES, write_manifest
from sdvae.encoding.prepare import find_store, require_apart
from sdvae.errors import StoreError, VerifyError
from sdvae.journal import Journal
from sdvae.progress import Progress, silent
from sdvae.store.buckets import Size
from sdvae.store.paths import StorePaths
from sdvae.store.records import Line, Record, quarantined_line, written_line
from sdvae.store.roster import Task, place, roster_lines
from sdvae.store.shard import Shard, commit_shard, row_sha256
from sdvae.store.store import VERSION, Store, commit_roster
from sdvae.store.streams import stream_names
from sdvae.weights.evidence import Verdict

_LOG = logging.getLogger(__name__)
_OPEN_SHARDS = 64  # maps of the old store at once: a process may open only so many files


def compact(path: str | Path, out: str | Path, progress: Progress = silent) -> int:
    """Write the newest view of the finished store `path` to `out` as a store of one generation; returns its records.

    The bytes are those of a store encoded afresh from the same photos, by the same VAE and compute block, where no
    shard is degraded. Streams are not copied, and a warning says so. After a kill it may be run again. Raises
    StoreError for a store that is not finished, or where `out` holds anything else; VerifyError where latents are not
    those that were committed.
    """
    store, paths = Store.open(Path(path)), StorePaths(Path(out).resolve())
    require_apart(store.paths.root, paths.root)
    if not store.is_finished:
        raise StoreError(f"{store.paths.root} is not finished; run sdvae encode to its end, then compact it")
    if names := stream_names(store):
        _LOG.warning("the new store has none of the streams of %s (%s): make them again", path, ", ".join(names))
    shards = store.shards()
    held = {found.record.key: found for shard in shards for found in _held(shard)}
    rows_of = _rows_of(shards, store.manifest["shard_rows"])
    tasks = place((found.record for found in held.values()), rows_of)
    new = _begin(paths, _manifest(store), roster_lines(tasks))
    tensors = lru_cache(_OPEN_SHARDS)(lambda number: store.shard(number).tensors())
    num_done = 0
    with Journal(paths.timings) as journal:
        for task in tasks:
            if not paths.done(task.number).exists():
                _write(new, task, [held[record.key] for record in task.records], tensors, journal)
            num_done += len(task.records)
            progress("compact", num_done, len(held))
    new.finalise()
    return len(held)


@dataclass(frozen=True, slots=True)
class _Held:
    """A record of a view, and what became of it."""

    record: Record
    shard: int
    row: int | None
    latents_sha256: str | None
    step: str | None
    reason: str | None
    degraded: int | None


def _held(shard: Shard) -> Iterable[_Held]:
    for line in shard.records():
        record = Record.from_json(line)
        if record.bucket_px is not None:  # before it was encoded it had no flaw
            record = replace(record, step=None, reason=None)
        what = line["row"], line["latents_sha256"], line["step"], line["reason"]
        yield _Held(record, shard.number, *what, shard.degraded)


def _rows_of(shards: Sequence[Shard], shard_rows: int) -> Callable[[Size | None], int]:
    """Most records in a shard of each size, as `encode` has it."""
    written = next((shard for shard in shards if shard.num_rows), None)

    def rows_of(bucket_px: Size | None) -> int:
        if bucket_px is None or written is None or written.bucket_px is None:
            return shard_rows
        _, channels, height, width = written.places.shape
        num_latents = channels * height * width * (bucket_px[0] * bucket_px[1])
        num_latents //= written.bucket_px[0] * written.bucket_px[1]
        return min(shard_rows, max(1, MAX_SHARD_BYTES // (num_latents * written.places.dtype.itemsize)))

    return rows_of


def _manifest(store: Store) -> bytes:
    """That of the store, in this version: what older ones left out is told."""
    told = {name: value for name, value in store.manifest.items() if name != "roster"}
    vae = told["vae"] | {"evidence": Verdict.from_json(told["vae"]).to_json()}
    return sealed.seal(told | {"version": VERSION, "vae": vae, "compute": {"images_at_once": 0} | told["compute"]})


def _begin(paths: StorePaths, manifest: bytes, roster: list[bytes]) -> Store:
    """The new store with its one roster, or what an interrupted run has made of it."""
    begun = find_store(paths, restart=False)
    if begun is not None and paths.manifest.read_bytes() != manifest:
        raise StoreError(f"{paths.root} holds another store; give a new folder")
    paths.make_folders()
    new = begun or write_manifest(paths, manifest)
    if not new.rosters:
        commit_roster(new, roster)
    wanted = hashlib.sha256(b"".join(roster)).hexdigest()
    if [one.sha256 for one in new.rosters] != [wanted]:
        raise StoreError(
            f"{paths.root} holds other records than the newest generation of that store; give a new folder"
        )
    return new


def _write(
    new: Store,
    task: Task,
    members: Sequence[_Held],
    tensors_of: Callable[[int], dict[str, NDArray[Any]]],
    journal: Journal,
) -> None:
    rows: dict[str, NDArray[Any]] = {}
    lines: list[Line] = []
    num_rows = 0
    for record, found in zip(task.records, members, strict=True):
        if found.row is None:
            lines.append(quarantined_line(record, found.step or "", found.reason or ""))
            continue
        for name, values in tensors_of(found.shard).items():
            if name not in rows:
                num_written = sum(one.row is not None for one in members)
                rows[name] = np.empty((num_written, *values.shape[1:]), values.dtype)
            rows[name][num_rows] = values[found.row]
        if row_sha256(rows, num_rows) != found.latents_sha256:
            raise VerifyError(f"the latents of {record.key} are damaged; run sdvae verify on the store that holds them")
        lines.append(written_line(record, num_rows, found.latents_sha256))
        num_rows += 1
    degraded = min((one.degraded for one in members if one.degraded is not None), default=None)
    journal.append({"shard": task.number, "degraded": degraded})  # as `encode` does: repair asks for it
    commit_shard(new.paths, task.number, task.bucket_px, lines, rows, degraded)
