"""The latent store of docs/store.md: its manifest, its generations, and the shards that are committed."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sdvae import atomic, sealed
from sdvae.config import LatentScaling, VAEConfig
from sdvae.errors import StoreError, VerifyError
from sdvae.store.generations import Change, Known, Place, View, fold, name_known, parse_changes
from sdvae.store.paths import StorePaths
from sdvae.store.records import Line, pack_index, quarantine, read_roster
from sdvae.store.shard import CommittedFile, Shard, file_sha256

FORMAT, VERSION = "sdvae-latent-store", 2
OLD_VERSION = 1  # without changes; its first roster is committed by the manifest


class Store:
    """A latent store, opened for reading."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.paths = StorePaths(root.absolute())
        self.manifest = manifest
        self._manifest_sha256 = file_sha256(self.paths.manifest)

    @classmethod
    def open(cls, root: Path) -> "Store":
        """Read the manifest; StoreError where there is none or of another version, VerifyError where it is damaged."""
        path = StorePaths(root).manifest
        if not path.is_file():
            raise StoreError(f"{root} is not a latent store: it has no manifest.json")
        if FORMAT.encode() not in path.read_bytes():
            raise StoreError(f"{path} is not the manifest of a latent store")
        manifest = sealed.read_json(path)
        if manifest["version"] not in (OLD_VERSION, VERSION):
            raise StoreError(
                f"{root} is a store of version {manifest['version']}; this sdvae reads {OLD_VERSION} and {VERSION}"
            )
        if "latent_scaling" not in manifest:
            manifest["latent_scaling"] = _latent_scaling_of_old(manifest["vae"])
        return cls(root, manifest)

    @classmethod
    def find(cls, root: Path) -> "Store | None":
        """The store in `root`, None where none was begun; else as `open`."""
        return cls.open(root) if StorePaths(root).manifest.exists() else None

    @property
    def latent_scaling(self) -> LatentScaling:
        """What makes scaled latents of the raw ones stored here."""
        return LatentScaling.from_json(self.manifest["latent_scaling"])

    @property
    def version(self) -> int:
        """That of the format: 1 or 2."""
        return int(self.manifest["version"])

    @property
    def rosters(self) -> list[CommittedFile]:
        """The roster of each generation, as its commit describes it (in version 1, that of the first the manifest)."""
        return [CommittedFile.of(self.paths.roster(number), entry) for number, entry in enumerate(self._generations())]

    @property
    def num_shards(self) -> int:
        """Shards of all generations, committed or not."""
        return sum(entry["num_shards"] for entry in self._generations())

    @property
    def num_records(self) -> int:
        """Records in the shards of all generations, encoded or not, retired or not."""
        return sum(entry["num_records"] for entry in self._generations())

    def _generations(self) -> list[dict[str, Any]]:
        """What is known of the roster of each generation; VerifyError where their chain is broken."""
        entries = [self.manifest["roster"]] if self.version == OLD_VERSION else []
        while (path := self.paths.generation(len(entries))).exists():
            entry = sealed.read_json(path)
            is_next = entry["generation"] == len(entries)
            is_next = is_next and entry["previous"] == (entries[-1]["sha256"] if entries else None)
            if not is_next or entry["manifest_sha256"] != self._manifest_sha256:
                raise VerifyError(f"{path} is a generation of another store or number")
            entries.append(entry)
        return entries

    @property
    def is_finished(self) -> bool:
        """Whether every shard is committed."""
        numbers = range(self.num_shards)
        return bool(numbers) and all(self.paths.done(number).exists() for number in numbers)

    # --- Views ---

    def view(self, generation: int | None = None) -> View:
        """What the generations up to this one, the newest by default, say of records that older ones placed."""
        entries = self._generations()
        last = len(entries) if generation is None else generation + 1
        return fold(itertools.chain.from_iterable(self._changes(*one) for one in enumerate(entries[:last])))

    def _changes(self, generation: int, entry: Mapping[str, Any]) -> list[Change]:
        """The end of a roster; VerifyError where it was altered."""
        told = entry.get("changes")
        if not told or not told["num_changes"]:
            return []
        path = self.paths.roster(generation)
        data = b""
        if path.is_file():
            with path.open("rb") as file:
                file.seek(entry["num_bytes"] - told["num_bytes"])
                data = file.read()
        if hashlib.sha256(data).hexdigest() != told["sha256"]:
            raise VerifyError(f"{path} is damaged or missing: its changes are not those committed")
        return parse_changes(data)

    def newest_complete(self) -> int | None:
        """The newest generation whose shards, and those of all before it, are committed; None where none is."""
        there = set(self.paths.committed())
        num_whole = next(number for number in itertools.count() if number not in there)
        ends = itertools.accumulate(entry["num_shards"] for entry in self._generations())
        return max((number for number, end in enumerate(ends) if 0 < end <= num_whole), default=None)

    def shards(self, generation: int | None = None) -> list[Shard]:
        """The committed shards in order of their numbers, as a generation has them.

        By default the newest complete one; where none is complete, the newest. StoreError for one that is not there.
        """
        entries = self._generations()
        if generation is None:
            complete = self.newest_complete()
            generation = len(entries) - 1 if complete is None else complete
        elif not 0 <= generation < len(entries):
            raise StoreError(f"{self.paths.root} has the generations 0 to {len(entries) - 1}, not {generation}")
        end, view = sum(entry["num_shards"] for entry in entries[: generation + 1]), self.view(generation)
        numbers = (number for number in self.paths.committed() if number < end)
        return [replace(self.shard(number), changes=view.get(number, {})) for number in numbers]

    def known(self) -> Iterator[Known]:
        """Every record of the rosters, as the newest generation names it."""
        placed = itertools.chain.from_iterable(read_roster(roster.path) for roster in self.rosters)
        return name_known(placed, self.view())

    def latents_at(self) -> Callable[[Place], bool]:
        """A function that says whether a place has latents: its shard is committed, and it is not quarantined."""

        @cache
        def are_written(number: int) -> list[bool]:
            if not self.paths.done(number).exists():
                return []
            shard = self.shard(number)
            return [line["row"] is not None for line in shard.records()] if shard.index_file.is_whole() else []

        def has_latents(place: Place) -> bool:
            written = are_written(place[0])
            return bool(written) and written[place[1]]

        return has_latents

    def shard(self, number: int) -> Shard:
        """One committed shard; StoreError where it is not, VerifyError where its commit is damaged."""
        path = self.paths.done(number)
        return self.parse_commit(path, sealed.read_json(path))

    def parse_commit(self, path: Path, commit: Mapping[str, Any]) -> Shard:
        """The shard that `commit`, read from `path`, describes; VerifyError where it is of another store or number."""
        if f"{commit['shard']:05d}" != path.stem or commit["manifest_sha256"] != self._manifest_sha256:
            raise VerifyError(f"{path} commits a shard of another store or number")
        return Shard.from_commit(self.paths, commit, self.manifest)

    def quarantined(self, generation: int | None = None) -> list[Line]:
        """Key, step and reason of every record that was not encoded, sorted by key; of the generation as `shards`."""
        shards = self.shards(generation)
        return quarantine(line for shard in shards if shard.num_quarantined for line in shard.records())

    def finalise(self) -> None:
        """Write `quarantine.jsonl`, once every shard is committed; may be repeated."""
        atomic.write_bytes(self.paths.quarantine, pack_index(self.quarantined()))


def _latent_scaling_of_old(vae: Mapping[str, Any]) -> dict[str, Any]:
    """The member `latent_scaling` of a manifest that was written before there was one."""
    if vae["config"]["_class_name"] == "AutoencoderTiny":  # it says 1.0: to itself, its latents are scaled ones
        return VAEConfig.from_family(vae["latent_space"]).latent_scaling.to_json()
    return VAEConfig.from_diffusers(vae["config"]).latent_scaling.to_json()


def commit_roster(store: Store, lines: Sequence[bytes]) -> None:
    """Add a generation: its roster (header first), then the sealed file beside it, whose existence is the commit.

    The store is unfinished again from here on, so `quarantine.jsonl` goes first.
    """
    header = json.loads(lines[0])
    generation = header["generation"]
    atomic.remove(store.paths.quarantine)
    if header.get("changes", {}).get("num_changes"):
        atomic.write_bytes(store.paths.changes(generation), lines[-1])
    sha256 = atomic.write_bytes(store.paths.roster(generation), *lines)
    atomic.create_bytes(
        store.paths.generation(generation), seal_generation(store, header, sha256, sum(map(len, lines)))
    )


def seal_generation(store: Store, header: Mapping[str, Any], sha256: str, num_bytes: int) -> bytes:
    """The commit of a roster with this header and digest."""
    entry = {"sha256": sha256, "num_bytes": num_bytes, "manifest_sha256": file_sha256(store.paths.manifest)}
    told = {name: value for name, value in header.items() if name != "shards" or store.version == OLD_VERSION}
    return sealed.seal(told | entry)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two nested mappings, one readable line each."""
    found: list[str] = []
    for name in sorted(stored.keys() | wanted.keys()):
        before, now = stored.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{where}{name}.")
        elif before != now:
            found.append(f"{where}{name} was {json.dumps(before)}, now {json.dumps(now)}")
    return found
