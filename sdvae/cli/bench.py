"""`sdvae bench`: how fast this machine encodes and decodes, beside diffusers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from sdvae.amounts import size_text
from sdvae.cli.grouped import Grouped
from sdvae.cli.shared import FAMILY, PATH, SIZES, Console, with_console
from sdvae.errors import BenchError, ShapeError

if TYPE_CHECKING:
    from sdvae.engine.stages import Direction
    from sdvae.model import AutoencoderKL


@click.command(
    cls=Grouped,
    short_help="Measure speed and memory beside diffusers.",
    groups={"What is measured": ("sizes", "direction", "rounds", "alone")},
    examples=(
        "sdvae bench --size 512 --size 1024",
        "sdvae bench --direction decode --alone --output bench.json",
    ),
)
@SIZES
@click.option("--direction", type=click.Choice(["encode", "decode", "both"]), default="both", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), metavar="N", default=5, show_default=True, help="Timed runs each."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Images in one call."
)
@click.option("--alone", is_flag=True, help="Measure sdvae without diffusers.")
@click.option("--output", type=PATH, metavar="FILE", help="Write everything that was measured, as JSON.")
@click.option("--vae", metavar="VAE", help="Weights to measure with.  [default: random ones of --family]")
@FAMILY
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True, help="Of sdvae."
)
@with_console
def bench(
    sizes: tuple[tuple[int, int], ...],
    direction: Literal["encode", "decode", "both"],
    rounds: int,
    batch_size: int,
    alone: bool,
    output: Path | None,
    vae: str | None,
    family: str | None,
    device: str,
    dtype: str,
    console: Console,
) -> None:
    """Measure encode and decode beside diffusers, in one process and in turns.

    Each output is first compared with that of the reference network in fp32; what differs is not timed. diffusers runs
    in each dtype and memory format. Without --vae the weights are random (seed 0), of --family or sd1: speed does not
    depend on them. Measure on a machine that does nothing else.
    """
    from sdvae.bench.contenders import every_diffusers
    from sdvae.bench.report import report, table
    from sdvae.bench.throughput import Settings, measure
    from sdvae.engine.precision import choose_device, choose_dtype
    from sdvae.vae import VAE

    place = choose_device(device)
    choice = choose_dtype(dtype, place)
    model, name = _model(vae, family)
    downscale = model.config.downscale
    if odd := next((size for size in sizes if size[0] % downscale or size[1] % downscale), None):
        raise ShapeError(f"{size_text(*odd)} px: both sides must be multiples of {downscale}")
    directions: tuple[Direction, ...] = ("encode", "decode") if direction == "both" else (direction,)
    ours = VAE(model, place, choice.dtype, name)
    measurements = []
    for way in directions:
        rivals = [] if alone else every_diffusers(model, way, place)
        for size in sizes:
            measurements.append(measure(ours, model, Settings(way, *size, batch_size, rounds), rivals))
    result = report(ours, measurements)
    if output is not None:
        from sdvae import atomic

        atomic.write_bytes(output, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    console.result("\n".join(table(result)), **result)
    if refused := [row for measurement in measurements for row in measurement.rows[:1] if row.refused]:
        raise BenchError(f"sdvae {refused[0].refused}; nothing of it was timed")


def _model(vae: str | None, family: str | None) -> "tuple[AutoencoderKL, str]":
    from sdvae.bench.throughput import seeded_model
    from sdvae.config import VAEConfig
    from sdvae.model import AutoencoderKL
    from sdvae.weights.load import build_model, load_weights

    if vae is None:
        family = family or "sd1"
        return seeded_model(VAEConfig.from_family(family)), f"{family} with random weights, seed 0"
    weights = load_weights(vae, family)
    model = build_model(weights)
    if not isinstance(model, AutoencoderKL):
        raise BenchError(f"{vae} is a TAESD, which has no plan to be measured; take a KL-VAE")
    return model.requires_grad_(False), weights.name
