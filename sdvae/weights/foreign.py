"""What a file is that holds no weights sdvae reads, by its first bytes, and what to do about it."""

import re
from collections.abc import Callable
from pathlib import Path

from sdvae.errors import WeightsError

NUM_BYTES = 512  # of the beginning of a file, which tell what it is

_OTHER_WEIGHTS = "use a .safetensors version of these weights"
_UNPACK = "unpack it first"
_EXPORTED = "a program for one size and machine; give the weights it was made from, as .safetensors"
# How a file begins -> what it is, and the next step.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch the real file with `git lfs pull`",
    b"GGUF": f"a GGUF file, as llama.cpp and stable-diffusion.cpp quantise them; {_OTHER_WEIGHTS}",
    b"tjgg": f"a GGML file, as old versions of llama.cpp wrote them; {_OTHER_WEIGHTS}",
    b"ftrt": f"a TensorRT engine, {_EXPORTED}",
    b"ptrt": f"a TensorRT engine, {_EXPORTED}",
    b"\x7fELF": f"a compiled library, {_EXPORTED}",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file, as Keras writes them; {_OTHER_WEIGHTS}",
    b"\x93NUMPY": f"one array of NumPy; {_OTHER_WEIGHTS}",
    b"PAR1": f"a Parquet table; {_OTHER_WEIGHTS}",
    b"\x89PNG": "a PNG picture; give the file of a VAE",
    b"\xff\xd8\xff": "a JPEG picture; give the file of a VAE",
    b"RIFF": "a WebP picture, sound or film; give the file of a VAE",
    b"GIF8": "a GIF picture; give the file of a VAE",
    b"\x1f\x8b": f"compressed with gzip; {_UNPACK}",
    b"BZh": f"compressed with bzip2; {_UNPACK}",
    b"\xfd7zXZ": f"compressed with xz; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed with zstandard; {_UNPACK}",
    b"7z\xbc\xaf": f"a 7-Zip archive; {_UNPACK}",
    b"Rar!": f"a RAR archive; {_UNPACK}",
}
# Formats without a constant beginning.
_PATTERNS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    # Protobuf's ModelProto: its version (field 1), then producer, domain, graph or the like
    (re.compile(rb"\x08[\x03-\x0f][\x12\x1a\x22\x28\x3a\x42]"), f"an ONNX model, {_EXPORTED}"),
    # msgpack: a map whose first key is a short text
    (re.compile(rb"[\x81-\x8f][\xa1-\xbf][\w.]"), f"a msgpack file, as Flax saves weights; {_OTHER_WEIGHTS}"),
    (re.compile(rb"....TFL3", re.DOTALL), f"a TensorFlow Lite model, {_EXPORTED}"),
    (re.compile(rb"....ET1\d", re.DOTALL), f"an ExecuTorch model, {_EXPORTED}"),
    (re.compile(rb".{257}ustar", re.DOTALL), f"a tar archive; {_UNPACK}"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?<net\b"), f"an OpenVINO model, {_EXPORTED}"),
    (re.compile(rb"\s*<"), "a web page, not weights; the download needs a login or another address"),
    (re.compile(rb"[\t\n\r\x20-\x7e]+\Z"), "a text file, not safetensors weights; check the path"),
)  # fmt: skip
# Files that zip archives of other programs hold -> what they are.
_MEMBERS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name.endswith(".npy"), f"arrays of NumPy (.npz); {_OTHER_WEIGHTS}"),
    (lambda name: name.endswith((".weights.h5", "/archive_format", "/serialized_exported_program.json"))
     or name in ("archive_format", "serialized_exported_program.json"), f"an exported program, {_EXPORTED}"),
)  # fmt: skip


def explain(path: Path, start: bytes) -> WeightsError:
    """The error for a file that begins with `start` and is neither safetensors nor of torch.save."""
    what = next((told for begin, told in _BEGINNINGS.items() if start.startswith(begin)), None)
    what = what or next((told for pattern, told in _PATTERNS if pattern.match(start)), None)
    if what is not None:
        return WeightsError(f"{path} is {what}")
    empty = " (it is empty)" if not start else ""
    return WeightsError(f"{path} is not a readable safetensors file{empty}, nor one of torch.save; download it again")


def explain_zip(path: Path, names: list[str]) -> WeightsError:
    """The error for a zip archive that torch.save did not write, by the names of its members."""
    told = (what for is_one, what in _MEMBERS if any(map(is_one, names)))
    return WeightsError(f"{path} is {next(told, f'a zip archive, but not one of torch.save; {_UNPACK}')}")
