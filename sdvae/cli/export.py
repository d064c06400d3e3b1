"""`sdvae export`: a store in the format of another trainer."""

import shlex
from pathlib import Path

import click

from sdvae.amounts import count
from sdvae.cli.shared import PATH, Console, with_console


@click.command(short_help="Write a store in another trainer's format.")
@click.argument("path", metavar="STORE", type=PATH)
@click.option(
    "--to",
    "name",
    type=click.Choice(
        [
            "kohya",
            "kohya-flux",
            "repa",
            "fast-dit",
            "lightning-dit",
            "musubi-flux2-dev",
            "musubi-flux2-klein-4b",
            "musubi-flux2-klein-9b",
            "musubi-z-image",
            "webdataset",
        ]
    ),
    required=True,
    metavar="FORMAT",
    help="kohya (sd-scripts: SD 1, SDXL), kohya-flux, repa, fast-dit, lightning-dit, musubi-flux2-dev (or -klein-4b, "
    "-klein-9b), musubi-z-image, webdataset.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="The new folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of samples.")
@with_console
def export(path: Path, name: str, output: Path, seed: int, console: Console) -> None:
    """Write the latents in STORE to the folder OUT, as another trainer reads them.

    OUT/sdvae-export.json states what the files hold (sample, mean or moments; scaled or raw; the range of pixels;
    mirrored latents) and what to set in the trainer. A store that the format cannot hold, or that its reader would
    misread, is refused.
    """
    from sdvae.reading.export import export

    with console.progress() as show:
        done = export(path, name, output, seed, show)
    console.result(
        f"{count(done['num_records'], 'record')} written to {output} for {done['reader']}: "
        f"{done['value']}, {done['scaling']}; mirrored latents: {done['flips']}",
        output=str(output),
        **done,
    )
    for setting, value in done["settings"].items():
        console.note(f"for training, {setting}: {output if value == 'OUT' else value}")
    if done["training"]:
        console.note(f"train with: {done['training'].replace('OUT', shlex.quote(str(output)))}")
