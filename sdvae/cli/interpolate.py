"""`sdvae interpolate`: images between photos in latent space."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, read_square, write_gif, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, PATH, SIDE, Console, with_console, with_vae

if TYPE_CHECKING:
    from sdvae.vae import VAE, Blend


@click.command(
    cls=Grouped,
    short_help="Interpolate between photos in latent space.",
    groups={"What is interpolated": ("steps", "mode", "size")},
    examples=(
        "sdvae interpolate a.jpg b.jpg -o strip.png",
        "sdvae interpolate a.jpg b.jpg -o film.gif --steps 24",
        "sdvae interpolate a.jpg b.jpg c.jpg d.jpg -o grid.png",
    ),
)
@click.argument("photos", metavar="A B [C D]", nargs=-1, required=True, type=PATH)
@OUTPUT
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    metavar="N",
    help="Images from one photo to the next, both included.  [default: 8; in a grid 5]",
)
@click.option(
    "--mode",
    type=click.Choice(["slerp", "lerp"]),
    default="slerp",
    show_default=True,
    help="slerp keeps the norm of the latents; lerp is a straight line.",
)
@SIDE
@METADATA
@BUDGET
@with_vae
@with_console
def interpolate(
    photos: tuple[Path, ...],
    output: Path,
    steps: int | None,
    mode: "Blend",
    size: int,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Interpolate between photos in latent space.

    From A to B: a row of images, or a GIF if FILE ends in .gif. Between four photos: a square grid with A, B, C and D
    in its corners, top left to bottom right.
    """
    is_grid = len(photos) == 4
    if len(photos) not in (2, 4):
        raise click.UsageError(f"give two photos for a row or four for a grid, not {len(photos)}.")
    check_output(output, *photos, others=() if is_grid else (".gif",))
    import numpy as np

    images = [read_square(path, size) for path in photos]
    steps = steps or (5 if is_grid else 8)
    vae = load_vae()
    if is_grid:
        made = vae.interpolate_grid(images, steps, mode, budget)
    else:
        made = vae.interpolate(images[0], images[1], steps, mode, budget)
    frames = [np.asarray(frame) for frame in made]
    if output.suffix.lower() == ".gif":
        write_gif(output, frames)
    else:
        write_picture(output, grid(frames, columns=steps), vae, has_metadata=not no_metadata)
    names = [str(path) for path in photos]
    what = f"between {', '.join(names[:-1])} and {names[-1]}" if is_grid else f"from {names[0]} to {names[1]}"
    console.result(f"{len(frames)} images {what} written to {output}", output=str(output), steps=steps, mode=mode)
