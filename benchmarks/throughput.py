#!/usr/bin/env python
"""`sdvae bench` with two rivals more, diffusers compiled and in tiles, for Stable Diffusion's VAE with random weights.

    benchmarks/throughput.py [--size 512 ...] [--device auto] [--dtype auto] [--batch-size 1] [--rounds 5] [--write]
    benchmarks/throughput.py --sweep [--beside 1] [--network sd1 ...] [--size 64 ...] [--dtype auto] [--write]

With --write, results/<device>-<dtype>-<sizes>[x<batch>].json and a plot of speed and memory against size. The sweep is
a table of ratios on the CPU, 64 to 512 px in batches of 1 and 8, beside so many busy processes; with --write,
results/sweep-<dtype>-<n>threads[-beside<n>].json.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sweep
import torch
from common import RESULTS, write_result
from torch import Tensor

from sdvae.bench.contenders import Contender, diffusers_contender, every_diffusers, load_diffusers
from sdvae.bench.report import report, table
from sdvae.bench.throughput import Settings, measure, seeded_batch, seeded_model
from sdvae.config import FAMILIES
from sdvae.engine.precision import DTYPES, choose_device, choose_dtype
from sdvae.engine.stages import Direction
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

_APPROXIMATE = 0.8  # tiles have statistics of their own: far off on random weights, but still akin


def diffusers_tiled(model: AutoencoderKL, direction: Direction, device: torch.device, dtype: str) -> Contender:
    """`enable_tiling`, which gives another picture than the whole network does."""
    theirs = load_diffusers(model, device, dtype, "channels_last")
    theirs.enable_tiling()
    run = diffusers_contender("", theirs, direction, dtype, "channels_last").run
    return Contender("diffusers tiled", dtype, "channels_last", run, _APPROXIMATE)


def diffusers_compiled(
    model: AutoencoderKL, direction: Direction, device: torch.device, dtype: str, *, is_reindexed: bool = True
) -> Contender:
    """Its `encode` or `decode` compiled: `torch.compile(vae)` would compile `forward`, which nobody calls.

    Without `is_reindexed`, inductor does not reindex loops after it fused them, which made upsampling six times slower
    in some versions (pytorch#189488).
    """
    from torch._inductor import config as inductor

    torch.compiler.reset()  # after a few sizes, dynamo would run the next one uncompiled
    theirs = load_diffusers(model, device, dtype, "channels_last")
    setattr(theirs, direction, torch.compile(getattr(theirs, direction), dynamic=False))
    name = "diffusers compiled" if is_reindexed else "diffusers compiled, no reindexing"
    contender = diffusers_contender(name, theirs, direction, dtype, "channels_last")

    def run(batch: Tensor) -> Tensor:
        with inductor.patch({} if is_reindexed else {"loop_reindexing_after_fusion": False}):
            return contender.run(batch)

    return Contender(name, dtype, "channels_last", run, contender.tolerance)


def rivals(model: AutoencoderKL, settings: Settings, device: torch.device, dtype: str) -> Iterator[Contender]:
    """All that can run here; the others say on stdout why not."""
    direction = settings.direction
    yield from every_diffusers(model, direction, device)
    side_px = max(settings.height, settings.width)
    if side_px > model.config.sample_size:
        yield diffusers_tiled(model, direction, device, dtype)
    else:
        print(f"diffusers does not tile {side_px} px: they are one tile of {model.config.sample_size}")
    small = seeded_batch(model.config, Settings(direction, 64, 64)).to(device)
    for is_reindexed in (True, False) if device.type == "cuda" else (True,):
        contender = diffusers_compiled(model, direction, device, dtype, is_reindexed=is_reindexed)
        try:
            with torch.no_grad():
                contender.run(small)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            print(f"{contender.name} cannot run here: {error}")
            continue
        yield contender


def plot(measurements: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: megapixels a second and peak bytes over the size, a line for each contender and direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    speeds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    peaks: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in measurements:
        megapixels = one["height"] * one["width"] / 1e6
        for row in one["rows"]:
            name = f"{one['direction']}: {row['name']}, {row['dtype']}, {row['memory_format']}"
            if row["images_per_s"]:
                speeds[name].append((megapixels, row["images_per_s"] * megapixels))
            if row["peak_bytes"]:
                peaks[name].append((megapixels, row["peak_bytes"] / 1e9))
    labels = ("megapixels a second", "peak GB beside the weights")
    for axes, lines, label in zip(figure.subplots(1, 2), (speeds, peaks), labels, strict=True):
        for name, points in lines.items():
            style = "-" if ": sdvae" in name else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
        axes.set(xlabel="megapixels of an image", ylabel=label, xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def run_sweep(chosen: argparse.Namespace) -> None:
    """Print each cell as it comes, then the table."""
    choice = choose_dtype(chosen.dtype, torch.device("cpu"))
    dtype = next(name for name, known in DTYPES.items() if known == choice.dtype)
    names, sizes = chosen.network or sweep.NETWORKS, chosen.size or [64, 128, 256, 512]
    cells = []
    for cell in sweep.sweep(names, sizes, [1, 8], dtype, chosen.rounds, chosen.beside):
        cells.append(cell)
        again = "" if cell.first_ratio is None else f", {cell.first_ratio:.2f} before"
        ours, theirs = (1e3 * statistics.median(times) for times in (cell.our_seconds, cell.their_seconds))
        print(
            f"{cell.network} {cell.direction} {cell.size_px} px x {cell.batch_size}: {ours:.1f} ms, diffusers "
            f"{theirs:.1f} ms ({cell.memory_format}), ratio {cell.ratio:.2f}{again}",
            flush=True,
        )
    print("\n".join(sweep.table(cells)))
    if chosen.write:
        threads = torch.get_num_threads()
        beside = f"-beside{chosen.beside}" if chosen.beside else ""
        result = {"dtype": dtype, "threads": threads, "busy_processes": chosen.beside, "cells": sweep.values(cells)}
        print(write_result(f"sweep-{dtype}-{threads}threads{beside}", result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--size", action="append", type=int)
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--beside", default=0, type=int)
    parser.add_argument("--network", action="append", choices=sweep.NETWORKS)
    chosen = parser.parse_args()
    if chosen.sweep:
        run_sweep(chosen)
        return
    device = choose_device(chosen.device)
    choice = choose_dtype(chosen.dtype, device)
    dtype = next(name for name, known in DTYPES.items() if known == choice.dtype)
    sizes = chosen.size or [512, 1024]
    model = seeded_model(FAMILIES[chosen.family])
    vae = VAE(model, device, choice.dtype, f"{chosen.family} with random weights, seed 0")
    measurements = []
    for size in sizes:
        for direction in ("encode", "decode"):
            settings = Settings(direction, size, size, chosen.batch_size, chosen.rounds)
            measurements.append(measure(vae, model, settings, list(rivals(model, settings, device, dtype))))
    result = report(vae, measurements)
    print("\n".join(table(result)))
    if chosen.write:
        batch = "" if chosen.batch_size == 1 else f"x{chosen.batch_size}"
        path = RESULTS / f"{device.type}-{dtype}-{'-'.join(map(str, sizes))}{batch}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        plot(result["measurements"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
