"""A network that must know what digits look like: it is shown noisy ones and asked for the sound ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdvae.train.losses import add_noise, bernoulli_nll
from theory import likelihood
from theory.bernoulli import Shape, make_vae
from theory.dense import DenseVAE
from theory.digits import SIDE, digits
from theory.figures import draw_panels
from theory.fit import Schedule, fit, generator_of
from theory.work import Findings, Row, Work, sheet

STD = 0.5  # of the noise, where pixels are in [0, 1]
TO_REACH = 14.0  # dB


@dataclass(frozen=True)
class Settings:
    """Wider than the VAE, which is that of part `likelihood`: there is nothing to overfit in noise that is new."""

    vae: likelihood.Settings = field(default_factory=likelihood.Settings)
    shape: Shape = field(default_factory=lambda: Shape(100, 1000))
    schedule: Schedule = field(default_factory=lambda: Schedule(12, learning_rate=2e-3))


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """PSNR of the noisy test images, of what the denoising autoencoder makes of them, and of what the VAE does."""
    images, _ = digits(work.digits, "test")
    noise = torch.randn(images.shape, generator=generator_of(0), dtype=torch.float32, device="cpu")
    noisy = add_noise(images, STD, noise)
    models = {
        "denoising autoencoder": train_denoiser(work, settings),
        "VAE": likelihood.trained_vae(work.beside("likelihood"), settings.vae),
    }
    with torch.inference_mode():
        cleaned = {name: model.mean_image(model.encode(noisy).mode()) for name, model in models.items()}
    before = psnr(noisy, images)
    gains = {name: psnr(of, images) - before for name, of in cleaned.items()}
    ours, theirs = gains.values()
    rows = [
        Row(
            f"noise of {STD} in [0, 1], unclipped: PSNR gain of the denoising autoencoder",
            f"{ours:.1f} dB (from {before:.1f} to {before + ours:.1f})",
            f">= {TO_REACH:.0f} dB",
            ours >= TO_REACH,
        ),
        Row("gain of the VAE's reconstruction", f"{theirs:.1f} dB", "less", theirs < ours),
    ]
    sheets = {"Noisy": noisy, "Original": images} | {f"By the {name}": of for name, of in cleaned.items()}
    file = draw_panels(work, "digits", {title: sheet(of[:50].view(-1, SIDE, SIDE), 10) for title, of in sheets.items()})
    numbers = {"psnr_noisy": before, "gain": gains}
    return Findings(rows, numbers, {file: "Test digits under noise, and what two networks make of them."})


def train_denoiser(work: Work, settings: Settings) -> DenseVAE:
    """Trained on grey digits with new noise each time; cross-entropy is least at the mean of what may be there."""
    images, _ = digits(work.digits, "train")
    model = make_vae(images, settings.shape)

    def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=generator, dtype=torch.float32, device="cpu")
        return bernoulli_nll(model.decode(model.encode(add_noise(batch[0], STD, noise)).mode()), batch[0]).mean()

    fit(work, "denoiser", model, (images,), loss, settings.schedule)
    return model


def psnr(images: Tensor, originals: Tensor) -> float:  # (N, D) in [0, 1]
    """Mean over images of their PSNR, dB."""
    return (-10.0 * (images - originals).square().mean(1).log10()).mean().item()
