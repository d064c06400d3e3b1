"""Reads safetensors and both containers of torch.save (their pickles: `pickles.py`) without executing code.

A file is opened to an index: where each tensor lies. A tensor stays on disk until `Entry.read`.
"""

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from sdvae.errors import UnsafeFileError, WeightsError
from sdvae.weights.foreign import NUM_BYTES, explain, explain_zip
from sdvae.weights.pickles import DAMAGED_PICKLE, PickledTensor, Storage, Unpickled, named_tensors, unpickle

Container = Literal["safetensors", "torch zip", "torch legacy"]

DTYPES = {  # safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The most that is read of a header, as in the safetensors library: its metadata may hold pictures. Of a pickle, less:
# Stable Diffusion XL's, with 2,600 tensors, have 0.4 MB.
_MAX_HEADER_BYTES = 100_000_000
_MAX_PICKLE_BYTES = 8 << 20
_MAX_MARKS = 1_000_000  # the brackets, colons and commas of a header: each may become an object of 64 bytes
_MAX_PREAMBLE_BYTES = 4096  # of the three short pickles that torch.save once began with
_MAX_AXES = 64  # torch's own limit
_CHUNK_BYTES = 8 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_INDEX_NAME = re.compile(r".+\.index(\.[\w-]+)?\.json")  # diffusers puts the variant before .json


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: `num_bytes` from `offset` of the file, in safetensors' name of the dtype."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    stride: tuple[int, ...] | None = None  # in elements; None: contiguous

    def read(self) -> Tensor:
        """The tensor, in the memory of this process; WeightsError where the file ends before it."""
        if self.dtype not in DTYPES:
            raise WeightsError(f"{self.path} holds a tensor of type {self.dtype}, which sdvae cannot read")
        values = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu")
        with opened(self.path) as file:
            file.seek(self.offset)
            _fill(values.numpy().data, file, self.path)
        flat = values.view(DTYPES[self.dtype])
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride).contiguous()

    def chunks(self) -> Iterator[memoryview]:
        """The tensor's bytes in order, some MB at a time, for copies that need no tensor."""
        if self.stride is not None:
            yield as_bytes(self.read())
            return
        with opened(self.path) as file:
            file.seek(self.offset)
            for done in range(0, self.num_bytes, _CHUNK_BYTES):
                chunk = memoryview(bytearray(min(_CHUNK_BYTES, self.num_bytes - done)))
                _fill(chunk, file, self.path)
                yield chunk


@dataclass(frozen=True)
class TensorFile:
    """The index of a weights file: its tensors by key in file order, and the metadata of its header."""

    path: Path
    container: Container
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


def open_weights(path: Path) -> TensorFile:
    """The index of a safetensors file, a file of torch.save (.ckpt, .pt, .bin), or the JSON index of a sharded one.

    Reads headers only. Raises WeightsError for any other file, with what it is, and UnsafeFileError for a file that
    could run code in other programs.
    """
    if is_index(path.name):
        return _open_shards(path)
    with opened(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(NUM_BYTES)
        if start[7:9] == b"\0{":
            return _index_safetensors(path, file, size)
        is_pickle = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
        if not is_pickle or len(start) < 2:
            raise explain(path, start)
        if path.suffix == ".safetensors":
            raise UnsafeFileError(
                f"{path} is a pickle, which can run code, under a safe name; find its real .safetensors"
            )
        file.seek(0)
        if start.startswith(b"PK"):
            return TensorFile(path, "torch zip", _index_zip(path, file, size))
        return TensorFile(path, "torch legacy", _index_legacy(path, file, size))


def is_index(name: str) -> bool:
    """Whether a file of this name is the JSON index of sharded weights."""
    return _INDEX_NAME.fullmatch(name) is not None


def shard_names(path: Path) -> list[str]:
    """The files that hold the tensors of a JSON index, by name; none for other files."""
    return sorted(set(_read_weight_map(path).values())) if is_index(path.name) else []


def opened(path: Path) -> io.BufferedReader:
    """The file, opened for reading; WeightsError where that fails."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a dtype; WeightsError for one that it has no name for."""
    if dtype not in _DTYPE_NAMES:
        raise WeightsError(f"weights of type {dtype} are not supported")
    return _DTYPE_NAMES[dtype]


def _fill(buffer: memoryview, file: io.BufferedReader, path: Path) -> None:
    if file.readinto(buffer) != len(buffer):
        raise WeightsError(f"{path} became shorter while it was read; download it again")


# --- safetensors: eight bytes of length, a JSON header, tensors without gaps ---


def _index_safetensors(path: Path, file: BinaryIO, size: int) -> TensorFile:
    file.seek(0)
    (header_bytes,) = struct.unpack("<Q", file.read(8))
    data_start = 8 + header_bytes
    if data_start > size:
        raise WeightsError(
            f"{path} is not a readable safetensors file: its header should have {header_bytes:,} bytes, the whole file "
            f"has {size:,}; download it again"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise WeightsError(f"{path} has a header of {header_bytes:,} bytes, more than any model needs; it is refused")
    header = _parse_json(path, file.read(header_bytes))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} is not a readable safetensors file: its metadata are not strings")
    entries = {key: _parse_entry(path, key, value, data_start) for key, value in header.items()}
    end = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise WeightsError(
                f"{path} is not a readable safetensors file: {key} does not begin where the tensor before it ends"
            )
        end = entry.offset + entry.num_bytes
    if end != size:
        more = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise WeightsError(f"{path} {more}: its tensors end at byte {end:,} of {size:,}; download it again")
    return TensorFile(path, "safetensors", entries, metadata)


def _parse_entry(path: Path, key: str, value: Any, data_start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{path} is not a readable safetensors file: it does not describe {key} fully") from None
    numbers = (*shape, begin, end)
    is_sound = isinstance(dtype, str) and len(shape) <= _MAX_AXES and _are_sizes(numbers)
    if is_sound and dtype in DTYPES:
        is_sound = math.prod(shape) * DTYPES[dtype].itemsize == end - begin
    if not is_sound or end < begin:
        raise WeightsError(f"{path} is not a readable safetensors file: shape and bytes of {key} contradict each other")
    return Entry(path, dtype, shape, data_start + begin, end - begin)


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    """Whether these are whole numbers that torch can count with."""
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    if sum(map(data.count, (b"[", b"{", b":", b","))) > _MAX_MARKS:
        raise WeightsError(f"{path} has a header of more parts than any model needs; it is refused")
    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has an unreadable header ({str(error)[:99]}); download it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} has a header that is no JSON object; download it again")
    return value


def _open_shards(path: Path) -> TensorFile:
    weight_map = _read_weight_map(path)
    shards = {name: open_weights(path.parent / name) for name in dict.fromkeys(weight_map.values())}
    for key, name in weight_map.items():
        if key not in shards[name].entries:
            raise WeightsError(f"{path} looks for {key} in {name}, which does not hold it; download both again")
    container = next(iter(shards.values())).container
    return TensorFile(path, container, {key: shards[name].entries[key] for key, name in weight_map.items()})


def _read_weight_map(path: Path) -> dict[str, str]:
    with opened(path) as file:
        weight_map = _parse_json(path, file.read(_MAX_HEADER_BYTES)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; it is not the index of sharded weights")
    for name in weight_map.values():
        if not isinstance(name, str) or set(name) & set("/\\\0") or not name.endswith((".safetensors", ".bin")):
            raise WeightsError(f"{path} names the shard {name!r}, which is no weights file beside it; it is refused")
    return weight_map


# --- torch.save: a zip of one pickle and raw storages; before torch 1.6, five pickles and raw storages ---


def _index_zip(path: Path, file: BinaryIO, size: int) -> dict[str, Entry]:
    try:
        records = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, *DAMAGED_PICKLE, NotImplementedError, OSError) as error:
        raise WeightsError(
            f"{path} is a damaged or truncated file of torch.save ({error}); download it again"
        ) from None
    pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise explain_zip(path, [record.filename for record in records])
    root = pickles[0].filename.removesuffix("data.pkl")
    if any(record.filename == f"{root}constants.pkl" for record in records):
        raise UnsafeFileError(
            f"{path} is refused: it is a TorchScript program; use a .safetensors version of its weights"
        )
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        raise WeightsError(
            f"{path} is refused: torch.save compresses nothing, but records of this archive are compressed"
        )
    if sum(record.file_size for record in records) > size or pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise WeightsError(f"{path} is refused: its records say they hold more than the file does")
    places = {record.filename: (_data_offset(path, file, record.header_offset), record.file_size) for record in records}
    if f"{root}byteorder" in places:
        file.seek(places[f"{root}byteorder"][0])
        if file.read(3) != b"lit":
            raise WeightsError(f"{path} was written by a big-endian machine; save it as safetensors there")
    file.seek(places[pickles[0].filename][0])
    found = unpickle(path, io.BytesIO(file.read(pickles[0].file_size)), _MAX_PICKLE_BYTES)
    return _entries(path, found, lambda storage: places[f"{root}data/{storage.key}"], size)


def _data_offset(path: Path, file: BinaryIO, header_offset: int) -> int:
    file.seek(max(0, header_offset))
    header = file.read(30)  # of the record itself: its extra field is not that of the directory
    if header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise WeightsError(f"{path} is a damaged file of torch.save; download it again")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
    return int(header_offset + 30 + name_bytes + extra_bytes)


def _index_legacy(path: Path, file: BinaryIO, size: int) -> dict[str, Entry]:
    if (first := unpickle(path, file, _MAX_PREAMBLE_BYTES)).value != _LEGACY_MAGIC:
        named_tensors(path, first)  # raises where it asks for code
        raise WeightsError(
            f"{path} is a pickle, but not one of torch.save; use a .safetensors version of these weights"
        )
    unpickle(path, file, _MAX_PREAMBLE_BYTES)  # the protocol
    unpickle(path, file, _MAX_PREAMBLE_BYTES)  # the machine
    found = unpickle(path, file, _MAX_PICKLE_BYTES)
    storages = found.storages
    # The storages that follow, each as its number of elements and its bytes.
    keys = unpickle(path, file, _MAX_PICKLE_BYTES).value
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else ():
        count = file.read(8)
        if not isinstance(key, str) or key not in storages or len(count) < 8:
            raise WeightsError(f"{path} is damaged or truncated after {len(places)} of {len(keys)} storages")
        (num_elements,) = struct.unpack("<q", count)
        num_bytes = num_elements * storages[key].dtype.itemsize
        if num_bytes < 0 or file.tell() + num_bytes > size:
            raise WeightsError(f"{path} is truncated: storage {key} ends after the file; download it again")
        places[key] = (file.tell(), num_bytes)
        file.seek(num_bytes, io.SEEK_CUR)
    return _entries(path, found, lambda storage: places[storage.key], size)


def _entries(path: Path, found: Unpickled, place: Callable[[Storage], tuple[int, int]], size: int) -> dict[str, Entry]:
    state = named_tensors(path, found)
    if not state:
        raise WeightsError(f"{path} holds no tensors by name; is it a checkpoint?")
    entries = {}
    for key, tensor in state.items():
        try:
            start, num_bytes = place(tensor.storage)
            if start + num_bytes > size:
                raise ValueError("a storage reaches out of the file")
            entries[key] = _place_tensor(path, tensor, start, num_bytes)
        except (LookupError, ValueError, OverflowError) as error:
            raise WeightsError(f"{path} is damaged: {key} cannot be found in it ({error}); download it again") from None
    return entries


def _place_tensor(path: Path, tensor: PickledTensor, start: int, num_bytes: int) -> Entry:
    """Where a tensor lies, given the place of its storage; ValueError where it exceeds the storage."""
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not _are_sizes(numbers) or not len(tensor.shape) == len(tensor.stride) <= _MAX_AXES:
        raise ValueError("impossible shape")
    num_elements = math.prod(tensor.shape)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    span = last + 1 if num_elements else 0
    # An expanded tensor repeats elements; no trained weight does.
    if (tensor.offset + span) * tensor.dtype.itemsize > num_bytes or num_elements > span:
        raise ValueError("a tensor reaches out of its storage")
    steps = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    is_contiguous = all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride, steps, strict=True))
    if tensor.dtype not in _DTYPE_NAMES:
        raise WeightsError(f"{path} holds a tensor of type {tensor.dtype}, which sdvae cannot read")
    begin = start + tensor.offset * tensor.dtype.itemsize
    stride = None if is_contiguous or not num_elements else tensor.stride
    return Entry(path, dtype_name(tensor.dtype), tensor.shape, begin, span * tensor.dtype.itemsize, stride)
