"""Sprites whose every factor is known: shape, size, angle, x, y (after dSprites, Matthey et al. 2017)."""

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor

SIDE = 32
SHAPES = ("square", "ellipse", "heart")
SIZES = tuple(float(size) for size in range(5, 11))  # side of the square of the same area, in pixels
ANGLES = tuple(2.0 * math.pi * step / 8 for step in range(8))  # counter-clockwise
PLACES = tuple(9.5 + step for step in range(14))  # of the centre of mass, from the left or the top edge, in pixels
FACTORS = {"shape": range(len(SHAPES)), "size": SIZES, "angle": ANGLES, "x": PLACES, "y": PLACES}

_SUBPIXELS = 4  # each way: how finely a pixel's covered share is measured
_ELLIPSE_RATIO = 2.0
_HEART_AREA, _HEART_CENTRE = 3.66196, 0.29349  # of (x^2 + y^2 - 1)^3 = x^2 y^3


@cache
def every_sprite() -> tuple[Tensor, Tensor]:  # (N, SIDE, SIDE) in [0, 1], (N, 5)
    """All combinations of the factors' values, and the factors of each."""
    middle = PLACES[len(PLACES) // 2]
    factors = torch.tensor(list(product(*FACTORS.values())), dtype=torch.float32, device="cpu")
    kinds = factors.view(-1, len(PLACES) ** 2, 5)[:, 0]
    kinds = torch.cat([kinds[:, :3], torch.full((len(kinds), 2), middle, dtype=torch.float32, device="cpu")], 1)
    drawn = draw(kinds)  # places are whole pixels apart: the same sprites, moved
    moves = [int(place - middle) for place in PLACES]
    return torch.stack([drawn.roll((y, x), (1, 2)) for x in moves for y in moves], 1).flatten(0, 1), factors


def random_sprites(num_sprites: int, generator: torch.Generator) -> Tensor:  # (N, 5)
    """Factors drawn evenly; angles and places are any between the ends, not those of `every_sprite` alone."""
    uniform = torch.rand((num_sprites, 4), generator=generator, dtype=torch.float32, device="cpu")
    shape = (uniform[:, 0] * len(SHAPES)).floor()
    size = torch.tensor(SIZES, dtype=torch.float32, device="cpu")[
        torch.randint(len(SIZES), (num_sprites,), generator=generator, dtype=torch.int64, device="cpu")
    ]
    places = PLACES[0] + uniform[:, 2:] * (PLACES[-1] - PLACES[0])
    return torch.cat([torch.stack([shape, size, uniform[:, 1] * 2.0 * math.pi], 1), places], 1)


def draw(factors: Tensor) -> Tensor:  # (N, 5) -> (N, SIDE, SIDE)
    """White sprites on black: a pixel's value is the share of it that the sprite covers."""
    return torch.cat([_draw(part) for part in factors.split(32)])


def _draw(factors: Tensor) -> Tensor:
    shape, size, angle, x, y = factors[:, :, None, None].unbind(1)
    grid = (torch.arange(SIDE * _SUBPIXELS, dtype=torch.float32, device="cpu") + 0.5) / _SUBPIXELS
    right, up = grid - x, y - grid[:, None]  # of the centre of mass
    along, across = right * angle.cos() + up * angle.sin(), up * angle.cos() - right * angle.sin()
    inside = torch.empty(along.shape, dtype=torch.bool, device="cpu")
    for number, is_inside in enumerate((_in_square, _in_ellipse, _in_heart)):
        rows = shape.flatten() == number
        inside[rows] = is_inside(along[rows] / size[rows], across[rows] / size[rows])
    blocks = inside.view(len(factors), SIDE, _SUBPIXELS, SIDE, _SUBPIXELS)
    return blocks.to(torch.float32).mean((2, 4))


# Shapes of area 1 around their centre of mass.


def _in_square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) <= 0.5


def _in_ellipse(x: Tensor, y: Tensor) -> Tensor:
    return x.square() / _ELLIPSE_RATIO + y.square() * _ELLIPSE_RATIO <= 1.0 / math.pi


def _in_heart(x: Tensor, y: Tensor) -> Tensor:
    scale = math.sqrt(_HEART_AREA)
    x, y = x * scale, y * scale + _HEART_CENTRE
    squares = x.square()
    return (squares + y.square() - 1.0) ** 3 <= squares * y**3
