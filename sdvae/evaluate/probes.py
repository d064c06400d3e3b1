"""What needs more than one round trip: equivariance, and the decay over many. Measured on crops of a few photos."""

from collections.abc import Iterable, Sequence

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

TRIPS = (1, 2, 4, 8, 16)


def spread(num_images: int, num_probed: int, seed: int) -> list[int]:
    """Evenly spaced places of at most `num_probed` images; the seed says where they begin."""
    num = min(num_images, num_probed)
    begin = np.random.default_rng(seed).random()
    return [int((step + begin) * num_images / num) for step in range(num)]


def central_crop(image: Image, downscale: int, most_px: int) -> Image | None:
    """The middle of an image, at most `most_px` a side and a multiple of two latents; None where it is too small."""
    multiple = 2 * downscale
    height, width = (min(side, most_px) // multiple * multiple for side in image.shape[:2])
    if not height or not width:
        return None
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def probe(candidate: VAECandidate, images: Sequence[Image]) -> tuple[tuple[Equivariance, ...], Curve]:
    """How far latents are from following a transform of the image, and the PSNR after 1, 2, 4, 8 and 16 round trips.

    Both are over all images, at least one; those of one size run together, and their latents are computed once.
    """
    follows = {name: _Following() for name in TRANSFORMS}
    decays = np.zeros(len(TRIPS))
    for pixels in _batches(images):
        latents = candidate.encode(pixels).mode()
        for name, following in follows.items():
            following.add(candidate, name, pixels, latents)
        decays += _decay(candidate, pixels, latents)
    equivariance = tuple(following.found(name, len(images)) for name, following in follows.items())
    return equivariance, Curve(tuple(map(float, TRIPS)), tuple(map(float, decays / len(images))))


def _batches(images: Sequence[Image]) -> Iterable[Tensor]:
    by_size: dict[tuple[int, ...], list[Image]] = {}
    for image in images:
        by_size.setdefault(image.shape, []).append(image)
    return (to_pixels(np.stack(same)) for same in by_size.values())


def _decay(candidate: VAECandidate, pixels: Tensor, latents: Tensor) -> NDArray[np.float64]:  # (len(TRIPS),)
    """The PSNR to the original after round trips through 8 bits, summed over the images."""
    original = to_levels(pixels, "8-bit")
    found = []
    for trip in range(1, TRIPS[-1] + 1):
        levels = to_levels(candidate.decode(latents).cpu(), "8-bit")
        if trip in TRIPS:
            found.append(_psnr(levels, original))
        if trip < TRIPS[-1]:
            latents = candidate.encode((levels / 127.5 - 1).float()).mode()
    return np.array(found)


def _psnr(levels: Tensor, originals: Tensor) -> float:
    """Summed over the images."""
    return sum(psnr_of_levels(*pair) for pair in zip(levels, originals, strict=True))


def _half(planes: Tensor) -> Tensor:
    return F.avg_pool2d(planes, 2)


def _turned(planes: Tensor) -> Tensor:
    return planes.rot90(1, (2, 3)).contiguous()


TRANSFORMS = {"half size": _half, "quarter turn": _turned}


class _Following:
    """How far T E(x) is from E(T x), and D(T E(x)) from T x, summed over images."""

    def __init__(self) -> None:
        self.missed = self.spread = self.quality = 0.0

    def add(self, candidate: VAECandidate, name: str, pixels: Tensor, latents: Tensor) -> None:
        transform = TRANSFORMS[name]
        wanted, raw = transform(pixels), transform(latents)
        of_transformed = candidate.scaled(candidate.encode(wanted)).mode().cpu().double()
        transformed = candidate.scaled(DiagonalGaussian(raw, raw)).mode().cpu().double()
        self.missed += float((of_transformed - transformed).square().sum())
        self.spread += float((of_transformed - of_transformed.mean((2, 3), keepdim=True)).square().sum())
        self.quality += _psnr(to_levels(candidate.decode(raw).cpu(), "8-bit"), to_levels(wanted, "8-bit"))

    def found(self, name: str, num_images: int) -> Equivariance:
        error = (self.missed / self.spread) ** 0.5 if self.spread else 0.0
        return Equivariance(name, error, self.quality / num_images, num_images)
