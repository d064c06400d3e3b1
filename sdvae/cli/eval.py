"""`sdvae eval`: how well VAEs reconstruct photos."""

import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdvae.amounts import count
from sdvae.cli.shared import (
    BATCH_SIZE,
    BUDGET,
    DEVICE,
    FAMILY,
    PATH,
    VAES,
    Console,
    dtype_option,
    take_own_gpu,
    with_console,
)

if TYPE_CHECKING:
    from sdvae.evaluate.candidates import VAECandidate
    from sdvae.vae import VAE

_RECIPES = ("native", "kodak", "kodak-512", "sd-vae-card", "imagenet-256")
_SIZES = (256, 512, 768, 1024)
_TILES = (512, 256)


@click.command("eval", short_help="Judge VAEs by what they make of photos.")
@click.argument("source", metavar="SRC")
@VAES
@click.option("-o", "--output", type=PATH, metavar="REPORT", help="The folder to write results.json and pictures into.")
@click.option(
    "--recipe",
    type=click.Choice(_RECIPES),
    default="native",
    show_default=True,
    help="Crop, resize and comparison; printed as the table's caption.",
)
@click.option(
    "--metrics",
    metavar="NAME,...",
    help="Of psnr, ssim, ms_ssim, lpips_alex, lpips_vgg, rfid, rkid.  [default: the recipe's, as far as their networks "
    "are on this machine]",
)
@click.option(
    "--vary",
    type=click.Choice(["dtype", "tiling", "size"]),
    help="Judge one VAE in each dtype, with diffusers' tiles, or at several sizes.",
)
@click.option(
    "--explain-difference",
    is_flag=True,
    help="Instead of a report: the same photos under each other convention, and which number it moves.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Judge only the first N photos of SRC.")
@BATCH_SIZE
@BUDGET
@FAMILY
@DEVICE
@dtype_option("fp32")
@with_console
def evaluate(
    source: str,
    vaes: tuple[str, ...],
    output: Path | None,
    recipe: str,
    metrics: str | None,
    vary: str | None,
    explain_difference: bool,
    limit: int | None,
    batch_size: int | None,
    budget: int | None,
    family: str | None,
    device: str,
    dtype: str,
    console: Console,
) -> None:
    """Encode and decode the photos in SRC with each VAE, and compare.

    The table goes to stdout; results.json, a page to look at and the scores of each photo go to REPORT. After an
    interruption, the same command continues. Under accelerate launch, torchrun or srun, each process judges its share.
    """
    if (output is None) != explain_difference:
        raise click.UsageError("give -o REPORT, or --explain-difference, which writes nothing.")
    if (vary or explain_difference) and len(vaes) > 1:
        raise click.UsageError("--vary and --explain-difference are for one VAE.")
    from sdvae.encoding.runners import Ranks
    from sdvae.evaluate.recipes import find_recipe
    from sdvae.evaluate.results import to_json
    from sdvae.evaluate.run import evaluate as run
    from sdvae.evaluate.table import table
    from sdvae.sources.open import open_source

    ranks = Ranks.of_environment()
    take_own_gpu(ranks)
    chosen = find_recipe(recipe)
    if metrics:
        chosen = replace(chosen, metrics=tuple(metrics.split(",")))
    if limit:
        chosen = replace(chosen, max_images=min(limit, chosen.max_images or limit))
    photos = open_source(source)
    candidates = _candidates(vaes or (None,), vary, device, dtype, family, budget)
    with console.progress() as show:
        if output is None:
            from sdvae.evaluate.explain import explain, explained

            found = explain(photos, candidates[0], chosen, candidates[0].vae.device, show)
            console.result("\n".join(explained(found)), **asdict(found))
            return
        results = run(
            photos, output, candidates, chosen, batch_size=batch_size, ranks=ranks, must_have_all=bool(metrics),
            progress=show,
        )  # fmt: skip
    if results is None:
        console.result(f"judged this process's share into {output}; others are still at work", output=str(output))
        return
    for reason, number in results.left_out.items():
        console.note(f"{count(number, 'photo')} left out: {reason}")
    page = _write_page(output, console)
    console.result("\n".join(table(results)), output=str(output), page=page, **to_json(results))
    if results.left_out and ranks.world_size == 1:  # a launcher ends all ranks when one does not exit with 0
        click.get_current_context().exit(3)


def _write_page(report: Path, console: Console) -> str | None:
    """The page of a report; its numbers are worth having without the library that sets it."""
    if find_spec("jinja2") is None:
        console.note("no page is made without jinja2; pip install 'sdvae[report]', then run sdvae report")
        return None
    from sdvae.report.comparison import write_report

    page = str(write_report(report))
    console.note(f"to look at: {page}")
    return page


def _candidates(
    specs: tuple[str | None, ...],
    vary: str | None,
    device: str,
    dtype: str,
    family: str | None,
    budget: int | None,
) -> "list[VAECandidate]":
    from sdvae.evaluate.candidates import VAECandidate
    from sdvae.vae import VAE

    if vary is None:
        loaded = [VAE.load(spec, device, dtype, family) for spec in specs]
        labels = [_label(vae) for vae in loaded]
        return [
            VAECandidate(vae, label if labels.count(label) == 1 else vae.name, budget=budget)
            for vae, label in zip(loaded, labels, strict=True)
        ]
    first = VAE.load(specs[0], device, "fp32" if vary == "dtype" else dtype, family)
    return _varied(first, vary, budget)


def _varied(vae: "VAE", vary: str, budget: int | None) -> "list[VAECandidate]":
    from sdvae.engine.precision import DTYPES
    from sdvae.evaluate.candidates import VAECandidate
    from sdvae.vae import VAE

    name = _label(vae)
    if vary == "size":
        return [VAECandidate(vae, f"{name} {size} px", size_px=size, budget=budget) for size in _SIZES]
    if vary == "tiling":
        tiled = [VAECandidate(vae, f"{name}, diffusers' {tile} px tiles", tile_px=tile) for tile in _TILES]
        return [VAECandidate(vae, f"{name} whole", budget=budget), *tiled]
    dtypes = ("fp32", "bf16") if vae.device.type == "cpu" else ("fp32", "bf16", "fp16")  # fp16 takes minutes on CPUs
    return [
        VAECandidate(VAE(vae.model, vae.device, DTYPES[dtype], vae.name), f"{name} {dtype}", budget=budget)
        for dtype in dtypes
    ]


def _label(vae: "VAE") -> str:
    """A short name: of a path, the last part without its ending; of a TAESD's two files, what they share."""
    path = Path(vae.name)
    if not path.is_file():
        return path.name if path.is_dir() else vae.name
    return re.sub("_(encoder|decoder)$", "", path.stem)
