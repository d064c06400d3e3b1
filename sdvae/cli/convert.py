"""`sdvae convert`: a VAE in another layout, dtype or kind of file."""

from pathlib import Path
from typing import Literal

import click

from sdvae.amounts import count
from sdvae.cli.shared import DRY_RUN, FAMILY, FORCE, STORED_DTYPE, WEIGHTS_OUTPUT, Console, tell_written, with_console


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
@FORCE
@with_console
def convert(
    source: str,
    output: Path,
    layout: Literal["ldm", "diffusers", "taesd"] | None,
    dtype: str | None,
    family: str | None,
    dry_run: bool,
    force: bool,
    console: Console,
) -> None:
    """Write the VAE that IN holds (a file, a diffusers folder, a hub id) to OUT.

    OUT is a file named .safetensors, or a folder that diffusers reads. A TAESD can also be written in its
    author's layout: a folder of two files, as ComfyUI expects them.
    """
    from sdvae.engine.precision import DTYPES
    from sdvae.weights.edit import convert
    from sdvae.weights.find import find_file
    from sdvae.weights.keymap import some

    stored = None if dtype is None else DTYPES[dtype]
    written = convert(find_file(source), output, layout, stored, family, is_dry_run=dry_run, force=force)
    tell_written(console, written, dry_run)
    if written.left_out:
        groups = [f"{number} {names}" for names, number in written.left_out.items()]
        num_left_out = count(sum(written.left_out.values()), "tensor")
        console.note(f"left out {num_left_out} that are no part of the VAE: {some(groups)}")
