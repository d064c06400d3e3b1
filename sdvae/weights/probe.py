"""The probe: one image whose latents in each space are known.

SD1 and SDXL have equal keys and shapes, and the spread of latents depends on the image. But two encoders of one space
agree on any image, up to a factor: correlation names the space, the slope of the regression the factor.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdvae.weights.files import open_weights
from sdvae.weights.identity import LATENT_SPACES

PROBE_ASSET = "probe.safetensors"
PROBE_SIZE_PX = 128


@dataclass(frozen=True)
class Match:
    """How well latents of the probe image agree with those of a space; slope: scaled reference per unit of latents."""

    space: str
    correlation: float
    slope: float


def probe_image() -> NDArray[np.uint8]:  # (128, 128, 3)
    """Shaded discs of all sizes that hide one another ("dead leaves"), whose statistics are those of photos.

    The same bytes on every machine: nothing but uniform numbers, arithmetic and square roots goes into it.
    """
    uniform = np.random.Generator(np.random.PCG64(0))
    rows, columns = np.mgrid[: 2 * PROBE_SIZE_PX, : 2 * PROBE_SIZE_PX] / (2.0 * PROBE_SIZE_PX)
    image = np.full((*rows.shape, 3), 0.5)
    for _ in range(300):
        size, top, left, gray, *tint, slope_down, slope_right = uniform.random(9)
        down, right = rows - (1.2 * top - 0.1), columns - (1.2 * left - 0.1)
        radius = min(0.05 / np.sqrt(size + 1e-4), 0.4)
        shade = gray + down * (slope_down - 0.5) + right * (slope_right - 0.5)
        is_inside = down * down + right * right <= radius * radius
        image[is_inside] = (shade[..., None] + 0.4 * (np.array(tint) - 0.5))[is_inside]
    smooth = image.reshape(PROBE_SIZE_PX, 2, PROBE_SIZE_PX, 2, 3).mean(axis=(1, 3))
    levels: NDArray[np.uint8] = np.floor(smooth.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return levels


@cache
def references() -> dict[str, Tensor]:
    """Scaled latents (C, 16, 16) of the probe image in each space, by the TAESD encoders (scripts/make_probe.py)."""
    with as_file(files("sdvae") / "assets" / PROBE_ASSET) as path:
        stored = open_weights(path).entries
        return {name: stored[name].read().float() for name in LATENT_SPACES if name in stored}


def match_references(latents: Tensor) -> list[Match]:  # (C, 16, 16), of the probe image
    """The match with each space of as many channels, best first; NaN and infinity match none."""
    matches = []
    for space, reference in references().items():
        if latents.shape == reference.shape:
            matches.append(Match(space, *agreement(latents, reference)))
    return sorted(matches, key=lambda match: -match.correlation)


def agreement(latents: Tensor, reference: Tensor) -> tuple[float, float]:  # (C, h, w) each
    """Correlation, and the factor that brings the latents nearest to the reference; 0 for NaN, infinity, constants."""
    ours, theirs = _centred(latents), _centred(reference)
    product, norms = float((ours * theirs).sum()), (float(ours.norm()), float(theirs.norm()))
    if not np.isfinite(product) or not all(0.0 < norm < np.inf for norm in norms):
        return 0.0, 0.0
    return product / (norms[0] * norms[1]), product / norms[0] ** 2


def _centred(latents: Tensor) -> Tensor:
    """Without each channel's mean: spaces differ by a shift, too."""
    return latents.double() - latents.double().mean(dim=(1, 2), keepdim=True)
