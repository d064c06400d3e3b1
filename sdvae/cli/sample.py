"""`sdvae sample`: images decoded from the prior, on one contact sheet."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, Console, with_console, with_vae

if TYPE_CHECKING:
    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Decode latents drawn from the prior.",
    groups={"What is drawn": ("num", "size", "seed")},
    examples=(
        "sdvae sample -o sheet.png",
        "sdvae sample -n 4 --size 512 --seed 7 -o sheet.png",
    ),
)
@click.option(
    "-n", "--num", type=click.IntRange(min=1), metavar="N", default=16, show_default=True, help="How many images."
)
@OUTPUT
@click.option(
    "--size", type=click.IntRange(min=1), metavar="PX", default=256, show_default=True, help="Pixels along each side."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="The same seed gives the same images.",
)
@METADATA
@BUDGET
@with_vae
@with_console
def sample(
    num: int,
    output: Path,
    size: int,
    seed: int,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Decode latents drawn from the prior N(0, I) to a contact sheet.

    The VAE of a diffusion model is only weakly regularised towards its prior: expect textures, not photos.
    """
    check_output(output)
    import numpy as np

    vae = load_vae()
    images = [np.asarray(image) for image in vae.sample(num, size, size, seed, budget)]
    write_picture(output, grid(images, columns=math.ceil(math.sqrt(num))), vae, has_metadata=not no_metadata)
    console.result(f"{count(num, 'image')} written to {output}", output=str(output), num=num, size=size, seed=seed)
