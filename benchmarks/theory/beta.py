"""What the weight of the KL buys and costs: error, nats, latents that are used."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from theory.bernoulli import Shape, binary_test_images, log_likelihood, train_vae
from theory.dense import DenseVAE
from theory.digits import SIDE, digits
from theory.figures import draw_panels, save_figure
from theory.fit import Schedule, generator_of
from theory.work import Findings, Row, Work, sheet

ACTIVE = 0.01  # Burda et al.: a latent is used where the variance of its mean over images is larger
SHOWN = 12  # test digits in the picture of reconstructions


@dataclass(frozen=True)
class Settings:
    """15 epochs each, which is enough to compare them."""

    betas: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    shape: Shape = field(default_factory=Shape)
    schedule: Schedule = field(default_factory=lambda: Schedule(15, learning_rate=2e-3))
    num_samples: int = 10
    grid: int = 20  # digits along each side of the picture of two latents


@dataclass(frozen=True)
class Measured:
    """Of one beta, over the test images."""

    error: float  # E[-log p(x|z)], nats
    kl: float  # nats
    num_active: int


def trained_vae(work: Work, beta: float, settings: Settings = Settings()) -> DenseVAE:
    """The VAE of one beta; other parts use that of beta 1."""
    return train_vae(work, f"beta-{beta:g}", settings.shape, settings.schedule, beta)


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """A VAE for each beta, what it costs and gives; and one of two latents, which can be seen at once."""
    images = binary_test_images(work)
    models = {beta: trained_vae(work, beta, settings) for beta in settings.betas}
    found = {beta: measure(model, images, settings.num_samples) for beta, model in models.items()}
    errors, kls = [of.error for of in found.values()], [of.kl for of in found.values()]
    active = [of.num_active for of in found.values()]
    betas = ", ".join(f"{beta:g}" for beta in settings.betas)
    rows = [
        Row(
            f"beta {betas}: reconstruction error in nats",
            ", ".join(f"{error:.1f}" for error in errors),
            "rises",
            all(first < second for first, second in pairwise(errors)),
        ),
        Row(
            "the same: KL in nats",
            ", ".join(f"{kl:.1f}" for kl in kls),
            "falls",
            all(first > second for first, second in pairwise(kls)),
        ),
        Row(
            f"the same: active latents of {settings.shape.num_latents}; all others have collapsed to the prior",
            ", ".join(map(str, active)),
            beside="19 of 50 at beta 1 (Burda et al. 2016)",
        ),
    ]
    two = train_vae(work, "two", Shape(2, settings.shape.width), settings.schedule)
    pictures = {
        _plot(work, found, settings.shape.num_latents): (
            "What beta does to a VAE of 50 latents, on the test images. Left: the two terms of the loss. Right: the "
            "latents that are used."
        ),
        _draw_reconstructions(work, models, images): "The same test digits, reconstructed by the VAE of each beta.",
        _draw_two(work, two, settings.grid): (
            "A VAE of two latents. Left: what it decodes over quantiles of the prior. Right: where the test digits lie "
            "in the same square."
        ),
    }
    numbers = {f"beta_{beta:g}": vars(of) for beta, of in found.items()}
    return Findings(rows, numbers, pictures)


@torch.inference_mode()
def measure(model: DenseVAE, images: Tensor, num_samples: int) -> Measured:
    """Both terms of the ELBO, and the active latents."""
    posterior, generator = model.encode(images), generator_of(0)
    error = torch.stack(
        [-log_likelihood(model, posterior.sample(generator), images).mean() for _ in range(num_samples)]
    ).mean()
    num_active = int((posterior.mean.var(0) > ACTIVE).sum())
    return Measured(error.item(), posterior.kl().mean().item(), num_active)


def _plot(work: Work, found: dict[float, Measured], num_latents: int) -> str:
    from matplotlib.figure import Figure

    betas = [f"{beta:g}" for beta in found]
    figure = Figure(figsize=(10.0, 3.6))
    terms, used = figure.subplots(1, 2)
    terms.plot(betas, [of.error for of in found.values()], marker="o", label="reconstruction error")
    terms.plot(betas, [of.kl for of in found.values()], marker="s", label="KL")
    terms.set(xlabel="beta", ylabel="nats per image", ylim=(0.0, None), title="A larger beta: fewer nats, larger error")
    terms.legend()
    bars = used.bar(betas, [of.num_active for of in found.values()])
    used.bar_label(bars)
    used.set(xlabel="beta", ylabel=f"active latents of {num_latents}", title="Latents collapse to the prior")
    used.margins(y=0.15)
    return save_figure(work, "terms", figure)


@torch.inference_mode()
def _draw_reconstructions(work: Work, models: dict[float, DenseVAE], images: Tensor) -> str:
    from matplotlib.figure import Figure

    shown = images[:SHOWN]
    rows = {"test digit": shown} | {
        f"beta {beta:g}": vae.mean_image(vae.encode(shown).mode()) for beta, vae in models.items()
    }
    figure = Figure(figsize=(10.0, 0.78 * len(rows)))
    for axes, (title, row) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        axes.imshow(sheet(row.view(-1, SIDE, SIDE), SHOWN).numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=12)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return save_figure(work, "reconstructions", figure)


@torch.inference_mode()
def _draw_two(work: Work, model: DenseVAE, num: int) -> str:
    """Decoded quantiles of N(0, I), and the posterior means of the test digits at their quantiles."""
    quantiles = torch.special.ndtri((torch.arange(num, dtype=torch.float32, device="cpu") + 0.5) / num)
    across, up = torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy")
    decoded = model.mean_image(torch.stack([across.flatten(), up.flatten()], 1))
    places = torch.special.ndtr(model.encode(binary_test_images(work)).mode())
    return draw_panels(
        work,
        "two-latents",
        {"Decoded over the two latents": sheet(decoded.view(-1, SIDE, SIDE), num, gap=0)},
        {"Where the test digits lie": (places, digits(work.digits, "test")[1])},
    )
