"""The dense VAE of any grey images in [0, 1]: how it is trained, and what it costs an image in nats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.train.losses import bernoulli_nll, kl_term
from theory.dense import DenseVAE, keep_scale
from theory.fit import Schedule, fit, seeded
from theory.work import Work


@dataclass(frozen=True)
class Shape:
    """How large a VAE is, and whether its first weights keep the scale of values; torch's own shrink it at SiLU."""

    num_latents: int = 10
    width: int = 400
    keeps_scale: bool = True


def train_grey_vae(
    work: Work, name: str, images: Tensor, shape: Shape, schedule: Schedule, beta: float = 1.0, seed: int = 0
) -> DenseVAE:
    """A VAE of images (N, D) that pays `beta` times the KL; kept as NAME in the folder of `work`.

    A grey value is taken as the probability of white, as beta-VAE takes it (Higgins et al. 2017).
    """
    model = seeded(lambda: _new(images.shape[1], shape), seed)

    def loss(batch: list[Tensor], generator: torch.Generator) -> Tensor:
        posterior = model.encode(batch[0])
        return (bernoulli_nll(model.decode(posterior.sample(generator)), batch[0]) + beta * kl_term(posterior)).mean()

    fit(work, name, model, (images,), loss, schedule, seed)
    return model


def _new(num_values: int, shape: Shape) -> DenseVAE:
    model = DenseVAE(num_values, shape.num_latents, shape.width)
    return keep_scale(model) if shape.keeps_scale else model


@torch.inference_mode()
def latent_means(model: DenseVAE, images: Tensor) -> Tensor:  # (N, D) -> (N, L)
    """The posterior's mean of each image."""
    return torch.cat([model.encode(part).mode() for part in images.split(1000)])
