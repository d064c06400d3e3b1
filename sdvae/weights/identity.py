"""What a VAE is by its values: a fingerprint and a sketch of signs. Which latent spaces have names."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sdvae.config import FAMILIES, VAEConfig

LATENT_SPACES = ("sd1", "sdxl", "sd3", "flux1", "x4-upscaler")
_SPACE_FIELDS = (
    "downscale", "latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
)  # fmt: skip


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over sorted keys, shapes and values as little-endian fp32.

    Keys are diffusers' own. Independent of the file, its order and metadata, and of a dtype that fp32
    holds exactly.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def sign_sketch(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits over sorted keys, shapes and signs: the same for the same weights in any precision.

    Rounding to fp16, bf16 or fp8 keeps every sign (what underflows becomes a zero that has one). Training does not.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        signs = torch.signbit(tensors[key].detach().to("cpu", torch.float32))
        digest.update(f"{key} {tuple(signs.shape)}\n".encode())
        digest.update(np.packbits(signs.numpy()).data)
    return digest.hexdigest()[:16]


def known_space(config: VAEConfig) -> str | None:
    """The family whose latents have this scale and shape; None where there is none."""
    for name in LATENT_SPACES:
        if all(getattr(config, key) == getattr(FAMILIES[name], key) for key in _SPACE_FIELDS):
            return name
    return None
