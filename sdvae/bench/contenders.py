"""Who runs the same network on the same weights: sdvae, and diffusers in each dtype and memory format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.engine.precision import DTYPES, served_dtypes
from sdvae.engine.stages import Direction
from sdvae.errors import BenchError
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Relative L2 from fp32 at which a result is another one: several times what rounding does to this network.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.15}


@dataclass(frozen=True)
class Contender:
    """One way to encode or decode a batch: fp32 pixels in and the mean of the posterior out, or latents and pixels."""

    name: str
    dtype: str  # fp32, bf16, fp16
    memory_format: str
    run: Callable[[Tensor], Tensor]
    tolerance: float  # of the relative L2 error; who is further off is not timed


def sdvae(vae: VAE, direction: Direction, budget_bytes: int | None = None) -> Contender:
    """sdvae, through its public methods."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == vae.dtype)

    def run(batch: Tensor) -> Tensor:
        return vae.encode(batch, budget_bytes).mean if direction == "encode" else vae.decode(batch, budget_bytes)

    return Contender("sdvae", dtype, "channels_last", run, TOLERANCES[dtype])


def diffusers(
    model: AutoencoderKL, direction: Direction, device: torch.device, dtype: str, memory_format: str
) -> Contender:
    """`diffusers.AutoencoderKL` with these weights."""
    theirs = load_diffusers(model, device, dtype, memory_format)
    return diffusers_contender("diffusers", theirs, direction, dtype, memory_format)


def every_diffusers(model: AutoencoderKL, direction: Direction, device: torch.device) -> list[Contender]:
    """One of diffusers for each memory format and each dtype that the device computes in."""
    return [
        diffusers(model, direction, device, dtype, memory_format)
        for dtype in served_dtypes(device)
        for memory_format in MEMORY_FORMATS
    ]


def load_diffusers(model: AutoencoderKL, device: torch.device, dtype: str, memory_format: str) -> Any:
    """Diffusers' VAE with the weights of `model`, on a device."""
    try:
        import diffusers as theirs
    except ImportError as error:
        raise BenchError(f"diffusers cannot be imported: {error}; install it, or measure with --alone") from error
    padding: Any = model.config.padding
    if padding in ("circular-x", "circular-y"):
        raise BenchError(f"diffusers cannot pad by {padding}; compare with nobody, or with another padding")
    config = model.config.to_diffusers()
    with torch.device("meta"):
        vae = getattr(theirs, config["_class_name"]).from_config(config)
    weights = {name: values.to(device, DTYPES[dtype]) for name, values in model.state_dict().items()}
    vae.load_state_dict(weights, assign=True)
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = padding
    return vae.requires_grad_(False).eval().to(memory_format=MEMORY_FORMATS[memory_format])


def diffusers_contender(name: str, theirs: Any, direction: Direction, dtype: str, memory_format: str) -> Contender:
    """A VAE of diffusers, called as people call it."""

    def run(batch: Tensor) -> Tensor:
        batch = batch.to(DTYPES[dtype]).contiguous(memory_format=MEMORY_FORMATS[memory_format])
        out: Tensor = theirs.encode(batch).latent_dist.mean if direction == "encode" else theirs.decode(batch).sample
        return out

    return Contender(name, dtype, memory_format, run, TOLERANCES[dtype])
