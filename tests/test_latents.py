from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdvae.config import FAMILIES
from sdvae.errors import ShapeError
from sdvae.latents import lerp, scale, slerp, standardise, unscale, unstandardise

PLAYGROUND = FAMILIES["playground"]


@pytest.mark.parametrize("name", FAMILIES)
def test_unscale_inverts_scale(name: str) -> None:
    config = FAMILIES[name]
    latents = 5.0 * torch.randn(2, config.latent_channels, 4, 6)
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


def test_latents_of_flux2_are_scaled_in_patches_each_channel_by_its_own_statistics() -> None:
    config, latents = FAMILIES["flux2"], torch.randn(2, 32, 4, 6)
    scaled = scale(latents, config)
    assert scaled.shape == (2, 128, 2, 3)
    assert config.latents_mean is not None and config.latents_std is not None
    for channel, row, column in ((0, 0, 0), (7, 1, 2), (31, 3, 5)):  # written out once more
        patched = 4 * channel + 2 * (row % 2) + column % 2
        expected = (latents[1, channel, row, column] - config.latents_mean[patched]) / config.latents_std[patched]
        assert abs(scaled[1, patched, row // 2, column // 2] - expected) < 1e-6
        assert abs(standardise(latents, config)[1, channel, row, column] - expected) < 1e-6


def test_odd_latents_make_no_patches_but_can_be_standardised() -> None:
    config, latents = FAMILIES["flux2"], torch.randn(1, 32, 3, 4)
    with pytest.raises(ShapeError, match=r"raw latents of 4x3 cannot be scaled: .* stands for 2x2 of them"):
        scale(latents, config)
    assert (unstandardise(standardise(latents, config), config) - latents).abs().max() < 1e-6


def test_scalings_are_close_up_to_the_rounding_of_their_statistics() -> None:
    flux2 = FAMILIES["flux2"]
    assert flux2.latents_mean is not None and flux2.latents_std is not None
    rounded = [tuple(torch.tensor(x).bfloat16().tolist()) for x in (flux2.latents_mean, flux2.latents_std)]
    near = replace(flux2, latents_mean=rounded[0], latents_std=rounded[1])
    assert near != flux2 and near.latent_scaling.is_close(flux2.latent_scaling)
    swapped = replace(flux2, latents_mean=flux2.latents_mean[::-1])
    plain = replace(flux2, latents_mean=None, latents_std=None)
    for other in (swapped, plain, FAMILIES["cogview4"], FAMILIES["sd1"]):
        assert not other.latent_scaling.is_close(flux2.latent_scaling)
    assert abs(flux2.latent_scaling.overall_factor - 1 / 1.77) < 0.005
    assert FAMILIES["sd3"].latent_scaling.overall_factor == FAMILIES["sd3"].scaling_factor


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
