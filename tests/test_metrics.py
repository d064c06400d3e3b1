import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from sdvae.errors import ShapeError
from sdvae.metrics import psnr


def test_psnr_is_that_of_scikit_image() -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    assert abs(psnr(first, second) - peak_signal_noise_ratio(first, second)) < 1e-9


def test_psnr_of_equal_images_is_infinite_and_of_black_and_white_is_zero() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, white) == 0.0


def test_psnr_of_different_shapes_is_refused() -> None:
    with pytest.raises(ShapeError):
        psnr(np.zeros((2, 2, 3), np.uint8), np.zeros((1, 2, 3), np.uint8))
