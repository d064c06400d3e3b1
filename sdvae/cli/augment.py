"""`sdvae augment`: more training data from photos, by small moves in latent space."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.shared import BATCH_SIZE, BUDGET, PATH, SEED, Console, tell_left_out, with_console, with_crop, with_vae

if TYPE_CHECKING:
    from sdvae.store.geometry import Preprocess
    from sdvae.vae import VAE


@click.command(
    cls=Grouped,
    short_help="Make new photos by small moves in latent space.",
    groups={"What is made": ("copies", "strength", "seed"), "How a photo is prepared": ("size", "crop")},
    examples=(
        "sdvae augment photos more-photos --vae RUN",
        "sdvae augment photos more-photos --copies 4 --strength 0.2 --vae RUN",
    ),
)
@click.argument("source", metavar="SRC")
@click.argument("out", type=PATH)
@click.option(
    "--copies",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="New images of each photo.",
)
@click.option(
    "--strength",
    type=click.FloatRange(min=0.0),
    metavar="S",
    default=0.1,
    show_default=True,
    help="Noise added to a sample of the posterior, in units of scaled latents, whose std is about 1.",
)
@SEED
@with_crop
@BATCH_SIZE
@BUDGET
@with_vae
@with_console
def augment(
    source: str,
    out: Path,
    copies: int,
    strength: float,
    seed: int,
    preprocess: "Preprocess",
    batch_size: int | None,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Write new images of the photos in SRC to OUT, in the same folders, with their captions and labels.

    Each is decoded from a sample of the photo's posterior, moved a little. OUT must be new or empty; its metadata.jsonl
    tells caption, label and photo of each file, and is written last. Photos that cannot be read are left out; the exit
    code is then 3.
    """
    from sdvae.explore.augment import augment_dataset
    from sdvae.sources.open import open_source

    photos = open_source(source)
    vae = load_vae()
    with console.progress() as show:
        report = augment_dataset(
            photos, out, vae, num_copies=copies, strength=strength, preprocess=preprocess, seed=seed,
            batch_size=batch_size, budget=budget, progress=show,
        )  # fmt: skip
    console.result(
        f"{count(report.num_written, 'image')} of {count(report.num_photos, 'photo')} written to {out}",
        output=str(out), num_written=report.num_written, num_photos=report.num_photos, left_out=report.left_out,
    )  # fmt: skip
    tell_left_out(console, report.left_out)
