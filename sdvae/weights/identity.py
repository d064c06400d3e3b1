"""What a VAE is by its values: a fingerprint, and the name of its latent space."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sdvae.config import FAMILIES, Padding, VAEConfig

LATENT_SPACES = ("sd1", "sdxl", "sd3", "flux1", "x4-upscaler", "flux2", "playground", "cogview4")
# A factor of 1 is also that of a VAE whose latents nobody scales: here the network must be the same, too.
_KNOWN_BY_SHAPE = {"cogview4": ("block_out_channels", "layers_per_block")}
# The beginnings of "modelspec.architecture" (Stability-AI/ModelSpec) -> space.
ARCHITECTURES = {
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd1", "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3", "stable-diffusion-v3": "sd3", "flux-1": "flux1",
    "flux-2": "flux2",
}  # fmt: skip


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


def latent_space(config: VAEConfig, fingerprint: str) -> str:
    """The name of the latent space: latents of one VAE decode with any other of the same space.

    A family is recognised by the scale and shape of its latents; any other VAE has a space of its own,
    named by the fingerprint of its weights, whatever the padding.
    """
    return known_space(config) or f"vae-{fingerprint[:16]}"


def known_space(config: VAEConfig) -> str | None:
    """The family whose latents have this scale and shape; None where there is none."""
    for name in LATENT_SPACES:
        family = FAMILIES[name]
        fields = ("downscale", "latent_channels", *_KNOWN_BY_SHAPE.get(name, ()))
        is_same = all(getattr(config, key) == getattr(family, key) for key in fields)
        if is_same and config.latent_scaling.is_close(family.latent_scaling):
            return name
    return None
