"""`sdvae roundtrip`: one photo through the VAE and back, before and after side by side."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import size_text
from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, grid, write_picture
from sdvae.cli.shared import BUDGET, OUTPUT, PATH, Console, with_console, with_vae

if TYPE_CHECKING:
    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Encode and decode a photo; show both side by side.",
    groups={"How the photo is prepared": ("size",)},
    examples=(
        "sdvae roundtrip photo.jpg -o compare.png",
        "sdvae roundtrip photo.jpg -o compare.png --size 0      # the photo as it is",
        "sdvae roundtrip photo.jpg -o compare.png --vae stabilityai/sd-vae-ft-mse",
    ),
)
@click.argument("image", type=PATH)
@OUTPUT
@click.option(
    "--size",
    type=click.IntRange(min=0),
    metavar="PX",
    default=512,
    show_default=True,
    help="Shrink a photo whose shorter side has more pixels than this; 0 keeps every photo as it is.",
)
@METADATA
@BUDGET
@with_vae
@with_console
def roundtrip(
    image: Path,
    output: Path,
    size: int,
    no_metadata: bool,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Encode and decode a photo, and write the photo and the result side by side."""
    check_output(output, image)
    import numpy as np

    from sdvae.encoding.resize import apply
    from sdvae.images.read import read_image
    from sdvae.metrics import psnr
    from sdvae.store.geometry import Preprocess, plan_geometry

    photo = read_image(image)
    height, width, _ = photo.shape
    if 0 < size < min(height, width):
        photo = apply(photo, plan_geometry(height, width, Preprocess(size, "none"), downscale=1))
        height, width, _ = photo.shape
    vae = load_vae()
    start = time.perf_counter()
    after = np.asarray(vae.roundtrip([photo], budget)[0])
    seconds = time.perf_counter() - start

    value = psnr(after, photo)
    psnr_db = value if math.isfinite(value) else None  # JSON has no infinity
    quality = "no difference" if psnr_db is None else f"{psnr_db:.2f} dB"
    sheet = grid([photo, after], 2, [f"before: {image.name}", f"after {vae.name}: {quality}"])
    write_picture(output, sheet, vae, has_metadata=not no_metadata)
    console.result(
        f"{image} at {size_text(height, width)} px: {quality} PSNR in {seconds:.2f} s; both are in {output}",
        image=str(image),
        output=str(output),
        width=width,
        height=height,
        psnr_db=psnr_db,
        seconds=seconds,
        vae=vae.name,
    )
