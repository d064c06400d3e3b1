"""`sdvae extract`: the VAE of a checkpoint as a file or folder of its own."""

from pathlib import Path

import click

from sdvae.cli.shared import DRY_RUN, FAMILY, FORCE, PATH, WEIGHTS_OUTPUT, Console, tell_written, with_console


@click.command(short_help="Take the VAE out of a checkpoint.")
@click.argument("checkpoint", metavar="CKPT", type=PATH)
@WEIGHTS_OUTPUT
@FAMILY
@DRY_RUN
@FORCE
@with_console
def extract(checkpoint: Path, output: Path, family: str | None, dry_run: bool, force: bool, console: Console) -> None:
    """Write the VAE in the checkpoint CKPT to OUT, bit for bit.

    OUT is a file named .safetensors, or a folder that diffusers reads.
    """
    from sdvae.weights.edit import extract

    tell_written(console, extract(checkpoint, output, family, is_dry_run=dry_run, force=force), dry_run)
