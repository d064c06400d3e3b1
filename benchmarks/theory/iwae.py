"""Training on a tighter bound: 50 weighted samples instead of one (Burda et al. 2016)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdvae.evaluate.intervals import bootstrap_interval
from sdvae.posterior import DiagonalGaussian
from sdvae.train.losses import bernoulli_nll, log_importance_weights
from theory import likelihood
from theory.bernoulli import binary_test_images, evidence, log_likelihood, make_vae, train_vae
from theory.dense import DenseVAE
from theory.digits import binarised, digits
from theory.fit import Schedule, fit
from theory.work import Findings, Row, Work


@dataclass(frozen=True)
class Settings:
    """5 epochs on from the VAE of part `likelihood`, with a quarter of its learning rate; 50 samples make one 140 s."""

    start: likelihood.Settings = field(default_factory=likelihood.Settings)
    schedule: Schedule = field(default_factory=lambda: Schedule(5, batch_size=100, learning_rate=5e-4))
    num_samples: int = 50
    num_test_samples: int = 500


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """The IWAE and the VAE that was continued as long, by importance samples of the same test images."""
    start = likelihood.trained_vae(work.beside("likelihood"), settings.start)
    models = {
        "vae": train_vae(work, "vae", settings.start.shape, settings.schedule, start=start),
        "iwae": train_iwae(work, start, settings),
    }
    images = binary_test_images(work)
    nll = {
        name: -evidence(work, f"evidence-{name}", model, images, settings.num_test_samples)
        for name, model in models.items()
    }
    difference = nll["vae"] - nll["iwae"]
    low, high = bootstrap_interval(difference.numpy()) or (math.nan, math.nan)
    epochs = f"{settings.schedule.num_epochs} more epochs"
    rows = [
        Row(
            f"VAE, {epochs}: -log p(x), {settings.num_test_samples} importance samples each",
            f"{nll['vae'].mean():.2f} nats",
        ),
        Row(
            f"IWAE of {settings.num_samples} samples, {epochs} from the VAE's weights: the same",
            f"{nll['iwae'].mean():.2f} nats",
            beside="84.78 against 86.76 (Burda et al. 2016)",
        ),
        Row(
            "what the IWAE gains: mean over the images, 95% interval by bootstrap of pairs",
            f"{difference.mean():.2f} nats [{low:.2f}, {high:.2f}]",
            "> 0",
            low > 0.0,
            "1.98 (Burda et al. 2016)",
        ),
    ]
    numbers = {f"nll_{name}": values.mean().item() for name, values in nll.items()}
    return Findings(rows, numbers | {"gain": difference.mean().item(), "gain_low": low, "gain_high": high})


def train_iwae(work: Work, start: DenseVAE, settings: Settings) -> DenseVAE:
    """The IWAE, from the weights of `start`; kept as "iwae"."""
    images, _ = digits(work.digits, "train")
    model = make_vae(images, settings.start.shape, start)

    def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        return iwae_loss(model, binarised(batch[0], generator), settings.num_samples, generator).mean()

    fit(work, "iwae", model, (images,), loss, settings.schedule)
    return model


def iwae_loss(model: DenseVAE, pixels: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:  # (N,)
    """A number whose gradient has the mean of the gradient of -log (1/K) sum of w_k.

    That gradient is the mean of those of -log w_k, weighted by w_k / sum of w. One sample drawn by these weights stands
    for it, so that K forward passes need a single backward pass (Burda et al. 2016, end of section 3).
    """
    posterior = model.encode(pixels)
    with torch.no_grad():
        noise = _drawn_noise(model, posterior, pixels, num_samples, generator)
    latents = posterior.mean + posterior.std * noise
    log_prior = -0.5 * (math.log(2.0 * math.pi) + latents.square()).sum(1)
    return bernoulli_nll(model.decode(latents), pixels) - log_prior - posterior.nll(latents)


def _drawn_noise(
    model: DenseVAE, posterior: DiagonalGaussian, pixels: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:  # (N, L)
    """The noise of one of the samples, drawn by their weights."""
    drawn: list[Tensor] = []

    def remembered(latents: Tensor) -> Tensor:
        drawn.append(latents)
        return log_likelihood(model, latents, pixels)

    weights = log_importance_weights(remembered, posterior, num_samples, generator).softmax(1)
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    latents = torch.stack(drawn, 1)[torch.arange(len(pixels)), chosen]
    return (latents - posterior.mean) / posterior.std
