"""`sdvae stats`: mean, std, sizes and failures of a store."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.shared import PATH, Console, with_console

if TYPE_CHECKING:
    from sdvae.reading.stats import StoreStats


@click.command(short_help="Measure the latents of a store.")
@click.argument("path", metavar="STORE", type=PATH)
@with_console
def stats(path: Path, console: Console) -> None:
    """Measure the raw latents in STORE: mean and std of each channel, scaling factor, sizes, failures.

    Reads every number once, in fp64. Latents are measured as a training loop draws them: from the posterior.
    """
    from sdvae.reading.stats import measure
    from sdvae.store.remote import local_copy
    from sdvae.store.store import Store

    store = Store.open(local_copy(path))
    found = measure(store)
    num_shards = len(store.paths.committed())
    vae_factor = store.latent_scaling.overall_factor
    console.result(
        "\n".join(_lines(path, found, vae_factor)),
        store=str(path),
        **asdict(found),
        scaling_factor=found.scaling_factor,
        vae_scaling_factor=vae_factor,
        num_shards=store.num_shards,
        num_committed_shards=num_shards,
    )
    if num_shards < store.num_shards:
        console.note(f"the store is not complete: it has {num_shards} of {count(store.num_shards, 'shard')}")


def _lines(path: Path, found: "StoreStats", vae_factor: float) -> list[str]:
    lines = [
        f"{path}: {count(found.num_written, 'record')}, {found.num_quarantined} more quarantined",
        f"{'channel':<9}{'mean':>12}{'std':>12}{'posterior std':>16}",
    ]
    rows = zip(found.mean, found.std, found.posterior_std, strict=True)
    lines += [f"{channel:<9}{a:>12.5f}{b:>12.5f}{c:>16.5f}" for channel, (a, b, c) in enumerate(rows)]
    lines.append(f"{'all':<9}{found.overall_mean:>12.5f}{found.overall_std:>12.5f}")
    own = f"the VAE's own, {vae_factor:g}, gives a std of {found.overall_std * vae_factor:.3f}"
    lines.append(f"scaling factor for a std of 1: {found.scaling_factor:.5f}; {own}")
    lines += [f"{number:>9} of {bucket} px" for bucket, number in found.buckets.items()]
    if found.num_enlarged:
        lines.append(f"{found.num_enlarged:>9} enlarged; --max-upscale of sdvae encode sets a limit")
    return lines + [f"{number:>9} quarantined: {reason}" for reason, number in found.quarantined.items()]
