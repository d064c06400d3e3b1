"""`sdvae encode`: a folder of photos into a latent store."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from sdvae.cli.shared import BATCH_SIZE, PATH, Console, with_console, with_vae

if TYPE_CHECKING:
    from sdvae.vae import VAE


@click.command()
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    metavar="PX",
    help="Pixels of the shorter side.  [default: 512; with --crop none the photo's own size]",
)
@click.option(
    "--crop",
    type=click.Choice(["center", "none"]),
    default="center",
    show_default=True,
    help="A square from the middle, or the whole photo.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    metavar="N",
    default=1024,
    show_default=True,
    help="Images in a shard, at most.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="What latents are stored in.",
)
@click.option(
    "--resume/--restart", default=True, show_default=True, help="Continue what OUT holds, or throw it away first."
)
@BATCH_SIZE
@with_vae
@with_console
def encode(
    source: Path,
    out: Path,
    size: int | None,
    crop: Literal["center", "none"],
    shard_rows: int,
    store_dtype: Literal["fp16", "fp32"],
    resume: bool,
    batch_size: int | None,
    load_vae: "Callable[[str], VAE]",
    console: Console,
) -> None:
    """Encode the photos in SRC into the latent store OUT.

    Run again after an interruption, it continues. Photos that cannot be read are quarantined with a reason; then the
    exit code is 3.
    """
    from sdvae.data.encode import EncodeSettings, encode_source, recorded_dtype
    from sdvae.data.preprocess import Preprocess

    size_px = size or (512 if crop == "center" else None)
    settings = EncodeSettings(Preprocess(size_px, crop), store_dtype, shard_rows, batch_size)
    vae = load_vae((resume and recorded_dtype(out)) or "auto")
    with console.progress() as show:
        report = encode_source(source, out, vae, settings, restart=not resume, progress=show)
    num_quarantined = sum(report.quarantined.values())
    for reason, count in Counter(report.quarantined).most_common(10):
        console.note(f"{count} in quarantine: {reason}")
    in_quarantine = f", {num_quarantined} in {out / 'quarantine.jsonl'}" if num_quarantined else ""
    speed = f"{report.images_per_s:.2f} images/s" if report.images_per_s else "nothing was left to do"
    console.result(
        f"{report.num_written} of {report.num_seen} photos are in {out}{in_quarantine}; {speed}",
        output=str(out),
        num_seen=report.num_seen,
        num_written=report.num_written,
        quarantined=report.quarantined,
        seconds=report.seconds,
        images_per_s=report.images_per_s,
        vae=vae.name,
    )
    if num_quarantined:
        click.get_current_context().exit(3)
