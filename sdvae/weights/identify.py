"""What a weights file holds: the network, its fingerprint, its latent space."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdvae.config import FAMILIES
from sdvae.errors import WeightsError
from sdvae.model import AutoencoderKL
from sdvae.weights import taesd
from sdvae.weights.evidence import (
    UNKNOWN,
    Certainty,
    Evidence,
    Verdict,
    judge,
    known_bytes,
    told_by_config,
    told_by_file,
)
from sdvae.weights.files import TensorFile, open_weights
from sdvae.weights.identity import fingerprint, sign_sketch
from sdvae.weights.keymap import STATISTICS, VAEKeys, find_vae, fit_layout
from sdvae.weights.load import open_vae
from sdvae.weights.shapes import fields_of

_HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}


@dataclass(frozen=True)
class Identity:
    """What is known of a weights file. `latent_space` is a family's name, or "unknown"."""

    latent_space: str
    certainty: Certainty
    network: str
    fingerprint: str | None  # None for a network that sdvae does not know
    sign_sketch: str | None
    correlations: Mapping[str, float]  # of the probe, by space
    evidence: tuple[Evidence, ...]
    contradictions: tuple[Evidence, ...]


def identify(path: Path) -> Identity:
    """Which latent space the VAE in a weights file has, how certain that is, and why.

    Takes a KL-VAE in either layout, alone or in a checkpoint, and a TAESD, whole or half: a decoder alone is judged by
    what it shows. The file's name is ignored. Raises WeightsError for a file that holds no such thing.
    """
    file = open_weights(path)
    if taesd.is_taesd(file.entries):
        return _identify_tiny(file)
    try:
        keys = find_vae(file.entries)
    except WeightsError as error:
        raise WeightsError(f"{path} holds {error}") from None
    sides = [side for side in _HALVES if any(name.startswith(f"{side}.") for name in keys.names.values())]
    if len(sides) < len(_HALVES):
        return _identify_half(file, keys, sides[0])
    vae = open_vae(path, is_copied=True)
    same = [name for name, family in FAMILIES.items() if fields_of(family) == fields_of(vae.config)]
    return _identity(vae.verdict, f"KL-VAE with the shapes of {', '.join(same) or 'no family'}", vae.read())


def _identify_tiny(file: TensorFile) -> Identity:
    """A TAESD under diffusers' names, or one of its author's two files, by itself."""
    entries = taesd.by_name(file.entries)
    config = taesd.fit_config(entries)
    told = [*known_bytes(file.path), *told_by_file(file)]
    if config is None:
        return _identity(judge(None, {}, told), "a sequence of layers that is no TAESD", {})
    tensors = {name: entry.read() for name, entry in entries.items()}
    halves = " and ".join(sorted(taesd.sides(entries), reverse=True))
    return _identity(judge(config, tensors, told), f"TAESD {halves}, {config.latent_channels} latent channels", tensors)


def _identify_half(file: TensorFile, keys: VAEKeys, side: str) -> Identity:
    """The encoder or the decoder of a KL-VAE alone: it can run where a family has its shapes."""
    entries = file.entries
    tensors = {name: fit_layout(name, entries[key].read(), "diffusers") for key, name in keys.names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(_HALVES[side])}
    same = [name for name in FAMILIES if _half_shapes(name, side) == shapes]
    config = FAMILIES[same[0]] if same else None
    told = [*known_bytes(file.path), *told_by_file(file)]
    if config is not None and tensors.keys() >= set(STATISTICS):
        config = config.with_batch_norm(*(tensors[name].double().tolist() for name in STATISTICS))
        told.append(told_by_config(config, "it"))
    verdict = judge(config, tensors, told)
    return _identity(verdict, f"{side} of a KL-VAE with the shapes of {', '.join(same) or 'no family'}", tensors)


def _half_shapes(family: str, side: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: nn.Module = AutoencoderKL(FAMILIES[family])
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key.startswith(_HALVES[side])}


def _identity(verdict: Verdict, network: str, tensors: Mapping[str, Tensor]) -> Identity:
    return Identity(
        latent_space=verdict.space or UNKNOWN,
        certainty=verdict.certainty,
        network=network,
        fingerprint=fingerprint(tensors) if tensors else None,
        sign_sketch=sign_sketch(tensors) if tensors else None,
        correlations=verdict.correlations,
        evidence=verdict.evidence,
        contradictions=verdict.contradictions,
    )
