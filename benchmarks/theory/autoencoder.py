"""What a VAE gives up and what it gains beside a plain autoencoder of the same network."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.explore.fit import fit_latents
from sdvae.perceptual.distances import FeatureStatistics, frechet_distance
from sdvae.posterior import DiagonalGaussian
from sdvae.train.losses import bernoulli_nll
from theory import beta
from theory.bernoulli import binary_test_images, make_vae
from theory.dense import DenseVAE
from theory.digits import SIDE, Classifier, accuracy, binarised, digit_classifier, digits
from theory.figures import draw_panels
from theory.fit import Schedule, fit, generator_of
from theory.work import Findings, Row, Work, sheet


@dataclass(frozen=True)
class Settings:
    """The VAE is that of part `beta` with beta 1; the autoencoder is trained as long, on the same images."""

    vae: beta.Settings = field(default_factory=beta.Settings)
    num_draws: int = 10_000
    num_classifier_epochs: int = 5
    shifted: Schedule = field(default_factory=lambda: Schedule(3, learning_rate=5e-4))


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """Reconstruction error of both, and how far their draws are from test digits, as a classifier sees them."""
    models = {
        "autoencoder": train_autoencoder(work, settings.vae),
        "VAE": beta.trained_vae(work.beside("beta"), 1.0, settings.vae),
    }
    classifier = train_on(work, digit_classifier(work, settings.num_classifier_epochs), settings.shifted)
    images, labels = digits(work.digits, "test")
    seen, _ = digits(work.digits, "train")
    errors = {name: reconstruction_error(model, binary_test_images(work)) for name, model in models.items()}
    draws = {name: draws_of(name, model, seen, settings.num_draws) for name, model in models.items()}
    real = statistics(classifier, images)
    distances = {
        name: {kind: frechet_distance(statistics(classifier, of), real) for kind, of in kinds.items()}
        for name, kinds in draws.items()
    }
    least = frechet_distance(statistics(classifier, seen[: settings.num_draws]), real)
    right = accuracy(classifier, images, labels)
    ours, theirs = distances["autoencoder"], distances["VAE"]
    rows = [
        Row(
            "the classifier whose features are compared: test digits it knows", f"{right:.2%}", ">= 99%", right >= 0.99
        ),
        Row(
            "reconstruction error of autoencoder and VAE",
            f"{errors['autoencoder']:.1f} and {errors['VAE']:.1f} nats",
            "the autoencoder's is lower",
            errors["autoencoder"] < errors["VAE"],
        ),
        Row(
            "Frechet distance from test digits, of draws from N(0, I)",
            f"{ours['prior']:.0f} and {theirs['prior']:.0f}",
            "the autoencoder's is larger",
            ours["prior"] > theirs["prior"],
            f"training digits: {least:.1f}",
        ),
        Row("of draws from a Gaussian fitted to the latents", f"{ours['fitted']:.0f} and {theirs['fitted']:.0f}"),
    ]
    text = (
        "An autoencoder and a VAE of the same network. The autoencoder's digits are closer to the originals; what it "
        "decodes from N(0, I) is no digit, and a Gaussian fitted to its latents helps only so far."
    )
    numbers = {"classifier": right, "error": errors, "frechet": distances, "frechet_of_training_digits": least}
    return Findings(rows, numbers, {_draw(work, models, draws): text})


def train_autoencoder(work: Work, settings: beta.Settings) -> DenseVAE:
    """The same network without samples and without a KL: what it encodes is the mean alone."""
    images, _ = digits(work.digits, "train")
    model = make_vae(images, settings.shape)

    def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        pixels = binarised(batch[0], generator)
        return bernoulli_nll(model.decode(model.encode(pixels).mode()), pixels).mean()

    fit(work, "autoencoder", model, (images,), loss, settings.schedule)
    return model


def train_on(work: Work, classifier: Classifier, schedule: Schedule) -> Classifier:
    """The classifier after more epochs, in which each batch is shifted by up to two pixels: it errs less then."""
    images, labels = digits(work.digits, "train")

    def loss(batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        shifted = batch[0].view(-1, SIDE, SIDE).roll(shift, (1, 2))
        return F.cross_entropy(classifier(shifted), batch[1])

    fit(work, "classifier", classifier, (images, labels), loss, schedule)
    return classifier


@torch.inference_mode()
def reconstruction_error(model: DenseVAE, images: Tensor) -> float:
    """-log p(x | z) at the mean of the posterior, nats per image."""
    return bernoulli_nll(model.decode(model.encode(images).mode()), images).mean().item()


@torch.inference_mode()
def draws_of(name: str, model: DenseVAE, images: Tensor, num_draws: int) -> dict[str, Tensor]:  # (num_draws, 784)
    """Images decoded from N(0, I), and from the Gaussian of the latents of `images`."""
    posterior = model.encode(binarised(images, generator_of(1)))
    if name == "autoencoder":  # its latents are points
        posterior = DiagonalGaussian(posterior.mean, torch.full_like(posterior.logvar, -torch.inf))
    prior = torch.randn((num_draws, model.num_latents), generator=generator_of(2), dtype=torch.float32, device="cpu")
    return {
        "prior": model.mean_image(prior),
        "fitted": model.mean_image(fit_latents(posterior).sample(num_draws, generator_of(3))),
    }


@torch.inference_mode()
def statistics(classifier: Classifier, images: Tensor) -> FeatureStatistics:
    """Of the classifier's features."""
    found = FeatureStatistics()
    for part in images.split(1000):
        found.add(classifier.features(part).numpy())
    return found


@torch.inference_mode()
def _draw(work: Work, models: dict[str, DenseVAE], draws: dict[str, dict[str, Tensor]]) -> str:
    shown = binary_test_images(work)[:36].view(3, 12, -1)
    rows = {
        name: torch.stack([shown, model.mean_image(model.encode(shown.flatten(0, 1)).mode()).view_as(shown)], 1)
        for name, model in models.items()
    }
    sheets = {}
    for name, pairs in rows.items():
        sheets[f"Digits, each above the {name}'s"] = pairs.flatten(0, 2)
    for kind, title in (("prior", "draws of N(0, I)"), ("fitted", "draws of a fitted Gaussian")):
        for name in models:
            sheets[f"{name[0].upper()}{name[1:]}: {title}"] = draws[name][kind][:72]
    return draw_panels(work, "draws", {title: sheet(of.view(-1, SIDE, SIDE), 12) for title, of in sheets.items()})
