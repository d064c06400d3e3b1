from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdvae.config import FAMILIES
from sdvae.latents import lerp, scale, slerp, unscale

PLAYGROUND = replace(
    FAMILIES["sdxl"],
    scaling_factor=0.5,
    latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
    latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
)
CONFIGS = {**FAMILIES, "playground": PLAYGROUND}


@pytest.mark.parametrize("name", CONFIGS)
def test_unscale_inverts_scale(name: str) -> None:
    config = CONFIGS[name]
    latents = 5.0 * torch.randn(2, config.latent_channels, 3, 5)
    assert (unscale(scale(latents, config), config) - latents).abs().max() < 1e-5  # a few fp32 roundings at |x| < 25


def test_scaling_is_that_of_the_diffusers_pipelines() -> None:
    latents = torch.randn(1, 16, 2, 2)
    flux = FAMILIES["flux1"]
    theirs = latents / 0.3611 + 0.1159  # FluxPipeline.__call__, before vae.decode
    assert (unscale(latents, flux) - theirs).abs().max() < 1e-6
    latents = torch.randn(1, 4, 2, 2)
    mean = torch.tensor(PLAYGROUND.latents_mean).view(1, 4, 1, 1)
    std = torch.tensor(PLAYGROUND.latents_std).view(1, 4, 1, 1)
    theirs = latents * std / 0.5 + mean  # StableDiffusionXLPipeline.__call__
    assert (unscale(latents, PLAYGROUND) - theirs).abs().max() < 1e-5


def test_scale_keeps_dtype() -> None:
    assert scale(torch.zeros(1, 4, 1, 1, dtype=torch.bfloat16), FAMILIES["sd1"]).dtype == torch.bfloat16


@given(st.floats(0.0, 1.0))
def test_slerp_keeps_the_norm_of_equal_norms(position: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 4, 4, 4, generator=generator)
    a, b = a / a.norm(), b / b.norm()
    assert abs(slerp(a, b, position).norm().item() - 1.0) < 1e-5


def test_slerp_ends_where_it_should_and_survives_equal_and_opposite_latents() -> None:
    a, b = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (slerp(a, b, 0.0) - a).abs().max() < 1e-6
    assert (slerp(a, b, 1.0) - b).abs().max() < 1e-6
    assert (slerp(a, a, 0.5) - a).abs().max() < 1e-6
    assert slerp(a, -a, 0.5).abs().max() < 1e-6
    assert (lerp(a, b, 0.25) - (0.75 * a + 0.25 * b)).abs().max() < 1e-6
