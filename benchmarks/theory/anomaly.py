"""One digit is normal, nine are not: a VAE that saw only the one says which test images are strange."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdvae.train.losses import bernoulli_nll, log_evidence, log_importance_weights, squared_error
from theory.dense import DenseVAE
from theory.digits import SIDE, digits
from theory.figures import Grid, draw_grids
from theory.fit import Schedule, generator_of
from theory.grey import Shape, train_grey_vae
from theory.work import Findings, Row, Work

TO_REACH, AIM = 0.970, 0.975  # mean AUROC of a VAE and of OCGAN in the table of Perera et al. 2019
SCORES = {
    "share": "squared error for each unit of ink",
    "error": "squared error",
    "elbo": "negative ELBO",
    "likelihood": "-log p(x) by importance sampling",
}
CHOSEN = "share"  # after a trial with an 8 as the normal digit: for the others a 1, with little to explain, is an 8


@dataclass(frozen=True)
class Settings:
    """The protocol of OCGAN's table: normal images of the train split, judged on the whole test split."""

    digits: tuple[int, ...] = tuple(range(10))
    shape: Shape = field(default_factory=lambda: Shape(num_latents=32, width=256))
    schedule: Schedule = field(default_factory=lambda: Schedule(16, batch_size=64))
    num_samples: int = 20
    num_test: int = 10_000


@torch.inference_mode()
def scores(
    model: DenseVAE, images: Tensor, num_samples: int, generator: torch.Generator
) -> dict[str, Tensor]:  # name -> (N,), larger is stranger
    """Each image's score by all of SCORES."""
    found: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for part in images.split(1000):
        posterior = model.encode(part)

        def log_likelihood(latents: Tensor, part: Tensor = part) -> Tensor:
            return -bernoulli_nll(model.decode(latents), part)

        weights = log_importance_weights(log_likelihood, posterior, num_samples, generator)
        error = squared_error(model.mean_image(posterior.mode()), part)
        found["share"].append(error / part.sum(1))
        found["error"].append(error)
        found["elbo"].append(-weights.mean(1))
        found["likelihood"].append(-log_evidence(weights))
    return {name: torch.cat(parts) for name, parts in found.items()}


def auroc(strangeness: Tensor, is_normal: Tensor) -> float:
    """Probability that a strange image has a larger score than a normal one."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(~is_normal.numpy(), strangeness.numpy()))


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """The AUROC of each digit by each score."""
    images, labels = digits(work.digits, "train")
    test_images, test_labels = (tensor[: settings.num_test] for tensor in digits(work.digits, "test"))
    by_digit, strangest = {}, []
    for digit in settings.digits:
        model = train_grey_vae(
            work, f"digit-{digit}", images[labels == digit], settings.shape, settings.schedule, seed=digit
        )
        found = scores(model, test_images, settings.num_samples, generator_of(digit))
        by_digit[digit] = {name: auroc(score, test_labels == digit) for name, score in found.items()}
        strangest.append(_row(test_images, test_labels == digit, found[CHOSEN]))
    means = {name: float(np.mean([areas[name] for areas in by_digit.values()])) for name in SCORES}
    rows = [
        Row(
            f"one digit normal, {len(by_digit)} runs, whole test split: mean AUROC by {SCORES[name]}",
            f"{means[name]:.4f}",
            f">= {TO_REACH}, aim {AIM}" if name == CHOSEN else "",
            means[name] >= TO_REACH if name == CHOSEN else None,
            "VAE 0.970, OCGAN 0.975 (Perera et al. 2019)" if name == CHOSEN else "",
        )
        for name in sorted(SCORES, key=lambda name: name != CHOSEN)
    ]
    numbers = {"mean": means, "by_digit": {str(digit): areas for digit, areas in by_digit.items()}, "chosen": CHOSEN}
    titles = ("Its digit, the most usual", "Its digit, the strangest", "Other digits, taken for it")
    columns = [torch.stack(column) for column in zip(*strangest, strict=True)]
    names = ([f"the VAE of {digit}" for digit in by_digit], (), ())
    picture = draw_grids(work, "digits", [Grid(*grid) for grid in zip(titles, columns, names, strict=True)])
    text = (
        "A row for each of the ten VAEs: test images of the digit that it knows with the smallest and with the largest "
        "scores, and the images of other digits with the smallest."
    )
    return Findings(rows, numbers, {picture: text})


NUM_SHOWN = 8


def _row(images: Tensor, is_normal: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normal, other = (images[rows][score[rows].argsort()].view(-1, SIDE, SIDE) for rows in (is_normal, ~is_normal))
    return normal[:NUM_SHOWN], normal[-NUM_SHOWN:], other[:NUM_SHOWN]
