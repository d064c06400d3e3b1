"""Before encoding: the store to encode into is found or begun, and every photo of the source is in its rosters."""

import fcntl
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sdvae import atomic, sealed
from sdvae.encoding.manifest import EncodeSettings, begin, identify_run, max_rows, require_same_run
from sdvae.encoding.runners import Ranks
from sdvae.encoding.scan import scan
from sdvae.errors import OutputError, SourceError, StoreError, VerifyError
from sdvae.sources.entries import Entry, Source
from sdvae.sources.kinds import is_junk
from sdvae.store.geometry import TOO_SMALL
from sdvae.store.paths import StorePaths
from sdvae.store.records import Record
from sdvae.store.roster import find_new, place, plan_records, roster_lines
from sdvae.store.store import Store, commit_roster
from sdvae.vae import VAE

_LOG = logging.getLogger(__name__)


def require_apart(source: Path, out: Path) -> None:
    """Raise StoreError where the photos and the store would lie in each other."""
    if out == source or out.is_relative_to(source):
        raise StoreError(
            f"{out} lies in the source {source}: latents and photos would mix; give a folder outside of it"
        )
    if source.is_relative_to(out):
        raise StoreError(f"the source {source} lies in {out}; give the store a folder of its own")


def list_entries(source: Source, limit: int | None = None) -> list[Entry]:
    """Every photo of a source, or the first ones; SourceError where there are none."""
    entries = source.entries()
    if not entries:
        raise SourceError("; ".join([f"{source.name} holds no photos", *source.remarks]))
    return entries[:limit]


def identify(store: Store | None, vae: VAE, settings: EncodeSettings, ranks: Ranks) -> dict[str, Any]:
    """What the manifest says, or is to say; StoreError, with the differences, where `store` says otherwise."""
    identity = identify_run(vae, settings, store.manifest["compute"] if store else {}, ranks.local_world_size)
    if store:
        require_same_run(store, identity)
    return identity


def find_store(paths: StorePaths, restart: bool) -> Store | None:
    """The store to continue (or to delete), None for a new one; StoreError for a folder that is something else."""
    root = paths.root
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is not a folder; give the store a folder of its own")
    store = Store.find(root)
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
def one_at_a_time(paths: StorePaths) -> Iterator[None]:
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
            if error.errno not in atomic.NO_LOCKS:
                raise OutputError(f"cannot lock {path}: {error.strerror}") from error
            atomic.say_missing("locks")
        yield


def prepare(
    paths: StorePaths,
    source: Source,
    entries: Sequence[Entry],
    identity: dict[str, Any],
    vae: VAE,
    settings: EncodeSettings,
    progress: Callable[[int, int], None],
) -> Store:
    """The store, with every entry in its rosters."""
    store = Store.find(paths.root)
    listing = _hash(entries)
    if store is not None and _was_listed(store, listing):
        return store
    preprocess = settings.preprocess
    records = scan(source, entries, preprocess.max_pixels, paths.journal / "scan.jsonl", progress)
    planned = list(plan_records(records, preprocess, vae.config.scaled_downscale))
    tell_refused(planned)
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


def tell_refused(planned: Iterable[Record]) -> None:
    """Say before the work begins which photos the settings refuse, and what would let them in."""
    reasons = Counter(record.reason for record in planned if record.step == "preprocess" and record.reason)
    for reason, count in reasons.most_common(5):
        hint = "; --max-upscale N allows it" if reason.startswith(TOO_SMALL) else ""
        _LOG.warning("%d %s not be encoded: %s%s", count, "photo will" if count == 1 else "photos will", reason, hint)


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
