"""Every part of the theory run, in the order of docs/theory.md. Each takes at most an hour of one core."""

from collections.abc import Callable

from theory import (
    agent,
    anomaly,
    arithmetic,
    augmentation,
    autoencoder,
    beta,
    denoising,
    gradients,
    interpolation,
    iwae,
    likelihood,
    sprites,
)  # fmt: skip
from theory.work import Findings, Work

PARTS: dict[str, Callable[[Work], Findings]] = {
    "likelihood": likelihood.run,
    "iwae": iwae.run,
    "gradients": gradients.run,
    "beta": beta.run,
    "autoencoder": autoencoder.run,
    "denoising": denoising.run,
    "sprites": sprites.run,
    "arithmetic": arithmetic.run,
    "anomaly": anomaly.run,
    "interpolation": interpolation.run,
    "augmentation": augmentation.run,
    "agent": agent.run,
}
