"""docs/theory.md quotes lines that exist, and its formulas hold in numbers."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvae.config import FAMILIES
from sdvae.latents import lerp, scale, slerp, unscale
from sdvae.metrics import psnr
from sdvae.posterior import DiagonalGaussian
from sdvae.train.config import load_config
from sdvae.train.losses import kl_term
from sdvae.train.terms import pixel_error
from sdvae.vae import VAE

ROOT = Path(__file__).parents[1]
THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def quotes(text: str) -> list[tuple[str, list[str]]]:
    """(file, lines) of every code block; a block belongs to the file named on the line above it."""
    blocks = re.findall(r"^`([^`\n]+)`\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(file, [line.strip() for line in block.splitlines()]) for file, block in blocks]


def is_quoted_truly(lines: list[str], source: str) -> bool:
    """Whether `lines` stand in `source` one after the other; indentation aside."""
    there = [line.strip() for line in source.splitlines()]
    return any(there[start : start + len(lines)] == lines for start in range(len(there)))


# The document.


@pytest.mark.parametrize(("file", "lines"), quotes(THEORY))
def test_every_quoted_line_is_in_the_code(file: str, lines: list[str]) -> None:
    assert lines
    assert is_quoted_truly(lines, (ROOT / file).read_text(encoding="utf-8")), f"{file} no longer has {lines}"


def test_every_code_block_is_checked() -> None:
    assert len(quotes(THEORY)) == THEORY.count("```python") >= 20
    assert THEORY.count("```") == 2 * THEORY.count("```python")


def test_a_quote_that_differs_by_a_sign_is_caught() -> None:
    source = (ROOT / "sdvae" / "posterior.py").read_text(encoding="utf-8")
    lines = ["return self.mean + self.std * noise.to(self.mean.device)"]
    assert is_quoted_truly(lines, source)
    assert not is_quoted_truly([lines[0].replace("*", "+")], source)
    assert not is_quoted_truly([lines[0], lines[0]], source)


def test_every_section_with_a_formula_quotes_the_code() -> None:
    sections = re.split(r"^## ", THEORY, flags=re.MULTILINE)[1:]
    with_formulas = [section for section in sections if "$$" in section]
    assert len(with_formulas) == 11
    assert [section.splitlines()[0] for section in with_formulas if not quotes(section)] == []


# The formulas. All in fp64: what is compared is algebra, and 1e-10 is generous to its rounding.


def gaussian(mean: float, std: float) -> DiagonalGaussian:
    """One image of one latent number."""
    values = torch.tensor([mean, 2.0 * math.log(std)], dtype=torch.float64)
    return DiagonalGaussian.from_moments(values.view(1, 2, 1, 1))


def log_density(latents: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((latents - mean) / std) ** 2 - math.log(std * math.sqrt(2.0 * math.pi))


def integrate(values: Tensor, grid: Tensor) -> float:
    return float(torch.trapezoid(values, grid))


GRID = torch.linspace(-60.0, 60.0, 400_001, dtype=torch.float64)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-2.0, 2.5)])
def test_section_4_kl_is_its_integral(mean: float, std: float) -> None:
    log_q, log_p = log_density(GRID, mean, std), log_density(GRID, 0.0, 1.0)
    integral = integrate(log_q.exp() * (log_q - log_p), GRID)
    assert abs(float(gaussian(mean, std).kl()) - integral) <= 1e-10
    log_p = log_density(GRID, 0.7, 1.8)
    integral = integrate(log_q.exp() * (log_q - log_p), GRID)
    assert abs(float(gaussian(mean, std).kl(gaussian(0.7, 1.8))) - integral) <= 1e-10


# A VAE that can be solved on paper: p(z) = N(0, 1), p(x | z) = N(a z, s^2), so p(x) = N(0, a^2 + s^2) and
# p(z | x) = N(a x / (a^2 + s^2), s^2 / (a^2 + s^2)).
SLOPE, NOISE, OBSERVED = 1.7, 0.6, 0.9
EVIDENCE_VARIANCE = SLOPE**2 + NOISE**2
LOG_EVIDENCE = float(log_density(torch.tensor(OBSERVED).double(), 0.0, math.sqrt(EVIDENCE_VARIANCE)))
TRUE_POSTERIOR = gaussian(SLOPE * OBSERVED / EVIDENCE_VARIANCE, NOISE / math.sqrt(EVIDENCE_VARIANCE))


def elbo(mean: float, std: float) -> float:
    """By our nll and kl; the expectation over q as an integral."""
    z = GRID.view(-1, 1, 1, 1)
    decoded = DiagonalGaussian(SLOPE * z, torch.full_like(z, 2.0 * math.log(NOISE)))
    log_likelihood = -decoded.nll(torch.full_like(z, OBSERVED))
    reconstruction = integrate(log_density(GRID, mean, std).exp() * log_likelihood, GRID)
    return reconstruction - float(gaussian(mean, std).kl())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.2), (-1.0, 0.7)])
def test_section_2_evidence_is_elbo_plus_a_divergence(mean: float, std: float) -> None:
    gap = float(gaussian(mean, std).kl(TRUE_POSTERIOR))
    assert gap > 0.01, "these are not the true posterior"
    assert abs(elbo(mean, std) + gap - LOG_EVIDENCE) <= 1e-8  # the integrand reaches 10^4 at the ends of the grid


def test_section_2_the_bound_is_tight_at_the_true_posterior() -> None:
    assert abs(elbo(float(TRUE_POSTERIOR.mean), float(TRUE_POSTERIOR.std)) - LOG_EVIDENCE) <= 1e-8


def test_section_3_samples_have_the_mean_and_deviation_asked_for() -> None:
    num_samples, mean, std = 100_000, 3.0, 0.2
    posterior = gaussian(mean, std)
    many = DiagonalGaussian(posterior.mean.expand(num_samples, 1, 1, 1), posterior.logvar.expand(num_samples, 1, 1, 1))
    samples = many.sample(torch.Generator().manual_seed(0))
    # Five standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a deviation. The slip
    # mean + std + noise would have mean 3.2 and deviation 1.
    assert abs(float(samples.mean()) - mean) <= 5 * std / math.sqrt(num_samples)
    assert abs(float(samples.std()) - std) <= 5 * std / math.sqrt(2 * num_samples)


def test_section_5_squared_error_is_a_gaussian_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, decoded = torch.randn(2, 3, 3, 8, 8, generator=generator, dtype=torch.float64)
    std = 0.3
    nll = DiagonalGaussian(decoded, torch.full_like(decoded, 2.0 * math.log(std))).nll(pixels)
    squares = (pixels - decoded).square().flatten(1).sum(1)
    constant = 0.5 * pixels[0].numel() * math.log(2.0 * math.pi * std**2)
    torch.testing.assert_close(nll, squares / (2.0 * std**2) + constant, rtol=1e-12, atol=0.0)


def test_section_5_one_grey_level_is_48_decibels() -> None:
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert abs(psnr(image, image + 1) - 20.0 * math.log10(255.0)) <= 1e-12
    assert abs(psnr(image, image + 1) - 48.13) <= 0.005


def test_section_6_the_weight_of_the_kl_is_a_decoder_right_to_one_grey_level() -> None:
    config = load_config("small", ["teacher.start=TAESD"])
    assert (config.loss.squared, config.loss.absolute) == (4.0, 0.25)
    assert config.loss.kl == pytest.approx(48 * 1e-5, rel=1e-12)
    variance = config.loss.kl / (2.0 * config.loss.squared)
    assert variance == pytest.approx(6e-5, rel=1e-12)
    assert abs(127.5 * math.sqrt(variance) - 1.0) <= 0.02  # [-1, 1] holds 255 grey levels

    generator = torch.Generator().manual_seed(0)
    pixels, decoded = 0.1 * torch.randn(2, 1, 3, 96, 96, generator=generator)
    posterior = DiagonalGaussian.from_moments(torch.randn(1, 8, 12, 12, generator=generator))
    squares = replace(config, loss=replace(config.loss, absolute=0.0))
    ours = pixel_error(squares, decoded, pixels) + config.loss.kl * kl_term(posterior)
    log_likelihood = -DiagonalGaussian(decoded, torch.full_like(decoded, math.log(variance))).nll(pixels)
    constant = 0.5 * pixels.numel() * math.log(2.0 * math.pi * variance)
    negative_elbo = -log_likelihood - constant + posterior.kl()
    # fp32; the constant takes a digit
    torch.testing.assert_close(ours, config.loss.kl * negative_elbo, rtol=1e-5, atol=0.0)


def test_section_7_the_prior_is_standard_over_scaled_latents(small_vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    decode = small_vae.decode

    def recorded(latents: Tensor, budget: None) -> Tensor:
        drawn.append(latents)
        return decode(latents, budget)

    monkeypatch.setattr(small_vae, "decode", recorded)
    small_vae.sample(2, 256, 256, seed=0)
    scaled = small_vae.scale(torch.cat(drawn))
    assert scaled.numel() == 8192
    assert abs(float(scaled.mean())) <= 5 / math.sqrt(8192)  # five standard errors
    assert abs(float(scaled.std()) - 1.0) <= 5 / math.sqrt(2 * 8192)


def test_section_7_the_arc_stays_on_the_shell_and_the_chord_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 4, 64, 64, generator=generator, dtype=torch.float64)
    shell = math.sqrt(a.numel())
    # The norm of n normal numbers has a deviation of sqrt(1/2), whatever n; two of them are at right angles up to
    # 1 / sqrt(n), which moves the middle of the arc by half of that.
    assert abs(float(a.norm()) - shell) <= 5 * math.sqrt(0.5)
    assert abs(float(slerp(a, b, 0.5).norm()) / shell - 1.0) <= 0.02
    assert abs(float(lerp(a, b, 0.5).norm()) / shell - math.sqrt(0.5)) <= 0.02


def test_section_7_the_arc_is_walked_at_constant_speed() -> None:
    angle = 2.1  # radians between two unit vectors in a plane
    a = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).view(1, 2, 1, 1)
    for position in (0.0, 0.25, 0.5, 0.9, 1.0):
        expected = [math.cos(position * angle), math.sin(position * angle)]
        assert slerp(a, b, position).flatten().tolist() == pytest.approx(expected, abs=1e-14)
        chord = [(1.0 - position) + position * math.cos(angle), position * math.sin(angle)]
        assert lerp(a, b, position).flatten().tolist() == pytest.approx(chord, abs=1e-14)


def test_section_8_forty_eight_numbers_become_one() -> None:
    config = FAMILIES["sd1"]
    assert config.downscale == 8
    assert 48 * (512 // config.downscale) ** 2 * config.latent_channels == 512 * 512 * 3


@pytest.mark.parametrize("family", ["sd1", "flux1"])
def test_section_8_scaling_takes_latents_to_deviation_one_and_back(family: str) -> None:
    config = FAMILIES[family]
    shift = config.shift_factor or 0.0
    unit = torch.randn(1, config.latent_channels, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    raw = unit / config.scaling_factor + shift
    assert abs(float(raw.std()) * config.scaling_factor - 1.0) <= 0.05  # 4,096 numbers or more
    torch.testing.assert_close(scale(raw, config), unit, rtol=1e-6, atol=1e-6)  # the factors are held in fp32
    torch.testing.assert_close(unscale(scale(raw, config), config), raw, rtol=1e-6, atol=1e-6)


def test_section_8_stable_diffusion_1_has_latents_of_deviation_five_and_a_half() -> None:
    assert abs(1.0 / FAMILIES["sd1"].scaling_factor - 5.5) <= 0.02
