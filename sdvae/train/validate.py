"""Validation: held-out photos through the averaged weights, as numbers and as a picture."""

import logging
import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sdvae.encoding.load_photo import load
from sdvae.encoding.times import Times
from sdvae.metrics import psnr
from sdvae.model import AutoencoderKL
from sdvae.pixels import to_images, to_pixels
from sdvae.sources.entries import Source
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record
from sdvae.train.data import held_out_geometry
from sdvae.train.optimise import mean_over_ranks

_LOG = logging.getLogger(__name__)

_GAP_PX = 4

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
        pixels = to_pixels(image[None]).to(device, memory_format=torch.channels_last)
        decoded.append(to_images(model.decode(model.encode(pixels).mode()).nan_to_num())[0])
    return decoded


def validate(model: AutoencoderKL, images: list[Image], rank: int, world_size: int) -> dict[str, float]:
    """The means of the metrics over all images; each rank takes its share."""
    share = images[rank::world_size]
    values = [psnr(decoded, image) for decoded, image in zip(reconstruct(model, share), share, strict=True)]
    device = next(model.parameters()).device
    sums = torch.tensor([math.fsum(values), len(values)], dtype=torch.float64).to(device, torch.float32)
    mean_over_ranks([sums])
    return {"psnr_db": float(sums[0] / sums[1])}


def strip(model: AutoencoderKL, images: list[Image]) -> Image:
    """The images in a row, and below each what the model makes of it."""
    rows = [_row(images), _row(reconstruct(model, images))]
    gap = np.full((_GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([rows[0], gap, rows[1]])


def _row(images: list[Image]) -> Image:
    gap = np.full((images[0].shape[0], _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
