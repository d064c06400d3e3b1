"""What needs more than one round trip: equivariance, and the decay over many. Measured on a few central crops."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sdvae.evaluate.candidates import VAECandidate, to_levels
from sdvae.evaluate.results import Curve, Equivariance
from sdvae.metrics import psnr_of_levels
from sdvae.pixels import to_pixels
from sdvae.posterior import DiagonalGaussian

Image = NDArray[np.uint8]  # (H, W, 3)

NUM_PROBED = 4
PROBE_PX = 256
TRIPS = (1, 2, 4, 8, 16)


def central_crop(image: Image, downscale: int) -> Image | None:
    """The middle of an image, at most PROBE_PX a side and a multiple of two latents; None where it is too small."""
    multiple = 2 * downscale
    height, width = (min(side, PROBE_PX) // multiple * multiple for side in image.shape[:2])
    if not height or not width:
        return None
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def equivariance(candidate: VAECandidate, images: Sequence[Image]) -> tuple[Equivariance, ...]:
    """How far latents are from following the image when it is shrunk to half or turned by a quarter."""
    return tuple(_follow(candidate, name, images) for name in TRANSFORMS)


def decay(candidate: VAECandidate, images: Sequence[Image]) -> Curve:
    """PSNR to the original after 1, 2, 4, 8 and 16 round trips through 8 bits, mean over the images."""
    found = np.zeros(len(TRIPS))
    for image in images:
        original = pixels = to_pixels(image[None])
        for trip in range(1, TRIPS[-1] + 1):
            levels = to_levels(candidate.decode(candidate.encode(pixels).mode()).cpu(), "8-bit")
            if trip in TRIPS:
                found[TRIPS.index(trip)] += psnr_of_levels(levels, to_levels(original, "8-bit"))
            pixels = (levels / 127.5 - 1).float()
    return Curve(tuple(map(float, TRIPS)), tuple(map(float, found / len(images))))


def _half(planes: Tensor) -> Tensor:
    return F.avg_pool2d(planes, 2)


def _turned(planes: Tensor) -> Tensor:
    return planes.rot90(1, (2, 3)).contiguous()


TRANSFORMS = {"half size": _half, "quarter turn": _turned}


def _follow(candidate: VAECandidate, name: str, images: Sequence[Image]) -> Equivariance:
    transform = TRANSFORMS[name]
    missed = spread = quality = 0.0
    for image in images:
        pixels = to_pixels(image[None])
        wanted = transform(pixels)
        of_transformed = candidate.scaled(candidate.encode(wanted)).mode().cpu().double()
        posterior = candidate.encode(pixels)
        raw = transform(posterior.mode())
        transformed = candidate.scaled(DiagonalGaussian(raw, transform(posterior.logvar))).mode().cpu().double()
        missed += float((of_transformed - transformed).square().sum())
        spread += float((of_transformed - of_transformed.mean((2, 3), keepdim=True)).square().sum())
        levels = to_levels(candidate.decode(raw).cpu(), "8-bit")
        quality += psnr_of_levels(levels, to_levels(wanted, "8-bit"))
    error = (missed / spread) ** 0.5 if spread else 0.0
    return Equivariance(name, error, quality / len(images), len(images))
