"""`sdvae swap`: a checkpoint with another VAE in it."""

from pathlib import Path

import click

from sdvae.cli.shared import (
    DRY_RUN,
    FAMILY,
    FORCE,
    PATH,
    STORED_DTYPE,
    WEIGHTS_OUTPUT,
    Console,
    tell_written,
    with_console,
)


@click.command(short_help="Put another VAE into a checkpoint.")
@click.argument("checkpoint", metavar="CKPT", type=PATH)
@click.option("--vae", required=True, metavar="VAE", help="The VAE to put in: a file, a diffusers folder or a hub id.")
@WEIGHTS_OUTPUT
@STORED_DTYPE
@FAMILY
@DRY_RUN
@FORCE
@with_console
def swap(
    checkpoint: Path,
    vae: str,
    output: Path,
    dtype: str | None,
    family: str | None,
    dry_run: bool,
    force: bool,
    console: Console,
) -> None:
    """Write the checkpoint CKPT to OUT.safetensors with another VAE in it; all other tensors stay bit for bit."""
    from sdvae.engine.precision import DTYPES
    from sdvae.weights.edit import swap
    from sdvae.weights.find import find_file

    stored = None if dtype is None else DTYPES[dtype]
    written = swap(checkpoint, find_file(vae), output, stored, family, is_dry_run=dry_run, force=force)
    tell_written(console, written, dry_run)
