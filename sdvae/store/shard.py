"""One shard of a store: where row i of tensor t lies, its records, its tensors, its commit."""

import hashlib
import json
import math
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae import atomic, sealed
from sdvae.errors import StoreError, VerifyError
from sdvae.store.buckets import Size
from sdvae.store.generations import Change, viewed
from sdvae.store.paths import StorePaths
from sdvae.store.records import Line, pack_index, parse_index, written

DATA_START = 4096  # numbers begin on the second page of every shard file, so that no header moves a row
STORE_DTYPES: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}

Tensors = Mapping[str, NDArray[Any]]  # "mean" and "logvar" (and the mirrored "*_flip"), each (rows, C, h, w) raw

_SAFETENSORS_CODES = {STORE_DTYPES["fp16"]: "F16", STORE_DTYPES["fp32"]: "F32"}
_METADATA = {"format": "pt", "latents": "raw"}


@dataclass(frozen=True)
class TensorPlaces:
    """Where the tensors of a shard lie in its file: one behind the other, in the order of their names."""

    names: tuple[str, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of each tensor: (rows, C, h, w)

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any], shape: Sequence[int]) -> "TensorPlaces":
        """The places in a store of this manifest."""
        names = ["mean", "logvar"] + ["mean_flip", "logvar_flip"] * manifest["preprocess"].get("flip", False)
        return cls(tuple(sorted(names)), STORE_DTYPES[manifest["store_dtype"]], tuple(shape))

    @property
    def tensor_bytes(self) -> int:
        """The length of one tensor."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def file_bytes(self) -> int:
        """The length of the file."""
        return DATA_START + self.tensor_bytes * len(self.names)

    def start(self, name: str) -> int:
        """The first byte of a tensor."""
        return DATA_START + self.names.index(name) * self.tensor_bytes

    def row(self, data: bytes, row: int) -> bytes:
        """The bytes of one record in those of a file: its row of every tensor. Its digest covers these."""
        row_bytes = self.tensor_bytes // self.shape[0]
        starts = [self.start(name) + row * row_bytes for name in self.names]
        return b"".join(data[start : start + row_bytes] for start in starts)

    def header(self) -> bytes:  # DATA_START bytes
        """The head of the file: sorted keys, and spaces up to the fixed start of the data.

        safetensors' own writer orders metadata at random and would make the bytes of a shard an accident.
        """
        text = sealed.canonical_json(
            {"__metadata__": _METADATA} | {name: self._entry(self.start(name) - DATA_START) for name in self.names}
        )
        text = text.rstrip().ljust(DATA_START - 8)
        return struct.pack("<Q", len(text)) + text

    def map(self, path: Path) -> dict[str, NDArray[Any]]:
        """The tensors as read-only memory maps, by place: the header is not looked at."""
        return {name: np.memmap(path, self.dtype, "r", self.start(name), self.shape) for name in self.names}

    def starts_in(self, path: Path) -> dict[str, int]:
        """The first byte of each tensor as the header of the file has it; tensors of other names are passed over.

        VerifyError where the header does not describe these tensors.
        """
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(DATA_START - 8)
        try:
            header = json.loads(text)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError alike
            header = None
        if length != len(text) or not isinstance(header, dict):
            raise VerifyError(f"{path} is damaged: it does not begin with the header of a shard")
        starts: dict[str, int] = {}
        for name in self.names:
            places = range(0, path.stat().st_size - DATA_START, self.tensor_bytes)
            found = [DATA_START + start for start in places if header.get(name) == self._entry(start)]
            if not found:
                raise VerifyError(f"{path} is damaged: its header does not describe {name} as it was committed")
            starts[name] = found[0]
        return starts

    def _entry(self, start: int) -> dict[str, Any]:
        code = _SAFETENSORS_CODES[self.dtype]
        return {"dtype": code, "shape": list(self.shape), "data_offsets": [start, start + self.tensor_bytes]}


@dataclass(frozen=True)
class CommittedFile:
    """A file as a commit describes it."""

    path: Path
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, entry: Mapping[str, Any]) -> "CommittedFile":
        """The file `path`, described by a commit's `entry`."""
        return cls(path, entry["num_bytes"], entry["sha256"])

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
    """A committed shard; `tensors_file` is None where every record was quarantined.

    `changes`, by the number of the record, is what later generations say of its records; a shard by itself has none.
    """

    number: int
    bucket_px: Size | None
    num_rows: int
    num_quarantined: int
    places: TensorPlaces
    degraded: int | None  # rows at once, where memory did not suffice for whole batches
    tensors_file: CommittedFile | None
    index_file: CommittedFile
    changes: Mapping[int, Change] = field(default_factory=dict)

    @classmethod
    def from_commit(cls, paths: StorePaths, commit: Mapping[str, Any], manifest: Mapping[str, Any]) -> "Shard":
        """The shard that an unsealed `done` file of the store at `paths` describes."""
        number, size, tensors = commit["shard"], commit["bucket_px"], commit["tensors"]
        bucket_px = size and (size[0], size[1])
        return cls(
            number=number,
            bucket_px=bucket_px,
            num_rows=commit["num_written"],
            num_quarantined=commit["num_quarantined"],
            places=TensorPlaces.of_manifest(manifest, tensors["shape"] if tensors else (0, 0, 0, 0)),
            degraded=commit["degraded"],
            tensors_file=CommittedFile.of(paths.tensors(number, bucket_px), tensors) if tensors else None,
            index_file=CommittedFile.of(paths.index(number), commit["index"]),
        )

    @property
    def num_records(self) -> int:
        """Records of the shard, quarantined ones too, without the retired."""
        return self.num_rows + self.num_quarantined - sum(change.is_retired for change in self.changes.values())

    @property
    def rows(self) -> Sequence[int]:
        """The rows of the written records, without the retired, in order; the index is read where some are."""
        if not any(change.is_retired for change in self.changes.values()):
            return range(self.num_rows)
        return [line["row"] for line in written(self.records())]

    @property
    def files(self) -> list[CommittedFile]:
        """All files of the shard but `done`."""
        return [self.index_file] if self.tensors_file is None else [self.index_file, self.tensors_file]

    def records(self) -> list[Line]:
        """The lines of the index, those of quarantined records too, with `changes`; VerifyError if it was altered."""
        self.require_whole_index()
        return viewed(parse_index(self.index_file.path.read_bytes()), self.changes)

    def require_whole_index(self) -> None:
        """Raise VerifyError unless the index is the one committed."""
        if not self.index_file.is_whole():
            raise VerifyError(f"{self.index_file.path} is damaged or missing: its bytes are not those committed")

    def tensors(self) -> dict[str, NDArray[Any]]:  # each (rows, C, h, w), raw
        """All tensors by name, as read-only memory maps.

        Length and header are checked. The numbers are not: that is what `verify` is for.
        """
        if self.tensors_file is None:
            return dict.fromkeys(self.places.names, np.empty(self.places.shape, self.places.dtype))
        path = self.tensors_file.path
        if not self.tensors_file.is_present():
            raise VerifyError(f"{path} is missing, or is not the {self.tensors_file.num_bytes:,} bytes committed")
        places = self.places
        starts = places.starts_in(path)
        return {name: np.memmap(path, places.dtype, "r", start, places.shape) for name, start in starts.items()}

    def moments(self, flipped: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:  # both (rows, C, h, w), raw
        """Mean and logvar, as read-only memory maps; `flipped`: of the mirrored photos.

        StoreError where mirrored photos were not encoded; else as `tensors`.
        """
        tensors, ending = self.tensors(), "_flip" if flipped else ""
        if f"mean{ending}" not in tensors:
            raise StoreError("this store holds no mirrored photos; encode with --flip for those")
        return tensors[f"mean{ending}"], tensors[f"logvar{ending}"]


def row_sha256(tensors: Tensors, row: int) -> str:
    """The digest of one record's numbers: its row of every tensor, in the order of the tensors' names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name][row].data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_files(
    paths: StorePaths,
    number: int,
    bucket_px: Size | None,
    lines: Sequence[Line],
    tensors: Tensors,
    degraded: int | None = None,
) -> tuple[dict[Path, list[atomic.Buffer]], bytes]:
    """What the files of one shard hold, by path, and what its `done` says of them.

    `degraded` says how few rows went through the network at once, where memory did not suffice for whole batches.
    """
    text = pack_index(lines)
    files: dict[Path, list[atomic.Buffer]] = {paths.index(number): [text]}
    described, num_rows = None, 0
    if bucket_px is not None and tensors:
        mean = tensors["mean"]
        num_rows = len(mean)
        header = TensorPlaces(tuple(sorted(tensors)), mean.dtype, mean.shape).header()
        chunks: list[atomic.Buffer] = [header, *(tensors[name].data for name in sorted(tensors))]
        files[paths.tensors(number, bucket_px)] = chunks
        described = _describe(chunks) | {"shape": mean.shape}
    done = {
        "shard": number,
        "bucket_px": bucket_px,
        "num_written": num_rows,
        "num_quarantined": len(lines) - num_rows,
        "tensors": described,
        "index": _describe([text]),
        "degraded": degraded,
        "manifest_sha256": file_sha256(paths.manifest),
    }
    return files, sealed.seal(done)


def commit_shard(
    paths: StorePaths,
    number: int,
    bucket_px: Size | None,
    lines: Sequence[Line],
    tensors: Tensors,
    degraded: int | None = None,
) -> None:
    """Write one shard: numbers (none where `tensors` is empty), index, then `done`, whose existence is the commit.

    A second process that comes with the same shard is harmless, as it brings the same bytes; StoreError if not.
    """
    files, done = shard_files(paths, number, bucket_px, lines, tensors, degraded)
    path = paths.done(number)
    if not path.exists() or path.read_bytes() == done:
        for file, content in files.items():
            atomic.write_bytes(file, *content)
        if atomic.create_bytes(path, done):
            return
    if path.read_bytes() != done:
        raise StoreError(f"{path} exists, but encoding its shard again gave other bytes; start again with --restart")


def _describe(chunks: Sequence[atomic.Buffer]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return {"num_bytes": sum(memoryview(chunk).nbytes for chunk in chunks), "sha256": digest.hexdigest()}
