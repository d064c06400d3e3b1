"""A VAE that can be solved on paper: each value x of a pixel has a latent number z, and x = slope z + noise."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.posterior import DiagonalGaussian
from sdvae.vae import VAE


class LinearVAE(VAE):
    """p(z) = N(0, 1), p(x | z) = N(slope z, noise^2), so p(x) = N(0, slope^2 + noise^2), and its true posterior.

    `width` times as wide a posterior is not the true one.
    """

    def __init__(self, slope: float = 1.0, noise: float = 0.5, width: float = 1.0) -> None:
        self.config = VAEConfig(
            block_out_channels=(4,), norm_num_groups=1, latent_channels=3, scaling_factor=1.0, layers_per_block=1
        )
        self.name, self.device = "linear", torch.device("cpu")
        self.slope, self.noise, self.width = slope, noise, width
        self.largest_batch = 0

    @property
    def evidence_std(self) -> float:
        """The std of x."""
        return math.hypot(self.slope, self.noise)

    def encode(self, pixels: Tensor, budget: Any = None) -> DiagonalGaussian:
        self.largest_batch = max(self.largest_batch, len(pixels))
        std = self.width * self.noise / self.evidence_std
        mean = self.slope / self.evidence_std**2 * pixels.float()
        return DiagonalGaussian(mean, torch.full_like(mean, 2.0 * math.log(std)))

    def decode(self, latents: Tensor, budget: Any = None) -> Tensor:
        return self.slope * latents

    @contextmanager
    def deterministic(self, images_at_once: int = 0) -> Iterator[None]:
        yield

    @property
    def latent_space(self) -> str:
        return "linear"

    told_space = latent_space


class IdentityVAE(LinearVAE):
    """Its latents are the pixels."""

    def encode(self, pixels: Tensor, budget: Any = None) -> DiagonalGaussian:
        return DiagonalGaussian(pixels.float(), torch.full_like(pixels, -30.0))
