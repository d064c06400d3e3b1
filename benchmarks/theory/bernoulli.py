"""The dense VAE of black-or-white digits: its training, and how probable it makes an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.train.losses import bernoulli_nll, kl_term, log_evidence, log_importance_weights
from theory.dense import DenseVAE, keep_scale
from theory.digits import binarised, digits
from theory.fit import Schedule, fit, generator_of, seeded
from theory.work import Work

BINARISED, EVIDENCE, ELBO = 1, 2, 3  # what randomness is for: the first number after the seed
BLOCK = 500  # images scored at once: their logits stay in the cache


@dataclass(frozen=True)
class Shape:
    """How large a VAE is."""

    num_latents: int = 50
    width: int = 500


def make_vae(images: Tensor, shape: Shape, start: DenseVAE | None = None) -> DenseVAE:
    """A VAE of such images: new, or with the weights of `start`."""
    model = seeded(lambda: keep_scale(DenseVAE(images.shape[1], shape.num_latents, shape.width)), 0)
    if start is not None:
        model.load_state_dict(start.state_dict())
    return model


def train_vae(
    work: Work, name: str, shape: Shape, schedule: Schedule, beta: float = 1.0, start: DenseVAE | None = None
) -> DenseVAE:
    """A VAE of the training images, binarised anew each time; `start`: one whose weights it goes on from."""
    images, _ = digits(work.digits, "train")
    model = make_vae(images, shape, start)

    def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        pixels = binarised(batch[0], generator)
        posterior = model.encode(pixels)
        return (bernoulli_nll(model.decode(posterior.sample(generator)), pixels) + beta * kl_term(posterior)).mean()

    fit(work, name, model, (images,), loss, schedule)
    return model


def binary_test_images(work: Work) -> Tensor:  # (N, 784), 0 or 1
    """The test images, binarised once."""
    images, _ = digits(work.digits, "test")
    return binarised(images, generator_of(0, BINARISED))


@torch.inference_mode()
def log_likelihood(model: DenseVAE, latents: Tensor, pixels: Tensor) -> Tensor:  # (N, L), (N, D) of 0 and 1 -> (N,)
    """Log p(x | z) in nats: -bernoulli_nll, with half of its operations."""
    logits = model.decode(latents)
    return torch.einsum("nd,nd->n", logits, pixels) - F.softplus(logits).sum(1)


@torch.inference_mode()
def evidence(work: Work, name: str, model: DenseVAE, images: Tensor, num_samples: int) -> Tensor:  # (N,) nats
    """Log p(x) of each image by importance sampling. Blocks of images that are done are kept as NAME-BLOCK."""
    found = []
    for number, pixels in enumerate(images.split(BLOCK)):
        kept = work.load(f"{name}-{number}")
        if kept is None:
            weights = log_importance_weights(
                lambda latents, pixels=pixels: log_likelihood(model, latents, pixels),
                model.encode(pixels), num_samples, generator_of(0, EVIDENCE, number),
            )  # fmt: skip
            kept = log_evidence(weights.double())
            work.save(f"{name}-{number}", kept)
        found.append(kept)
    return torch.cat(found)


@torch.inference_mode()
def elbo(model: DenseVAE, images: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:  # (N,) nats, (N,) nats
    """The ELBO of each image, and its standard error: the KL by its formula, the likelihood by samples."""
    bounds, errors = [], []
    for number, pixels in enumerate(images.split(BLOCK)):
        posterior, generator = model.encode(pixels), generator_of(0, ELBO, number)
        samples = torch.stack([log_likelihood(model, posterior.sample(generator), pixels) for _ in range(num_samples)])
        bounds.append(samples.mean(0) - posterior.kl())
        errors.append(samples.std(0) / num_samples**0.5)
    return torch.cat(bounds).double(), torch.cat(errors).double()
