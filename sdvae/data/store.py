"""The latent store of docs/store.md: shards committed one by one, and the reader that trusts nothing else."""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae import atomic
from sdvae.errors import StoreError, VerifyError

FORMAT, VERSION = "sdvae-latent-store", 1
DATA_START = 4096  # numbers begin on the second page of every shard file, so that no header moves a row
STORE_DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}

Size = tuple[int, int]  # (height, width) in pixels
Moments = Mapping[str, NDArray[Any]]  # "mean" and "logvar" (and the mirrored "*_flip"), each (rows, C, h, w) raw

_SAFETENSORS_CODES = {STORE_DTYPES["fp16"]: "F16", STORE_DTYPES["fp32"]: "F32"}
_OWN_FOLDERS = ("roster", "shards", "index", "done", "journal")
_OWN_FILE = re.compile(
    r"manifest\.json|quarantine\.jsonl|roster/\d{5,}\.jsonl?|journal/(scan\.jsonl|timings\.jsonl|(manifest|listing)\.json|lock)"
    r"|shards/\d{5,}-\d+x\d+\.safetensors|index/\d{5,}\.jsonl|done/\d{5,}\.json"
)


@dataclass(frozen=True)
class Layout:
    """Where each file of a store lies."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What every shard has in common; never rewritten."""
        return self.root / "manifest.json"

    def roster(self, generation: int) -> Path:
        """Which record is in which shard."""
        return self.root / "roster" / f"{generation:05d}.jsonl"

    def generation(self, generation: int) -> Path:
        """The commit of a later roster; that of the first is the manifest."""
        return self.root / "roster" / f"{generation:05d}.json"

    @property
    def quarantine(self) -> Path:
        """The records that were not encoded, with reasons; present when the store is finished."""
        return self.root / "quarantine.jsonl"

    @property
    def journal(self) -> Path:
        """Notes of the writer, which readers ignore."""
        return self.root / "journal"

    def tensors(self, number: int, bucket_px: Size) -> Path:
        """The numbers of a shard."""
        return self.root / "shards" / f"{number:05d}-{bucket_px[0]}x{bucket_px[1]}.safetensors"

    def index(self, number: int) -> Path:
        """The records of a shard."""
        return self.root / "index" / f"{number:05d}.jsonl"

    def done(self, number: int) -> Path:
        """The commit of a shard."""
        return self.root / "done" / f"{number:05d}.json"

    def make_folders(self) -> None:
        """Make the root and the folders in it."""
        for name in _OWN_FOLDERS:
            atomic.make_folder(self.root / name)

    def contents(self) -> tuple[list[Path], list[Path]]:
        """All files below the root: those that a store writes, and others; a link is other, wherever it leads."""
        own: list[str] = []
        other: list[str] = []
        folders = [""] if self.root.is_dir() else []
        while folders:
            folder = folders.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    else:
                        is_own = entry.is_file(follow_symlinks=False) and self._is_own(name)
                        (own if is_own else other).append(name)
        return [self.root / name for name in sorted(own)], [self.root / name for name in sorted(other)]

    def clear(self) -> None:
        """Remove the files of the store; a clearing that is killed leaves no commit without its manifest."""
        own, _ = self.contents()
        commits_first = sorted(own, key=lambda path: (path == self.manifest, path.parent.name != "done"))
        for path in commits_first:
            atomic.remove(path)

    def _is_own(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        is_here = not folder or folder.partition("/")[0] in _OWN_FOLDERS
        return _OWN_FILE.fullmatch(name) is not None or (is_here and atomic.is_temporary(file))


def tensor_names(has_flips: bool) -> list[str]:
    """The tensors of a shard, in the order in which they lie in its file."""
    return sorted(["mean", "logvar"] + ["mean_flip", "logvar_flip"] * has_flips)


# --- Writing ---


def row_sha256(moments: Moments, row: int) -> str:
    """The digest of one record's numbers: its row of every tensor, in the order of the tensors' names."""
    digest = hashlib.sha256()
    for name in sorted(moments):
        digest.update(moments[name][row].data)
    return digest.hexdigest()


def shard_files(
    layout: Layout,
    number: int,
    bucket_px: Size | None,
    lines: Sequence[dict[str, Any]],
    moments: Moments,
    degraded: int | None = None,
) -> tuple[dict[Path, list[atomic.Buffer]], bytes]:
    """What the files of one shard hold, by path, and what its `done` says of them.

    `degraded` says how few rows went through the network at once, where memory did not suffice for whole batches.
    """
    num_rows = len(moments["mean"]) if moments else 0
    text = b"".join(map(atomic.canonical_json, lines))
    files: dict[Path, list[atomic.Buffer]] = {layout.index(number): [text]}
    tensors = None
    if bucket_px is not None and num_rows:
        chunks: list[atomic.Buffer] = [pack_header(moments, {"format": "pt", "latents": "raw"})]
        chunks += [moments[name].data for name in sorted(moments)]
        files[layout.tensors(number, bucket_px)] = chunks
        tensors = _describe(chunks) | {"shape": moments["mean"].shape}
    done = {
        "shard": number,
        "bucket_px": bucket_px,
        "num_written": num_rows,
        "num_quarantined": len(lines) - num_rows,
        "tensors": tensors,
        "index": _describe([text]),
        "degraded": degraded,
        "manifest_sha256": file_sha256(layout.manifest),
    }
    return files, atomic.seal(done)


def commit_shard(
    layout: Layout,
    number: int,
    bucket_px: Size | None,
    lines: Sequence[dict[str, Any]],
    moments: Moments,
    degraded: int | None = None,
) -> None:
    """Write one shard: numbers (none where `moments` is empty), index, then `done`, whose existence is the commit.

    A second process that comes with the same shard is harmless, as it brings the same bytes; StoreError if not.
    """
    files, done = shard_files(layout, number, bucket_px, lines, moments, degraded)
    path = layout.done(number)
    if not path.exists() or path.read_bytes() == done:
        for file, content in files.items():
            atomic.write_bytes(file, *content)
        if atomic.create_bytes(path, done):
            return
    if path.read_bytes() != done:
        raise StoreError(f"{path} exists, but encoding its shard again gave other bytes; start again with --restart")


def commit_roster(store: "Store", lines: Sequence[bytes]) -> None:
    """Add a generation: its roster (header first), then the sealed file beside it, whose existence is the commit.

    The store is unfinished again from here on, so `quarantine.jsonl` goes first.
    """
    header = json.loads(lines[0])
    atomic.remove(store.layout.quarantine)
    sha256 = atomic.write_bytes(store.layout.roster(header["generation"]), *lines)
    entry = header | {"sha256": sha256, "num_bytes": sum(map(len, lines))}
    entry["manifest_sha256"] = file_sha256(store.layout.manifest)
    atomic.create_bytes(store.layout.generation(header["generation"]), atomic.seal(entry))


def _describe(chunks: Sequence[atomic.Buffer]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return {"num_bytes": sum(memoryview(chunk).nbytes for chunk in chunks), "sha256": digest.hexdigest()}


def pack_header(moments: Moments, metadata: dict[str, str]) -> bytes:  # DATA_START bytes
    """The head of a safetensors file: sorted keys, and spaces up to the fixed start of the data.

    The library's own writer orders metadata at random and would make the bytes of a shard an accident.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in sorted(moments):
        values = moments[name]
        header[name] = _header_entry(values.dtype, values.shape, start, values.nbytes)
        start += values.nbytes
    text = atomic.canonical_json(header).rstrip().ljust(DATA_START - 8)
    return struct.pack("<Q", len(text)) + text


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


# --- Reading ---


@dataclass(frozen=True)
class CommittedFile:
    """A file as its shard's commit describes it."""

    path: Path
    num_bytes: int
    sha256: str

    def is_present(self) -> bool:
        """Whether a file of this length is there; cheap, and enough to tell an interrupted copy."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == self.num_bytes

    def is_whole(self) -> bool:
        """Whether every byte is the one committed."""
        return self.is_present() and file_sha256(self.path) == self.sha256


@dataclass(frozen=True)
class Shard:
    """A committed shard; `tensors` is None where every record was quarantined."""

    number: int
    bucket_px: Size | None
    num_rows: int
    num_quarantined: int
    shape: tuple[int, ...]  # of each tensor: (rows, C, h, w)
    degraded: int | None  # rows at once, where memory did not suffice for whole batches
    tensors: CommittedFile | None
    index: CommittedFile

    @property
    def files(self) -> list[CommittedFile]:
        """All files of the shard but `done`."""
        return [self.index] if self.tensors is None else [self.index, self.tensors]


class Store:
    """A latent store, opened for reading."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.layout = Layout(root)
        self.manifest = manifest
        self._manifest_sha256 = file_sha256(self.layout.manifest)

    @classmethod
    def open(cls, root: Path) -> "Store":
        """Read the manifest; StoreError where there is none or of another version, VerifyError where it is damaged."""
        path = Layout(root).manifest
        if not path.is_file():
            raise StoreError(f"{root} is not a latent store: it has no manifest.json")
        if FORMAT.encode() not in path.read_bytes():
            raise StoreError(f"{path} is not the manifest of a latent store")
        manifest = atomic.read_json(path)
        if manifest["version"] != VERSION:
            raise StoreError(f"{root} is a store of version {manifest['version']}; this sdvae reads {VERSION}")
        return cls(root, manifest)

    @property
    def rosters(self) -> list[CommittedFile]:
        """The roster of each generation, as the manifest and the commits of later ones describe them."""
        return [_committed(self.layout.roster(number), entry) for number, entry in enumerate(self._generations())]

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
        while (path := self.layout.generation(len(entries))).exists():
            entry = atomic.read_json(path)
            is_next = entry["generation"] == len(entries) and entry["previous"] == entries[-1]["sha256"]
            if not is_next or entry["manifest_sha256"] != self._manifest_sha256:
                raise VerifyError(f"{path} is a generation of another store or number")
            entries.append(entry)
        return entries

    def shards(self) -> list[Shard]:
        """The committed shards in order of their numbers."""
        folder = self.layout.root / "done"
        numbers = sorted(int(path.stem) for path in folder.glob("*.json") if _OWN_FILE.fullmatch(f"done/{path.name}"))
        return [self.shard(number) for number in numbers]

    def shard(self, number: int) -> Shard:
        """One committed shard; StoreError where it is not, VerifyError where its commit is damaged."""
        path = self.layout.done(number)
        done = atomic.read_json(path)
        if done["shard"] != number or done["manifest_sha256"] != self._manifest_sha256:
            raise VerifyError(f"{path} commits a shard of another store or number")
        bucket_px = done["bucket_px"] and tuple(done["bucket_px"])
        tensors = done["tensors"]
        return Shard(
            number=number,
            bucket_px=bucket_px,
            num_rows=done["num_written"],
            num_quarantined=done["num_quarantined"],
            shape=tuple(tensors["shape"]) if tensors else (0, 0, 0, 0),
            degraded=done["degraded"],
            tensors=_committed(self.layout.tensors(number, bucket_px), tensors) if tensors else None,
            index=_committed(self.layout.index(number), done["index"]),
        )

    def records(self, number: int) -> list[dict[str, Any]]:
        """The index lines of a committed shard, quarantined records too; VerifyError where they were altered."""
        index = self.shard(number).index
        if not index.is_whole():
            raise VerifyError(f"{index.path} is damaged or missing: its bytes are not those committed")
        return [json.loads(line) for line in index.path.read_bytes().splitlines()]

    def moments(
        self, number: int, flipped: bool = False
    ) -> tuple[NDArray[Any], NDArray[Any]]:  # both (rows, C, h, w), raw
        """Mean and logvar of a committed shard, as read-only memory maps; `flipped`: of the mirrored photos.

        StoreError where mirrored photos were not encoded; else as `tensors`.
        """
        tensors = self.tensors(number)
        ending = "_flip" if flipped else ""
        if f"mean{ending}" not in tensors:
            raise StoreError(f"{self.layout.root} holds no mirrored photos; encode with --flip for those")
        return tensors[f"mean{ending}"], tensors[f"logvar{ending}"]

    def tensors(self, number: int) -> dict[str, NDArray[Any]]:  # each (rows, C, h, w), raw
        """All that a committed shard holds by name, as read-only memory maps.

        Length and header are checked; the numbers are not, that is what `verify` is for.
        """
        shard = self.shard(number)
        dtype = STORE_DTYPES[self.manifest["store_dtype"]]
        if shard.tensors is None:
            return dict.fromkeys(self._tensor_names, np.empty(shard.shape, dtype))
        path = shard.tensors.path
        if not shard.tensors.is_present():
            raise VerifyError(f"{path} is missing, or is not the {shard.tensors.num_bytes:,} bytes committed")
        header = _read_header(path)
        return {name: _map(path, header, name, dtype, shard.shape) for name in self._tensor_names}

    @property
    def _tensor_names(self) -> list[str]:
        return tensor_names(self.manifest["preprocess"].get("flip", False))

    def quarantined(self) -> list[dict[str, Any]]:
        """Key, step and reason of every record that was not encoded, sorted by key."""
        lines = [line for shard in self.shards() if shard.num_quarantined for line in self.records(shard.number)]
        found = [{name: line[name] for name in ("key", "step", "reason")} for line in lines if line["row"] is None]
        return sorted(found, key=lambda line: str(line["key"]))

    def finalise(self) -> None:
        """Write `quarantine.jsonl`, once every shard is committed; may be repeated."""
        atomic.write_bytes(self.layout.quarantine, b"".join(map(atomic.canonical_json, self.quarantined())))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _committed(path: Path, entry: Mapping[str, Any]) -> CommittedFile:
    return CommittedFile(path, entry["num_bytes"], entry["sha256"])


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(DATA_START - 8)
    try:
        header = json.loads(text)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError alike
        header = None
    if length != len(text) or not isinstance(header, dict):
        raise VerifyError(f"{path} is damaged: it does not begin with the header of a shard")
    return header


def _map(path: Path, header: dict[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    entry = header.get(name)
    num_bytes = dtype.itemsize * math.prod(shape)
    places = range(0, path.stat().st_size - DATA_START, num_bytes)
    starts = [start for start in places if entry == _header_entry(dtype, shape, start, num_bytes)]
    if not starts:
        raise VerifyError(f"{path} is damaged: its header does not describe {name} as it was committed")
    return np.memmap(path, dtype, "r", DATA_START + starts[0], shape)


def _header_entry(dtype: np.dtype[Any], shape: tuple[int, ...], start: int, num_bytes: int) -> dict[str, Any]:
    code = _SAFETENSORS_CODES[dtype]
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, start + num_bytes]}
