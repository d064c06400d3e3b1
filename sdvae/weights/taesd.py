"""TAESD's files: one under diffusers' names, or its author's pair of halves, whose keys are the numbers of layers."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from sdvae.tiny import AutoencoderTiny, TinyConfig, named_as_diffusers
from sdvae.weights.files import Entry
from sdvae.weights.keymap import unwrapped

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_LAYER = re.compile(r"[0-9]{1,2}\.")
_HALVES = {"encoder": "decoder", "decoder": "encoder"}
_COMFYUI = re.compile(r"taesd_(encoder|decoder)\.([0-9]{1,2}\..+)")  # its VAESave writes both halves into one file


def is_taesd(keys: Collection[str]) -> bool:
    """Whether these are keys of numbered layers, as a TAESD has them in any layout."""
    names = [unwrapped(key) for key in keys]
    return is_bare(keys) or "encoder.layers.0.weight" in names or any(map(_COMFYUI.match, names))


def is_bare(keys: Collection[str]) -> bool:
    """Whether these are the keys of a file of TAESD's author: one half, named by the numbers of its layers alone."""
    return len(keys) > 0 and all(_LAYER.match(unwrapped(key)) for key in keys)


def by_name(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a file in any layout under diffusers' names; a bare file's layers tell which half it is."""
    is_half = is_bare(entries)
    entries = {unwrapped(key): entry for key, entry in entries.items()}
    halves: dict[str, dict[str, Entry]] = {"encoder": {}, "decoder": {}}
    for key, entry in entries.items():
        if match := _COMFYUI.fullmatch(key):
            halves[match[1]][match[2]] = entry
    if any(halves.values()):
        return named_as_diffusers(**halves)
    if not is_half:
        return entries
    return named_as_diffusers(*((entries, {}) if "0.weight" in entries else ({}, entries)))


def sides(names: Collection[str]) -> set[str]:
    """Which halves are there: "encoder", "decoder"."""
    return {name.partition(".")[0] for name in names}


def fit_config(entries: Mapping[str, Entry]) -> TinyConfig | None:
    """The network whose tensors, or one half of them, these are; the scale of its latents is not known yet."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    has_mid_pool = any(".pool." in name for name in shapes)
    for latent_channels in (4, 16, 32):
        config = TinyConfig(latent_channels=latent_channels, scaling_factor=1.0, has_mid_pool=has_mid_pool)
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in AutoencoderTiny(config).state_dict().items()}
        if shapes == {key: shape for key, shape in expected.items() if sides([key]) <= sides(shapes)}:
            return config
    return None


def other_half(path: Path) -> Path | None:
    """The name that the other half of a pair has: "decoder" for "encoder" and the other way; None for other names."""
    half = next((half for half in _HALVES if half in path.name), None)
    return path.with_name(path.name.replace(half, _HALVES[half])) if half else None


def find_pairs(names: Collection[str]) -> list[str]:
    """The encoders in a folder of these files that have their decoder beside them."""
    encoders = [name for name in sorted(names) if "encoder" in name and name.endswith(SUFFIXES)]
    return [name for name in encoders if (other := other_half(Path(name))) and other.name in names]
