#!/usr/bin/env python
"""What it costs to bring a dataset to latents, and to read them: each part by itself.

benchmarks/dataset.py roster    a million photos, each a small file: listing, scan, roster, and the scan resumed
benchmarks/dataset.py pipeline  photos per second without a network; waiting with one; beside a plain diffusers loop
benchmarks/dataset.py resume    a store of ten thousand shards, gone on with
benchmarks/dataset.py reader    latents per second into a training loop, and the memory that takes
"""

import click
from pipeline import pipeline, resume
from reader import reader
from roster import roster


@click.group()
def main() -> None: ...


for command in (roster, pipeline, resume, reader):
    main.add_command(command)

if __name__ == "__main__":
    main()
