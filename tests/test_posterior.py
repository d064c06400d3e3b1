import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sdvae.posterior import LOGVAR_MAX, LOGVAR_MIN, DiagonalGaussian


def random_gaussian(seed: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> DiagonalGaussian:
    """Means and logvars of std 2, three images of 4 channels with sides that differ."""
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = 2.0 * torch.randn(2, batch, 4, 5, 6, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean.to(dtype), logvar.to(dtype))


def per_image(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


# The closed forms are compared in fp64, where 120 terms of rounding stay under 1e-12 of the sum.


def test_kl_to_the_prior_equals_torch() -> None:
    posterior = random_gaussian(0)
    prior = Normal(torch.zeros_like(posterior.mean), 1.0)
    theirs = per_image(kl_divergence(Normal(posterior.mean, posterior.std), prior))
    assert posterior.kl().shape == (3,)
    torch.testing.assert_close(posterior.kl(), theirs, rtol=1e-12, atol=0.0)


def test_kl_to_another_gaussian_equals_torch() -> None:
    posterior, other = random_gaussian(0), random_gaussian(1)
    theirs = per_image(kl_divergence(Normal(posterior.mean, posterior.std), Normal(other.mean, other.std)))
    assert posterior.kl(other).shape == (3,)
    torch.testing.assert_close(posterior.kl(other), theirs, rtol=1e-12, atol=0.0)
    assert (posterior.kl(other) - other.kl(posterior)).abs().min() > 1.0, "KL is not symmetric"


def test_kl_to_an_explicit_prior_is_the_default() -> None:
    posterior = random_gaussian(0)
    prior = DiagonalGaussian(torch.zeros_like(posterior.mean), torch.zeros_like(posterior.mean))
    torch.testing.assert_close(posterior.kl(prior), posterior.kl(), rtol=1e-12, atol=0.0)


def test_kl_is_what_sampling_estimates() -> None:
    """KL = E_q[log q(z) - log p(z)]: an estimate that shares no formula with the closed form."""
    q = DiagonalGaussian(torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[-0.5, 0.8]]).double())
    num_samples = 200_000
    many = DiagonalGaussian(q.mean.expand(num_samples, 2), q.logvar.expand(num_samples, 2))
    latents = many.sample(torch.Generator().manual_seed(0))
    prior = DiagonalGaussian(torch.zeros_like(many.mean), torch.zeros_like(many.mean))
    log_ratios = prior.nll(latents) - many.nll(latents)
    standard_error = float(log_ratios.std()) / math.sqrt(num_samples)
    assert standard_error < 0.01
    # Five standard errors: a fair estimate falls outside once in two million seeds, and the seed is fixed.
    assert abs(float(log_ratios.mean() - q.kl())) < 5 * standard_error


def test_nll_is_minus_the_log_density_of_torch() -> None:
    posterior = random_gaussian(0)
    latents = random_gaussian(1).mean
    theirs = -per_image(Normal(posterior.mean, posterior.std).log_prob(latents))
    assert posterior.nll(latents).shape == (3,)
    torch.testing.assert_close(posterior.nll(latents), theirs, rtol=1e-12, atol=0.0)


def test_nll_is_least_at_the_mode() -> None:
    posterior = random_gaussian(0)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert (posterior.nll(posterior.mode()) < posterior.nll(posterior.mean + 0.01)).all()


def test_logvar_is_clamped_on_the_way_in() -> None:
    extremes = torch.tensor([-math.inf, -31.0, -30.0, 0.0, 20.0, 21.0, math.inf]).view(1, 7, 1, 1)
    posterior = DiagonalGaussian(torch.zeros_like(extremes), extremes)
    assert posterior.logvar.flatten().tolist() == [-30.0, -30.0, -30.0, 0.0, 20.0, 20.0, 20.0]
    assert (LOGVAR_MIN, LOGVAR_MAX) == (-30.0, 20.0)
    assert posterior.kl().isfinite().all()
    assert posterior.sample(torch.Generator().manual_seed(0)).isfinite().all()


def test_std_and_var_are_of_the_clamped_logvar() -> None:
    logvar = torch.tensor([-40.0, -2.0, 0.0, 3.0, 40.0], dtype=torch.float64).view(1, 5, 1, 1)
    posterior = DiagonalGaussian(torch.zeros_like(logvar), logvar)
    expected = [math.exp(value) for value in (-30.0, -2.0, 0.0, 3.0, 20.0)]
    assert posterior.var.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert posterior.std.flatten().tolist() == pytest.approx([math.sqrt(value) for value in expected], rel=1e-14)


def test_moments_are_mean_then_logvar() -> None:
    moments = torch.arange(8.0).view(1, 8, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert posterior.logvar.flatten().tolist() == [4.0, 5.0, 6.0, 7.0]


def test_a_sample_is_mean_plus_std_times_noise() -> None:
    posterior = random_gaussian(0)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    sample = posterior.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample, posterior.mean + posterior.std * noise, rtol=0.0, atol=0.0)


def test_samples_follow_their_generator() -> None:
    posterior = random_gaussian(0)
    generator = torch.Generator().manual_seed(7)
    first, second = posterior.sample(generator), posterior.sample(generator)
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)


def test_samples_leave_the_global_generator_alone_when_given_one() -> None:
    state = torch.get_rng_state()
    random_gaussian(0).sample(torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_without_a_generator_follow_the_global_seed() -> None:
    posterior = random_gaussian(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = posterior.sample()
        torch.manual_seed(3)
        assert torch.equal(first, posterior.sample())
        assert not torch.equal(first, posterior.sample())


def test_gradients_reach_mean_and_logvar_through_a_sample() -> None:
    mean = torch.zeros(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((1, 4, 2, 2), -1.0, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(0)).sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))  # dz / dmean
    # dz / dlogvar = std / 2 * noise; fp64 rounding of one product
    torch.testing.assert_close(logvar.grad, 0.5 * math.exp(-0.5) * noise, rtol=1e-14, atol=0.0)


def test_gradients_of_the_kl() -> None:
    posterior = random_gaussian(0)
    mean, logvar = (values.clone().requires_grad_() for values in (posterior.mean, posterior.logvar))
    DiagonalGaussian(mean, logvar).kl().sum().backward()
    torch.testing.assert_close(mean.grad, posterior.mean, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(logvar.grad, 0.5 * (posterior.var - 1.0), rtol=1e-12, atol=1e-14)


def test_no_gradient_passes_a_clamped_logvar() -> None:
    logvar = torch.tensor([25.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    DiagonalGaussian(torch.zeros(1, 2, 1, 1), logvar).kl().sum().backward()
    assert logvar.grad.flatten()[0] == 0.0
    assert logvar.grad.flatten()[1] > 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_by_latents_and_widened_by_sums(dtype: torch.dtype) -> None:
    posterior = random_gaussian(0, dtype=dtype)
    assert posterior.mode().dtype == posterior.std.dtype == posterior.var.dtype == dtype
    assert posterior.sample(torch.Generator().manual_seed(0)).dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert posterior.kl().dtype == posterior.kl(posterior).dtype == wide
    assert posterior.nll(posterior.mode()).dtype == wide


def test_half_precision_sums_lose_no_digits() -> None:
    """Summed in fp16, 16,384 latents of KL 50 would overflow at 65,504."""
    mean = torch.full((1, 4, 64, 64), 10.0, dtype=torch.float16)
    posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
    assert float(posterior.kl()) == 16384 * 50.0
    assert float(posterior.nll(torch.zeros_like(mean))) == pytest.approx(
        16384 * (50.0 + 0.5 * math.log(2 * math.pi)),
        rel=1e-6,  # fp32
    )


numbers = st.floats(-30.0, 20.0)


@given(mean=numbers, logvar=numbers)
def test_kl_is_zero_to_itself_and_never_negative_to_the_prior(mean: float, logvar: float) -> None:
    values = torch.tensor([mean, logvar], dtype=torch.float64).view(1, 2, 1, 1)
    posterior = DiagonalGaussian.from_moments(values)
    # exp(logvar) * exp(-logvar) differs from 1 by rounding
    assert abs(float(posterior.kl(posterior))) <= 1e-15
    assert float(posterior.kl()) >= -1e-15


@given(numbers, numbers, numbers, numbers)
def test_kl_between_gaussians_is_never_negative(
    mean: float, logvar: float, other_mean: float, other_logvar: float
) -> None:
    one = DiagonalGaussian.from_moments(torch.tensor([mean, logvar], dtype=torch.float64).view(1, 2, 1, 1))
    other = DiagonalGaussian.from_moments(
        torch.tensor([other_mean, other_logvar], dtype=torch.float64).view(1, 2, 1, 1)
    )
    # The terms reach 30 before they cancel: rounding in fp64 is under 1e-14.
    assert float(one.kl(other)) >= -1e-14
