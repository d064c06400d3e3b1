"""Validation: held-out photos through the averaged weights, as numbers and as a picture."""

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.encoding.load_photo import load
from sdvae.encoding.times import Times
from sdvae.evaluate.judge import Judge, appoint
from sdvae.evaluate.recipes import Recipe
from sdvae.metrics import METRICS
from sdvae.model import AutoencoderKL
from sdvae.pixels import to_images, to_pixels
from sdvae.sources.entries import Source
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record
from sdvae.train.data import held_out_geometry, memory_format
from sdvae.train.optimise import mean_over_ranks

_LOG = logging.getLogger(__name__)

_GAP_PX = 4
_RECIPE = Recipe("held-out", "held-out photos, centre crops", metrics=("psnr", "ssim", "ms_ssim", "lpips_alex"))

Image = NDArray[np.uint8]


def load_held_out(source: Source, records: list[Record], size_px: int, downscale: int) -> list[Image]:
    """The centres of the held-out photos; one that cannot be read is left out, with a warning."""
    images = []
    for record in records:
        image = np.empty((size_px, size_px, 3), np.uint8)
        placed = replace(record, geometry=held_out_geometry(record, size_px, downscale))
        failure = load(source, Preprocess(size_px), placed, image, Times())
        if failure is None:
            images.append(image)
        else:
            _LOG.warning("%s is left out of the validation: %s", record.key, failure.reason)
    return images


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: list[Image]) -> list[Image]:
    """What the decoder makes of the posteriors' means, image by image, in fp32."""
    device = next(model.parameters()).device
    decoded = []
    for image in images:
        pixels = to_pixels(image[None]).to(device, memory_format=memory_format(device))
        decoded.append(to_images(model.decode(model.encode(pixels).mode()).nan_to_num())[0])
    return decoded


def appoint_judge(device: torch.device) -> Judge:
    """Who gives the scores; one whose network is not on this machine is left out."""
    judge = appoint(_RECIPE, device)
    for remark in judge.remarks:
        _LOG.info("%s", remark)
    return judge


def validate(model: AutoencoderKL, images: list[Image], judge: Judge, rank: int, world_size: int) -> dict[str, float]:
    """The means of the metrics over all images, which have one size; each rank takes its share."""
    names = [name for name in judge.scores if min(images[0].shape[:2]) >= METRICS[name].min_side_px]
    device = next(model.parameters()).device
    sums = torch.zeros(len(names) + 1, dtype=torch.float32, device=device)  # the last counts
    share = images[rank::world_size]
    for decoded, image in zip(reconstruct(model, share), share, strict=True):
        scores = judge.score(_levels(decoded, device), _levels(image, device))
        sums += torch.tensor([*(scores[name] for name in names), 1.0], dtype=torch.float32, device=device)
    mean_over_ranks([sums])
    return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))


def _levels(image: Image, device: torch.device) -> Tensor:  # (H, W, 3) uint8 -> (1, 3, H, W), 0..255
    precise = torch.float64 if device.type != "mps" else torch.float32
    return torch.from_numpy(image).to(device).to(precise).permute(2, 0, 1)[None]


def strip(model: AutoencoderKL, images: list[Image]) -> Image:
    """The images in a row, and below each what the model makes of it."""
    rows = [_row(images), _row(reconstruct(model, images))]
    gap = np.full((_GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([rows[0], gap, rows[1]])


def _row(images: list[Image]) -> Image:
    gap = np.full((images[0].shape[0], _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
