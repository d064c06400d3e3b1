"""Streams: more of each record than its latents, in a folder of their own beside the shards.

A stream has a row for each written record of each shard, in their order, under a commit of its own; no byte of the
shards depends on it. A row is an array; rows lie one behind the other along their first axis, and a row of length 0
says that the record has none.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvae import atomic, sealed
from sdvae.errors import ConfigError, StoreError, VerifyError
from sdvae.store.shard import DATA_START, CommittedFile, Shard, file_sha256
from sdvae.store.store import Store, differences

Kind = Literal["mask", "control", "tensor"]
Flip = Literal[
    "same", "mirror", "stored"
]  # of a mirrored photo: the same row, its last axis reversed, a row of its own
Row = NDArray[Any] | None  # (n, ...), or None where a record has none

State = Literal["damaged", "missing", "not encoded yet"]

# Bytes of one value, by safetensors' names. Of BF16, which numpy lacks, arrays hold the bits.
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAKEN = {"latents", "key", "caption", "label", "original_size", "crop_top_left", "target_size", "is_flipped"}
_FORMAT, _VERSION = "sdvae-latent-stream", 1


@dataclass(frozen=True)
class Declaration:
    """What all rows of a stream have in common."""

    kind: Kind
    dtype: str  # safetensors' name of it
    flip: Flip = "same"
    made_from: str | None = None  # for people


@dataclass(frozen=True)
class StreamShard:
    """The rows of one shard: `starts` (rows + 1) int64, `values` (starts[-1], ...), and `values_flip` where stored."""

    file: CommittedFile
    num_rows: int
    num_missing: int
    shape: tuple[int, ...]  # of the values
    value_bytes: int

    def values_at(self, flipped: bool = False) -> int:
        """The first byte of the values, or of those that are mirrored."""
        return DATA_START + 8 * (self.num_rows + 1) + self.values_bytes * flipped

    @property
    def values_bytes(self) -> int:
        """The length of the values."""
        return self.value_bytes * math.prod(self.shape)


class Stream:
    """One stream of a store."""

    def __init__(self, store: Store, name: str, declaration: Declaration) -> None:
        self.store, self.name, self.declaration = store, name, declaration
        self.folder = store.paths.stream(name)

    @classmethod
    def open(cls, store: Store, name: str) -> "Stream":
        """A stream that was begun; VerifyError where its declaration is damaged or of another store."""
        path = store.paths.stream(name) / "stream.json"
        told = sealed.read_json(path)
        if (told.pop("format"), told.pop("version"), told.pop("name")) != (_FORMAT, _VERSION, name):
            raise StoreError(f"{path} declares no stream that this sdvae reads")
        if told.pop("manifest_sha256") != file_sha256(store.paths.manifest):
            raise VerifyError(f"{path} declares a stream of another store")
        return cls(store, name, Declaration(**{field: told[field] for field in ("kind", "dtype", "flip", "made_from")}))

    @classmethod
    def begin(cls, store: Store, name: str, declaration: Declaration) -> "Stream":
        """A stream to add shards to; StoreError where one of this name was begun as something else."""
        require_stream_name(name)
        stream = cls(store, name, declaration)
        path = stream.folder / "stream.json"
        told = {"format": _FORMAT, "version": _VERSION, "name": name} | asdict(declaration)
        atomic.make_folder(stream.folder)
        if not atomic.create_bytes(path, sealed.seal(told | {"manifest_sha256": file_sha256(store.paths.manifest)})):
            found = differences(asdict(cls.open(store, name).declaration), asdict(declaration))
            if found:
                raise StoreError(
                    f"{stream.folder} was begun as another stream: {'; '.join(found)}. Give another name, or remove "
                    "the folder"
                )
        return stream

    def has(self, number: int) -> bool:
        """Whether the rows of a shard are committed, and their file is there."""
        return self.commit_path(number).exists() and self.shard(number).file.is_present()

    def shard(self, number: int) -> StreamShard:
        """The committed rows of a shard; VerifyError where the commit is damaged, or of another shard."""
        path = self.commit_path(number)
        commit = sealed.read_json(path)
        if commit["shard"] != number or commit["done_sha256"] != file_sha256(self.store.paths.done(number)):
            raise VerifyError(f"{path} commits the rows of another shard")
        return StreamShard(
            CommittedFile.of(self._file(number), commit),
            commit["num_rows"],
            commit["num_missing"],
            tuple(commit["shape"]),
            DTYPES[self.declaration.dtype],
        )

    def lengths(self, number: int) -> NDArray[np.int64]:  # (rows,)
        """The length of each row of a shard; 0 where a record has none."""
        shard = self.shard(number)
        if not shard.file.is_present():
            raise VerifyError(f"{shard.file.path} is missing, or is not the {shard.file.num_bytes:,} bytes committed")
        return np.diff(np.fromfile(shard.file.path, "<i8", shard.num_rows + 1, offset=DATA_START))

    def commit(self, shard: Shard, rows: Sequence[Row], flipped: Sequence[Row] | None = None) -> None:
        """Write the rows of a shard, one a written record; all that are there agree in every axis but the first.

        StoreError where other rows were committed before.
        """
        code = self.declaration.dtype
        tensors = {"starts": np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int64)}
        tensors["values"] = _join(rows)
        if flipped is not None:
            tensors["values_flip"] = _join(flipped)
        header = _header({name: ("I64" if name == "starts" else code, tensor) for name, tensor in tensors.items()})
        chunks: list[atomic.Buffer] = [header, *(tensor.data for tensor in tensors.values() if tensor.size)]
        file = CommittedFile(
            self._file(shard.number), sum(memoryview(chunk).nbytes for chunk in chunks), _sha256(chunks)
        )
        commit = sealed.seal(
            {
                "shard": shard.number,
                "num_rows": len(rows),
                "num_missing": sum(row is None for row in rows),
                "shape": tensors["values"].shape,
                "num_bytes": file.num_bytes,
                "sha256": file.sha256,
                "done_sha256": file_sha256(self.store.paths.done(shard.number)),
            }
        )
        path = self.commit_path(shard.number)
        if path.exists() and sealed.unseal(path.read_bytes()) is None:
            atomic.remove(path)
        if not path.exists() or path.read_bytes() == commit:
            if not file.is_whole():
                atomic.write_bytes(file.path, *chunks)
            if atomic.create_bytes(path, commit):
                return
        if path.read_bytes() != commit:
            raise StoreError(f"{path} commits other rows than these; to make the stream anew, remove {self.folder}")

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def commit_path(self, number: int) -> Path:
        """Where the commit of a shard's rows lies."""
        return self.folder / f"{number:05d}.json"


def require_stream_name(name: str) -> None:
    """Raise ConfigError for what no stream can be called."""
    if not _NAME.fullmatch(name) or name in _TAKEN or name.endswith("_length"):
        raise ConfigError(
            f"{name!r} cannot name a stream: take lower-case letters, digits and _, and none of "
            f"{', '.join(sorted(_TAKEN))}, *_length"
        )


def stream_names(store: Store) -> list[str]:
    """The streams that a store has, finished or not, sorted."""
    return sorted(path.parent.name for path in store.paths.stream("").glob("*/stream.json"))


def examine_streams(store: Store) -> Iterator[tuple[Path, int, State | None]]:
    """Every file of every stream with its length and what is wrong with it, if anything; each is hashed."""
    for folder in sorted(path for path in store.paths.stream("").glob("*") if path.is_dir()):
        yield from _examine(store, folder)


def _examine(store: Store, folder: Path) -> Iterator[tuple[Path, int, State | None]]:
    path = folder / "stream.json"
    try:
        stream = Stream.open(store, folder.name)
    except (StoreError, KeyError):  # KeyError: a seal of something else
        yield path, 0, "damaged" if path.exists() else "missing"
        return
    yield path, path.stat().st_size, None
    for number in store.paths.committed():
        commit = stream.commit_path(number)
        if not commit.exists():
            yield commit, 0, "not encoded yet"
            continue
        try:
            file = stream.shard(number).file
        except StoreError:
            yield commit, 0, "damaged"
            continue
        yield commit, commit.stat().st_size, None
        state: State = "damaged" if file.path.is_file() else "missing"
        yield file.path, file.num_bytes, None if file.is_whole() else state


def _join(rows: Sequence[Row]) -> NDArray[Any]:
    there = [row for row in rows if row is not None]
    return np.ascontiguousarray(np.concatenate(there)) if there else np.empty(0, np.uint8)


def _header(tensors: dict[str, tuple[str, NDArray[Any]]]) -> bytes:  # DATA_START bytes
    """Of a safetensors file; keys sorted, and spaces up to the fixed start of the data."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (code, tensor) in sorted(tensors.items()):
        start, end = end, end + DTYPES[code] * tensor.size
        told[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = sealed.canonical_json(told).rstrip().ljust(DATA_START - 8)
    return struct.pack("<Q", len(text)) + text


def _sha256(chunks: Sequence[atomic.Buffer]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
