"""What the latents of photos are like: a Gaussian, or a mixture, fitted to their posteriors.

What is fitted is the whole latents of an image as one vector: places keep what they have to do with each other.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from sdvae.errors import ConfigError
from sdvae.posterior import DiagonalGaussian

_MOST_DIRECTIONS = 64  # along which the components of a mixture differ
_IMAGES_PER_DIRECTION = 4  # and component, so that a covariance can be estimated


@dataclass(frozen=True)
class FittedLatents:
    """A distribution of raw latents (C, h, w); `sample` draws from it.

    Latents are `mean`, plus coordinates along `directions`, plus noise. The first k coordinates come from a mixture,
    the others from a Gaussian. One component has k = 0.
    """

    shape: tuple[int, ...]  # (C, h, w)
    mean: Tensor  # (D,), D = C h w
    directions: Tensor  # (r, D), orthonormal: the principal components of the means
    weights: Tensor  # (K,)
    centers: Tensor  # (K, k)
    factors: Tensor  # (K, k, k), lower triangular: of the covariance of each component
    rest_std: Tensor  # (r - k,)
    noise_std: Tensor  # (D,), of the posteriors themselves

    def sample(self, num_images: int, generator: torch.Generator | None = None) -> Tensor:  # (N, C, h, w) raw
        """Latents drawn from the distribution; `generator` is on the CPU."""
        which = torch.multinomial(self.weights, num_images, replacement=True, generator=generator)

        def noise(size: int) -> Tensor:
            return torch.randn((num_images, size), generator=generator, dtype=torch.float32, device="cpu")

        mixed = self.centers[which] + (self.factors[which] @ noise(self.centers.shape[1]).unsqueeze(2)).squeeze(2)
        coordinates = torch.cat([mixed, self.rest_std * noise(len(self.rest_std))], dim=1)
        latents = self.mean + coordinates @ self.directions + self.noise_std * noise(len(self.mean))
        return latents.view(num_images, *self.shape)


def fit_latents(posterior: DiagonalGaussian, num_components: int = 1, seed: int = 0) -> FittedLatents:
    """Fit the aggregate posterior, the mean of all q(z | x), of N images: raw (N, C, h, w).

    One component: the Gaussian that has its mean and covariance. More: a Gaussian mixture of scikit-learn's along the
    directions of largest variance, 64 at most, and no more than the images can tell; the Gaussian along the others.
    ConfigError for more components than the images can tell, or without scikit-learn.
    """
    means = posterior.mean.detach().cpu().flatten(1).double()
    num_images = len(means)
    mean = means.mean(0)
    left, lengths, directions = torch.linalg.svd(means - mean, full_matrices=False)
    rank = int((lengths > lengths[0] * num_images * torch.finfo(torch.float32).eps).sum())
    std = lengths[:rank] / num_images**0.5
    num_mixed = 0
    if num_components > 1:
        num_mixed = min(rank, _MOST_DIRECTIONS, num_images // (_IMAGES_PER_DIRECTION * num_components))
        if not num_mixed:
            least = num_components * _IMAGES_PER_DIRECTION
            raise ConfigError(
                f"a mixture of {num_components} needs at least {least} images that differ, these are {num_images}; "
                "give more, or fewer components"
            )
    weights, centers, factors = _mixture((left * lengths)[:, :num_mixed], num_components, seed)
    return FittedLatents(
        shape=tuple(posterior.mean.shape[1:]),
        mean=mean.float(),
        directions=directions[:rank].float(),
        weights=weights.float(),
        centers=centers.float(),
        factors=factors.float(),
        rest_std=std[num_mixed:].float(),
        noise_std=posterior.var.detach().cpu().flatten(1).double().mean(0).sqrt().float(),
    )


def _mixture(coordinates: Tensor, num_components: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), centers (K, k) and factors (K, k, k)."""
    num_directions = coordinates.shape[1]
    if num_components == 1:
        weights = torch.ones(1, dtype=torch.float64, device="cpu")
        return (
            weights,
            coordinates.new_zeros((1, num_directions)),
            coordinates.new_zeros((1, num_directions, num_directions)),
        )
    if find_spec("sklearn") is None:
        raise ConfigError("a mixture needs scikit-learn, which is not installed; pip install 'sdvae[explore]'")
    from sklearn.mixture import GaussianMixture

    scale = coordinates[:, 0].std(correction=0)  # sklearn adds 1e-6 to each variance, whatever the unit
    fitted = GaussianMixture(num_components, max_iter=1000, random_state=seed).fit((coordinates / scale).numpy())
    covariances = torch.from_numpy(fitted.covariances_)
    assert covariances.shape == (num_components, num_directions, num_directions)
    return (
        torch.from_numpy(fitted.weights_),
        torch.from_numpy(fitted.means_) * scale,
        torch.linalg.cholesky(covariances) * scale,
    )
