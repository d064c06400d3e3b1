"""Latents that samplers and trainers save (.safetensors, .npy, .npz, .pt, ComfyUI's .latent, tars), as raw latents."""

import io
import math
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.errors import LatentsError, UnsafeFileError, WeightsError
from sdvae.latents import unscale
from sdvae.reading.declaration import LatentFiles, Scaling, declared_files
from sdvae.weights.files import TensorFile, open_weights

_METADATA_KEY = "latents"  # in safetensors' __metadata__: "raw" or "scaled"
# Which tensor to take from a file that holds several; `mean` is what a shard of a store calls it.
_NAMES = ("latent_tensor", "latents", "latent", "samples", "mean")
_SIZED_NAME = re.compile(r"latents_\d+x\d+")  # sd-scripts, where one file holds several sizes
_SCALED_CACHES = ("_flux", "_lumina")  # sd-scripts': the encoder it uses there scales what it gives
# Before ComfyUI marked its files with `latent_format_version_0` it passed scaled latents from node to node, and knew
# one scale only. Its LoadLatent still multiplies unmarked files by 1 / 0.18215; marked ones are raw, of any model.
_COMFYUI_OLD_SCALE = 0.18215
_MAX_PACKED_BYTES = 1 << 27  # of one array in a .npz, which may be compressed: SD's latents of 20,000 pixels a side
_DAMAGED_ARRAY = (ValueError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError, EOFError)


def list_latent_files(source: Path) -> list[Path]:
    """The latent files of an export or of a folder and its subfolders, sorted; or `source`, where it is a file."""
    if source.is_dir():
        declared = declared_files(source)
        found = source.glob(declared.pattern if declared else "**/*")
        found = (path for path in found if path.suffix.lower() in _READERS)
        files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
        if not files:
            raise LatentsError(f"{source} holds no latents: neither a manifest.json nor a file ending {_SUFFIXES}")
        return files
    if not source.exists():
        raise LatentsError(f"{source} does not exist; give a store, a folder of latent files or one such file")
    return [source]


@dataclass(frozen=True)
class FoundLatents:
    """The latents of a file."""

    raw: Tensor  # (N, C, h, w), fp32
    scaling: Scaling  # that they are stored in
    is_told: bool  # whether the user says so, not the file


def read_latents(
    path: Path, config: VAEConfig, told: Scaling | None = None, declared: LatentFiles | None = None
) -> FoundLatents:
    """Read one file of latents for the VAE of `config`; one image may come as (C, h, w).

    `told` says whether the latents are raw or scaled where neither the file does nor the export, `declared`, that it
    belongs to. Raises LatentsError where none of them does, or where the latents do not fit the VAE or are not finite;
    UnsafeFileError where reading would run code.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise LatentsError(f"{path} is not a latents file: its name ends with none of {_SUFFIXES}")
    try:
        found, says = reader(path)
    except OSError as error:
        raise LatentsError(f"{path} cannot be read: {error.strerror or error}") from error
    if declared:
        says = says or declared.scaling
        found = found.chunk(2, dim=-3)[0] if declared.has_std and found.dim() >= 3 else found
    latents = _check(path, found, (config.latent_channels, config.scaled_channels))
    if config.latents_patch > 1:  # FLUX.2's scaled latents have four times as many channels: that is proof
        says = "raw" if latents.shape[1] == config.latent_channels else "scaled"
        if told not in (None, says):
            raise LatentsError(f"{path} has {latents.shape[1]} channels, so its latents are {says}, not {told}")
    match says or told:
        case "raw":
            return FoundLatents(latents, "raw", is_told=says is None)
        case "scaled":
            return FoundLatents(unscale(latents, config), "scaled", is_told=says is None)
    raise LatentsError(
        f"{path} does not say whether its latents are raw or scaled; add --latents scaled for those of a diffusion "
        "model (diffusers' output_type='latent') or --latents raw for those of a VAE's encoder"
    )


def _check(path: Path, found: Tensor, known_channels: tuple[int, int]) -> Tensor:
    """The latents as (N, C, h, w) fp32, with as many channels as raw or as scaled ones have."""
    channels, patched = known_channels
    if not found.is_floating_point():
        raise LatentsError(f"{path} holds {found.dtype} numbers, latents are floating-point tensors")
    shape = tuple(found.shape)
    if len(shape) == 3 and shape[0] not in known_channels and shape[2] == 4 * channels:
        raise LatentsError(
            f"{path} has shape {shape}, as a FLUX pipeline packs latents; unpack them to (N, {patched}, h, w) first"
        )
    if len(shape) not in (3, 4):
        raise LatentsError(f"{path} has shape {shape}; latents are (N, {channels}, h, w) or ({channels}, h, w)")
    if shape[-3] not in known_channels:
        told = f"{channels} (raw) or {patched} (scaled)" if patched != channels else str(channels)
        raise LatentsError(f"{path} has {shape[-3]} channels {shape}, but this VAE's latents have {told}")
    if 0 in shape:
        raise LatentsError(f"{path} is empty: its shape is {shape}")
    latents = found.to(torch.float32).reshape(-1, *shape[-3:])
    is_bad = ~latents.isfinite().flatten(1).all(1)
    if is_bad.any():
        which = f" (image {int(is_bad.nonzero()[0])} of {len(latents)})" if len(latents) > 1 else ""
        raise LatentsError(f"{path} holds NaN or infinite latents{which}; the model that made them overflowed")
    return latents


# --- safetensors and torch.save ---


def _read_tensors(path: Path) -> tuple[Tensor, Scaling | None]:
    try:
        file = open_weights(path)
        name = _choose(path, file.entries)
        found = file.entries[name].read()
    except UnsafeFileError:
        raise
    except WeightsError as error:
        raise LatentsError(str(error)) from error
    if name == "latent_tensor":  # ComfyUI's SaveLatent; anything else it knows stays outside this key
        is_marked = "latent_format_version_0" in file.entries
        return (found if is_marked else found.float() / _COMFYUI_OLD_SCALE), "raw"
    return found, _declared(file)


def _declared(file: TensorFile) -> Scaling | None:
    match file.metadata.get(_METADATA_KEY):
        case "raw" | "scaled" | None as says:
            return says
        case says:
            raise LatentsError(f"{file.path} says its latents are {says!r}; sdvae knows raw and scaled")


def _choose(path: Path, keys: Collection[str]) -> str:
    if len(keys) == 1:
        return next(iter(keys))
    for name in _NAMES:
        if name in keys:
            return name
    sized = [key for key in keys if _SIZED_NAME.fullmatch(key)]
    if len(sized) == 1:
        return sized[0]
    names = ", ".join(sorted(keys)[:5]) or "none"
    raise LatentsError(f"{path} holds {len(keys)} tensors ({names}); name the one with the latents 'latents'")


# --- numpy ---


def _read_npy(path: Path) -> tuple[Tensor, Scaling | None]:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_array(path, file, size), None


def _read_npz(path: Path) -> tuple[Tensor, Scaling | None]:
    """An archive of numpy's; sd-scripts keeps one image's latents in each, raw, and its crop beside them."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            name = _choose(path, records)
            if records[name].file_size > _MAX_PACKED_BYTES:
                raise LatentsError(f"{path} is refused: its {name} would take {records[name].file_size:,} bytes")
            with archive.open(records[name]) as packed:
                data = packed.read(_MAX_PACKED_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise LatentsError(f"{path} is a damaged .npz file, or none ({str(error)[:99]}); write it again") from None
    says: Scaling | None = None
    if any(key.startswith("crop_ltrb") for key in records):
        says = "scaled" if path.stem.endswith(_SCALED_CACHES) else "raw"
    return _read_array(path, io.BytesIO(data), len(data)), says


def _read_tar(path: Path) -> tuple[Tensor, Scaling | None]:
    """The `mean.npy` of every sample in a WebDataset shard, in its order; all have one shape."""
    means = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".mean.npy") and (file := archive.extractfile(member)):
                    data = file.read(_MAX_PACKED_BYTES)
                    means.append(_read_array(path, io.BytesIO(data), len(data)))
        return torch.stack(means), None
    except (tarfile.TarError, EOFError, ValueError, RuntimeError) as error:
        raise LatentsError(
            f"{path} is no tar of latents of one shape, each in a mean.npy ({str(error)[:99]})"
        ) from None


def _read_array(path: Path, file: BinaryIO, size: int) -> Tensor:
    """The array of `size` bytes, header included, that `file` holds."""
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, is_fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            raise UnsafeFileError(f"{path} is refused: it holds pickled Python objects, which can run code")
        if dtype.kind not in "biufc":
            raise LatentsError(f"{path} does not hold numbers but {dtype}")
        num_bytes = math.prod(shape) * dtype.itemsize
        if any(side < 0 for side in shape) or num_bytes > size - file.tell():
            raise ValueError("the array is longer than its file")
        flat = np.frombuffer(file.read(num_bytes), dtype).astype(dtype.newbyteorder("="))
        return torch.from_numpy(flat.reshape(shape, order="F" if is_fortran else "C"))
    except (*_DAMAGED_ARRAY, KeyError) as error:  # numpy reads headers with Python's own parser
        raise LatentsError(f"{path} is a damaged .npy file, or none; write it with numpy.save") from error
    except TypeError as error:
        raise LatentsError(f"{path} does not hold numbers ({error})") from None


_READERS: dict[str, Callable[[Path], tuple[Tensor, Scaling | None]]] = {
    ".safetensors": _read_tensors,
    ".latent": _read_tensors,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_tensors,
    ".pth": _read_tensors,
    ".tar": _read_tar,
}
_SUFFIXES = " ".join(_READERS)
