#!/usr/bin/env python
"""Train the embedded default: a small KL-VAE whose latents live in Stable Diffusion 1's latent space.

    scripts/train_default.py TRAIN_PHOTOS TAESD_FOLDER -o RUN      # about 95 minutes on one AVX512-bf16 core

Opens only the training photos and the frozen TAESD (MIT). Four terms per step, fixed seed, fixed number
of steps, no selection on any test photo:

    reconstruction  half of the batch decodes our posterior samples, the other half TAESD's latents
    pull            our mean towards the latents of the TAESD encoder for the same crop
    crossing        the frozen TAESD decoder on our mean (every second step, half of the batch)
    KL              of our posterior to N(0, I), a trace

`--stop-after 50` ends early and leaves the log to compare with the committed one.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae.config import FAMILIES
from sdvae.model import AutoencoderKL

SEED = 0
NUM_THREADS = 1  # sums in a fixed order: the same log on every run of the same CPU
NUM_STEPS = 4600
WARMUP_STEPS = 100
LEARNING_RATE = 2e-3
EMA_DECAY = 0.999
# (first step, crop in pixels, batch): the last fifth sees larger crops, whose GroupNorm statistics are
# closer to those of whole photos. Both hold the same number of pixels.
PHASES = [(0, 96, 8), (3700, 192, 2)]
MAX_SHRINK = 3.0  # half of the crops are cut up to this much larger and shrunk: sharper than most JPEGs
PULL_WEIGHT, CROSSING_WEIGHT, KL_WEIGHT = 0.5, 1.0, 1e-5
CONFIG = FAMILIES["small"]


def load_photos(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*.jpg"))]


def random_crops(photos: list[Image.Image], size_px: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless pixels (3, size, size) in [-1, 1]; a photo is drawn as often as the root of its area."""
    photos = [photo for photo in photos if min(photo.size) >= size_px]
    weights = np.sqrt([photo.width * photo.height for photo in photos])
    weights /= weights.sum()
    while True:
        photo = photos[rng.choice(len(photos), p=weights)]
        largest = min(*photo.size, int(size_px * MAX_SHRINK))
        side = size_px if rng.random() < 0.5 else int(rng.integers(size_px, largest + 1))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.resize((size_px, size_px), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        image = np.asarray(crop)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        yield torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def load_taesd(folder: Path) -> AutoencoderTiny:
    """TAESD from its two bare nn.Sequential files; diffusers drops the decoder's leading clamp layer."""
    tensors = {f"encoder.layers.{key}": value for key, value in load_file(folder / "taesd_encoder.safetensors").items()}
    for key, value in load_file(folder / "taesd_decoder.safetensors").items():
        layer, rest = key.split(".", 1)
        tensors[f"decoder.layers.{int(layer) - 1}.{rest}"] = value
    taesd = AutoencoderTiny()
    taesd.load_state_dict(tensors)
    return taesd.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def pixel_loss(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Mostly squared error, which PSNR counts; some absolute error keeps flat areas clean."""
    difference = reconstruction.float() - pixels
    return 4.0 * difference.square().mean() + 0.25 * difference.abs().mean()


def losses(model: AutoencoderKL, taesd: AutoencoderTiny, pixels: Tensor, step: int) -> dict[str, Tensor]:
    half = len(pixels) // 2
    scale = CONFIG.scaling_factor
    with torch.no_grad():
        theirs = taesd.encode(pixels).latents.float() / scale
    posterior = model.encode(pixels)
    mean = posterior.mean.float()
    ours = posterior.sample().float()
    parts = {
        "own": pixel_loss(model.decode(ours[:half]), pixels[:half]),
        "theirs": pixel_loss(model.decode(theirs[half:]), pixels[half:]),
        "pull": PULL_WEIGHT * F.mse_loss(mean * scale, theirs * scale),
        "kl": KL_WEIGHT * posterior.kl().mean() / mean[0].numel(),
    }
    if step % 2 == 0:
        crossed = taesd.decode(mean[half:] * scale).sample
        parts["crossing"] = CROSSING_WEIGHT * pixel_loss(crossed, pixels[half:])
    return parts


def learning_rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)
    return LEARNING_RATE * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: AutoencoderKL, model: AutoencoderKL, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1.0 - decay)


def train(photos: Path, taesd_folder: Path, out: Path, stop_after: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    rng = np.random.default_rng(SEED)
    out.mkdir(parents=True)
    model = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    taesd = load_taesd(taesd_folder)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1e-3)
    images = load_photos(photos)
    started = time.monotonic()
    with (out / "log.jsonl").open("w", buffering=1) as log:
        for step in range(stop_after):
            for first_step, size_px, batch in PHASES:
                if step == first_step:
                    crops, batch_size = random_crops(images, size_px, rng), batch
            pixels = torch.stack([next(crops) for _ in range(batch_size)]).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                parts = losses(model, taesd, pixels, step)
            loss = torch.stack(list(parts.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
            update_average(average, model, step)
            if step < 50 or step % 50 < 2:
                line = {name: round(value.item(), 5) for name, value in parts.items()}
                log.write(json.dumps({"step": step, "seconds": round(time.monotonic() - started)} | line) + "\n")
            if (step + 1) % 500 == 0 or step + 1 == stop_after:
                halved = {key: value.half().contiguous() for key, value in average.state_dict().items()}
                metadata = {"format": "pt", "sdvae.family": "small", "license": "apache-2.0"}
                save_file(halved, out / f"step{step + 1}.safetensors", metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("taesd", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--stop-after", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    train(arguments.photos, arguments.taesd, arguments.out, arguments.stop_after)


if __name__ == "__main__":
    main()
