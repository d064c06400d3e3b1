"""`sdvae identify`: which latent space the VAE in a weights file has, and how that is known."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sdvae.cli.shared import Console, with_console
from sdvae.config import FAMILIES

if TYPE_CHECKING:
    from sdvae.weights.identify import Identity


@click.command(short_help="Tell which VAE a weights file holds.")
@click.argument("file")
@with_console
def identify(file: str, console: Console) -> None:
    """Tell which latent space the VAE in FILE (also a folder or hub id) has: sd1, sdxl, sd3, flux1, flux2 or unknown.

    A space is proved, declared or unknown. Names and shapes are the same in SD 1 and SDXL, so the encoder is run on an
    image whose latents are known; a decoder without an encoder shows that image.
    """
    from sdvae.weights.find import find_file
    from sdvae.weights.identify import identify as identify_file

    path = find_file(file)
    found = identify_file(path)
    family = FAMILIES.get(found.latent_space)
    factors = {"scaling_factor": family and family.scaling_factor, "shift_factor": family and family.shift_factor}
    console.result("\n".join(_lines(str(path), found)), **{"file": str(path)} | asdict(found) | factors)
    for item in found.contradictions:
        hint = f"use {found.latent_space}" if family else "the probe denies it: not that space"
        console.note(f"its {item.kind} disagrees ({item.reason}); {hint}")


def _lines(file: str, found: "Identity") -> list[str]:
    is_known = found.latent_space in FAMILIES
    lines = [f"{file}: {found.latent_space}" + (f", {found.certainty}" if is_known else "")]
    lines.append(f"network      {found.network}")
    if is_known:
        config = FAMILIES[found.latent_space]
        shift = f"(latents - {config.shift_factor})" if config.shift_factor else "latents"
        lines.append(f"scaling      scaled_latents = {shift} * {config.scaling_factor}")
    lines += [f"{item.kind:<11}  {item.reason}" for item in found.evidence]
    lines.append(f"fingerprint  {found.fingerprint or 'none'}")
    return [*lines, f"signs        {found.sign_sketch or 'none'} (the same for these weights in any precision)"]
