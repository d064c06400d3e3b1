#!/usr/bin/env python
"""Peak memory of fresh processes on a CPU: sdvae beside its own prediction, and diffusers without tiles.

    benchmarks/memory.py [--size 512 ...] [--dtype bf16] [--family sd1] [--write]

Bytes above the process with its weights, its input and warm libraries. Weights are random.
"""

import argparse
from dataclasses import asdict

from common import write_result

from sdvae.bench.memory import Task, measure_fresh
from sdvae.config import VAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="pixels along each side (512 and 1024)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    config = VAEConfig.from_family(chosen.family)
    rows = []
    print(f"{'':<24}{'peak MB':>10}{'predicted':>11}{'ratio':>8}")
    for size in chosen.size or [512, 1024]:
        for direction in ("encode", "decode"):
            for who in ("sdvae", "diffusers"):
                peak = measure_fresh(Task(config, direction, size, size, chosen.dtype, who))
                assert peak is not None  # None is for tasks with a limit
                row = {"direction": direction, "size": size, "who": who} | asdict(peak)
                rows.append(row)
                expected = peak.predicted_bytes
                told = "" if expected is None else f"{expected / 1e6:>11.0f}{peak.peak_bytes / expected:>8.2f}"
                print(f"{direction} {size:<6} {who:<10}{peak.peak_bytes / 1e6:>10.0f}{told}", flush=True)
    if chosen.write:
        print(write_result(f"memory-{chosen.dtype}", {"family": chosen.family, "dtype": chosen.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
