"""The terms of a training loss, as pure functions. docs/theory.md, sections 5, 6 and 9, derives them.

Likelihoods and divergences are in nats per image, (N,). What is in another unit says so.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.posterior import DiagonalGaussian

# --- Likelihoods: how badly `decoded` explains `pixels`; both (N, ...) ---


def squared_error(decoded: Tensor, pixels: Tensor) -> Tensor:  # (N,)
    """Sum of squares of each image: a Gaussian's nats where multiplied by 1 / (2 variance), but for a constant."""
    return (decoded - pixels).square().flatten(1).sum(1)


def absolute_error(decoded: Tensor, pixels: Tensor) -> Tensor:  # (N,)
    """Sum of absolute differences of each image: a Laplace's nats where divided by its scale, but for a constant."""
    return (decoded - pixels).abs().flatten(1).sum(1)


def gaussian_nll(decoded: Tensor, pixels: Tensor, logvar: Tensor) -> Tensor:  # (N,)
    """-log N(pixels; decoded, exp(logvar)); `logvar` is one number, or one for each value."""
    squares = (pixels - decoded).square() * (-logvar).exp()
    return 0.5 * (math.log(2.0 * math.pi) + logvar + squares).flatten(1).sum(1)


def laplace_nll(decoded: Tensor, pixels: Tensor, log_scale: Tensor) -> Tensor:  # (N,)
    """-log Laplace(pixels; decoded, exp(log_scale))."""
    distances = (pixels - decoded).abs() * (-log_scale).exp()
    return (math.log(2.0) + log_scale + distances).flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, pixels: Tensor) -> Tensor:  # (N,)
    """-log Bernoulli of `pixels` in [0, 1]; the decoder's output is taken as the logits of its probabilities."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").flatten(1).sum(1)


def learned_scale_nll(error: Tensor, logvar: Tensor, num_values: int) -> Tensor:  # (N,)
    """An error in nats at scale 1, under a scale that is learned with the network; constants are left out.

    latent-diffusion's `logvar` (CompVis, `contperceptual.py`). Absolute differences make it a Laplace's, `logvar` the
    log of its scale; squares make it twice a Gaussian's, `logvar` its log variance. Its minimum over `logvar` is at
    log(error / num_values).
    """
    return error * (-logvar).exp() + num_values * logvar


def gradient_error(decoded: Tensor, pixels: Tensor, num_scales: int = 4) -> Tensor:  # (N,)
    """How far slopes differ: mean absolute difference of neighbours' differences, over scales that halve the image.

    In units of pixels, not nats. Mathieu et al. 2016 (arXiv 1511.05440), over the scales of Li and Snavely 2018.
    """
    residual = decoded - pixels
    total = residual.new_zeros(len(residual))
    for _ in range(num_scales):
        if min(residual.shape[2:]) < 2:
            break
        total = total + residual.diff(dim=3).abs().flatten(1).mean(1) + residual.diff(dim=2).abs().flatten(1).mean(1)
        residual = F.avg_pool2d(residual, 2)
    return total


# --- The divergence ---


def kl_term(posterior: DiagonalGaussian, free_bits: float = 0.0, capacity: float | None = None) -> Tensor:  # (N,)
    """KL(q || N(0, I)), as a loss takes it.

    `free_bits`: each latent number costs at least so many nats, so that none is pushed below (Kingma et al. 2016,
    arXiv 1606.04934). `capacity`: the distance of each image's KL from so many nats (Burgess et al. 2018, arXiv
    1804.03599).
    """
    nats = posterior.kl_per_dimension().clamp_min(free_bits) if free_bits else posterior.kl_per_dimension()
    kl = nats.flatten(1).sum(1)
    return kl if capacity is None else (kl - capacity).abs()


def ramp(step: int, num_steps: int) -> float:
    """A warm-up: rises from 1 / num_steps to 1; 1 at once where `num_steps` is 0."""
    return min(1.0, (step + 1) / num_steps) if num_steps else 1.0


# --- Importance sampling ---


def log_importance_weights(
    log_likelihood: Callable[[Tensor], Tensor],
    posterior: DiagonalGaussian,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:  # (N, num_samples) in nats
    """The weights log p(x | z) + log p(z) - log q(z | x) of samples z of q; `log_likelihood` takes latents: (N,)."""
    weights = []
    for _ in range(num_samples):
        latents = posterior.sample(generator)
        log_prior = -0.5 * (math.log(2.0 * math.pi) + latents.square()).flatten(1).sum(1)
        weights.append(log_likelihood(latents) + log_prior + posterior.nll(latents))
    return torch.stack(weights, dim=1)


def log_evidence(log_weights: Tensor) -> Tensor:  # (N, K) -> (N,)
    """The log of the mean weight: the IWAE bound of K samples (Burda et al. 2016, arXiv 1509.00519).

    It tends to log p(x) from below as K grows. With one sample it is the ELBO's estimate.
    """
    return torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])


# --- What the encoder is shown ---


def add_noise(pixels: Tensor, std: float, noise: Tensor) -> Tensor:
    """A denoising autoencoder's input (Vincent et al. 2008); `noise` is standard normal, `std` in units of pixels."""
    return pixels + std * noise


def mask_patches(pixels: Tensor, share: float, uniform: Tensor) -> Tensor:
    """`pixels` (N, C, H, W) with a share of square patches grey; `uniform` (N, 1, h, w) in [0, 1) has one a patch."""
    keeps = (uniform >= share).to(pixels.dtype)
    return pixels * F.interpolate(keeps, pixels.shape[2:], mode="nearest")


# --- Adversaries: logits (N, 1, h, w), one a patch; all give one number, a mean over patches ---


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: margins of 1 on both sides (Lim and Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """What the autoencoder minimises beside it."""
    return -fake.mean()


def nonsaturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half the cross-entropy of real against fake (Goodfellow et al. 2014, arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """-log of the probability to be taken for real."""
    return F.softplus(-fake).mean()


def r1_penalty(real: Tensor, pixels: Tensor) -> Tensor:
    """Half the squared gradient of the logits at real pixels, mean over images (Mescheder et al. 2018, 1801.04406).

    Of each image the logits are averaged over patches first, so that the size of a crop does not change its weight.
    """
    gradient = torch.autograd.grad(real.flatten(1).mean(1).sum(), pixels, create_graph=True)[0]
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """What makes the adversary pull at the last layer as hard as the reconstruction does.

    Ratio of the norms of their gradients there, at most 1e4 (Esser et al. 2021, arXiv 2012.09841, equation 7).
    """
    ratio: Tensor = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()


# --- Alignment and equivariance ---


def latent_pull(mean: Tensor, teacher_mean: Tensor, scaling_factor: float) -> Tensor:  # (N,)
    """Mean squared distance to a teacher's latents, in units of scaled latents."""
    return ((mean - teacher_mean) * scaling_factor).square().flatten(1).mean(1)


def transformed(batch: Tensor, size: tuple[int, int], quarter_turns: int) -> Tensor:  # (N, C, h, w)
    """Pixels or latents scaled to `size` and turned: what EQ-VAE wants to do the same to both (arXiv 2502.09509)."""
    if tuple(batch.shape[2:]) != size:
        batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
    return batch.rot90(quarter_turns, dims=(2, 3))
