"""Tensors to a safetensors file, in bytes that depend on nothing but the tensors and their metadata."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdvae import atomic
from sdvae.weights.files import DTYPES, as_bytes, dtype_name


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of a file to be written: `chunks` makes its bytes when they are due."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Callable[[], Iterable[memoryview]]

    @classmethod
    def of(cls, tensor: Tensor) -> "OutputTensor":
        """A tensor in memory, on any device."""
        values = tensor.detach()
        return cls(dtype_name(values.dtype), tuple(values.shape), values.nbytes, lambda: [as_bytes(values.cpu())])


def write_safetensors(path: Path, tensors: Mapping[str, OutputTensor], metadata: Mapping[str, str]) -> None:
    """Write the file a chunk at a time; it appears under its name when it is complete."""
    atomic.write_stream(path, safetensors_chunks(tensors, metadata))


def safetensors_bytes(tensors: Mapping[str, OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """The whole file at once, for small ones."""
    return b"".join(safetensors_chunks(tensors, metadata))


def safetensors_chunks(tensors: Mapping[str, OutputTensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file a piece at a time, its tensors made when they are due."""
    # Wide elements first, as safetensors' own writer has it: then each tensor lies at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -_element_bytes(item[1].dtype))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for key, tensor in ordered:
        end = begin + tensor.num_bytes
        header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield from tensor.chunks()


def _element_bytes(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 0
