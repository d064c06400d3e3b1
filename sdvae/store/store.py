"""The latent store of docs/store.md: its manifest, its generations, and the shards that are committed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdvae import atomic, sealed
from sdvae.config import LatentScaling, VAEConfig
from sdvae.errors import StoreError, VerifyError
from sdvae.store.paths import StorePaths
from sdvae.store.records import Line, pack_index, quarantine
from sdvae.store.shard import CommittedFile, Shard, file_sha256

FORMAT, VERSION = "sdvae-latent-store", 1


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
        if manifest["version"] != VERSION:
            raise StoreError(f"{root} is a store of version {manifest['version']}; this sdvae reads {VERSION}")
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
    def rosters(self) -> list[CommittedFile]:
        """The roster of each generation, as the manifest and the commits of later ones describe them."""
        return [CommittedFile.of(self.paths.roster(number), entry) for number, entry in enumerate(self._generations())]

    @property
    def num_shards(self) -> int:
        """Shards of all generations, committed or not."""
        return sum(entry["num_shards"] for entry in self._generations())

    @property
    def num_records(self) -> int:
        """Records of all generations, encoded or not."""
        return sum(entry["num_records"] for entry in self._generations())

    def _generations(self) -> list[dict[str, Any]]:
        """What is known of the roster of each generation; VerifyError where their chain is broken."""
        entries = [self.manifest["roster"]]
        while (path := self.paths.generation(len(entries))).exists():
            entry = sealed.read_json(path)
            is_next = entry["generation"] == len(entries) and entry["previous"] == entries[-1]["sha256"]
            if not is_next or entry["manifest_sha256"] != self._manifest_sha256:
                raise VerifyError(f"{path} is a generation of another store or number")
            entries.append(entry)
        return entries

    @property
    def is_finished(self) -> bool:
        """Whether every shard is committed."""
        return all(self.paths.done(number).exists() for number in range(self.num_shards))

    def shards(self) -> list[Shard]:
        """The committed shards in order of their numbers."""
        return [self.shard(number) for number in self.paths.committed()]

    def shard(self, number: int) -> Shard:
        """One committed shard; StoreError where it is not, VerifyError where its commit is damaged."""
        path = self.paths.done(number)
        return self.parse_commit(path, sealed.read_json(path))

    def parse_commit(self, path: Path, commit: Mapping[str, Any]) -> Shard:
        """The shard that `commit`, read from `path`, describes; VerifyError where it is of another store or number."""
        if f"{commit['shard']:05d}" != path.stem or commit["manifest_sha256"] != self._manifest_sha256:
            raise VerifyError(f"{path} commits a shard of another store or number")
        return Shard.from_commit(self.paths, commit, self.manifest)

    def quarantined(self) -> list[Line]:
        """Key, step and reason of every record that was not encoded, sorted by key."""
        return quarantine(line for shard in self.shards() if shard.num_quarantined for line in shard.records())

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
    atomic.remove(store.paths.quarantine)
    sha256 = atomic.write_bytes(store.paths.roster(header["generation"]), *lines)
    entry = header | {"sha256": sha256, "num_bytes": sum(map(len, lines))}
    entry["manifest_sha256"] = file_sha256(store.paths.manifest)
    atomic.create_bytes(store.paths.generation(header["generation"]), sealed.seal(entry))


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
