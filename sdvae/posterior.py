"""DiagonalGaussian: the encoder's posterior q(z|x), and the VAE's formulas for it."""

import math

import torch
from torch import Tensor

from sdvae.notebook import card

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # CompVis' clamp; every SD VAE was trained and is used with it


class DiagonalGaussian:
    """A Gaussian with independent dimensions: `mean` and clamped `logvar`, both (N, C, h, w)."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def __repr__(self) -> str:
        return f"DiagonalGaussian({tuple(self.mean.shape)}, mode() and sample() give latents)"

    def _repr_html_(self) -> str:
        channels = zip(self.mean.unbind(1), self.std.unbind(1), strict=True)
        return card(
            f"DiagonalGaussian {tuple(self.mean.shape)}",
            {
                f"channel {number}": f"mean {float(mean.mean()):.3f}, std {float(mean.std(correction=0)):.3f}, "
                f"posterior std {float(std.mean()):.4f}"
                for number, (mean, std) in enumerate(channels)
            },
        )

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":  # (N, 2C, h, w), the encoder's output
        """Split the encoder's output into mean and logvar along the channels."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @property
    def var(self) -> Tensor:
        """Variance, exp(logvar)."""
        return self.logvar.exp()

    @property
    def std(self) -> Tensor:
        """Standard deviation, exp(logvar / 2)."""
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """The most probable latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn by the reparameterisation, so that gradients reach mean and logvar.

        The noise is drawn on the generator's device and moved, as diffusers does: a CPU generator
        gives the same sample for a posterior on any device.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:  # (N,) in nats
        """KL(self || other) summed over the dimensions of each image; `other` defaults to N(0, I)."""
        return self.kl_per_dimension(other).flatten(1).sum(1)

    def kl_per_dimension(self, other: "DiagonalGaussian | None" = None) -> Tensor:  # (N, C, h, w) in nats
        """What each latent number adds to `kl`."""
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if other is None:
            return 0.5 * (mean.square() + logvar.exp() - logvar - 1.0)
        other_mean, other_logvar = _wide(other.mean), _wide(other.logvar)
        squares = ((mean - other_mean).square() + logvar.exp()) * (-other_logvar).exp()
        return 0.5 * (squares - 1.0 + other_logvar - logvar)

    def nll(self, latents: Tensor) -> Tensor:  # (N, C, h, w) -> (N,) in nats
        """Negative log-likelihood of `latents` under this Gaussian, summed over each image."""
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        squares = (latents - mean).square() * (-logvar).exp()
        return 0.5 * (math.log(2.0 * math.pi) + logvar + squares).flatten(1).sum(1)


def _wide(values: Tensor) -> Tensor:
    """At least fp32: sums over 16,384 latents lose all digits in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
