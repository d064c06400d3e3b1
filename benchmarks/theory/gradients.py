"""Two ways to differentiate an average over random latents, and how much each scatters."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdvae.posterior import DiagonalGaussian
from sdvae.train.losses import bernoulli_nll
from theory import likelihood
from theory.bernoulli import binary_test_images
from theory.dense import DenseVAE
from theory.fit import generator_of
from theory.work import Findings, Row, Work

TO_REACH = 100.0


@dataclass(frozen=True)
class Settings:
    """Images and samples of each; the VAE is that of part `likelihood`."""

    start: likelihood.Settings = field(default_factory=likelihood.Settings)
    num_images: int = 100
    num_samples: int = 1000


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """Variance of one-sample estimates of the gradient of E[log p(x|z)] with respect to the encoder's outputs."""
    model = likelihood.trained_vae(work.beside("likelihood"), settings.start)
    images = binary_test_images(work)[: settings.num_images]
    estimates = sampled_gradients(model, images, settings.num_samples)
    variance = {name: of.var(0).sum(1).mean().item() for name, of in estimates.items()}
    ratio = {name: variance[name] / variance["reparameterised"] for name in ("score", "baseline")}
    differences = {
        name: disagreement(of, estimates["reparameterised"])
        for name, of in estimates.items()
        if name != "reparameterised"
    }
    rows = [
        Row(
            "variance of the score-function gradient over that of the reparameterised one",
            f"{ratio['score']:,.0f} times",
            f">= {TO_REACH:.0f}",
            ratio["score"] >= TO_REACH,
        ),
        Row("the same with the mean of log p(x given z) as its baseline", f"{ratio['baseline']:,.0f} times"),
    ]
    numbers = {"variance": variance, "ratio": ratio, "mean_square_of_z_scores": differences}
    return Findings(rows, numbers)


def sampled_gradients(model: DenseVAE, images: Tensor, num_samples: int) -> dict[str, Tensor]:  # (S, N, 2L)
    """One-sample estimates of the gradient of E_q[log p(x|z)] with respect to mean and log variance.

    Reparameterised: d log p(x|z) / dz, times dz / d(mean, logvar). Score function: log p(x|z) d log q(z|x) / d(mean,
    logvar) (Williams 1992). Baseline: the same, with log p(x|z) less its mean over the image's other samples.
    """
    with torch.no_grad():
        posterior = model.encode(images)
    generator = generator_of(0)
    paths, scores, likelihoods = [], [], []
    for _ in range(num_samples):
        mean, logvar = posterior.mean.clone().requires_grad_(), posterior.logvar.clone().requires_grad_()
        latents = DiagonalGaussian(mean, logvar).sample(generator)
        log_p = -bernoulli_nll(model.decode(latents), images)
        paths.append(torch.cat(torch.autograd.grad(log_p.sum(), (mean, logvar)), 1))
        log_q = -DiagonalGaussian(mean, logvar).nll(latents.detach())
        scores.append(torch.cat(torch.autograd.grad(log_q.sum(), (mean, logvar)), 1))
        likelihoods.append(log_p.detach())
    score, log_p = torch.stack(scores), torch.stack(likelihoods).unsqueeze(2)
    others = (log_p.sum(0) - log_p) / (num_samples - 1)
    return {"reparameterised": torch.stack(paths), "score": log_p * score, "baseline": (log_p - others) * score}


def disagreement(first: Tensor, second: Tensor) -> float:
    """Mean square of the difference of two means, in standard errors: near 1 where both estimate the same."""
    difference = first.mean(0) - second.mean(0)
    return (difference.square() / ((first - second).var(0) / len(first))).mean().item()
