#!/usr/bin/env python
"""Speed and memory of what quality.py judges: one photo of 512 px, all in turns, and peaks in fresh processes."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import test_data

from sdvae import VAE
from sdvae.bench.peak import measure_peak
from sdvae.bench.timing import in_turns
from sdvae.evaluate.candidates import VAECandidate, padded_pixels
from sdvae.evaluate.codecs import CodecCandidate, Image, compressed, decompressed
from sdvae.evaluate.crops import cut
from sdvae.evaluate.recipes import find_recipe
from sdvae.images.read import read_image

KODAK = test_data() / "kodak"
EMBEDDED = "sdvae-small"
TAESDS = {"taesd": "TAESD", "taesdxl": "TAESDXL", "taesd3": "TAESD3", "taef1": "TAEF1"}
ROUNDS = 7
_CPU = torch.device("cpu")


def load_taesd(name: str) -> VAE:
    """One of the TAESDs of the test data, in fp32."""
    return VAE.load(test_data() / "weights" / "taesd_bf16" / f"{name}_encoder.safetensors", "cpu", "fp32")


def bits_per_pixel(vae: VAE, image: Image) -> float:
    """The rate of a VAE: the KL of its posterior to the prior, of scaled latents, a photo pixel."""
    candidate = VAECandidate(vae)
    nats = candidate.scaled(candidate.encode(padded_pixels([image], vae.config.downscale))).kl()
    return float(nats) / math.log(2) / (image.shape[0] * image.shape[1])


LOADERS: dict[str, Callable[[], VAE]] = {
    EMBEDDED: lambda: VAE.load(device="cpu", dtype="fp32"),
    f"{EMBEDDED} in bf16": lambda: VAE.load(device="cpu", dtype="bf16"),
    **{label: lambda name=name: load_taesd(name) for name, label in TAESDS.items()},  # type: ignore[misc]
}


def measure_times() -> dict[str, Any]:
    """Median seconds to encode and decode the first photo's centre crop, and bytes beside the weights."""
    image = cut(read_image(KODAK / "kodim01.png"), find_recipe("kodak-512"))
    pixels = padded_pixels([image], 8)
    vaes = {label: load() for label, load in LOADERS.items()}
    latents = {label: vae.encode(pixels).mode() for label, vae in vaes.items()}
    encodes: dict[str, Callable[[], object]] = {
        label: lambda vae=vae: vae.encode(pixels)
        for label, vae in vaes.items()  # type: ignore[misc]
    }
    decodes: dict[str, Callable[[], object]] = {
        label: lambda label=label, vae=vae: vae.decode(latents[label])
        for label, vae in vaes.items()  # type: ignore[misc]
    }
    rate = bits_per_pixel(vaes[EMBEDDED], image)
    for codec, label in (("jpeg", "JPEG"), ("webp", "WebP"), ("avif", "AVIF")):
        quality = CodecCandidate(codec, rate, label).quality(image)  # type: ignore[arg-type]
        data = compressed(image, codec, quality)
        encodes[label] = lambda codec=codec, quality=quality: compressed(image, codec, quality)  # type: ignore[misc]
        decodes[label] = lambda data=data: decompressed(data)  # type: ignore[misc]
    rows: dict[str, dict[str, Any]] = {label: {} for label in encodes}
    for name, runs in (("encode_s", encodes), ("decode_s", decodes)):
        for run in runs.values():
            run()
        for label, seconds in in_turns(runs, ROUNDS, _CPU).items():
            rows[label][name] = round(statistics.median(seconds), 5)
            rows[label][f"spread_of_{name}"] = round(max(seconds) - min(seconds), 5)
    for label in LOADERS:
        done = subprocess.run([sys.executable, __file__, label], check=True, capture_output=True, text=True)
        rows[label]["peak_bytes"] = json.loads(done.stdout)
    return {"photo": "kodim01, centre 512 crop", "rounds": ROUNDS, "rows": rows}


def peak_of(label: str) -> int | None:
    """Bytes that a round trip takes beside the weights, in a process that has warmed up on a small image."""
    vae = LOADERS[label]()
    vae.decode(vae.encode(torch.zeros(1, 3, 64, 64)).mode())
    pixels = torch.zeros(1, 3, 512, 512)
    return measure_peak(lambda: vae.decode(vae.encode(pixels).mode()), _CPU)[1]


if __name__ == "__main__":
    print(json.dumps(peak_of(sys.argv[1])))
