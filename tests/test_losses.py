"""Each loss against torch.distributions, closed forms and finite differences; all in fp64."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Bernoulli, Laplace, Normal, kl_divergence

from sdvae.posterior import DiagonalGaussian
from sdvae.train import losses
from sdvae.train.discriminator import PatchDiscriminator

F64 = torch.float64


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=F64)


def exact(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Values.


def test_likelihoods_are_those_of_torch_distributions() -> None:
    decoded, pixels, logvar = drawn(3, 3, 4, 5), drawn(3, 3, 4, 5), torch.tensor(-0.7, dtype=F64)

    def summed(log_prob: Tensor) -> Tensor:
        return -log_prob.flatten(1).sum(1)

    exact(losses.gaussian_nll(decoded, pixels, logvar), summed(Normal(decoded, (0.5 * logvar).exp()).log_prob(pixels)))
    each = drawn(3, 3, 4, 5)
    exact(losses.gaussian_nll(decoded, pixels, each), summed(Normal(decoded, (0.5 * each).exp()).log_prob(pixels)))
    exact(losses.laplace_nll(decoded, pixels, logvar), summed(Laplace(decoded, logvar.exp()).log_prob(pixels)))
    coins = (pixels > 0).double()
    exact(losses.bernoulli_nll(decoded, coins), summed(Bernoulli(logits=decoded).log_prob(coins)))


def test_errors_are_likelihoods_but_for_a_constant() -> None:
    decoded, pixels = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4)
    other = drawn(2, 3, 4, 4)
    logvar = torch.tensor(-1.3, dtype=F64)
    weight = 0.5 * math.exp(1.3)
    gained = weight * (losses.squared_error(decoded, pixels) - losses.squared_error(other, pixels))
    exact(gained, losses.gaussian_nll(decoded, pixels, logvar) - losses.gaussian_nll(other, pixels, logvar))
    gained = math.exp(1.3) * (losses.absolute_error(decoded, pixels) - losses.absolute_error(other, pixels))
    exact(gained, losses.laplace_nll(decoded, pixels, logvar) - losses.laplace_nll(other, pixels, logvar))


def test_a_learned_scale_is_a_laplace_or_twice_a_gaussian() -> None:
    decoded, pixels, logvar = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4), torch.tensor(0.3, dtype=F64)
    absolute = losses.learned_scale_nll(losses.absolute_error(decoded, pixels), logvar, 48)
    exact(absolute + 48 * math.log(2.0), losses.laplace_nll(decoded, pixels, logvar))
    squared = losses.learned_scale_nll(losses.squared_error(decoded, pixels), logvar, 48)
    exact(squared + 48 * math.log(2.0 * math.pi), 2.0 * losses.gaussian_nll(decoded, pixels, logvar))

    error = losses.squared_error(decoded, pixels)
    best = (error / 48).log().requires_grad_()
    losses.learned_scale_nll(error, best, 48).sum().backward()
    assert best.grad is not None
    assert best.grad.abs().max() <= 1e-12


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (1, 1, 1, 1)])
def test_kl_is_that_of_torch_distributions(shape: tuple[int, ...]) -> None:
    posterior = DiagonalGaussian(drawn(*shape), drawn(*shape))
    theirs = kl_divergence(Normal(posterior.mean, posterior.std), Normal(torch.zeros((), dtype=F64), 1.0))
    exact(losses.kl_term(posterior), theirs.flatten(1).sum(1))
    exact(losses.kl_term(posterior, free_bits=0.5), theirs.clamp_min(0.5).flatten(1).sum(1))
    exact(losses.kl_term(posterior, capacity=25.0), (theirs.flatten(1).sum(1) - 25.0).abs())


def test_free_bits_stop_the_pull_below_them() -> None:
    mean = torch.tensor([[[[0.1]], [[3.0]]]], dtype=F64, requires_grad=True)
    losses.kl_term(DiagonalGaussian(mean, torch.zeros_like(mean)), free_bits=0.1).sum().backward()
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == [0.0, 3.0]


def test_a_ramp_ends_at_one() -> None:
    assert [losses.ramp(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert losses.ramp(0, 0) == 1.0


def test_gradient_error_sees_slopes_and_not_levels() -> None:
    pixels = drawn(2, 3, 16, 16)
    assert losses.gradient_error(pixels + 0.3, pixels).abs().max() <= 1e-12
    slope = torch.arange(16, dtype=F64).expand(2, 3, 16, 16) * 0.25
    # A slope of 0.25 a pixel is one of 0.5, 1 and 2 on the halved images.
    exact(losses.gradient_error(pixels + slope, pixels), torch.full((2,), 0.25 + 0.5 + 1.0 + 2.0, dtype=F64))
    assert losses.gradient_error(pixels[:, :, :1, :1], pixels[:, :, :1, :1]).tolist() == [0.0, 0.0]


def test_hinge_and_nonsaturating_losses_are_their_formulas() -> None:
    real, fake = torch.tensor([[[[2.0, -0.5]]]], dtype=F64), torch.tensor([[[[-3.0, 0.25]]]], dtype=F64)
    assert losses.hinge_discriminator(real, fake).item() == 0.5 * ((0.0 + 1.5) / 2 + (0.0 + 1.25) / 2)
    assert losses.hinge_generator(fake).item() == 1.375
    entropy = -(torch.sigmoid(real).log().mean() + torch.sigmoid(-fake).log().mean()) / 2
    exact(losses.nonsaturating_discriminator(real, fake), entropy)
    exact(losses.nonsaturating_generator(fake), -torch.sigmoid(fake).log().mean())


def test_r1_is_half_the_squared_slope() -> None:
    pixels = drawn(3, 2, 4, 4).requires_grad_()
    slope = drawn(2, 4, 4)
    logits = (pixels * slope).sum((1, 2, 3)).view(3, 1, 1, 1)
    exact(losses.r1_penalty(logits.expand(3, 1, 5, 5), pixels), 0.5 * slope.square().sum())


def test_the_adaptive_weight_is_its_formula() -> None:
    """One linear layer: both gradients are known on paper."""
    layer, inputs = drawn(4, 6).requires_grad_(), drawn(6)
    target, direction = drawn(4), drawn(4)
    decoded = layer @ inputs
    (reconstruction,) = torch.autograd.grad((decoded - target).square().sum(), layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(-(decoded @ direction), layer)
    by_hand = (2.0 * (layer @ inputs - target)).norm() / (direction.norm() + 1e-4 / inputs.norm())
    exact(losses.adaptive_weight(reconstruction, adversarial), by_hand.detach())
    assert losses.adaptive_weight(reconstruction, 0.0 * adversarial).item() == 1e4
    assert not losses.adaptive_weight(reconstruction, adversarial).requires_grad


def test_masks_cover_whole_patches() -> None:
    pixels = drawn(2, 3, 8, 8)
    masked = losses.mask_patches(pixels, 0.5, torch.tensor([0.4, 0.6, 0.5, 0.0], dtype=F64).view(1, 1, 2, 2))
    assert torch.equal(masked[..., :4, 4:], pixels[..., :4, 4:])
    assert torch.equal(masked[..., 4:, :4], pixels[..., 4:, :4])
    assert not masked[..., :4, :4].any()
    assert not masked[..., 4:, 4:].any()
    exact(losses.add_noise(pixels, 0.5, torch.ones_like(pixels)), pixels + 0.5)


def test_turning_latents_turns_what_they_stand_for() -> None:
    latents = drawn(1, 2, 4, 6)
    pixels = latents.repeat_interleave(8, 2).repeat_interleave(8, 3)
    for turns in range(4):
        small = losses.transformed(latents, (4, 6), turns)
        exact(losses.transformed(pixels, (32, 48), turns)[..., ::8, ::8], small)
    assert losses.transformed(latents, (2, 3), 1).shape == (1, 2, 3, 2)


def test_the_pull_is_in_scaled_latents() -> None:
    mean, teacher = drawn(2, 4, 3, 3), drawn(2, 4, 3, 3)
    exact(losses.latent_pull(mean, teacher, 0.2), 0.04 * (mean - teacher).square().flatten(1).mean(1))


# Gradients.

OTHER = drawn(2, 3, 4, 4)
SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": lambda x: losses.squared_error(x, OTHER),
    "absolute": lambda x: losses.absolute_error(x, OTHER),
    "gaussian": lambda x: losses.gaussian_nll(x, OTHER, x.new_tensor(-1.0)),
    "gaussian, its logvar": lambda x: losses.gaussian_nll(OTHER, OTHER.flip(0), x),
    "laplace": lambda x: losses.laplace_nll(x, OTHER, x.new_tensor(-1.0)),
    "bernoulli": lambda x: losses.bernoulli_nll(x, OTHER.sigmoid()),
    "learned scale": lambda x: losses.learned_scale_nll(x.square().sum((1, 2, 3)), x.mean(), 48),
    "gradient": lambda x: losses.gradient_error(x, OTHER),
    "kl": lambda x: losses.kl_term(DiagonalGaussian(x, OTHER)),
    "kl, its logvar": lambda x: losses.kl_term(DiagonalGaussian(OTHER, x)),
    "kl with free bits": lambda x: losses.kl_term(DiagonalGaussian(x, OTHER), free_bits=0.3),
    "kl with capacity": lambda x: losses.kl_term(DiagonalGaussian(x, OTHER), capacity=5.0),
    "evidence": lambda x: losses.log_evidence(x.flatten(1)),
    "noise": lambda x: losses.add_noise(x, 0.3, OTHER),
    "mask": lambda x: losses.mask_patches(x, 0.5, OTHER[:, :1, :2, :2].sigmoid()),
    "hinge discriminator": lambda x: losses.hinge_discriminator(x, OTHER),
    "hinge discriminator, fake": lambda x: losses.hinge_discriminator(OTHER, x),
    "hinge generator": losses.hinge_generator,
    "non-saturating discriminator": lambda x: losses.nonsaturating_discriminator(x, OTHER),
    "non-saturating generator": losses.nonsaturating_generator,
    "r1": lambda x: losses.r1_penalty((x * OTHER).square().sum((1, 2, 3)).view(2, 1, 1, 1), x),
    "pull": lambda x: losses.latent_pull(x, OTHER, 0.2),
    "transform": lambda x: losses.transformed(x, (3, 2), 1),
}


@pytest.mark.parametrize("name", SCALARS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    assert gradcheck(SCALARS[name], drawn(2, 3, 4, 4).requires_grad_())


def test_importance_weights_have_gradients_for_the_posterior() -> None:
    mean, logvar = drawn(2, 1, 2, 2).requires_grad_(), drawn(2, 1, 2, 2).requires_grad_()

    def bound(mean: Tensor, logvar: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        posterior = DiagonalGaussian(mean, logvar)
        likelihood = lambda z: -(z - 1.0).square().flatten(1).sum(1)  # noqa: E731
        return losses.log_evidence(losses.log_importance_weights(likelihood, posterior, 3, generator))

    assert gradcheck(bound, (mean, logvar))


# Probabilistic PCA: z of N(0, I), x of N(W z, s^2 I). With columns of W at right angles the true posterior is diagonal.

NOISE = 0.4


class LinearModel:
    """Everything about it is known on paper (Tipping and Bishop 1999)."""

    def __init__(self, num_pixels: int = 6, num_latents: int = 3) -> None:
        directions, _ = torch.linalg.qr(drawn(num_pixels, num_latents))
        self.slope = directions * torch.tensor([2.0, 1.0, 0.3], dtype=F64)
        self.x = drawn(5, num_pixels)
        covariance = self.slope @ self.slope.T + NOISE**2 * torch.eye(num_pixels, dtype=F64)
        self.log_evidence = torch.distributions.MultivariateNormal(
            torch.zeros(num_pixels, dtype=F64), covariance
        ).log_prob(self.x)
        precision = self.slope.square().sum(0) / NOISE**2 + 1.0  # of the posterior
        self.mean = (self.x @ self.slope / NOISE**2 / precision).view(5, num_latents, 1, 1)
        self.logvar = (-precision.log()).view(1, num_latents, 1, 1).expand_as(self.mean)

    def copies(self, number: int) -> "LinearModel":
        """The same images, over and over."""
        other = copy.copy(self)
        other.x, other.mean = self.x.repeat(number, 1), self.mean.repeat(number, 1, 1, 1)
        other.logvar = self.logvar.repeat(number, 1, 1, 1)
        return other

    def log_likelihood(self, latents: Tensor) -> Tensor:
        decoded = latents.flatten(1) @ self.slope.T
        return -losses.gaussian_nll(decoded, self.x, torch.tensor(2.0 * math.log(NOISE), dtype=F64))

    def elbo(self, posterior: DiagonalGaussian) -> Tensor:
        """The expectation of the squares is known: those of the mean, and the variances that pass through W."""
        spread = (posterior.var.flatten(1) * self.slope.square().sum(0)).sum(1) / (2.0 * NOISE**2)
        return self.log_likelihood(posterior.mean) - spread - losses.kl_term(posterior)


def test_on_probabilistic_pca_the_elbo_at_its_optimum_is_the_evidence() -> None:
    """The optimum is found by descent, from N(0, I): nothing of the closed form goes in."""
    model = LinearModel()
    mean = torch.zeros_like(model.mean).requires_grad_()
    logvar = torch.zeros_like(model.mean).requires_grad_()
    start = model.elbo(DiagonalGaussian(mean, logvar)).detach()
    optimizer = torch.optim.LBFGS([mean, logvar], max_iter=200, line_search_fn="strong_wolfe")

    def negative() -> Tensor:
        optimizer.zero_grad()
        loss = -model.elbo(DiagonalGaussian(mean, logvar)).sum()
        loss.backward()
        return loss

    optimizer.step(negative)
    elbo = model.elbo(DiagonalGaussian(mean, logvar)).detach()
    assert (model.log_evidence - start).min() > 0.1
    assert (elbo - model.log_evidence).abs().max() <= 1e-3
    assert (mean.detach() - model.mean).abs().max() <= 1e-3
    assert (elbo <= model.log_evidence + 1e-12).all()


def test_on_probabilistic_pca_importance_samples_give_the_evidence() -> None:
    model, generator = LinearModel(), torch.Generator().manual_seed(0)
    optimum = DiagonalGaussian(model.mean, model.logvar)
    weights = losses.log_importance_weights(model.log_likelihood, optimum, 4, generator)
    assert weights.var(1).max() <= 1e-20, "of the true posterior every sample weighs the same"
    assert (losses.log_evidence(weights) - model.log_evidence).abs().max() <= 1e-10

    # Of another posterior, 800,000 samples, in 1,000 copies of each image.
    copies = model.copies(1000)
    off = DiagonalGaussian(copies.mean + 0.02, copies.logvar + 0.2)
    weights = losses.log_importance_weights(copies.log_likelihood, off, 800, generator)
    weights = weights.view(1000, 5, 800).transpose(0, 1).flatten(1)
    ratios = (weights - model.log_evidence[:, None]).exp()
    assert (ratios.std(1) / math.sqrt(800_000)).max() < 3.5e-4, "the samples suffice to see 1e-3"
    assert (losses.log_evidence(weights) - model.log_evidence).abs().max() <= 1e-3
    assert (model.log_evidence - weights.mean(1)).min() > 0.01, "the ELBO of this posterior is not the evidence"
    few = losses.log_evidence(weights.view(-1, 10)).mean()  # 400,000 bounds of ten samples each
    assert weights.mean() < few < model.log_evidence.mean()


# The discriminator.


def test_logits_of_an_image_depend_on_no_other_image() -> None:
    discriminator = PatchDiscriminator(width=8).double()
    pixels = drawn(4, 3, 64, 64)
    together, alone = discriminator(pixels), torch.cat([discriminator(image[None]) for image in pixels])
    assert together.shape == (4, 1, 6, 6)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert discriminator(pixels).std() > 0
    assert not [module for module in discriminator.modules() if isinstance(module, torch.nn.BatchNorm2d)]
