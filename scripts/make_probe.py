#!/usr/bin/env python
"""Make sdvae/assets/probe.safetensors: the probe image's latents in each space, by TAESD's encoders (MIT).

scripts/make_probe.py TAESD_FOLDER      # with taesd_encoder.safetensors and its three siblings
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from sdvae import atomic, sealed
from sdvae.pixels import to_pixels
from sdvae.tiny import TinyConfig, TinyEncoder
from sdvae.weights.probe import PROBE_ASSET, probe_image

ENCODERS = {"sd1": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1"}
ASSETS = Path(__file__).parents[1] / "sdvae" / "assets"


@torch.no_grad()
def make_probe(folder: Path) -> bytes:
    """The asset: scaled latents (C, 16, 16) in fp16 by space, and where they come from."""
    image = probe_image()
    latents, sources = {}, {"image": hashlib.sha256(image.tobytes()).hexdigest()}
    for space, name in ENCODERS.items():
        path = folder / f"{name}_encoder.safetensors"
        encoder = TinyEncoder(TinyConfig.from_family(space))
        encoder.layers.load_state_dict(load_file(path))
        latents[space] = encoder(to_pixels(image[None]))[0].half()
        sources[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"licence": "MIT, Copyright (c) 2023 Ollin Boer Bohan (madebyollin/taesd)", "sha256": sources}
    return save(latents, metadata={"about": sealed.canonical_json(about).decode().strip()})  # one key: no random order


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    digest = atomic.write_bytes(ASSETS / PROBE_ASSET, make_probe(parser.parse_args().folder))
    print(f"{ASSETS / PROBE_ASSET}: sha256 {digest}")
