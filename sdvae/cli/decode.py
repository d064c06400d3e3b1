"""`sdvae decode`: latents to image files."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA
from sdvae.cli.shared import BATCH_SIZE, BUDGET, PATH, SPACE, Console, describe_vae, with_console, with_vae

if TYPE_CHECKING:
    from sdvae.vae import VAE

_MOST_NAMED = 10


@click.command(
    cls=Grouped,
    short_help="Decode a latent store or latent files to images.",
    groups={"What is decoded": ("latents", "space")},
    examples=(
        "sdvae decode latents images                            # a store",
        "sdvae decode samples.npy images --latents scaled       # of a diffusion model",
        "sdvae decode huge.latent huge.png --budget 2GiB        # one image",
    ),
)
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--format",
    type=click.Choice(["png", "jpeg", "webp"]),
    default="png",
    show_default=True,
    help="Format of the image files.",
)
@click.option(
    "--latents",
    type=click.Choice(["raw", "scaled"]),
    help="For files that do not declare it: a VAE's raw latents, or a diffusion model's scaled latents.",
)
@SPACE
@METADATA
@BATCH_SIZE
@BUDGET
@with_vae
@with_console
def decode(
    source: Path,
    out: Path,
    format: Literal["png", "jpeg", "webp"],
    latents: Literal["raw", "scaled"] | None,
    space: str | None,
    no_metadata: bool,
    batch_size: int | None,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Decode SRC to image files in OUT.

    SRC is a store written by `sdvae encode`, a folder of latents that samplers and trainers save (.safetensors, .npy,
    .npz, .pt, ComfyUI's .latent), or one such file. Files of a folder that cannot be decoded are left out and named;
    the exit code is then 3. For one image, OUT may be the name of a picture: out.png. `sdvae inspect` shows which VAE
    decoded it.
    """
    console.note(f"decoding {source} into {out}")  # before the seconds that imports and weights take
    from sdvae.reading.decode import DecodeSettings, decode_dataset
    from sdvae.store.remote import local_copy

    vae = load_vae()
    console.note(describe_vae(vae))
    settings = DecodeSettings(format, latents, batch_size, budget, space, has_metadata=not no_metadata)
    with console.progress() as show:
        report = decode_dataset(local_copy(source), out, vae, settings, show)
    for told in report.skipped[:_MOST_NAMED]:
        console.note(f"left out: {told}")
    if len(report.skipped) > _MOST_NAMED:
        console.note(f"left out: {len(report.skipped) - _MOST_NAMED} more")
    console.result(
        f"{count(report.num_written, 'image')} written to {out}, {report.images_per_s:.2f} images/s",
        output=str(out),
        num_written=report.num_written,
        seconds=report.seconds,
        images_per_s=report.images_per_s,
        vae=vae.name,
        skipped=list(report.skipped),
        remarks=list(report.remarks),
    )
    if report.skipped:
        click.get_current_context().exit(3)
