"""The only place where raw latents and scaled latents meet.

Raw latents are what the encoder gives and the decoder takes. Scaled latents are what a diffusion model
sees: about unit variance, `(latents - shift_factor) * scaling_factor`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdvae.config import LatentScaling, VAEConfig

Scaling = LatentScaling | VAEConfig  # both say by what


def scale(latents: Tensor, scaling: Scaling) -> Tensor:  # raw (N, C, h, w) -> scaled
    """Raw latents to what the diffusion model of this VAE was trained on."""
    shift, factor = _affine(latents, scaling)
    return (latents - shift) * factor


def unscale(scaled_latents: Tensor, scaling: Scaling) -> Tensor:  # scaled (N, C, h, w) -> raw
    """What a diffusion model produced to what the decoder takes."""
    shift, factor = _affine(scaled_latents, scaling)
    return scaled_latents / factor + shift


def _affine(like: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    shift = _numbers(0.0 if scaling.shift_factor is None else scaling.shift_factor)
    factor = _numbers(scaling.scaling_factor)
    if scaling.latents_mean is not None and scaling.latents_std is not None:
        # Playground v2.5: whitened per channel, then scaled (diffusers' SDXL pipeline, decode).
        shift = shift + _numbers(scaling.latents_mean).view(1, -1, 1, 1)
        factor = factor / _numbers(scaling.latents_std).view(1, -1, 1, 1)
    return shift.to(like), factor.to(like)


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
