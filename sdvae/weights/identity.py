"""What a VAE is by its values: a fingerprint and a sketch of signs. Which latent spaces have names."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sdvae.config import FAMILIES, Padding, VAEConfig

LATENT_SPACES = ("sd1", "sdxl", "sd3", "flux1", "x4-upscaler", "flux2", "playground", "cogview4")
# A factor of 1 is also that of a VAE whose latents nobody scales: here the network must be the same, too.
KNOWN_BY_SHAPE = {"cogview4": ("block_out_channels", "layers_per_block")}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over sorted keys, shapes and values as little-endian fp32.

    Keys are diffusers' own. Independent of the file, its order and metadata, and of a dtype that fp32
    holds exactly. FLUX.2's counter of training steps, on which no result depends, is left out.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors.keys() - {"bn.num_batches_tracked"}):
        tensor = tensors[key]
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def padded_fingerprint(fingerprint: str, padding: Padding) -> str:
    """The fingerprint of a VAE with weights of this one: the same where it is padded with zeros."""
    if padding == "zeros":
        return fingerprint
    return hashlib.sha256(f"{fingerprint} padding {padding}\n".encode()).hexdigest()


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
        family = FAMILIES[name]
        fields = ("downscale", "latent_channels", *KNOWN_BY_SHAPE.get(name, ()))
        is_same = all(getattr(config, key) == getattr(family, key) for key in fields)
        if is_same and config.latent_scaling.is_close(family.latent_scaling):
            return name
    return None
