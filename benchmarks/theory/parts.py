"""Every part of the theory run, in the order of docs/theory.md. Each takes at most an hour of one core."""

from collections.abc import Callable

from theory import autoencoder, beta, denoising, gradients, iwae, likelihood
from theory.work import Findings, Work

PARTS: dict[str, Callable[[Work], Findings]] = {
    "likelihood": likelihood.run,
    "iwae": iwae.run,
    "gradients": gradients.run,
    "beta": beta.run,
    "autoencoder": autoencoder.run,
    "denoising": denoising.run,
}
