"""What `scripts/demo` runs: four photos to latents and back by the commands a user would type, and how well it went.

The picture of the README comes from `scripts/demo docs/before_after.jpg`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from skimage import data

from sdvae import atomic
from sdvae.cli.pictures import check_output, grid, write_picture
from sdvae.images.read import read_image
from sdvae.images.write import encode_image
from sdvae.metrics import psnr
from sdvae.vae import VAE

FOLDER = Path("demo")
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")  # free photos that come with scikit-image
CROP_PX = 256


def sdvae(*arguments: str) -> dict[str, Any]:
    """Run one sdvae command as a user would, and return its result."""
    print(f"$ sdvae {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "sdvae", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def detail(image: np.ndarray) -> np.ndarray:
    """A square of an image, above its middle, where faces are. Not resized: shrinking would hide what the VAE loses."""
    top, left = (image.shape[0] - CROP_PX) // 4, (image.shape[1] - CROP_PX) // 2
    return image[top : top + CROP_PX, left : left + CROP_PX]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path, nargs="?", default=FOLDER / "before_after.png", help="[%(default)s]")
    picture: Path = parser.parse_args().picture
    FOLDER.mkdir(exist_ok=True)
    check_output(picture)
    photos, latents, decoded = FOLDER / "photos", FOLDER / "latents", FOLDER / "decoded"
    photos.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        atomic.write_bytes(photos / f"{name}.png", encode_image(getattr(data, name)(), "png"))

    encoding = sdvae("encode", str(photos), str(latents), "--crop", "none", "--restart", "--yes")
    decoding = sdvae("decode", str(latents), str(decoded))

    befores = [read_image(photos / f"{name}.png") for name in PHOTOS]
    afters = [read_image(decoded / f"{name}.png") for name in PHOTOS]
    values = [psnr(after, before) for before, after in zip(befores, afters, strict=True)]
    print(f"\n{'photo':<12}{'size':>12}{'PSNR':>12}")
    for name, image, value in zip(PHOTOS, befores, values, strict=True):
        print(f"{name:<12}{f'{image.shape[1]}x{image.shape[0]}':>12}{f'{value:.2f} dB':>12}")
    seconds = [1.0 / result["images_per_s"] for result in (encoding, decoding)]
    print(f"per photo: {seconds[0]:.2f} s to encode, {seconds[1]:.2f} s to decode, with {encoding['vae']}")

    captions = list(PHOTOS) + [f"{value:.1f} dB" for value in values]
    sheet = grid([detail(image) for image in befores + afters], len(PHOTOS), captions)
    write_picture(picture, sheet, VAE.load(), has_metadata=True)
    print(f"\nbefore (top) and after (bottom): {picture.resolve()}")


if __name__ == "__main__":
    main()
