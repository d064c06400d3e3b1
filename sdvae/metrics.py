"""Every number that a reconstruction is judged by: one table, and the functions behind it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ShapeError

if TYPE_CHECKING:  # `psnr` of images needs no torch
    from torch import Tensor

NO_DIFFERENCE_DB = 100.0  # the PSNR of equal images where numbers are averaged, or written as JSON


@dataclass(frozen=True)
class Metric:
    """One row: what a number is called, which way is better, and which network it needs."""

    name: str
    label: str
    unit: str
    direction: Literal["higher", "lower"]
    scope: Literal["image", "set"] = "image"
    network: Literal["", "alex", "vgg", "inception"] = ""
    min_side_px: int = 1  # a smaller image has no such number


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", "dB", "higher"),
        Metric("ssim", "SSIM", "", "higher", min_side_px=11),
        Metric("ms_ssim", "MS-SSIM", "", "higher", min_side_px=161),
        Metric("lpips_alex", "LPIPS (alex)", "", "lower", network="alex", min_side_px=63),
        Metric("lpips_vgg", "LPIPS (vgg)", "", "lower", network="vgg", min_side_px=32),
        Metric("rfid", "rFID", "", "lower", "set", network="inception"),
        Metric("rkid", "rKID", "", "lower", "set", network="inception"),
    )
}


def psnr(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:  # both (H, W, 3); dB
    """Peak signal-to-noise ratio over all samples of two 8-bit images; infinite for equal ones."""
    if image.shape != reference.shape:
        raise ShapeError(f"cannot compare images of shapes {image.shape} and {reference.shape}")
    mean_square = float(np.mean(np.square(image.astype(np.float64) - reference)))
    return math.inf if mean_square == 0.0 else 10.0 * math.log10(255.0**2 / mean_square)


def psnr_of_levels(levels: "Tensor", reference: "Tensor") -> float:
    """PSNR in dB, at most NO_DIFFERENCE_DB."""
    mean_square = float((levels - reference).square().mean())
    return min(NO_DIFFERENCE_DB, 10.0 * math.log10(255.0**2 / mean_square)) if mean_square else NO_DIFFERENCE_DB
