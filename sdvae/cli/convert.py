"""`sdvae convert`: a VAE in another layout, dtype or kind of file."""

from pathlib import Path
from typing import Literal

import click

from sdvae.cli.shared import DRY_RUN, FAMILY, STORED_DTYPE, WEIGHTS_OUTPUT, Console, tell_written, with_console


@click.command(short_help="Write a VAE in another layout, dtype or kind of file.")
@click.argument("source", metavar="IN")
@WEIGHTS_OUTPUT
@click.option(
    "--layout",
    type=click.Choice(["ldm", "diffusers", "taesd"]),
    help="Naming of the tensors; taesd: a TAESD as two files.  [default: unchanged]",
)
@STORED_DTYPE
@FAMILY
@DRY_RUN
@with_console
def convert(
    source: str,
    output: Path,
    layout: Literal["ldm", "diffusers", "taesd"] | None,
    dtype: str | None,
    family: str | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Write the VAE that IN holds (a file, a diffusers folder, a hub id) to OUT.

    OUT is a file named .safetensors, or a folder that diffusers reads. A TAESD can also be written in its
    author's layout: a folder of two files, as ComfyUI expects them.
    """
    from sdvae.engine.precision import DTYPES
    from sdvae.weights.edit import convert
    from sdvae.weights.find import find_file

    stored = None if dtype is None else DTYPES[dtype]
    written = convert(find_file(source), output, layout, stored, family, is_dry_run=dry_run)
    tell_written(console, written, dry_run)
