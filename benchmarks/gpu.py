#!/usr/bin/env python
"""What only a GPU can show, for Stable Diffusion's VAE with random weights in fp16.

    benchmarks/gpu.py first     seconds of the first encode and decode in a fresh process, with no cached kernels
    benchmarks/gpu.py large     decode of 4096 and 8192 px within 9 and 16 GiB: memory, and that no plan changes a bit
    benchmarks/gpu.py stream    1,000 photos from uint8 to latents to uint8, beside the kernels alone

Options: --device, --dtype, --size (of `first` and `stream`), --images, --write (results/gpu-<part>.json).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import write_result
from numpy.typing import NDArray

from sdvae.bench.peak import measure_peak
from sdvae.bench.throughput import seeded_model
from sdvae.bench.timing import seconds_of
from sdvae.config import FAMILIES
from sdvae.engine.memory import parse_bytes
from sdvae.engine.precision import DTYPES
from sdvae.staging import download, upload
from sdvae.vae import VAE

_BATCH_SIZE = 8
_LARGE = {4096: "9GiB", 8192: "16GiB"}
_ALIKE_PX = 2048  # where every plan fits


def first(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first call, then of the second."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "CUDA_CACHE_PATH": cache}
        command = [sys.executable, __file__, "_first", "--device", chosen.device, "--dtype", chosen.dtype]
        done = subprocess.run(
            [*command, "--size", str(chosen.size)], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def first_in_this_process(chosen: argparse.Namespace) -> dict[str, Any]:
    vae = _vae(chosen)
    pixels = torch.rand(1, 3, chosen.size, chosen.size, device=vae.device) * 2 - 1
    latents = torch.randn(1, 4, chosen.size // 8, chosen.size // 8, device=vae.device)
    runs = {"encode": lambda: vae.encode(pixels), "decode": lambda: vae.decode(latents)}
    seconds: dict[str, Any] = {}
    for name, run in runs.items():
        started = time.perf_counter()
        run()
        _synchronize(vae.device)
        seconds[f"first_{name}_s"] = time.perf_counter() - started
        seconds[f"second_{name}_s"] = seconds_of(run, vae.device)
    return seconds


def large(chosen: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of large decodes, and the difference between plans."""
    vae = _vae(chosen)
    engine: Any = vae.engine
    vae.decode(torch.zeros(1, 4, 8, 8))  # weights are packed now
    rows = []
    for size, budget in _LARGE.items():
        latents = torch.randn(1, 4, size // 8, size // 8, device=vae.device)
        plan = engine.plan("decode", size // 8, size // 8, budget=budget)
        pixels, peak = measure_peak(lambda z=latents, b=budget: vae.decode(z, b), vae.device)
        del pixels
        seconds = seconds_of(lambda z=latents, b=budget: vae.decode(z, b), vae.device)
        predicted = plan.predict_bytes() - latents.nbytes
        rows.append(
            {"size": size, "budget_bytes": parse_bytes(budget), "is_arena_on_host": plan.is_on_host, "seconds": seconds,
             "peak_bytes": peak, "predicted_bytes": predicted}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    latents = torch.randn(1, 4, _ALIKE_PX // 8, _ALIKE_PX // 8, device=vae.device)
    whole, on_host = engine.plan("decode", *latents.shape[2:]), engine.plan("decode", *latents.shape[2:], budget="1GiB")
    assert on_host.is_on_host and not whole.is_on_host
    near, far = vae.decode(latents), vae.decode(latents, "1GiB")
    difference = float((near - far).norm() / near.norm())
    return {"decodes": rows, "alike_px": _ALIKE_PX, "relative_difference_on_host": difference}


def stream(chosen: argparse.Namespace) -> dict[str, Any]:
    """Images per second end to end, and of the network alone on what is on the device already."""
    vae = _vae(chosen)
    photos = np.random.default_rng(0).integers(0, 256, (_BATCH_SIZE, chosen.size, chosen.size, 3), np.uint8)
    num_batches = max(2, chosen.images // _BATCH_SIZE)

    def batches() -> Iterator[NDArray[np.uint8]]:
        for number in range(num_batches):
            yield np.roll(photos, number, 2)

    def end_to_end() -> int:
        pixels = (vae.decode(vae.encode(batch).mode()) for batch in upload(batches(), vae.device))
        return sum(int(images[0, 0, 0, 0]) for images in download(pixels))

    on_device = next(upload(batches(), vae.device))

    def network_alone() -> None:
        for _ in range(num_batches):
            vae.decode(vae.encode(on_device).mode())

    for _ in range(3):  # the second is captured as a graph
        vae.decode(vae.encode(on_device).mode())
    seconds: dict[str, list[float]] = {"end to end": [], "network alone": []}
    for _ in range(3):
        for name, run in (("end to end", end_to_end), ("network alone", network_alone)):
            _synchronize(vae.device)
            started = time.perf_counter()
            run()
            _synchronize(vae.device)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: sorted(values)[1] for name, values in seconds.items()}
    num_images = num_batches * _BATCH_SIZE
    return {
        "num_images": num_images,
        "size": chosen.size,
        "seconds": seconds,
        "images_per_s": {name: num_images / median for name, median in medians.items()},
        "share_of_network_alone": medians["network alone"] / medians["end to end"],
    }


def _vae(chosen: argparse.Namespace) -> VAE:
    model = seeded_model(FAMILIES["sd1"])
    return VAE(model, torch.device(chosen.device), DTYPES[chosen.dtype], "sd1 with random weights, seed 0")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {"first": first, "large": large, "stream": stream, "_first": first_in_this_process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="|".join(name for name in PARTS if name[0] != "_"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    result = PARTS[chosen.part](chosen)
    print(json.dumps(result))
    if chosen.write:
        print(write_result(f"gpu-{chosen.part}", {"dtype": chosen.dtype} | result))


if __name__ == "__main__":
    main()
