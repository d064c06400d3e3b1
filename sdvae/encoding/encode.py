"""Photos of a source into a latent store: scan, roster, tasks, and the end, where every shard is committed."""

import errno
import fcntl
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdvae import atomic, sealed
from sdvae.encoding.manifest import EncodeSettings, begin, identify_run, max_rows, require_possible, require_same_run
from sdvae.encoding.runners import Ranks, Runner, uploading
from sdvae.encoding.scan import scan
from sdvae.encoding.tasks import Work, encode_tasks
from sdvae.encoding.times import Times
from sdvae.errors import OutputError, SourceError, StoreError, VerifyError
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Entry, Source
from sdvae.sources.kinds import is_junk
from sdvae.sources.open import open_source
from sdvae.store.paths import StorePaths
from sdvae.store.remote import open_mirror
from sdvae.store.roster import Roster, find_new, place, plan_records, roster_lines
from sdvae.store.store import Store, commit_roster
from sdvae.vae import VAE

_LOG = logging.getLogger(__name__)
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems


@dataclass(frozen=True)
class EncodeReport:
    """What became of every record: num_seen == num_written + sum(quarantined.values()) when no shard is left."""

    num_seen: int
    num_written: int
    quarantined: dict[str, int]  # reason -> records
    num_shards_left: int  # of other ranks, not committed yet
    num_degraded: int  # shards for which memory was short
    images_per_s: float  # of this run, without the scan; 0 where nothing was left to do
    seconds: float
    times: Times
    remarks: tuple[str, ...] = ()  # what the source left aside: texts of no photo, files that are no photos


def encode_dataset(
    source: str | Path | Source,
    out: str | Path,
    vae: VAE,
    settings: EncodeSettings | None = None,
    *,
    restart: bool = False,
    work: Work | None = None,
    runner: Runner = encode_tasks,
    ranks: Ranks | None = None,
    progress: Progress = silent,
) -> EncodeReport:
    """Encode every photo of `source` into the store `out`, a folder or a URL; a store begun before is continued.

    The bytes of the store are a function of the photos, the VAE, the settings and the compute block that the first
    run recorded, whatever happened in between, and however many `ranks` and workers there are. Photos that came to
    the source since become a generation of their own. `restart` throws away what is there.

    Raises StoreError where `out` holds anything else, was begun with other settings (all are listed), where photos
    changed or vanished, or where it cannot be written; committed shards stay whole in any case.
    """
    begun = time.monotonic()
    settings, ranks = settings or EncodeSettings(), ranks or Ranks()
    require_possible(settings, vae)
    source = open_source(source) if isinstance(source, str | Path) else source
    mirror = open_mirror(out)
    if mirror is not None and restart:
        raise StoreError(f"{mirror.url} is not thrown away from here; remove it with the tools of its storage")
    if mirror is not None:
        mirror.pull()
        runner = uploading(runner, mirror)
    paths = StorePaths((mirror.local if mirror else Path(out)).resolve())
    if source.root is not None:
        _require_apart(source.root.resolve(), paths.root)
    if restart and ranks.world_size > 1:
        raise StoreError(
            f"{ranks.world_size} processes cannot all throw away what is in {paths.root}, each would take the work "
            "of the others; remove the folder, then run them without --restart"
        )
    store = _find_store(paths, restart)
    identity = _identify(None if restart else store, vae, settings, ranks)
    entries = source.entries()
    if not entries:
        raise SourceError("; ".join([f"{source.name} holds no photos", *source.remarks]))
    for remark in source.remarks if ranks.rank == 0 else ():
        _LOG.warning("%s: %s", source.name, remark)
    if restart:
        paths.clear()
    paths.make_folders()
    with _one_at_a_time(paths):
        atomic.sweep(paths.root)
        if paths.manifest.exists():  # it may be another rank's, of this moment
            identity = _identify(Store.open(paths.root), vae, settings, ranks)
        store = _prepare(paths, source, entries, identity, vae, settings, partial(progress, "scan"))
    times = _run(store, source, vae, work or Work(), runner, ranks, progress)
    if store.is_finished:
        store.finalise()
    if mirror is not None:
        mirror.finish()
    shards, quarantined = store.shards(), store.quarantined()
    return EncodeReport(
        num_seen=len(entries),
        num_written=sum(shard.num_rows for shard in shards),
        quarantined=dict(Counter(line["reason"] for line in quarantined)),
        num_shards_left=store.num_shards - len(shards),
        num_degraded=sum(shard.degraded is not None for shard in shards),
        images_per_s=times.num_images / times.all if times.num_images else 0.0,
        seconds=time.monotonic() - begun,
        times=times,
        remarks=tuple(source.remarks),
    )


# --- Before work ---


def _require_apart(source: Path, out: Path) -> None:
    if out == source or out.is_relative_to(source):
        raise StoreError(
            f"{out} lies in the source {source}: latents and photos would mix; give a folder outside of it"
        )
    if source.is_relative_to(out):
        raise StoreError(f"the source {source} lies in {out}; give the store a folder of its own")


def _identify(store: Store | None, vae: VAE, settings: EncodeSettings, ranks: Ranks) -> dict[str, Any]:
    """What the manifest says, or is to say; StoreError, with the differences, where `store` says otherwise."""
    identity = identify_run(vae, settings, store.manifest["compute"] if store else {}, ranks.local_world_size)
    if store:
        require_same_run(store, identity)
    return identity


def _find_store(paths: StorePaths, restart: bool) -> Store | None:
    """The store to continue (or to throw away), None for a new one; StoreError for a folder that is something else."""
    root = paths.root
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is not a folder; give the store a folder of its own")
    store = Store.open(root) if paths.manifest.exists() else None
    own, found = paths.contents()
    other = [path for path in found if not is_junk(path.relative_to(root).as_posix())]
    if other and (store is None or restart):
        names = ", ".join(path.relative_to(root).as_posix() for path in other[:5])
        raise StoreError(f"{root} holds files that no store has ({names}); nothing was touched, give another folder")
    if store is None and not restart and any(path.parent == paths.done(0).parent for path in own):
        raise StoreError(
            f"{root} holds shards, but its manifest.json is gone; sdvae verify --repair may restore it, "
            "or start again with --restart"
        )
    return store


@contextmanager
def _one_at_a_time(paths: StorePaths) -> Iterator[None]:
    """Let one process of several scan; the others wait for what it finds. The lock dies with its process.

    On a file system without locks all of them scan, which costs time and nothing else: they find the same.
    """
    path = paths.journal / "lock"
    try:
        file = path.open("ab")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _prepare(
    paths: StorePaths,
    source: Source,
    entries: Sequence[Entry],
    identity: dict[str, Any],
    vae: VAE,
    settings: EncodeSettings,
    progress: Callable[[int, int], None],
) -> Store:
    """The store, with every entry in its rosters."""
    store = Store.open(paths.root) if paths.manifest.exists() else None
    listing = _hash(entries)
    if store is not None and _was_listed(store, listing):
        return store
    preprocess = settings.preprocess
    records = scan(source, entries, preprocess.max_pixels, paths.journal / "scan.jsonl", progress)
    planned = plan_records(records, preprocess, vae.config.downscale)
    if store is None:
        store = begin(paths, identity, place(planned, partial(max_rows, vae, settings)), vae)
    else:
        _require_whole_rosters(store)
        new = find_new([roster.path for roster in store.rosters], planned)
        if new:
            tasks = place(new, partial(max_rows, vae, settings), first_shard=store.num_shards)
            commit_roster(store, roster_lines(tasks, len(store.rosters), previous=store.rosters[-1].sha256))
    sealed.write_json(_listing_path(paths), _listing(store, listing))
    return store


def _hash(entries: Sequence[Entry]) -> str:
    """A digest of everything a listing says: where it is the same, the photos need not be looked at again."""
    digest = hashlib.sha256()
    for entry in entries:
        values = (entry.key, entry.num_bytes, entry.mtime_ns, entry.reason, entry.uri, entry.caption, entry.label)
        digest.update(repr(values).encode())  # five times as fast as JSON, and nobody else reads it
    return digest.hexdigest()


def _listing(store: Store, listing: str) -> dict[str, Any]:
    return {"entries": listing, "rosters": [roster.sha256 for roster in store.rosters]}


def _listing_path(paths: StorePaths) -> Path:
    return paths.journal / "listing.json"


def _was_listed(store: Store, listing: str) -> bool:
    """Whether the rosters were made, and are whole, for the very listing that the source gives now."""
    path = _listing_path(store.paths)
    noted = sealed.unseal(path.read_bytes()) if path.is_file() else None
    return noted == _listing(store, listing) and all(roster.is_whole() for roster in store.rosters)


def _require_whole_rosters(store: Store) -> None:
    for roster in store.rosters:
        if not roster.is_whole():
            raise VerifyError(
                f"{roster.path} is damaged or missing; sdvae verify --repair may restore it, "
                "or start again with --restart"
            )


# --- Work ---


def _run(store: Store, source: Source, vae: VAE, work: Work, runner: Runner, ranks: Ranks, progress: Progress) -> Times:
    """Encode and commit what is not committed yet of this rank's share."""
    shards = Roster(file.path for file in store.rosters).shards
    share = ranks.share(range(len(shards)))
    left = [number for number in share if not _is_committed(store, number)]
    num_all = sum(shards[number].num_records for number in share)
    num_done = num_all - sum(shards[number].num_records for number in left)
    progress("encode", num_done, num_all)
    if not left:
        return Times()
    return runner(
        store, left, source, vae, work, lambda num_records: progress("encode", num_done + num_records, num_all)
    )


def _is_committed(store: Store, number: int) -> bool:
    """A shard whose files are gone or cut short counts as not committed: encoding it again mends it."""
    return store.paths.done(number).exists() and all(file.is_present() for file in store.shard(number).files)
