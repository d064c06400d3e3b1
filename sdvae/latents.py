"""The only place where raw latents and scaled latents meet.

Raw latents are what the encoder gives and the decoder takes. Scaled latents are what a diffusion model
sees: about unit variance, `(latents - shift_factor) * scaling_factor`. FLUX.2's model sees patches of 2x2 raw latents
as one scaled latent of four times as many channels, each with a mean and a std of its own.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from sdvae.amounts import size_text
from sdvae.config import LatentScaling, VAEConfig
from sdvae.errors import ShapeError

Scaling = LatentScaling | VAEConfig  # both say by what


def scale(latents: Tensor, scaling: Scaling) -> Tensor:  # raw (N, C, h, w) -> scaled; of FLUX.2 (N, 4C, h/2, w/2)
    """Raw latents to what the diffusion model of this VAE was trained on; ShapeError where they make no patches."""
    return _patchify(standardise(latents, scaling), scaling.latents_patch)


def unscale(scaled_latents: Tensor, scaling: Scaling) -> Tensor:  # scaled -> raw (N, C, h, w)
    """What a diffusion model produced to what the decoder takes."""
    return unstandardise(_unpatchify(scaled_latents, scaling.latents_patch), scaling)


def standardise(latents: Tensor, scaling: Scaling) -> Tensor:  # (N, C, h, w) -> same
    """The values of scaled latents, each where its raw one lies: those of `scale`, but in no patches."""
    shift, factor = _affine(latents, scaling)
    return (latents - shift) * factor


def unstandardise(latents: Tensor, scaling: Scaling) -> Tensor:  # (N, C, h, w) -> same
    """The inverse of `standardise`."""
    shift, factor = _affine(latents, scaling)
    return latents / factor + shift


def gain(like: Tensor, scaling: Scaling) -> Tensor:  # of (N, C, h, w); broadcasts to it
    """By what `standardise` multiplies."""
    return _affine(like, scaling)[1]


def scaled_shape(shape: Sequence[int], scaling: Scaling) -> tuple[int, int, int]:
    """The shape that `scale` gives latents of (C, h, w)."""
    (channels, height, width), patch = shape, scaling.latents_patch
    return channels * patch**2, height // patch, width // patch


def _patchify(latents: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return latents
    height, width = latents.shape[-2:]
    if height % patch or width % patch:
        raise ShapeError(
            f"raw latents of {size_text(height, width)} cannot be scaled: a scaled latent of this VAE stands for "
            f"{size_text(patch, patch)} of them; take images whose latents have sides that are multiples of {patch}"
        )
    return rearrange(latents, "... c (h p) (w q) -> ... (c p q) h w", p=patch, q=patch)


def _unpatchify(scaled_latents: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return scaled_latents
    return rearrange(scaled_latents, "... (c p q) h w -> ... c (h p) (w q)", p=patch, q=patch)


def _affine(like: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    shift = _numbers(0.0 if scaling.shift_factor is None else scaling.shift_factor)
    factor = _numbers(scaling.scaling_factor)
    if scaling.latents_mean is not None and scaling.latents_std is not None:
        # Playground v2.5: whitened per channel, then scaled (diffusers' SDXL pipeline, decode).
        shift = shift + _placed(scaling.latents_mean, like, scaling.latents_patch)
        factor = factor / _placed(scaling.latents_std, like, scaling.latents_patch)
    return shift.to(like), factor.to(like)


def _placed(values: Sequence[float], like: Tensor, patch: int) -> Tensor:  # (1, C, 1, 1), or (1, C, h, w) for patches
    """The number of each channel of scaled latents, where its raw latents lie."""
    if patch == 1:
        return _numbers(values).view(1, -1, 1, 1)
    rows, columns = (torch.arange(side, dtype=torch.int64, device="cpu") % patch for side in like.shape[-2:])
    return _numbers(values).view(1, -1, patch, patch)[:, :, rows][:, :, :, columns]


def _numbers(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def lerp(start: Tensor, end: Tensor, position: float) -> Tensor:
    """The point at `position` (0..1) on the straight line between two latents."""
    return torch.lerp(start, end, position)


def slerp(start: Tensor, end: Tensor, position: float) -> Tensor:
    """The point at `position` (0..1) on the great arc between two latents, each image one vector.

    Keeps the norm that Gaussian latents have, where the straight line passes through their unlikely
    middle. Falls back to the line where the two point the same or opposite way (Shoemake 1985).
    """
    a, b = start.flatten(1), end.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1.0, 1.0)).view(-1, 1, 1, 1)
    sine = angle.sin()
    arc = (torch.sin((1.0 - position) * angle) * start + torch.sin(position * angle) * end) / sine
    return torch.where(sine > 1e-4, arc, lerp(start, end, position))
