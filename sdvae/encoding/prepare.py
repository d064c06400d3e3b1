"""Before encoding: the store to encode into is found or begun, and every photo of the source is in its rosters."""

import fcntl
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sdvae import atomic, sealed
from sdvae.amounts import count
from sdvae.encoding.manifest import EncodeSettings, begin, identify_run, max_rows, require_same_run
from sdvae.encoding.runners import Ranks
from sdvae.encoding.scan import scan
from sdvae.errors import OutputError, SourceError, StoreError, VerifyError
from sdvae.sources.entries import Entry, Source
from sdvae.sources.kinds import is_junk
from sdvae.store.generations import Difference, compare
from sdvae.store.geometry import TOO_SMALL
from sdvae.store.paths import StorePaths
from sdvae.store.records import Record
from sdvae.store.roster import place, plan_records, roster_lines
from sdvae.store.store import OLD_VERSION, Store, commit_roster
from sdvae.vae import VAE

_LOG = logging.getLogger(__name__)
KINDS = {
    "added": "added", "changed": "changed", "vanished": "vanished", "renamed": "renamed",
    "texts": "with another caption or label",
}  # fmt: skip


def require_apart(source: Path, out: Path) -> None:
    """Raise StoreError where the photos and the store would lie in each other."""
    if out == source or out.is_relative_to(source):
        raise StoreError(
            f"{out} lies in the source {source}: latents and photos would mix; give a folder outside of it"
        )
    if source.is_relative_to(out):
        raise StoreError(f"the source {source} lies in {out}; give the store a folder of its own")


@dataclass(frozen=True)
class Listing:
    """The photos of a source that a store is to hold; others it goes on to hold, as those `beyond` a limit."""

    entries: Sequence[Entry]
    beyond: frozenset[str] = field(default_factory=frozenset)
    keep_vanished: bool = False

    def is_kept(self, key: str) -> bool:
        """Whether the store keeps a record of this key that is not among the entries."""
        return self.keep_vanished or key in self.beyond

    def digest(self) -> str:
        """Of everything it says: where that is the same, the photos need not be looked at again."""
        digest = hashlib.sha256()
        for entry in self.entries:
            values = (entry.key, entry.num_bytes, entry.mtime_ns, entry.reason, entry.uri, entry.caption, entry.label)
            digest.update(repr(values).encode())  # five times as fast as JSON, and nobody else reads it
        digest.update(repr((sorted(self.beyond), self.keep_vanished)).encode())
        return digest.hexdigest()


def list_photos(source: Source, limit: int | None = None, keep_vanished: bool = False) -> Listing:
    """What a store is to hold of a source: every photo, or the first ones; else as `list_entries`."""
    entries = list_entries(source)
    beyond = entries[limit:] if limit is not None else []
    return Listing(entries[:limit], frozenset(entry.key for entry in beyond), keep_vanished)


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
    listing: Listing,
    identity: dict[str, Any],
    vae: VAE,
    settings: EncodeSettings,
    progress: Callable[[int, int], None],
) -> tuple[Store, Difference]:
    """The store, with a generation that makes its view that of the listing; and what was not so before."""
    store = Store.find(paths.root)
    digest = listing.digest()
    if store is not None and _was_listed(store, digest):
        return store, Difference()
    preprocess = settings.preprocess
    records = scan(source, listing.entries, preprocess.max_pixels, paths.journal / "scan.jsonl", progress)
    planned = list(plan_records(records, preprocess, vae.config.scaled_downscale))
    tell_refused(planned)
    if store is None:
        store = begin(paths, identity, vae)
    _require_whole_rosters(store)
    found = find_difference(store, planned, listing)
    if found:
        first = store.num_shards
        tasks = place(found.to_encode, partial(max_rows, vae, settings), first_shard=first)
        rosters = store.rosters
        previous = rosters[-1].sha256 if rosters else None
        changes = None if store.version == OLD_VERSION else found.changes
        if rosters:
            _LOG.warning("%s differs from the store: %s", source.name, describe(found))
        commit_roster(store, roster_lines(tasks, len(rosters), previous, first, changes))
    sealed.write_json(_listing_path(paths), _listing(store, digest))
    return store, found


def find_difference(store: Store, planned: Sequence[Record], listing: Listing) -> Difference:
    """What the next generation of a store is to say.

    StoreError where the source is another one, or where a store of version 1 cannot say it.
    """
    found = compare(store.known(), planned, store.latents_at(), listing.is_kept)
    if found.num_before and len(found.vanished) == found.num_before:
        raise StoreError(
            f"none of the {count(found.num_before, 'photo')} of {store.paths.root} is in this source; encode it into "
            "another folder, or add it with --keep-vanished"
        )
    if store.version == OLD_VERSION and found.changes:
        raise StoreError(
            f"{store.paths.root} is a store of version 1, which can only grow, and since it was begun "
            f"{describe(found)}; sdvae compact writes it as a new store, which can change"
        )
    return found


def describe(found: Difference) -> str:
    """What a source has that the store has not, and what follows from it, in one line."""
    told = [f"{len(keys)} {KINDS[kind]} ({_shortened(keys)})" for kind, keys in found.keys().items() if keys]
    what = count(len(found.to_encode), "photo") if found.to_encode else "nothing"
    return f"{', '.join(told)}; {what} to encode"


def _shortened(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def tell_refused(planned: Iterable[Record]) -> None:
    """Say before the work begins which photos the settings refuse, and what would let them in."""
    reasons = Counter(record.reason for record in planned if record.step == "preprocess" and record.reason)
    for reason, number in reasons.most_common(5):
        hint = "; --max-upscale N allows it" if reason.startswith(TOO_SMALL) else ""
        _LOG.warning("%s will not be encoded: %s%s", count(number, "photo"), reason, hint)


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
