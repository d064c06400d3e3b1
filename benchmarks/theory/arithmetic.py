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
SMALL, BIG = 7.0, 10.0  # smaller hearts are hard to tell from squares
TO_REACH = 0.90


@dataclass(frozen=True)
class Settings:
    """A VAE of the 3,528 upright sprites: beta 4 on all of them pays for size and place alone, not for the shape."""

    shape: Shape = field(default_factory=lambda: Shape(num_latents=8, width=256, keeps_scale=False))
    schedule: Schedule = field(default_factory=lambda: Schedule(100, batch_size=64))
    beta: float = 0.2  # a shape is told by few pixels, and must be worth its nats
    classifier: Schedule = field(default_factory=lambda: Schedule(30, learning_rate=2e-3))
    num_drawn: int = 6000  # sprites at any place, which the classifier learns from
    num_sums: int = 1000
    every: int = 1  # of the upright sprites, which ones are used


class SpriteClassifier(nn.Module):
    """Two convolutions and two dense layers: logits of the shape and of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(24 * (SIDE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, len(SHAPES) + len(SIZES)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # (N, D) -> (N, 3), (N, 6)
        """The logits of the shapes, and of the sizes."""
        shapes, sizes = self.body(images.view(-1, 1, SIDE, SIDE)).split([len(SHAPES), len(SIZES)], 1)
        return shapes, sizes


def upright(every: int = 1) -> Tensor:  # (N, D)
    """The sprites of angle 0."""
    images, factors = every_sprite()
    return images[factors[:, 2] == 0.0].flatten(1)[::every]


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


def terms(num_sums: int, generator: torch.Generator) -> list[Tensor]:  # four of (N, D)
    """Big squares, small squares, small hearts, and the big hearts that should come out: upright, four at a place."""
    placed = random_sprites(num_sums, generator)
    return [
        draw(_as(placed, shape, size)).flatten(1)
        for shape, size in ((SQUARE, BIG), (SQUARE, SMALL), (HEART, SMALL), (HEART, BIG))
    ]


def _as(placed: Tensor, shape: int, size: float) -> Tensor:  # (N, 5) -> (N, 5)
    wanted = torch.tensor([shape, size], dtype=placed.dtype, device="cpu")
    return _upright(torch.cat([wanted.expand(len(placed), 2), placed[:, 2:]], 1))


def _upright(factors: Tensor) -> Tensor:  # (N, 5) -> (N, 5)
    return factors * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=factors.dtype, device="cpu")


@torch.inference_mode()
def sums(model: DenseVAE, big: Tensor, small: Tensor, other: Tensor) -> dict[str, Tensor]:  # each (N, D)
    """z(big) - z(small) + z(other), decoded: each by itself, and by the means over all big and all small ones.

    The second is `sdvae.explore.arithmetic`'s attribute vector: it knows no place.
    """
    means = [model.encode(images).mode() for images in (big, small, other)]
    vector = means[0] - means[1]
    return {
        "latents": model.mean_image(means[2] + vector),
        "attribute": model.mean_image(means[2] + vector.mean(0)),
        "pixels": (other + big - small).clamp(0.0, 1.0),
    }


def run(work: Work, settings: Settings = Settings()) -> Findings:
    """How often the sum is taken for a big heart: of latents, by an attribute vector, and of pixels."""
    drawn = _upright(random_sprites(settings.num_drawn, generator_of(0)))
    classifier = sprite_classifier(work, draw(drawn).flatten(1), drawn, settings.classifier)
    images = upright(settings.every)
    model = train_grey_vae(work, "vae", images, settings.shape, settings.schedule, settings.beta)
    unseen = _upright(random_sprites(settings.num_sums, generator_of(1)))
    known = shares(classifier, draw(unseen).flatten(1), *classes(unseen))
    *parts, aim = terms(settings.num_sums, generator_of(2))
    made = sums(model, *parts)
    heart, big = torch.tensor(HEART, device="cpu"), torch.tensor(SIZES.index(BIG), device="cpu")
    found = {name: shares(classifier, of, heart, big) for name, of in (made | {"drawn": aim}).items()}
    rows = [
        Row(
            f"big square - small square + small heart, {settings.num_sums:,} places: taken for a big heart",
            f"{found['latents']['both']:.1%}",
            f">= {TO_REACH:.0%}",
            found["latents"]["both"] >= TO_REACH,
            f"{found['pixels']['both']:.1%} by a sum of pixels",
        ),
        Row(
            "small heart + (mean of all big squares - mean of all small squares): taken for a big heart",
            f"{found['attribute']['both']:.1%}",
        ),
        Row("the classifier of shape and size, on sprites it has not seen: both right", f"{known['both']:.1%}"),
    ]
    shown = torch.stack([*parts, made["latents"], made["pixels"], aim])[:, :NUM_SHOWN]
    return Findings(rows, {"found": found, "classifier": known}, {_draw(work, shown): TEXT})


NUM_SHOWN = 12
ROWS = ("big square", "\u2212 small square", "+ small heart", "sum of latents", "sum of pixels", "a big heart")
TEXT = (
    "Sums, one a column: three terms, the sum of their latents, decoded, that of their pixels, and a drawn big heart."
)


def _draw(work: Work, shown: Tensor) -> str:  # (6, NUM_SHOWN, D)
    images = shown.view(len(ROWS), -1, SIDE, SIDE)
    return draw_grids(work, "sums", [Grid("Big square \u2212 small square + small heart", images, ROWS)])
