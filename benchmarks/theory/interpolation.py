"""From one digit to another: through the latents, or by blending pixels. A classifier says which look like digits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdvae.evaluate.intervals import bootstrap_interval
from sdvae.latents import lerp
from theory import likelihood
from theory.dense import DenseVAE
from theory.digits import SIDE, Classifier, accuracy, digit_classifier, digits
from theory.figures import Grid, draw_grids
from theory.fit import generator_of
from theory.grey import latent_means
from theory.work import Findings, Row, Work

POSITIONS = tuple(step / 10 for step in range(1, 10))  # between the two; at the ends both paths show a digit


@dataclass(frozen=True)
class Settings:
    """The VAE is that of part `likelihood`. Pairs of test digits of different kinds, drawn at random."""

    start: likelihood.Settings = field(default_factory=likelihood.Settings)
    classifier_epochs: int = 5
    num_pairs: int = 1000


def pairs(labels: Tensor, num_pairs: int, generator: torch.Generator) -> Tensor:  # (num_pairs, 2)
    """Numbers of two images each, of two labels."""
    drawn = torch.randint(len(labels), (4 * num_pairs, 2), generator=generator, dtype=torch.int64, device="cpu")
    return drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]][:num_pairs]


@torch.inference_mode()
def paths(model: DenseVAE, first: Tensor, second: Tensor) -> dict[str, Tensor]:  # (N, D) -> name -> (N, positions, D)
    """The images along both paths."""
    ends = latent_means(model, first), latent_means(model, second)
    return {
        "latents": torch.stack([model.mean_image(lerp(*ends, position)) for position in POSITIONS], 1),
        "pixels": torch.stack([lerp(first, second, position) for position in POSITIONS], 1),
    }


@torch.inference_mode()
def confidence(classifier: Classifier, images: Tensor) -> Tensor:  # (N, positions, D) -> (N, positions)
    """The probability of the most probable digit, whichever it is."""
    found = [classifier(part).softmax(1).amax(1) for part in images.flatten(0, 1).split(1000)]
    return torch.cat(found).view(images.shape[:2])


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """The classifier's confidence along both paths, and the difference with its interval."""
    classifier = digit_classifier(work, settings.classifier_epochs)
    images, labels = digits(work.digits, "test")
    model = likelihood.trained_vae(work.beside("likelihood"), settings.start)
    chosen = pairs(labels, settings.num_pairs, generator_of(0))
    first, second = images[chosen[:, 0]], images[chosen[:, 1]]
    along = paths(model, first, second)
    sure = {name: confidence(classifier, path) for name, path in along.items()}
    means = {name: values.mean().item() for name, values in sure.items()}
    gain = (sure["latents"] - sure["pixels"]).mean(1).double().numpy()
    low, high = bootstrap_interval(gain) or (float("nan"), float("nan"))
    row = Row(
        f"a classifier's confidence along the path between {len(chosen):,} pairs of test digits: latents",
        f"{means['latents']:.3f}; {gain.mean():+.3f} ({low:+.3f} to {high:+.3f}) against blended pixels",
        "above",
        low > 0.0,
        f"{means['pixels']:.3f} for blended pixels",
    )
    numbers = {
        "confidence": means,
        "by_position": {name: values.mean(0).tolist() for name, values in sure.items()},
        "gain": float(gain.mean()), "interval": [low, high],
        "classifier_accuracy": accuracy(classifier, images, labels),
    }  # fmt: skip
    text = (
        "Each row goes from one test digit (left end) to another (right end). Through latents it passes digits; "
        "blended pixels show both at once."
    )
    return Findings([row], numbers, {_draw(work, first, second, along): text})


NUM_SHOWN = 10
TITLES = {"latents": "Straight through the latents", "pixels": "Blended pixels"}


def _draw(work: Work, first: Tensor, second: Tensor, along: dict[str, Tensor]) -> str:
    grids = []
    for name, path in along.items():
        images = torch.cat([first[:, None], path, second[:, None]], 1)[:NUM_SHOWN]
        grids.append(Grid(TITLES[name], images.view(*images.shape[:2], SIDE, SIDE)))
    return draw_grids(work, "paths", grids)
