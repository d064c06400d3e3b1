"""Images to a device and back in batches: the same as one by one, and lazily."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdvae.errors import ImageError
from sdvae.pixels import from_levels, to_images, to_pixels
from sdvae.staging import download, upload

CPU = torch.device("cpu")


def photos(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (2, 8, 16, 3), np.uint8)


def test_what_goes_up_comes_down() -> None:
    batches = [photos(number) for number in range(3)]
    pixels = list(upload(batches, CPU))
    assert all(torch.equal(one, to_pixels(batch)) for one, batch in zip(pixels, batches, strict=True))
    assert all(np.array_equal(one, batch) for one, batch in zip(download(pixels), batches, strict=True))


def test_levels_become_the_same_pixels_on_any_device() -> None:
    assert torch.equal(from_levels(torch.from_numpy(photos(0))), to_pixels(photos(0)))


def test_no_more_is_read_than_was_asked_for() -> None:
    def endless() -> Iterator[NDArray[np.uint8]]:
        number = 0
        while True:
            yield photos(number)
            number += 1

    images = download(upload(endless(), CPU))
    assert [next(images).sum() for _ in range(2)] == [photos(number).sum() for number in range(2)]


def test_nan_is_refused_where_it_appears() -> None:
    pixels = to_pixels(photos(0))
    pixels[1, 0, 0, 0] = torch.nan
    images = download(iter([to_pixels(photos(1)), pixels]))
    assert np.array_equal(next(images), to_images(to_pixels(photos(1))))
    with pytest.raises(ImageError, match="image 1 of the batch"):
        next(images)
