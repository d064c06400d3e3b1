"""`sdvae export`: a store in the format of another trainer."""

from pathlib import Path

import click

from sdvae.cli.shared import PATH, Console, with_console


@click.command(short_help="Write a store in another trainer's format.")
@click.argument("path", metavar="STORE", type=PATH)
@click.option(
    "--to",
    "name",
    type=click.Choice(["kohya", "repa", "fast-dit", "webdataset"]),
    required=True,
    help="Whose format: sd-scripts' .npz, REPA's and fast-DiT's .npy, WebDataset's tars.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="A new folder for it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of samples, where it has some.")
@with_console
def export(path: Path, name: str, output: Path, seed: int, console: Console) -> None:
    """Write the latents in STORE to the folder OUT, as another trainer reads them.

    OUT/sdvae-export.json says what that is: sample, mean or moments, scaled or raw, the range of pixels, mirrored
    latents, what to set in the trainer. A store that the format cannot hold, or its reader would misread, is refused.
    """
    from sdvae.reading.export import export

    with console.progress() as show:
        done = export(path, name, output, seed, show)
    console.result(
        f"{done['num_records']} records are in {output} for {done['reader']}: {done['value']}, {done['scaling']}; "
        f"mirrored latents: {done['flips']}",
        output=str(output),
        **done,
    )
    for setting, value in done["settings"].items():
        console.note(f"for training, {setting}: {value}")
