"""How photos are prepared: the options of `sdvae encode` for that."""

import re
from collections.abc import Callable

import click

from sdvae.cli.shared import SHORTER_SIDE


def _parse_buckets(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> str | tuple[tuple[int, int], ...] | None:
    if value is None or value in ("sd1", "sdxl"):
        return value
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", value):
        raise click.BadParameter(f"{value!r} is neither sd1 nor sdxl nor sizes like 512x768,768x512.")
    sizes = (size.split("x") for size in value.split(","))
    return tuple((int(height), int(width)) for width, height in sizes)


_PREPROCESS = (
    SHORTER_SIDE,
    click.option(
        "--crop",
        type=click.Choice(["center", "random", "none"]),
        default="center",
        show_default=True,
        help="center and random cut a square; none keeps the whole photo.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Seed of random crops."
    ),
    click.option(
        "--buckets",
        metavar="sd1|sdxl|WxH,...",
        callback=_parse_buckets,
        help="Several sizes instead of one square; each photo gets the size with the nearest aspect ratio.",
    ),
    click.option("--flip", is_flag=True, help="Also encode each photo mirrored."),
    click.option(
        "--max-upscale",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Quarantine photos that would be enlarged by more than X.  [default: no limit; 1.0 with --buckets]",
    ),
    click.option(
        "--min-size", type=click.IntRange(min=1), metavar="PX", help="Quarantine smaller photos (shorter side)."
    ),
    click.option(
        "--resample",
        type=click.Choice(["lanczos", "bicubic"]),
        default="lanczos",
        show_default=True,
        help="Filter for resizing; both are antialiased.",
    ),
    click.option(
        "--decoder",
        type=click.Choice(["pillow", "simplejpeg"]),
        default="pillow",
        show_default=True,
        help="Library that decodes JPEG.",
    ),
    click.option(
        "--resizer",
        type=click.Choice(["auto", "torch", "pillow"]),
        default="auto",
        show_default=True,
        help="Library that resizes. auto: the one OUT was begun with, else torch if it has the filter (faster).",
    ),
    click.option(
        "--jpeg-draft",
        is_flag=True,
        help="Decode large JPEGs at 1/2, 1/4 or 1/8 size: faster, a little softer.",
    ),
)


def with_preprocess(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command."""
    for option in reversed(_PREPROCESS):
        function = option(function)
    return function
