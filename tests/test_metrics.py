import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from sdvae.errors import ShapeError
from sdvae.metrics import METRICS, NO_DIFFERENCE_DB, psnr, psnr_of_levels
from sdvae.perceptual.ssim import MS_SSIM_MIN_PX, ms_ssim, ssim


def noisy_pair(height: int = 48, width: int = 40, noise: float = 20.0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A smooth image and the same with noise: SSIM far from 0 and 1."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([127 + 90 * np.sin(rows / 5 + c) * np.cos(columns / 7) for c in range(3)], -1)
    return smooth.astype(np.uint8), np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)


def levels(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].double()


def test_psnr_is_that_of_scikit_image() -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    assert abs(psnr(first, second) - peak_signal_noise_ratio(first, second)) < 1e-9
    assert abs(psnr_of_levels(levels(first), levels(second)) - peak_signal_noise_ratio(first, second)) < 1e-9


def test_psnr_of_equal_images_is_infinite_and_of_black_and_white_is_zero() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr_of_levels(levels(black), levels(black)) == NO_DIFFERENCE_DB
    assert psnr(black, white) == 0.0


def test_psnr_of_different_shapes_is_refused() -> None:
    with pytest.raises(ShapeError):
        psnr(np.zeros((2, 2, 3), np.uint8), np.zeros((1, 2, 3), np.uint8))


def test_ssim_is_that_of_scikit_image() -> None:
    original, noisy = noisy_pair()
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = structural_similarity(original, noisy, channel_axis=2, data_range=255, **wang)
    assert 0.2 < theirs < 0.9
    assert abs(ssim(levels(noisy), levels(original)) - theirs) < 1e-4


def test_ssim_under_a_uniform_window_is_scikit_images_default() -> None:
    original, noisy = noisy_pair()
    theirs = structural_similarity(original, noisy, channel_axis=2, data_range=255)
    assert abs(ssim(levels(noisy), levels(original), "uniform") - theirs) < 1e-4
    assert abs(ssim(levels(noisy), levels(original)) - theirs) > 1e-3


def test_ssim_with_reflected_borders_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    original, noisy = noisy_pair()
    theirs = float(structural_similarity_index_measure(levels(noisy), levels(original), data_range=255.0))
    assert abs(ssim(levels(noisy), levels(original), "reflected") - theirs) < 1e-4
    assert abs(ssim(levels(noisy), levels(original)) - theirs) > 1e-3


@pytest.mark.parametrize("size", [(176, 192), (171, 165)])
def test_ms_ssim_is_that_of_pytorch_msssim(size: tuple[int, int]) -> None:
    from pytorch_msssim import ms_ssim as their_ms_ssim

    original, noisy = noisy_pair(*size, noise=60.0)
    theirs = float(their_ms_ssim(levels(noisy), levels(original), data_range=255))
    assert 0.2 < theirs < 0.99
    assert abs(ms_ssim(levels(noisy), levels(original)) - theirs) < 1e-4


def test_ssim_of_equal_images_is_one() -> None:
    original, _ = noisy_pair(176, 176)
    assert ssim(levels(original), levels(original)) == ms_ssim(levels(original), levels(original)) == 1.0


def test_every_row_of_the_table_is_complete() -> None:
    assert set(METRICS) == {"psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "rfid", "rkid"}
    assert all(metric.name == name and metric.label for name, metric in METRICS.items())
    assert METRICS["ms_ssim"].min_side_px == MS_SSIM_MIN_PX
