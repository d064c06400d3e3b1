#!/usr/bin/env python
"""Reconstruction quality on Kodak: the embedded VAE, TAESD, and each decoding the other's latents.

    benchmarks/quality.py [--vae SPEC --family NAME] [--write]

Centre 512 crops of the 24 photos, fp32, PSNR of 8-bit images, mean over photos. Never a training photo.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import test_data, write_result
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from sdvae import VAE
from sdvae.encoding.resize import apply
from sdvae.images.read import read_image
from sdvae.metrics import psnr
from sdvae.pixels import to_images, to_pixels
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.tiny import AutoencoderTiny, TinyConfig, named_as_diffusers

SIZE_PX = 512
Picture = NDArray[np.uint8]


def load_taesd(folder: Path) -> AutoencoderTiny:
    """SD 1's TAESD from its two files."""
    encoder, decoder = (load_file(folder / f"taesd_{side}.safetensors") for side in ("encoder", "decoder"))
    taesd = AutoencoderTiny(TinyConfig.from_family("sd1"))
    taesd.load_state_dict(named_as_diffusers(encoder, decoder))
    return taesd.eval()


def lanczos_bicubic(image: Picture) -> Picture:
    """The floor: as many numbers as the latents would have, without a network (3 of 4)."""
    small = Image.fromarray(image).resize((SIZE_PX // 8, SIZE_PX // 8), Image.Resampling.LANCZOS)
    return np.asarray(small.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC))


def round_trips(vae: VAE, taesd: AutoencoderTiny) -> dict[str, Callable[[Picture], Picture]]:
    """Row of the table -> the round trip it measures."""

    def encode(image: Picture) -> torch.Tensor:
        return vae.encode(to_pixels(image[None])).mode()

    def decode(latents: torch.Tensor) -> Picture:
        return to_images(vae.decode(latents))[0]

    def taesd_encode(image: Picture) -> torch.Tensor:
        return taesd.encode(to_pixels(image[None])).mode()

    def taesd_decode(latents: torch.Tensor) -> Picture:
        return to_images(taesd.decode(latents))[0]

    return {
        "Lanczos 8x down, bicubic up": lanczos_bicubic,
        f"{vae.name}": lambda image: decode(encode(image)),
        f"{vae.name} latents through TAESD's decoder": lambda image: taesd_decode(encode(image)),
        f"TAESD latents through {vae.name}'s decoder": lambda image: decode(taesd_encode(image)),
        "TAESD": lambda image: taesd_decode(taesd_encode(image)),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", help="a folder, file or hub id; the embedded VAE without it")
    parser.add_argument("--family", help="the config of a bare weights file")
    parser.add_argument("--write", action="store_true", help="write results/quality-kodak.json")
    arguments = parser.parse_args()
    vae = VAE.load(arguments.vae, device="cpu", dtype="fp32", family=arguments.family)
    taesd = load_taesd(test_data() / "weights" / "taesd_bf16")
    trips = round_trips(vae, taesd)
    values: dict[str, list[float]] = {row: [] for row in trips}
    for path in sorted((test_data() / "kodak").glob("*.png")):
        photo = read_image(path)
        image = apply(photo, plan_geometry(*photo.shape[:2], Preprocess(SIZE_PX, "center"), downscale=8))
        for row, trip in trips.items():
            values[row].append(psnr(trip(image), image))
    num_photos = len(values["TAESD"])
    print(f"PSNR in dB, mean of {num_photos} Kodak photos, centre {SIZE_PX} crops, 8 bits, fp32")
    for row, per_photo in values.items():
        print(f"{statistics.fmean(per_photo):6.2f}  {row}")
    if arguments.write:
        table = {row: round(statistics.fmean(per_photo), 3) for row, per_photo in values.items()}
        rounded = {row: [round(value, 3) for value in per_photo] for row, per_photo in values.items()}
        path = write_result("quality-kodak", {"vae": vae.fingerprint, "mean_psnr_db": table, "psnr_db": rounded})
        print(f"written to {path}")


if __name__ == "__main__":
    main()
