"""`sdvae bench`: how fast this machine encodes and decodes, beside diffusers."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sdvae.cli.shared import FAMILY, PATH, SIZES, Console, with_console
from sdvae.errors import BenchError, ShapeError

if TYPE_CHECKING:
    import torch

    from sdvae.bench.throughput import Measurement, Row
    from sdvae.config import VAEConfig
    from sdvae.engine.stages import Direction
    from sdvae.model import AutoencoderKL

SCHEMA = 1  # of the JSON, which benchmarks/README.md describes
_KERNEL_BATCHES = (1, 8)
_LARGE_PX = 16384  # whose plans must be made in no time


@click.command(short_help="Measure speed and memory beside diffusers.")
@SIZES
@click.option("--direction", type=click.Choice(["encode", "decode", "both"]), default="both", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), metavar="N", default=5, show_default=True, help="Timed runs each."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Images in one call."
)
@click.option(
    "--rivals",
    type=click.Choice(["loaded", "best", "compile", "tiled", "none"]),
    multiple=True,
    default=("loaded", "best", "compile", "tiled"),
    help="diffusers as loaded (fp32), in its best dtype and memory format, compiled, with tiles; may be given again.  "
    "[default: all]",
)
@click.option("--output", type=PATH, metavar="FILE", help="Write everything that was measured, as JSON.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw throughput and peak memory against size, as PNG.")
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
    rivals: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    vae: str | None,
    family: str | None,
    device: str,
    dtype: str,
    console: Console,
) -> None:
    """Measure encode and decode beside diffusers, in one process and in turns.

    Before anything is timed its output is compared with the reference network's in fp32; what differs is not timed.
    Without --vae the weights are random (seed 0), of --family or sd1: how long a network takes does not depend on them.
    Only a machine without other work gives numbers worth keeping.
    """
    from sdvae.bench.machine import machine_card
    from sdvae.bench.throughput import Settings, measure, rooflines
    from sdvae.engine.precision import choose_device, choose_dtype
    from sdvae.vae import VAE

    place = choose_device(device)
    choice = choose_dtype(dtype, place)
    model, name = _model(vae, family)
    downscale = model.config.downscale
    if odd := next((size for size in sizes if size[0] % downscale or size[1] % downscale), None):
        raise ShapeError(f"{odd[1]}x{odd[0]} px: both sides must be multiples of {downscale}")
    directions: tuple[Direction, ...] = ("encode", "decode") if direction == "both" else (direction,)
    chosen = () if "none" in rivals else rivals
    ours = VAE(model, place, choice.dtype, name)
    measurements = [
        measure(ours, model, Settings(way, *size, batch_size, rounds, chosen)) for size in sizes for way in directions
    ]
    peaks = rooflines(measurements, place)
    planning_s = _planning_seconds(model.config, choice.dtype.itemsize)
    kernels = _kernels(model, sizes[0], rounds, directions, place) if place.type == "cuda" else None
    result = {
        "schema": SCHEMA,
        "machine": machine_card(),
        "vae": name,
        "device": str(place),
        "dtype": str(choice.dtype).removeprefix("torch."),
        "rounds": rounds,
        "roofline_tflops": peaks,
        "planning_16384_s": planning_s,
        "measurements": [_values(measurement, peaks) for measurement in measurements],
        "kernels": kernels,
    }
    if output is not None:
        from sdvae import atomic

        atomic.write_bytes(output, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    if plot is not None:
        from sdvae.bench.plots import plot as draw

        draw(measurements, plot)
    console.result("\n".join(_lines(result, measurements, peaks)), **result)
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


def _planning_seconds(config: "VAEConfig", element_bytes: int) -> float:
    """How long the plans of both directions take for a picture that is larger than any."""
    from sdvae.engine.plan import make_plan
    from sdvae.engine.stages import build_network

    start = time.perf_counter()
    make_plan(build_network(config, "encode"), _LARGE_PX, _LARGE_PX, element_bytes)
    side = _LARGE_PX // config.downscale
    make_plan(build_network(config, "decode"), side, side, element_bytes)
    return time.perf_counter() - start


def _kernels(
    model: "AutoencoderKL",
    size: tuple[int, int],
    rounds: int,
    directions: "tuple[Direction, ...]",
    device: "torch.device",
) -> list[dict[str, Any]]:
    """The network's operations one by one on the GPU, torch's and ours, in both half precisions."""
    from dataclasses import asdict

    from sdvae.bench.kernels import time_kernels
    from sdvae.bench.twins import time_twins
    from sdvae.engine.stages import build_network

    timings: list[dict[str, Any]] = []
    for way in directions:
        scale = 1 if way == "encode" else model.config.downscale
        network, (height, width) = build_network(model.config, way), (side // scale for side in size)
        for dtype in ("fp16", "bf16"):
            for batch_size in _KERNEL_BATCHES:
                found = time_kernels(network, height, width, batch_size, device, dtype, rounds)
                timings += [_kernel_values(way, dtype, batch_size) | asdict(timing) for timing in found]
            twins = time_twins(network, height, width, device, dtype, rounds)
            timings += [_kernel_values(way, dtype, 1) | asdict(timing) for timing in twins]
    return timings


def _kernel_values(direction: "Direction", dtype: str, batch_size: int) -> dict[str, Any]:
    return {"direction": direction, "dtype": dtype, "batch_size": batch_size}


def _values(measurement: "Measurement", peaks: dict[str, float]) -> dict[str, Any]:
    """A measurement as the JSON has it."""
    return {
        "direction": measurement.direction,
        "height": measurement.height,
        "width": measurement.width,
        "batch_size": measurement.batch_size,
        "gflop": measurement.flops / 1e9,
        "predicted_bytes": measurement.predicted_bytes,
        "rows": [_row_values(row, measurement, peaks) for row in measurement.rows],
        "survey": [_row_values(row, measurement, peaks) for row in measurement.survey],
    }


def _row_values(row: "Row", measurement: "Measurement", peaks: dict[str, float]) -> dict[str, Any]:
    median_s, our_median_s = row.median_s, measurement.rows[0].median_s
    tflops = measurement.flops / median_s / 1e12 if median_s else None
    return {
        "name": row.name,
        "dtype": row.dtype,
        "memory_format": row.memory_format,
        "refused": row.refused,
        "relative_error": row.relative_error,
        "seconds": list(row.seconds),
        "median_s": median_s,
        "images_per_s": measurement.batch_size / median_s if median_s else None,
        "tflops": tflops,
        "roofline_fraction": tflops / peaks[row.dtype] if tflops and row.dtype in peaks else None,
        "times_as_long": median_s / our_median_s if median_s and our_median_s else None,
        "peak_bytes": row.peak_bytes,
    }


def _lines(result: dict[str, Any], measurements: "list[Measurement]", peaks: dict[str, float]) -> list[str]:
    card = result["machine"]
    lines = [
        f"{card['gpu'] or card['cpu']}; {card['usable_cores']} cores, {card['threads']} threads, "
        f"{card['cpu_capability']}; torch {card['torch']}, diffusers {card['diffusers']}",
        f"{result['vae']} on {result['device']}; medians of {result['rounds']} rounds in turns, their spread beside",
        *(f"roofline: {tflops:.3g} TFLOP/s, a large matrix product in {dtype}" for dtype, tflops in peaks.items()),
        f"plans for {_LARGE_PX}x{_LARGE_PX} px, both directions: made in {result['planning_16384_s']:.3f} s",
    ]
    for measurement in measurements:
        lines += [
            "",
            f"{measurement.direction} {measurement.width}x{measurement.height}, {measurement.batch_size} image(s)",
        ]
        if measurement.survey:
            lines.append(f"  {'diffusers in':<44}{'median s':>10}{'spread':>9}{'error':>10}")
        lines += [f"  {row.dtype + ', ' + row.memory_format:<44}{_timing(row)}" for row in measurement.survey]
        lines.append(
            f"  {'':<44}{'median s':>10}{'spread':>9}{'error':>10}{'TFLOP/s':>9}{'roofline':>10}"
            f"{'times ours':>12}{'peak MB':>9}"
        )
        for row in measurement.rows:
            values = _row_values(row, measurement, peaks)
            title = f"{row.name} ({row.dtype}, {row.memory_format})"
            lines.append(f"  {title:<44}{_timing(row)}{_figures(values)}")
        lines.append(f"  sdvae's plan predicts {measurement.predicted_bytes / 1e6:.0f} MB")
    lines += _kernel_lines(result["kernels"] or [])
    return lines


def _timing(row: "Row") -> str:
    if row.refused is not None or row.median_s is None:
        return f"   {row.refused}"
    spread = (max(row.seconds) - min(row.seconds)) / row.median_s
    return f"{row.median_s:>10.4g}{spread:>8.0%} {row.relative_error:>9.2g}"


def _figures(values: dict[str, Any]) -> str:
    if values["median_s"] is None:
        return ""
    peak = "" if values["peak_bytes"] is None else f"{values['peak_bytes'] / 1e6:.0f}"
    fraction = "" if values["roofline_fraction"] is None else f"{values['roofline_fraction']:.0%}"
    ratio = "" if values["times_as_long"] is None else f"{values['times_as_long']:.2f}"
    return f"{values['tflops']:>9.3g}{fraction:>10}{ratio:>12}{peak:>9}"


def _kernel_lines(kernels: list[dict[str, Any]]) -> list[str]:
    if not kernels:
        return []
    lines = ["", f"{'kernel':<30}{'shape':<36}{'batch':<7}{'dtype':<7}{'ms':>8}{'TFLOP/s':>9}{'GB/s':>8}"]
    for one in kernels:
        tflops = "" if one["tflops"] is None else f"{one['tflops']:.0f}"
        what = f"{one['operation']:<30}{one['shape']:<36}{one['batch_size']:<7}{one['dtype']:<7}"
        lines.append(f"{what}{one['seconds'] * 1e3:>8.3f}{tflops:>9}{one['gb_per_s']:>8.0f}")
    return lines
