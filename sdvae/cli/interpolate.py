"""`sdvae interpolate`: images between two photos in latent space."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, write_gif, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, PATH, Console, with_console, with_vae

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Interpolate between two photos in latent space.",
    groups={"What is interpolated": ("steps", "mode", "size")},
    examples=(
        "sdvae interpolate a.jpg b.jpg -o strip.png",
        "sdvae interpolate a.jpg b.jpg -o film.gif --steps 24",
    ),
)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@OUTPUT
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    metavar="N",
    default=8,
    show_default=True,
    help="Images, both ends included.",
)
@click.option(
    "--mode",
    type=click.Choice(["slerp", "lerp"]),
    default="slerp",
    show_default=True,
    help="slerp keeps the norm of the latents; lerp is a straight line.",
)
@click.option(
    "--size", type=click.IntRange(min=1), metavar="PX", default=512, show_default=True, help="Pixels along each side."
)
@METADATA
@BUDGET
@with_vae
@with_console
def interpolate(
    a: Path,
    b: Path,
    output: Path,
    steps: int,
    mode: Literal["slerp", "lerp"],
    size: int,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Interpolate from photo A to photo B in latent space: a row of images, or a GIF if FILE ends in .gif."""
    check_output(output, a, b, others=(".gif",))
    import numpy as np

    from sdvae.encoding.resize import apply
    from sdvae.images.read import read_image
    from sdvae.store.geometry import Preprocess, plan_geometry

    def read_square(path: Path) -> "NDArray[np.uint8]":
        photo = read_image(path)
        height, width, _ = photo.shape
        return apply(photo, plan_geometry(height, width, Preprocess(size, "center"), downscale=1))

    start, end = read_square(a), read_square(b)
    vae = load_vae()
    frames = [np.asarray(frame) for frame in vae.interpolate(start, end, steps, mode, budget)]
    if output.suffix.lower() == ".gif":
        write_gif(output, frames)
    else:
        write_picture(output, grid(frames, columns=len(frames)), vae, has_metadata=not no_metadata)
    console.result(f"{steps} images from {a} to {b} written to {output}", output=str(output), steps=steps, mode=mode)
