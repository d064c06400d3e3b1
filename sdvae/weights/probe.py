"""The probe: one image whose latents in each space are known.

SD1 and SDXL have equal keys and shapes, and the spread of latents depends on the image. But two encoders of one space
agree on any image, up to a factor: correlation names the space, the slope of the regression the factor. A decoder
alone is judged the other way: it shows the image when it is given the latents of its own space.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig
from sdvae.engine.precision import inference
from sdvae.latents import unscale
from sdvae.model import Decoder, Encoder
from sdvae.pixels import to_pixels
from sdvae.tiny import TinyConfig, TinyDecoder, TinyEncoder
from sdvae.weights.files import open_weights
from sdvae.weights.identity import LATENT_SPACES

PROBE_ASSET = "probe.safetensors"
PROBE_SIZE_PX = 128

# Correlations with the references, measured: the same encoder in fp16 or bf16 1.00, with 10% noise on its weights
# 0.95 and more, the embedded VAE 0.91; another space at most 0.23, averages of pixels 0.27, random weights 0.14.
PROOF_CORRELATION = 0.9
NEAR_CORRELATION = 0.6
# One channel of 16 with its sign flipped leaves 0.87 of the whole correlation, so each channel is looked at.
_PROOF_CHANNEL, _NEAR_CHANNEL = 0.3, -0.3
_PROOF_SPREAD, _NEAR_SPREAD = 1.3, 1.5  # as a factor either way
# Of decoders, the shown image with the true one: from latents of their space 0.93 and more, of another at most 0.60,
# with random weights 0.10.
_PROOF_PICTURE, _NEAR_PICTURE = 0.85, 0.7


@dataclass(frozen=True)
class Agreement:
    """How well latents agree with reference ones of the same image."""

    correlation: float
    worst_channel: float  # the lowest correlation of one channel
    slope: float  # reference per unit of latents, by least squares
    spread: float  # of the reference, per spread of the latents

    def is_proof(self, factor: float = 1.0) -> bool:
        """Whether both are of one space; `factor` is the spread that the reference should have."""
        is_alike = self.correlation >= PROOF_CORRELATION and self.worst_channel >= _PROOF_CHANNEL
        return is_alike and 1.0 / _PROOF_SPREAD <= self.spread / factor <= _PROOF_SPREAD

    def is_near(self, factor: float = 1.0) -> bool:
        """Whether both may be of one space: a small network of it, or one that was trained on."""
        is_alike = self.correlation >= NEAR_CORRELATION and self.worst_channel >= _NEAR_CHANNEL
        return is_alike and 1.0 / _NEAR_SPREAD <= self.spread / factor <= _NEAR_SPREAD


@dataclass(frozen=True)
class Match:
    """How well latents of the probe image agree with those of a space."""

    space: str
    agreement: Agreement

    @property
    def correlation(self) -> float:
        """The correlation with the space's latents."""
        return self.agreement.correlation


@dataclass(frozen=True)
class Seen:
    """What a network made of the probe: an encoder of the image, or a decoder of each space's latents of it."""

    matches: tuple[Match, ...]  # best first
    output: Tensor | None  # (C, h, w) as the encoder gives them, scaled latents if it is a TAESD's; None of a decoder

    def proved(self, factors: Mapping[str, float]) -> list[str]:
        """The space that this is, where it is beyond doubt; `factors` are the spreads that encoders should have."""
        if self.output is None:
            best, *others = (match.correlation for match in self.matches)
            is_clear = best >= _PROOF_PICTURE and max(others, default=-1.0) < _NEAR_PICTURE
            return [self.matches[0].space] if is_clear else []
        return [match.space for match in self.matches[:1] if match.agreement.is_proof(factors[match.space])]

    def denied(self, factors: Mapping[str, float]) -> list[str]:
        """The spaces that this is not."""
        if self.output is None:
            return [match.space for match in self.matches if match.correlation < _NEAR_PICTURE]
        return [match.space for match in self.matches if not match.agreement.is_near(factors[match.space])]


_SEEN: dict[tuple[str, VAEConfig], Seen] = {}


def look(config: VAEConfig, tensors: Mapping[str, Tensor], digest: str) -> Seen:
    """Run an encoder, or a decoder where there is none, on the probe: once in a process for weights of one `digest`.

    `tensors` have diffusers' names. Runs the reference network in fp32 on the CPU: 128x128 px.
    """
    config = replace(config, padding="zeros")  # a space is that of the weights, whatever the padding
    key = digest, replace(config, scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    if key not in _SEEN:
        is_encoder = any(name.startswith("encoder.") for name in tensors)
        with inference():
            _SEEN[key] = _encode(config, tensors) if is_encoder else _decode(config, tensors)
    return _SEEN[key]


def probe_image() -> NDArray[np.uint8]:  # (128, 128, 3)
    """Shaded discs of all sizes that hide one another ("dead leaves"), whose statistics are those of photos.

    The same bytes on every machine: nothing but uniform numbers, arithmetic and square roots goes into it.
    """
    uniform = np.random.Generator(np.random.PCG64(0))
    rows, columns = np.mgrid[: 2 * PROBE_SIZE_PX, : 2 * PROBE_SIZE_PX] / (2.0 * PROBE_SIZE_PX)
    image = np.full((*rows.shape, 3), 0.5)
    for _ in range(300):
        size, top, left, gray, *tint, slope_down, slope_right = uniform.random(9)
        centre_down, centre_right = 1.2 * top - 0.1, 1.2 * left - 0.1
        radius = min(0.05 / np.sqrt(size + 1e-4), 0.4)
        part = _around(centre_down, radius), _around(centre_right, radius)
        down, right = rows[part] - centre_down, columns[part] - centre_right
        shade = gray + down * (slope_down - 0.5) + right * (slope_right - 0.5)
        is_inside = down * down + right * right <= radius * radius
        image[part][is_inside] = (shade[..., None] + 0.4 * (np.array(tint) - 0.5))[is_inside]
    smooth = image.reshape(PROBE_SIZE_PX, 2, PROBE_SIZE_PX, 2, 3).mean(axis=(1, 3))
    levels: NDArray[np.uint8] = np.floor(smooth.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return levels


def _around(centre: float, radius: float) -> slice:
    """The rows or columns that a disc may touch: to draw only them takes a tenth of the time."""
    side = 2 * PROBE_SIZE_PX
    return slice(max(0, int((centre - radius) * side) - 1), max(0, int((centre + radius) * side) + 2))


@cache
def references() -> dict[str, Tensor]:
    """Scaled latents (C, 16, 16) of the probe image in each space, by the TAESD encoders (scripts/make_probe.py)."""
    with as_file(files("sdvae") / "assets" / PROBE_ASSET) as path:
        stored = open_weights(path).entries
        return {name: stored[name].read().float() for name in LATENT_SPACES if name in stored}


def match_references(latents: Tensor) -> list[Match]:  # (C, 16, 16), of the probe image
    """The match with each space of as many channels, best first; NaN and infinity match none."""
    akin = ((space, reference) for space, reference in references().items() if latents.shape == reference.shape)
    matches = [Match(space, agreement(latents, reference)) for space, reference in akin]
    return sorted(matches, key=lambda match: -match.correlation)


def agreement(latents: Tensor, reference: Tensor) -> Agreement:  # (C, h, w) each
    """How well two agree, each channel's mean aside; 0 throughout for NaN, infinity and constants."""
    ours, theirs = _centred(latents), _centred(reference)
    product, norms = float((ours * theirs).sum()), (float(ours.norm()), float(theirs.norm()))
    if not np.isfinite(product) or not all(0.0 < norm < np.inf for norm in norms):
        return Agreement(0.0, 0.0, 0.0, 0.0)
    channels = (ours * theirs).sum(dim=(1, 2)) / (ours.norm(dim=(1, 2)) * theirs.norm(dim=(1, 2))).clamp(min=1e-30)
    return Agreement(
        product / (norms[0] * norms[1]), float(channels.min()), product / norms[0] ** 2, norms[1] / norms[0]
    )


def _centred(latents: Tensor) -> Tensor:
    """Without each channel's mean: spaces differ by a shift, too."""
    return latents.double() - latents.double().mean(dim=(1, 2), keepdim=True)


@cache
def _pixels() -> Tensor:  # (1, 3, 128, 128)
    return to_pixels(probe_image()[None])


def _encode(config: VAEConfig, tensors: Mapping[str, Tensor]) -> Seen:
    pixels = _pixels()
    with torch.device("meta"):
        encoder = TinyEncoder(config).eval() if isinstance(config, TinyConfig) else Encoder(config).eval()
    encoder.load_state_dict(_below("encoder.", tensors), assign=True)
    output = encoder(pixels)
    if not isinstance(config, TinyConfig):
        output = _convolved("quant_conv", output, tensors).chunk(2, dim=1)[0]
    return Seen(tuple(match_references(output[0])), output[0])


def _decode(config: VAEConfig, tensors: Mapping[str, Tensor]) -> Seen:
    with torch.device("meta"):
        decoder = TinyDecoder(config).eval() if isinstance(config, TinyConfig) else Decoder(config).eval()
    decoder.load_state_dict(_below("decoder.", tensors), assign=True)
    pixels = _pixels()[0]
    matches = []
    for space, scaled in references().items():
        if (FAMILIES[space].latent_channels, FAMILIES[space].downscale) == (config.latent_channels, config.downscale):
            latents = scaled if isinstance(config, TinyConfig) else unscale(scaled, FAMILIES[space])
            shown = decoder(_convolved("post_quant_conv", latents[None], tensors))
            matches.append(Match(space, agreement(shown[0], pixels)))
    return Seen(tuple(sorted(matches, key=lambda match: -match.correlation)), None)


def _convolved(name: str, values: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    if f"{name}.weight" not in tensors:
        return values
    weight, bias = (tensors[f"{name}.{part}"].detach().to("cpu", torch.float32) for part in ("weight", "bias"))
    return F.conv2d(values, weight, bias)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inside = ((key.removeprefix(prefix), value) for key, value in tensors.items() if key.startswith(prefix))
    return {key: value.detach().to("cpu", torch.float32) for key, value in inside}
