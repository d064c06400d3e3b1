"""What a diffusion model will feel of a VAE, gathered image by image: docs/evaluation.md has each formula.

Sums are in fp64 and merge in any order that is always the same, so a run can be cut anywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.evaluate.results import Channel, Curve, Equivariance, LatentReport
from sdvae.posterior import DiagonalGaussian

Array = NDArray[np.float64]

NUM_BINS = 32  # of the spectrum, from 0 to 0.5 cycles per latent
DEAD_STD = 0.05  # of scaled latents: a channel whose means vary less says nothing about the photo


@dataclass
class LatentSums:
    """Sums over images; a value of None has not been added to yet."""

    num_latents: int = 0  # places, of all images
    num_pixels: int = 0
    first: Array = field(default_factory=lambda: np.zeros(0))  # (C,) of the scaled means
    second: Array = field(default_factory=lambda: np.zeros((0, 0)))  # (C, C) of their products
    variance: Array = field(default_factory=lambda: np.zeros(0))  # (C,) of the posteriors, scaled
    kl_nats: Array = field(default_factory=lambda: np.zeros(0))  # (C,)
    power: Array = field(default_factory=lambda: np.zeros(NUM_BINS))
    photo_power: Array = field(default_factory=lambda: np.zeros(NUM_BINS))
    num_waves: Array = field(default_factory=lambda: np.zeros(NUM_BINS))
    levels: Array = field(default_factory=lambda: np.zeros((5, 3)))  # x, y, xx, yy, xy: original, reconstruction

    def add_posterior(self, scaled: DiagonalGaussian, photo: Tensor) -> None:
        """Take in one image: the posterior of its scaled latents (1, C, h, w), and its levels (1, 3, H, W)."""
        mean = scaled.mean[0].double().cpu()
        flat = mean.flatten(1).numpy()
        logvar = scaled.logvar[0].double().cpu()
        nats = 0.5 * (mean.square() + logvar.exp() - logvar - 1.0)
        self.num_latents += flat.shape[1]
        self.num_pixels += photo.shape[2] * photo.shape[3]
        self.first = _grown(self.first, flat.sum(1))
        self.second = _grown(self.second, flat @ flat.T)
        self.variance = _grown(self.variance, logvar.exp().flatten(1).sum(1).numpy())
        self.kl_nats = _grown(self.kl_nats, nats.flatten(1).sum(1).numpy())
        power, num_waves = radial_power(mean)
        small = torch.nn.functional.adaptive_avg_pool2d(photo.double().cpu(), (mean.shape[1], mean.shape[2]))[0]
        photo_power, _ = radial_power((small - small.mean()) / small.std().clamp(min=1e-6))
        self.power, self.num_waves = self.power + power, self.num_waves + num_waves
        self.photo_power = self.photo_power + photo_power

    def add_levels(self, original: Tensor, reconstruction: Tensor) -> None:
        """Take in one image and its reconstruction, both (1, 3, H, W) in levels."""
        x, y = (image[0].double().flatten(1).cpu().numpy() for image in (original, reconstruction))
        self.levels = self.levels + np.stack([x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)])

    def merge(self, other: "LatentSums") -> None:
        """Add what another part of the images gave."""
        for item in fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            both = _grown(ours, theirs) if isinstance(ours, np.ndarray) else type(ours)(ours + theirs)
            setattr(self, item.name, both)

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, exactly."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LatentSums":
        """The inverse of `to_json`."""
        sums = cls()
        for name, value in values.items():
            setattr(sums, name, np.array(value, np.float64) if isinstance(value, list) else value)
        return sums


def report(
    sums: LatentSums, has_posterior: bool, equivariance: tuple[Equivariance, ...], decay: Curve, num_decayed: int
) -> LatentReport:
    """What the sums of at least one image say; a TAESD has no posterior, and so neither noise nor bits."""
    mean = sums.first / sums.num_latents
    covariance = sums.second / sums.num_latents - np.outer(mean, mean)
    std = np.sqrt(np.diag(covariance).clip(min=0.0))
    posterior = sums.variance / sums.num_latents
    bits = sums.kl_nats / sums.num_latents / math.log(2)
    signal_to_noise = std**2 / posterior
    channels = tuple(
        Channel(
            mean=float(mean[c]),
            std=float(std[c]),
            posterior_std=float(np.sqrt(posterior[c])),
            snr_db=_decibels(signal_to_noise[c]) if has_posterior else None,
            kl_bits=float(bits[c]) if has_posterior else None,
            is_dead=bool(std[c] < DEAD_STD),
        )
        for c in range(len(mean))
    )
    scale = np.outer(std, std)
    correlation = np.divide(covariance, scale, out=np.eye(len(mean)), where=scale > 0)
    frequencies = tuple((np.arange(NUM_BINS) + 0.5) * 0.5 / NUM_BINS)
    shift, gain = colour(sums)
    return LatentReport(
        channels=channels,
        correlation=tuple(tuple(map(float, row)) for row in correlation),
        dead_share=sum(channel.is_dead for channel in channels) / len(channels),
        bits_per_pixel=float(sums.kl_nats.sum() / math.log(2) / sums.num_pixels) if has_posterior else None,
        spectrum=_curve(frequencies, sums.power, sums.num_waves),
        photo_spectrum=_curve(frequencies, sums.photo_power, sums.num_waves),
        equivariance=equivariance,
        colour_shift=shift,
        contrast_gain=gain,
        decay=decay,
        num_decayed=num_decayed,
    )


def colour(sums: LatentSums) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For red, green, blue: mean of reconstruction minus original in levels; slope of the one over the other."""
    num = max(1, sums.num_pixels)
    x, y, xx, _, xy = sums.levels / num
    variance = (xx - x * x).clip(min=0.0)
    gain = np.divide(xy - x * y, variance, out=np.ones(3), where=variance > 1e-9)
    return tuple(map(float, y - x)), tuple(map(float, gain))


def radial_power(planes: Tensor) -> tuple[Array, Array]:  # (C, h, w) fp64 -> (NUM_BINS,), (NUM_BINS,)
    """Power by frequency, summed over channels and waves, and the number of waves; white noise of std 1 has 1 a wave.

    The mean of each plane is left out. Frequencies are radial, in cycles per latent; the corners beyond 0.5 are left
    out, too.
    """
    channels, height, width = planes.shape
    centred = planes - planes.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().sum(0).numpy() / (height * width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    is_counted = (radius > 0) & (radius < 0.5)
    bins = (radius[is_counted] * 2 * NUM_BINS).astype(np.int64)
    num_waves = np.bincount(bins, minlength=NUM_BINS)
    summed = np.bincount(bins, power[is_counted] / channels, NUM_BINS)
    return summed.astype(np.float64), num_waves.astype(np.float64)


def _grown(ours: Array, theirs: Array) -> Array:
    if ours.size and ours.shape != theirs.shape and theirs.size:
        raise ValueError(f"sums of {ours.shape} and {theirs.shape} channels cannot be added")
    return ours + theirs if ours.size and theirs.size else theirs if theirs.size else ours


def _curve(frequencies: tuple[float, ...], power: Array, num_waves: Array) -> Curve:
    """The mean power of the bins that have waves."""
    present = num_waves > 0
    mean = power[present] / num_waves[present]
    return Curve(tuple(map(float, np.array(frequencies)[present])), tuple(map(float, mean)))


def _decibels(ratio: float) -> float:
    return 10.0 * math.log10(max(ratio, 1e-30))
