"""Latents that samplers save (.safetensors, .npy, .pt, ComfyUI's .latent), read as raw latents."""

import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.errors import LatentsError, UnsafeFileError
from sdvae.latents import unscale

Scaling = Literal["raw", "scaled"]

_METADATA_KEY = "latents"  # in safetensors' __metadata__: "raw" or "scaled"
# Which tensor to take from a file that holds several; `mean` is what a shard of a store calls it.
_NAMES = ("latent_tensor", "latents", "latent", "samples", "mean")
# Before ComfyUI marked its files with `latent_format_version_0` it passed scaled latents from node to node, and knew
# one scale only. Its LoadLatent still multiplies unmarked files by 1 / 0.18215; marked ones are raw, of any model.
_COMFYUI_OLD_SCALE = 0.18215


def list_latent_files(source: Path) -> list[Path]:
    """The latent files of a folder and its subfolders, sorted; or `source` itself, where it is a file."""
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.suffix.lower() in _READERS)
        files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
        if not files:
            raise LatentsError(f"{source} holds no latents: neither a manifest.json nor a file ending {_SUFFIXES}")
        return files
    if not source.exists():
        raise LatentsError(f"{source} does not exist; give a store, a folder of latent files or one such file")
    return [source]


def read_latents(path: Path, config: VAEConfig, told: Scaling | None = None) -> Tensor:  # (N, C, h, w) raw, fp32
    """Read one file of latents for the VAE of `config`; one image may come as (C, h, w).

    `told` says whether the latents are raw or scaled where the file does not. Raises LatentsError where neither
    does, or where the latents do not fit the VAE or are not finite; UnsafeFileError where reading would run code.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise LatentsError(f"{path} is not a latents file: its name ends with none of {_SUFFIXES}")
    found, says = reader(path)
    latents = _check(path, found, config.latent_channels)
    match says or told:
        case "raw":
            return latents
        case "scaled":
            return unscale(latents, config)
    raise LatentsError(
        f"{path} does not say whether its latents are raw or scaled; add --latents scaled for those of a diffusion "
        "model (diffusers' output_type='latent') or --latents raw for those of a VAE's encoder"
    )


def _check(path: Path, found: Tensor, channels: int) -> Tensor:
    if not found.is_floating_point() or found.layout is not torch.strided:
        raise LatentsError(f"{path} holds {found.dtype} numbers, latents are plain floating-point tensors")
    shape = tuple(found.shape)
    if len(shape) == 3 and shape[0] != channels and shape[2] == 4 * channels:
        raise LatentsError(
            f"{path} has shape {shape}, as a FLUX pipeline packs latents; unpack them to (N, {channels}, h, w) first"
        )
    if len(shape) not in (3, 4):
        raise LatentsError(f"{path} has shape {shape}; latents are (N, {channels}, h, w) or ({channels}, h, w)")
    if shape[-3] != channels:
        raise LatentsError(f"{path} has {shape[-3]} channels {shape}, but this VAE's latents have {channels}")
    if 0 in shape:
        raise LatentsError(f"{path} is empty: its shape is {shape}")
    latents = found.detach().to(torch.float32).reshape(-1, *shape[-3:])
    is_bad = ~latents.isfinite().flatten(1).all(1)
    if is_bad.any():
        which = f" (image {int(is_bad.nonzero()[0])} of {len(latents)})" if len(latents) > 1 else ""
        raise LatentsError(f"{path} holds NaN or infinite latents{which}; the model that made them overflowed")
    return latents


def _read_safetensors(path: Path) -> tuple[Tensor, Scaling | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
            name = _choose(path, keys)
            found: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise LatentsError(f"{path} is not a readable safetensors file ({error})") from None
    if name == "latent_tensor":  # ComfyUI's SaveLatent; anything else it knows stays outside this key
        is_marked = "latent_format_version_0" in keys
        return (found if is_marked else found.float() / _COMFYUI_OLD_SCALE), "raw"
    says = metadata.get(_METADATA_KEY)
    if says not in ("raw", "scaled", None):
        raise LatentsError(f"{path} says its latents are {says!r}; sdvae knows raw and scaled")
    return found, says


def _read_npy(path: Path) -> tuple[Tensor, Scaling | None]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise LatentsError(f"{path} is not a .npy file; write it with numpy.save")
    try:
        # Mapped, so that a header that promises more than the file holds is an error and not an allocation.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))), None
    except (ValueError, SyntaxError, TokenError) as error:  # numpy reads headers with Python's own parser
        if "objects" in str(error).lower():
            raise UnsafeFileError(f"{path} is refused: it holds pickled Python objects, which can run code") from None
        raise LatentsError(f"{path} is a damaged .npy file") from None
    except TypeError as error:
        raise LatentsError(f"{path} does not hold numbers ({error})") from None


def _read_torch(path: Path) -> tuple[Tensor, Scaling | None]:
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip, or the pickle that torch.save wrote before 1.6
            raise LatentsError(f"{path} is not a file of torch.save")
    try:
        with warnings.catch_warnings(action="ignore"):  # on odd pickles torch warns, then refuses
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            asked = re.search(r"GLOBAL:? (\S+)", str(error))
            more = f" ({asked[1]})" if asked else ""
            raise UnsafeFileError(
                f"{path} is refused: it asks for more than tensors{more}, and reading it could run code; "
                "save the latents alone, best as .safetensors"
            ) from None
        raise LatentsError(f"{path} is a damaged file of torch.save") from None
    except _DAMAGED_PICKLE:
        raise LatentsError(f"{path} is a damaged file of torch.save") from None
    if isinstance(found, Mapping):
        found = found[_choose(path, {key for key, value in found.items() if isinstance(value, Tensor)})]
    if not isinstance(found, Tensor):
        raise LatentsError(f"{path} holds a {type(found).__name__}; latents are one tensor, or one named 'latents'")
    return found, None


def _choose(path: Path, keys: set[str]) -> str:
    if len(keys) == 1:
        return next(iter(keys))
    for name in _NAMES:
        if name in keys:
            return name
    names = ", ".join(sorted(map(str, keys))[:5]) or "none"
    raise LatentsError(f"{path} holds {len(keys)} tensors ({names}); name the one with the latents 'latents'")


# What an unpickler that meets nonsense raises besides UnpicklingError.
_DAMAGED_PICKLE = (EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error)

_READERS: dict[str, Callable[[Path], tuple[Tensor, Scaling | None]]] = {
    ".safetensors": _read_safetensors,
    ".latent": _read_safetensors,
    ".npy": _read_npy,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
_SUFFIXES = " ".join(_READERS)
