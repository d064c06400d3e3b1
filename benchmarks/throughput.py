#!/usr/bin/env python
"""`sdvae bench` for Stable Diffusion's VAE at 512 and 1024 px, and its result file.

    benchmarks/throughput.py [--write] [options of sdvae bench]

With --write, results/<device>-<dtype>-<sizes>[x<batch>].json and its plot. Sizes given by --size replace those two.
"""

import argparse

from common import RESULTS

from sdvae.cli.main import cli
from sdvae.engine.precision import DTYPES, choose_device, choose_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", action="append")
    parser.add_argument("--batch-size", default="1")
    chosen, arguments = parser.parse_known_args()
    device = choose_device(chosen.device)
    choice = choose_dtype(chosen.dtype, device)
    dtype = next(name for name, known in DTYPES.items() if known == choice.dtype)
    sizes = chosen.size or ["512", "1024"]
    arguments = ["bench", "--device", chosen.device, "--dtype", dtype, "--batch-size", chosen.batch_size, *arguments]
    arguments += [argument for size in sizes for argument in ("--size", size)]
    if chosen.write:
        batch = "" if chosen.batch_size == "1" else f"x{chosen.batch_size}"
        path = RESULTS / f"{device.type}-{dtype}-{'-'.join(sizes)}{batch}.json"
        arguments += ["--output", str(path), "--plot", str(path.with_suffix(".png"))]
    cli(arguments, prog_name="sdvae")


if __name__ == "__main__":
    main()
