"""How far two images are apart."""

import math

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ShapeError


def psnr(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:  # both (H, W, 3); dB
    """Peak signal-to-noise ratio over all samples of two 8-bit images; infinite for equal ones."""
    if image.shape != reference.shape:
        raise ShapeError(f"cannot compare images of shapes {image.shape} and {reference.shape}")
    mean_square = float(np.mean(np.square(image.astype(np.float64) - reference)))
    return math.inf if mean_square == 0.0 else 10.0 * math.log10(255.0**2 / mean_square)
