"""Whether a store still holds the bytes that were committed: every file hashed once, on several threads."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

from sdvae import sealed
from sdvae.errors import StoreError, VerifyError
from sdvae.progress import Progress, silent
from sdvae.store.generations import View, name_known
from sdvae.store.paths import StorePaths
from sdvae.store.records import pack_index, read_roster, written
from sdvae.store.shard import CommittedFile, Shard
from sdvae.store.store import FORMAT, Store
from sdvae.store.streams import examine_streams

State = Literal["damaged", "missing", "not encoded yet"]

_NUM_THREADS = min(8, os.cpu_count() or 1)  # hashing leaves the GIL; more threads would only wait for the disk


@dataclass(frozen=True)
class Damage:
    """One file of a store that is not as it was committed."""

    path: Path
    state: State
    shard: int | None = None
    lost: tuple[str, ...] = ()  # keys of the records that cannot be read because of it


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; a store without damages is whole and finished."""

    damages: list[Damage]
    num_files: int = 0  # hashed
    num_bytes: int = 0
    num_records: int = 0  # in the shards that could be read
    stopped_at: Path | None = None  # the manifest or the commit of a roster: without it nothing else can be judged

    @property
    def is_unfinished(self) -> bool:
        """Whether nothing is wrong but that shards are still to be encoded."""
        return bool(self.damages) and all(damage.state == "not encoded yet" for damage in self.damages)

    @property
    def lost(self) -> list[str]:
        """The keys of all records that cannot be read, sorted."""
        return sorted({key for damage in self.damages for key in damage.lost})


def verify(root: str | Path, progress: Progress = silent) -> Verdict:
    """Hash every file of the store in `root`, and compare each with the digest that covers it.

    Raises StoreError where there is no store.
    """
    root = Path(root)
    paths = StorePaths(root)
    foundation = _damaged_manifest(paths) or _damaged_generation(Store.open(root))
    if foundation is not None:
        return Verdict([foundation], stopped_at=foundation.path)
    return _Examination(Store.open(root)).verdict(progress)


def _damaged_manifest(paths: StorePaths) -> Damage | None:
    is_there = paths.manifest.is_file()
    data = paths.manifest.read_bytes() if is_there else b""
    if FORMAT.encode() not in data and not paths.committed():
        raise StoreError(f"{paths.root} is not a latent store: it has no manifest.json of one")
    if sealed.unseal(data) is not None:
        return None
    return Damage(paths.manifest, "damaged" if is_there else "missing")


def _damaged_generation(store: Store) -> Damage | None:
    """The first commit of a later roster that is damaged, or is missing though shards of it were committed."""
    try:
        num_rosters, num_shards = len(store.rosters), store.num_shards
    except VerifyError:
        paths = sorted(store.paths.generation(0).parent.glob("*.json"))
        broken = [path for path in paths if sealed.unseal(path.read_bytes()) is None]
        return Damage((broken or paths[-1:])[0], "damaged")
    next_one = store.paths.generation(num_rosters)
    later = [path for path in next_one.parent.glob("*.json") if path.stem.isdecimal() and int(path.stem) > num_rosters]
    # A roster without a commit is one in the making, but not beside quarantine.jsonl, which goes before it is written.
    is_lost = store.paths.quarantine.is_file() and store.paths.roster(num_rosters).is_file()
    if is_lost or later or any(number >= num_shards for number in store.paths.committed()):
        return Damage(next_one, "missing")
    return None


@dataclass(frozen=True)
class _Finding:
    """What hashing one shard gave."""

    damages: list[Damage]
    files: list[CommittedFile] = field(default_factory=list)
    num_records: int = 0


class _Examination:
    """One look at all of a store whose manifest and commits of rosters are whole."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.paths = store.paths

    def verdict(self, progress: Progress) -> Verdict:
        """Hash everything."""
        rosters = self.store.rosters
        if not rosters:
            return Verdict([Damage(self.paths.generation(0), "not encoded yet")])
        damages = [Damage(roster.path, state) for roster in rosters for state in _states(roster)]
        numbers = range(self.store.num_shards)
        findings: list[_Finding] = []
        changes = (change for changes in self._view.values() for change in changes.values())
        num_records, num_all = 0, self.store.num_records - sum(change.is_retired for change in changes)
        with ThreadPoolExecutor(_NUM_THREADS, "sdvae-verify") as pool:
            for finding in pool.map(self._examine, numbers):
                findings.append(finding)
                num_records += finding.num_records
                progress("verify", num_records, num_all)
        of_shards = [damage for finding in findings for damage in finding.damages]
        damages += map(self._name_lost, of_shards)
        if not any(damage.path.parent.name in ("done", "index") for damage in of_shards):
            damages += self._examine_quarantine()
        of_streams = list(examine_streams(self.store))
        damages += [Damage(path, state) for path, _, state in of_streams if state]
        files = [*rosters, *(file for finding in findings for file in finding.files)]
        num_commits = len(numbers) + sum(self.paths.generation(number).is_file() for number in range(len(rosters)))
        return Verdict(
            damages,
            num_files=len(files) + num_commits + 2 + len(of_streams),  # 2: the manifest and the quarantine
            num_bytes=sum(file.num_bytes for file in files) + sum(num_bytes for _, num_bytes, _ in of_streams),
            num_records=num_records,
        )

    def _examine(self, number: int) -> _Finding:
        path = self.paths.done(number)
        if not path.is_file():
            is_finished = self.paths.quarantine.is_file()
            return _Finding([Damage(path, "missing" if is_finished else "not encoded yet", number)])
        try:
            shard = replace(self.store.shard(number), changes=self._view.get(number, {}))
        except VerifyError:
            return _Finding([Damage(path, "damaged", number)])
        damages = [Damage(shard.index_file.path, state, number) for state in _states(shard.index_file)]
        if shard.tensors_file is not None:
            for state in _states(shard.tensors_file):
                lost = () if damages else _lost(shard, shard.tensors_file.path)
                damages.append(Damage(shard.tensors_file.path, state, number, tuple(lost)))
        return _Finding(damages, shard.files, shard.num_records)

    def _name_lost(self, damage: Damage) -> Damage:
        """Without commit or index no record of the shard can be read; the roster has their names."""
        if damage.shard is None or damage.state == "not encoded yet" or damage.path.parent.name == "shards":
            return damage
        return replace(damage, lost=tuple(self._keys[damage.shard]))

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        """The records of every shard, as the rosters that are whole have them, without the retired."""
        keys: dict[int, list[str]] = defaultdict(list)
        rosters = (roster.path for roster in self.store.rosters if roster.is_whole())
        for one in name_known(chain.from_iterable(map(read_roster, rosters)), self._view):
            if not one.is_retired:
                keys[one.place[0]].append(one.record.key)
        return keys

    @cached_property
    def _view(self) -> View:
        try:
            return self.store.view()
        except VerifyError:  # the damage of its roster is told; records have their old names
            return {}

    def _examine_quarantine(self) -> list[Damage]:
        """Its bytes follow from the indexes."""
        try:
            data = pack_index(self.store.quarantined(len(self.store.rosters) - 1))
        except VerifyError:  # changes are damaged, which is told; what is quarantined is not known
            return []
        expected = CommittedFile(self.paths.quarantine, len(data), hashlib.sha256(data).hexdigest())
        return [Damage(expected.path, state) for state in _states(expected)]


def _lost(shard: Shard, path: Path) -> Iterator[str]:
    """The keys whose numbers differ from their digest; rows are found by place, so that no header is needed."""
    data = path.read_bytes() if path.is_file() else b""
    for line in written(shard.records()):
        if hashlib.sha256(shard.places.row(data, line["row"])).hexdigest() != line["latents_sha256"]:
            yield line["key"]


def _states(file: CommittedFile) -> Iterator[State]:
    """What is wrong with a file, if anything."""
    if not file.path.is_file():
        yield "missing"
    elif not file.is_whole():
        yield "damaged"
