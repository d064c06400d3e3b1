"""SSIM (Wang et al. 2004) and MS-SSIM (Wang, Simoncelli and Bovik 2003), per channel of RGB, then their mean."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Window = Literal["gaussian", "uniform", "reflected"]

GAUSSIAN_PX, UNIFORM_PX = 11, 7
_STD = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, from coarse means of structure to the finest
MS_SSIM_MIN_PX = (GAUSSIAN_PX - 1) * 2 ** (len(_WEIGHTS) - 1) + 1


def ssim(levels: Tensor, reference: Tensor, window: Window = "gaussian") -> float:  # both (1, 3, H, W), 0..255
    """Mean SSIM over the places where the whole window lies in the image.

    "gaussian": 11 px, std 1.5, as Wang's and everybody's. "uniform": 7 px and unbiased variances, scikit-image's
    default. "reflected": the Gaussian, also over the borders, where the image is reflected; torchmetrics' way.
    """
    if window == "reflected":
        half = GAUSSIAN_PX // 2
        levels, reference = (F.pad(image, (half,) * 4, mode="reflect") for image in (levels, reference))
    similarity, _ = _maps(levels, reference, window)
    return float(similarity.mean())


def ms_ssim(levels: Tensor, reference: Tensor) -> float:  # both (1, 3, H, W), 0..255, sides of MS_SSIM_MIN_PX or more
    """Contrast and structure on five scales, each half the last, and on the coarsest the luminance, too."""
    product = torch.ones(levels.shape[1], dtype=levels.dtype, device=levels.device)
    for scale, weight in enumerate(_WEIGHTS):
        similarity, contrast = _maps(levels, reference, "gaussian")
        term = similarity if scale == len(_WEIGHTS) - 1 else contrast
        product = product * term.mean((0, 2, 3)).clamp(min=0.0) ** weight
        odd = [side % 2 for side in levels.shape[2:]]
        levels, reference = (F.avg_pool2d(image, 2, padding=odd) for image in (levels, reference))
    return float(product.mean())


def _maps(levels: Tensor, reference: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """SSIM, and its part without luminance, at each place."""
    stacked = torch.cat([levels, reference, levels * levels, reference * reference, levels * reference], 1)
    taps, unbiased = _taps(window)
    taps = taps.to(stacked)
    channels = stacked.shape[1]
    means = F.conv2d(stacked, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    means = F.conv2d(means, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    x, y, xx, yy, xy = means.chunk(5, 1)
    variances, covariance = (xx - x * x + yy - y * y) * unbiased, (xy - x * y) * unbiased
    contrast = (2 * covariance + _C2) / (variances + _C2)
    return (2 * x * y + _C1) / (x * x + y * y + _C1) * contrast, contrast


def _taps(window: Window) -> tuple[Tensor, float]:
    """One axis of the window, and what makes a variance under it the one that is meant."""
    if window == "uniform":
        num = UNIFORM_PX**2
        return torch.full((UNIFORM_PX,), 1 / UNIFORM_PX, dtype=torch.float64, device="cpu"), num / (num - 1)
    place = torch.arange(GAUSSIAN_PX, dtype=torch.float64, device="cpu") - GAUSSIAN_PX // 2
    bell = torch.exp(-place.square() / (2 * _STD**2))
    return bell / bell.sum(), 1.0
