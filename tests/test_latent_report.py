"""What is said of latents, on VAEs whose answers are known."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.evaluate.candidates import VAECandidate, to_levels
from sdvae.evaluate.latents import NUM_BINS, LatentSums, radial_power, report
from sdvae.evaluate.probes import TRIPS, central_crop, decay, equivariance
from sdvae.evaluate.results import Curve, LatentReport
from sdvae.pixels import to_pixels
from sdvae.posterior import DiagonalGaussian

STD = 0.1  # of every posterior
Image = NDArray[np.uint8]


class Known:
    """Latents are pixels after `forth`, the reconstruction is latents after `back`; nothing is scaled."""

    def __init__(self, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        self.forth, self.back = forth, back

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        mean = self.forth(pixels)
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(STD)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.back(latents)

    def scaled(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        return posterior


def same(planes: Tensor) -> Tensor:
    return planes


def swapped(planes: Tensor) -> Tensor:
    return planes.flip(1)


def blurred(planes: Tensor) -> Tensor:
    """A mean of 3x3 around the torus, so that its spectrum is exact."""
    rows = (planes.roll(-1, 2) + planes + planes.roll(1, 2)) / 3
    return (rows.roll(-1, 3) + rows + rows.roll(1, 3)) / 3


def leaning(planes: Tensor) -> Tensor:
    """What no transform commutes with: a ramp is added."""
    return planes + torch.linspace(-1, 1, planes.shape[3])


IDENTITY, SWAP, BLUR = Known(same, same), Known(same, swapped), Known(blurred, same)
GAIN = Known(same, lambda planes: 0.5 * planes)
RAMP = Known(leaning, same)


def image(seed: int = 0, side: int = 32) -> Image:
    rng = np.random.default_rng(seed)
    return (rng.uniform(40, 216, (side, side, 3)) * np.array([1.0, 0.8, 0.6])).astype(np.uint8)


def gathered(known: Known, images: list[Image]) -> LatentReport:
    sums = LatentSums()
    for one in images:
        part = LatentSums()
        pixels = to_pixels(one[None])
        posterior = known.encode(pixels)
        original = to_levels(pixels, "8-bit")
        part.add_posterior(posterior, original)
        part.add_levels(original, to_levels(known.decode(posterior.mode()), "8-bit"))
        sums.merge(LatentSums.from_json(part.to_json()))
    return report(sums, True, (), Curve((), ()), 0)


def as_candidate(known: Known) -> VAECandidate:
    return cast(VAECandidate, cast(Any, known))


def test_the_identity_keeps_colours_and_contrast() -> None:
    found = gathered(IDENTITY, [image(0), image(1)])
    assert found.colour_shift == pytest.approx((0, 0, 0), abs=1e-9)
    assert found.contrast_gain == pytest.approx((1, 1, 1), abs=1e-9)


def test_mean_std_correlation_noise_and_bits_are_the_closed_forms() -> None:
    images = [image(0), image(1)]
    found = gathered(IDENTITY, images)
    values = np.stack(images).astype(np.float64) / 127.5 - 1
    flat = values.reshape(-1, 3)
    assert [channel.mean for channel in found.channels] == pytest.approx(flat.mean(0), abs=1e-6)
    assert [channel.std for channel in found.channels] == pytest.approx(flat.std(0), abs=1e-6)
    np.testing.assert_allclose(found.correlation, np.corrcoef(flat.T), atol=1e-6)
    for channel, variance, square in zip(found.channels, flat.var(0), np.square(flat).mean(0), strict=True):
        assert channel.posterior_std == pytest.approx(STD)
        assert channel.snr_db == pytest.approx(10 * math.log10(variance / STD**2), abs=1e-4)
        assert channel.kl_bits == pytest.approx(0.5 * (square + STD**2 - math.log(STD**2) - 1) / math.log(2), abs=1e-4)
        assert not channel.is_dead
    bits = [channel.kl_bits or 0.0 for channel in found.channels]
    assert found.bits_per_pixel == pytest.approx(sum(bits))  # three latents a pixel


def test_a_channel_that_does_not_follow_the_photo_is_dead() -> None:
    found = gathered(Known(lambda planes: planes * torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1), same), [image()])
    assert [channel.is_dead for channel in found.channels] == [False, True, False]
    assert found.dead_share == pytest.approx(1 / 3)
    assert found.correlation[0][1] == 0.0


def test_a_swap_of_channels_shifts_colours_and_comes_back_after_two_trips() -> None:
    one = image()
    found = gathered(SWAP, [one])
    means = one.reshape(-1, 3).astype(np.float64).mean(0)
    assert found.colour_shift == pytest.approx((means[2] - means[0], 0, means[0] - means[2]), abs=1e-9)
    curve = decay(as_candidate(SWAP), [one])
    assert curve.x == tuple(map(float, TRIPS))
    assert curve.y[0] < 20
    assert curve.y[1:] == (100.0,) * 4


def test_a_gain_of_a_half_halves_the_contrast_and_decays() -> None:
    one = image()
    found = gathered(GAIN, [one])
    assert found.contrast_gain == pytest.approx((0.5, 0.5, 0.5), abs=2e-3)
    means = one.reshape(-1, 3).astype(np.float64).mean(0)
    assert found.colour_shift == pytest.approx(0.5 * (127.5 - means), abs=0.3)
    curve = decay(as_candidate(GAIN), [one])
    # What is lost after k trips is (1 - 2^-k) of the distance to grey.
    lost = [(1 - 0.5**trip) ** 2 for trip in TRIPS]
    drops = [curve.y[0] - value for value in curve.y]
    assert drops == pytest.approx([10 * math.log10(part / lost[0]) for part in lost], abs=0.1)


def test_a_blur_has_the_photos_spectrum_times_its_response() -> None:
    found = gathered(BLUR, [image(seed, 64) for seed in range(4)])
    exact = gathered(IDENTITY, [image(seed, 64) for seed in range(4)])
    radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :])
    axis = (1 + 2 * np.cos(2 * np.pi * np.fft.fftfreq(64))) / 3
    response = np.square(np.outer(axis, axis))
    for frequency, power, before in zip(found.spectrum.x, found.spectrum.y, exact.spectrum.y, strict=True):
        near = (radius > 0) & (np.abs(radius - frequency) <= 0.25 / NUM_BINS)
        assert power / before == pytest.approx(response[near].mean(), abs=0.05)


def test_white_noise_of_unit_variance_has_a_flat_spectrum_of_one() -> None:
    noise = torch.randn(8, 128, 128, dtype=torch.float64)
    power, num_waves = radial_power(noise)
    assert power.sum() / num_waves.sum() == pytest.approx(1.0, abs=0.01)
    present = num_waves > 50
    assert (power[present] / num_waves[present]) == pytest.approx(1.0, abs=0.2)


def test_the_photos_spectrum_stands_beside_that_of_the_latents() -> None:
    found = gathered(IDENTITY, [image()])
    assert found.photo_spectrum.x == found.spectrum.x
    assert np.mean(found.photo_spectrum.y) == pytest.approx(1.0, abs=0.2)


def test_pixelwise_vaes_follow_every_transform_and_a_ramp_follows_none() -> None:
    for known in (IDENTITY, GAIN):
        assert [one.latent_error for one in equivariance(as_candidate(known), [image()])] == pytest.approx(
            [0, 0], abs=1e-6
        )
    half, turn = equivariance(as_candidate(RAMP), [image()])
    assert turn.latent_error > 0.5
    assert turn.psnr_db < 15 < half.psnr_db + 100
    ramp, turned = torch.linspace(-1, 1, 32).expand(32, 32), torch.linspace(-1, 1, 32).expand(32, 32).rot90()
    pixels = to_pixels(image()[None]).rot90(1, (2, 3)).double() + ramp
    missed = 3 * (ramp - turned).double().square().sum()
    expected = math.sqrt(missed / (pixels - pixels.mean((2, 3), keepdim=True)).square().sum())
    assert turn.latent_error == pytest.approx(expected, rel=1e-5)


def test_the_posterior_of_scaled_latents_is_scaled_as_the_latents_are(small_vae: Any) -> None:
    candidate = VAECandidate(small_vae)
    raw = candidate.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    scaled = candidate.scaled(raw)
    torch.testing.assert_close(scaled.mean, small_vae.scale(raw.mean))
    torch.testing.assert_close(scaled.std, raw.std * small_vae.config.scaling_factor)


def test_a_central_crop_is_a_multiple_of_two_latents() -> None:
    large = np.zeros((700, 300, 3), np.uint8)
    large[350, 150] = 255
    crop = central_crop(large, 16)
    assert crop is not None
    assert crop.shape == (256, 256, 3)
    assert crop.max() == 255
    assert central_crop(large[:, :100], 32) is not None
    assert central_crop(large[:20], 16) is None


def test_sums_of_other_channels_are_not_added() -> None:
    first, second = LatentSums(), LatentSums()
    photo = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    first.add_posterior(DiagonalGaussian(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)), photo)
    second.add_posterior(DiagonalGaussian(torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2)), photo)
    with pytest.raises(ValueError, match="channels"):
        first.merge(second)


def test_the_photo_is_shrunk_to_the_latents_before_its_spectrum_is_taken() -> None:
    """A wave of 32 px has a quarter of a cycle in each latent of a VAE that shrinks by 8."""
    wave = (127 + 100 * np.sin(2 * np.pi * np.arange(256) / 32)).astype(np.uint8)
    photo = np.broadcast_to(wave[None, :, None], (256, 256, 3))
    levels = to_levels(to_pixels(photo[None].copy()), "8-bit")
    sums = LatentSums()
    sums.add_posterior(DiagonalGaussian(torch.randn(1, 4, 32, 32), torch.zeros(1, 4, 32, 32)), levels)
    assert sums.photo_power.argmax() == int(0.25 * 2 * NUM_BINS)
    assert sums.photo_power.max() > 0.99 * sums.photo_power.sum()
