"""Chooses the exponents of a network's range scaling for fp16, from one run in fp32 on fixed inputs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.engine.execute import Peaks, execute
from sdvae.engine.kernels import Kernels
from sdvae.engine.plan import make_plan
from sdvae.engine.program import Weights, compile_program
from sdvae.engine.scaling import Exponents, choose_exponents, plan_scales
from sdvae.engine.stages import Direction, Network
from sdvae.errors import DeviceError
from sdvae.latents import unstandardise

_SIZE = 32  # of the calibration's latents; its pixels are as many as they stand for
_MAX_ERROR_GROWTH = 1.5  # of a weight's rounding, when scaling makes it subnormal


def calibrate(
    config: VAEConfig, direction: Direction, weights: Weights, device: torch.device, kernels: Kernels | None = None
) -> Exponents:
    """The exponents that keep fp16 in range; DeviceError for weights that fp16 would round away at these."""
    program = compile_program(config, direction, weights, torch.float32, device, kernels=kernels)
    images = calibration_images(config, direction)
    peaks: Peaks = {}
    plan = make_plan(program.network, images.shape[2], images.shape[3], element_bytes=4)
    execute(program, plan, images.to(device), peaks=peaks)
    exponents = choose_exponents(program.network, peaks)
    _require_precise(program.network, exponents, weights)
    return exponents


def calibration_images(config: VAEConfig, direction: Direction) -> Tensor:  # (2, C, h, w)
    """A smooth and a rough input, always the same."""
    generator = torch.Generator().manual_seed(0)
    if direction == "decode":
        rough = _noise((1, config.latent_channels, _SIZE, _SIZE), generator)
        return unstandardise(torch.cat([_smooth(rough[..., ::4, ::4], 4), rough]), config)
    rough = _noise((1, config.in_channels, _SIZE, _SIZE), generator)
    smooth = _smooth(rough, config.downscale)
    return torch.cat([smooth, _noise(smooth.shape, generator)]).clamp(-1, 1)


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _smooth(noise: Tensor, factor: int) -> Tensor:
    return F.interpolate(noise, scale_factor=float(factor), mode="bicubic")


def _require_precise(network: Network, exponents: Exponents, weights: Weights) -> None:
    for stage, scale in zip(network.stages, plan_scales(network, exponents), strict=True):
        scaled = [(f"{stage.name}.weight", scale.weight)]
        if stage.shortcut:
            scaled.append((f"{stage.shortcut}.weight", scale.shortcut_weight))
        if stage.kind == "attention":
            scaled = [(f"{stage.name}.to_out.0.weight", scale.weight)]
        for name, factor in scaled:
            growth = _rounding_error(weights[name], factor) / max(_rounding_error(weights[name], 1.0), 1e-5)
            if growth > _MAX_ERROR_GROWTH:
                raise DeviceError(
                    f"fp16 cannot hold this VAE: scaled by {factor:g} for its range, {name} would lose {growth:.1f}x "
                    "its precision; use --dtype bf16 or fp32"
                )


def _rounding_error(weight: Tensor, factor: float) -> float:
    exact = weight.detach().float() * factor
    return float((exact.half().float() - exact).norm() / exact.norm())
