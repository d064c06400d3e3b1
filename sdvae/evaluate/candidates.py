"""Who is judged: a VAE in one dtype and size, or diffusers' tiles of it."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae import latents as latent_scaling
from sdvae.bench.contenders import load_diffusers
from sdvae.config import VAEConfig
from sdvae.engine.precision import DTYPES
from sdvae.engine.run import Budget
from sdvae.errors import ReportError
from sdvae.model import AutoencoderKL
from sdvae.pixels import pad_to_multiple, to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.tiny import AutoencoderTiny
from sdvae.vae import VAE

Image = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Identity:
    """What a candidate is, as the results tell it; two of one identity give the same numbers."""

    label: str
    kind: Literal["vae", "codec"]
    name: str = ""
    fingerprint: str | None = None
    latent_space: str | None = None
    latent_channels: int | None = None
    downscale: int | None = None
    num_parameters: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    tiling: str = "none"
    size_px: int | None = None


class VAECandidate:
    """A VAE through its public methods, or diffusers' tiles of its weights."""

    def __init__(
        self,
        vae: VAE,
        label: str | None = None,
        *,
        tile_px: int | None = None,
        size_px: int | None = None,
        budget: Budget = None,
    ) -> None:
        """With `tile_px`, diffusers encodes and decodes in tiles of that size, a quarter overlapping."""
        if vae.config.in_channels != 3:
            raise ReportError(f"{vae.name} takes {vae.config.in_channels} channels; eval judges VAEs of RGB photos")
        self.vae, self.budget = vae, budget
        self.config: VAEConfig = vae.config
        self.has_posterior = not isinstance(vae.model, AutoencoderTiny)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == vae.dtype)
        self.tiled = _load_tiled(vae, dtype, tile_px) if tile_px else None
        self.identity = Identity(
            label or vae.name, "vae", vae.name, vae.fingerprint, vae.latent_space, vae.config.latent_channels,
            vae.config.downscale, sum(parameter.numel() for parameter in vae.model.parameters()), str(vae.device),
            dtype, f"diffusers {tile_px} px" if tile_px else "none", size_px,
        )  # fmt: skip

    def exactly(self) -> AbstractContextManager[object]:
        """Inside, results have the same bits whatever the batch; not under a budget, which may ask for other strips."""
        return self.vae.deterministic() if self.budget is None else nullcontext()

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """The posterior of raw latents, of pixels whose sides are whole numbers of latents."""
        if self.tiled is None:
            return self.vae.encode(pixels, self.budget)
        with torch.inference_mode():
            parts = [self.tiled.encode(one).latent_dist for one in self._one_by_one(pixels)]
            mean, logvar = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "logvar"))
        return DiagonalGaussian(mean.float(), logvar.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents to pixels."""
        if self.tiled is None:
            return self.vae.decode(latents, self.budget)
        with torch.inference_mode():
            return torch.cat([self.tiled.decode(one).sample for one in self._one_by_one(latents)]).float()

    def _one_by_one(self, batch: Tensor) -> Sequence[Tensor]:
        return torch.split(batch.to(self.vae.device, self.vae.dtype), 1)

    def scaled(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        """The posterior of scaled latents, each where its raw one lies: in no patches."""
        mean = latent_scaling.standardise(posterior.mean, self.config)
        return DiagonalGaussian(mean, posterior.logvar + 2.0 * latent_scaling.gain(mean, self.config).abs().log())


def _load_tiled(vae: VAE, dtype: str, tile_px: int) -> Any:
    if not isinstance(vae.model, AutoencoderKL):
        raise ReportError(f"{vae.name} is a TAESD, which diffusers does not tile in this way; take a KL-VAE")
    theirs = load_diffusers(vae.model, vae.device, dtype, "contiguous")
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = tile_px, tile_px // vae.config.downscale
    return theirs


def draw(posterior: DiagonalGaussian, latents: Literal["mode", "sample"], seed: int, keys: Sequence[str]) -> Tensor:
    """The latents that are decoded; each photo draws noise of its own, whatever the batch and the rank."""
    if latents == "mode":
        return posterior.mode()
    samples = []
    for row, key in enumerate(keys):
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        one = DiagonalGaussian(posterior.mean[row : row + 1], posterior.logvar[row : row + 1])
        samples.append(one.sample(generator))
    return torch.cat(samples)


def to_levels(pixels: Tensor, rounding: Literal["8-bit", "float"]) -> Tensor:  # (N, 3, H, W) -> 0..255 in fp64
    """The levels that are compared: clamped, and rounded as an 8-bit file is."""
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    levels = unit.mul_(255)
    return (levels.round_() if rounding == "8-bit" else levels).double()


def padded_pixels(images: Sequence[Image], downscale: int) -> Tensor:
    """Images of one size as pixels, padded by reflection to a whole number of latents."""
    return to_pixels(np.stack([pad_to_multiple(image, downscale) for image in images]))
