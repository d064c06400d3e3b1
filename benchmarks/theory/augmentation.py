"""Ten images a digit: does a classifier learn more from them with a VAE's copies beside them?"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdvae.evaluate.intervals import bootstrap_interval
from theory import likelihood
from theory.dense import DenseVAE
from theory.digits import SIDE, accuracy, digits, train_classifier
from theory.figures import Grid, draw_grids
from theory.fit import Schedule, generator_of
from theory.grey import Shape, train_grey_vae
from theory.work import Findings, Row, Work

NUM_DIGITS = 10
VAES = {
    "the same 100": "of the same 100 images",
    "unlabelled": "of all training images, unlabelled",
}


@dataclass(frozen=True)
class Settings:
    """Each seed draws other images. All classifiers take the same number of steps."""

    num_of_each: int = 10
    num_copies: int = 10  # of each image; the original is repeated as often beside them
    strength: float = 0.2  # of the moves, in units of the latents' own std
    shape: Shape = field(default_factory=lambda: Shape(num_latents=10, width=200))  # of the VAE of the few images
    vae: Schedule = field(default_factory=lambda: Schedule(20))  # on 50 repetitions of them
    classifier: Schedule = field(default_factory=lambda: Schedule(5, batch_size=50))
    num_seeds: int = 5
    start: likelihood.Settings = field(default_factory=likelihood.Settings)  # of the VAE of all training images


def few(images: Tensor, labels: Tensor, num_of_each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many images of each digit, drawn at random, and their labels."""
    order = torch.randperm(len(labels), generator=generator)
    rows = torch.cat([order[labels[order] == digit][:num_of_each] for digit in range(NUM_DIGITS)])
    return images[rows], labels[rows]


@torch.inference_mode()
def copies(
    model: DenseVAE, images: Tensor, num_copies: int, strength: float, generator: torch.Generator
) -> Tensor:  # (N, D) -> (num_copies * N, D)
    """Decoded samples of each posterior, moved by `strength` times the latents' std, as `sdvae augment` moves them."""
    posterior = model.encode(images)
    scale = posterior.mode().square().mean().sqrt()
    moved = []
    for _ in range(num_copies):
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32, device="cpu")
        moved.append(model.mean_image(posterior.sample(generator) + strength * scale * noise))
    return torch.cat(moved)


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """Test accuracy with the images alone, and with copies of either VAE beside them."""
    train, test = digits(work.digits, "train"), digits(work.digits, "test")
    unlabelled = likelihood.trained_vae(work.beside("likelihood"), settings.start)
    found: dict[str, list[float]] = {name: [] for name in ("alone", *VAES)}
    for seed in range(settings.num_seeds):
        images, labels = few(*train, settings.num_of_each, generator_of(seed))
        repeated = images.repeat(settings.num_copies, 1)
        own = train_grey_vae(work, f"vae-{seed}", images.repeat(50, 1), settings.shape, settings.vae, seed=seed)
        beside = {"alone": repeated} | {
            name: copies(model, images, settings.num_copies, settings.strength, generator_of(seed, 1))
            for name, model in zip(VAES, (own, unlabelled), strict=True)
        }
        for name, others in beside.items():
            classifier = train_classifier(
                work, f"classifier-{name.replace(' ', '-')}-{seed}", torch.cat([repeated, others]),
                labels.repeat(2 * settings.num_copies), settings.classifier, seed,
            )  # fmt: skip
            found[name].append(accuracy(classifier, *test))
        if seed == 0:
            picture = _draw(work, images, settings.num_of_each, beside)
    alone = np.array(found["alone"])
    rows, numbers = [], {"accuracy": found}
    for name, how in VAES.items():
        gain = np.array(found[name]) - alone
        low, high = bootstrap_interval(gain) or (float("nan"), float("nan"))
        numbers[f"gain, {name}"] = {"mean": float(gain.mean()), "interval": [low, high]}
        rows.append(Row(
            f"{len(images)} labelled digits, {settings.num_copies} copies of each by a VAE {how}: gain in test "
            f"accuracy, {settings.num_seeds} seeds",
            f"{100 * gain.mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})",
            beside=f"{alone.mean():.1%} without copies",
        ))  # fmt: skip
    text = "One labelled image of each digit (left), and copies of it, which get its label."
    return Findings(rows, numbers, {picture: text})


NUM_SHOWN = 8  # copies of an image


def _draw(work: Work, images: Tensor, num_of_each: int, beside: dict[str, Tensor]) -> str:
    grids = []
    for name, how in VAES.items():
        made = beside[name].view(-1, *images.shape)[:NUM_SHOWN]
        both = torch.cat([images[None], made]).transpose(0, 1)[::num_of_each]  # (digits, 1 + copies, D)
        grids.append(Grid(f"Copies by a VAE {how}", both.reshape(*both.shape[:2], SIDE, SIDE)))
    return draw_grids(work, "copies", grids)
