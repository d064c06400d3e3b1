"""Big square - small square + small heart: a sum of latents, decoded, and a classifier that says what it sees."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theory.dense import DenseVAE
from theory.draw_sprites import SHAPES, SIDE, SIZES, draw, every_sprite, random_sprites
from theory.figures import Grid, draw_grids
from theory.fit import Schedule, fit, generator_of, seeded
from theory.grey import Shape, train_grey_vae
from theory.work import Findings, Row, Work

SQUARE, HEART = SHAPES.index("square"), SHAPES.index("heart")
SMALL, BIG = SIZES[0], SIZES[-1]
TO_REACH = 0.90


@dataclass(frozen=True)
class Settings:
    """A VAE of the 3,528 upright sprites: beta 4 on all of them pays for size and place alone, not for the shape."""

    shape: Shape = field(default_factory=lambda: Shape(num_latents=8, width=256))
    schedule: Schedule = field(default_factory=lambda: Schedule(100))
    classifier: Schedule = field(default_factory=lambda: Schedule(10))
    num_sums: int = 1000
    every: int = 1  # of the upright sprites, which ones are used


class SpriteClassifier(nn.Module):
    """Two convolutions and two dense layers: logits of the shape and of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, len(SHAPES) + len(SIZES)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # (N, D) -> (N, 3), (N, 6)
        """The logits of the shapes, and of the sizes."""
        shapes, sizes = self.body(images.view(-1, 1, SIDE, SIDE)).split([len(SHAPES), len(SIZES)], 1)
        return shapes, sizes


def upright(every: int = 1) -> tuple[Tensor, Tensor]:  # (N, D), (N, 5)
    """The sprites of angle 0."""
    images, factors = every_sprite()
    rows = factors[:, 2] == 0.0
    return images[rows].flatten(1)[::every], factors[rows][::every]


def sprite_classifier(work: Work, images: Tensor, factors: Tensor, schedule: Schedule) -> SpriteClassifier:
    """A classifier of these sprites; kept in the folder of `work`."""
    classifier = seeded(SpriteClassifier, 0)

    def loss(batch: list[Tensor], _: torch.Generator) -> Tensor:
        shapes, sizes = classifier(batch[0])
        return F.cross_entropy(shapes, batch[1]) + F.cross_entropy(sizes, batch[2])

    fit(work, "classifier", classifier, (images, *classes(factors)), loss, schedule)
    return classifier


def classes(factors: Tensor) -> tuple[Tensor, Tensor]:  # (N, 5) -> (N,), (N,)
    """The numbers of the shape and of the size."""
    return factors[:, 0].long(), (factors[:, 1] - SIZES[0]).round().long()


@torch.inference_mode()
def shares(classifier: SpriteClassifier, images: Tensor, shape: Tensor, size: Tensor) -> dict[str, float]:
    """How many images (N, D) are taken for this shape, this size, both, and both but for one step of size."""
    found = [(shapes.argmax(1), sizes.argmax(1)) for shapes, sizes in map(classifier, images.split(1000))]
    shapes, sizes = (torch.cat(column) for column in zip(*found, strict=True))
    is_shape, distance = shapes == shape, (sizes - size).abs()
    hits = {"shape": is_shape, "size": distance == 0, "both": is_shape & (distance == 0),
            "nearly": is_shape & (distance <= 1)}  # fmt: skip
    return {name: hit.to(torch.float32).mean().item() for name, hit in hits.items()}


def terms(num_sums: int, apart: bool, generator: torch.Generator) -> list[Tensor]:  # four of (N, D)
    """Big squares, small squares, small hearts, and the big hearts that should come out.

    All are upright. Each sum has a place of its own; `apart`: its squares and its hearts have two.
    """
    square = random_sprites(num_sums, generator)
    heart = random_sprites(num_sums, generator) if apart else square
    return [draw(_as(placed, shape, size)).flatten(1) for placed, shape, size in
            [(square, SQUARE, BIG), (square, SQUARE, SMALL), (heart, HEART, SMALL), (heart, HEART, BIG)]]  # fmt: skip


def _as(placed: Tensor, shape: int, size: float) -> Tensor:  # (N, 5) -> (N, 5)
    wanted = torch.tensor([shape, size, 0.0], dtype=placed.dtype, device="cpu")
    return torch.cat([wanted.expand(len(placed), 3), placed[:, 3:]], 1)


@torch.inference_mode()
def added(model: DenseVAE, big: Tensor, small: Tensor, other: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """Images decoded from z(big) - z(small) + z(other): `sdvae.explore.arithmetic`'s formula, with means over one."""
    means = [model.encode(images).mode() for images in (big, small, other)]
    return model.mean_image(means[0] - means[1] + means[2])


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """How often the sum is taken for a big heart: of latents, and of pixels."""
    images, factors = upright(settings.every)
    classifier = sprite_classifier(work, images, factors, settings.classifier)
    model = train_grey_vae(work, "vae", images, settings.shape, settings.schedule)
    unseen = random_sprites(settings.num_sums, generator_of(1))
    unseen[:, 2] = 0.0
    known = shares(classifier, draw(unseen).flatten(1), *classes(unseen))
    heart, big = torch.tensor(HEART, device="cpu"), torch.tensor(len(SIZES) - 1, device="cpu")
    found, shown = {}, {}
    for name, apart in (("together", False), ("apart", True)):
        parts = terms(settings.num_sums, apart, generator_of(2))
        sums = added(model, *parts[:3])
        in_pixels = (parts[0] - parts[1] + parts[2]).clamp(0.0, 1.0)
        found[name] = {
            "latents": shares(classifier, sums, heart, big),
            "pixels": shares(classifier, in_pixels, heart, big),
            "drawn": shares(classifier, parts[3], heart, big),
        }
        shown[name] = torch.stack([*parts[:3], sums, in_pixels, parts[3]])[:, :NUM_SHOWN]
    rows = [
        Row(
            f"big square - small square + small heart, {settings.num_sums:,} places: taken for a big heart",
            f"{found['together']['latents']['both']:.1%}",
            f">= {TO_REACH:.0%}",
            found["together"]["latents"]["both"] >= TO_REACH,
            f"{found['together']['pixels']['both']:.1%} by a sum of pixels",
        ),
        Row(
            "the same, where the squares lie elsewhere than the hearts",
            f"{found['apart']['latents']['both']:.1%}",
            beside=f"{found['apart']['pixels']['both']:.1%} by a sum of pixels",
        ),
        Row("the classifier of shape and size, at places it has not seen: both right", f"{known['both']:.1%}"),
    ]
    return Findings(rows, {"found": found, "classifier": known}, {_draw(work, shown["together"]): TEXT})


NUM_SHOWN = 12
ROWS = ("big square", "\u2212 small square", "+ small heart", "sum of latents", "sum of pixels", "a big heart")
TEXT = (
    "Sums, one a column: three terms, the sum of their latents, decoded, that of their pixels, and a drawn big heart."
)


def _draw(work: Work, shown: Tensor) -> str:  # (6, NUM_SHOWN, D)
    images = shown.view(len(ROWS), -1, SIDE, SIDE)
    return draw_grids(work, "sums", [Grid("Big square \u2212 small square + small heart", images, ROWS)])
