"""Codecs as the floor that a VAE is held against: JPEG, WebP and AVIF at a rate, and shrinking."""

import io
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from sdvae.evaluate.results import Identity

Image = NDArray[np.uint8]  # (H, W, 3)

_OPTIONS: Mapping[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 4}, "avif": {"speed": 6}}


class CodecCandidate:
    """JPEG, WebP or AVIF at the best quality within `bits_per_pixel`, or a photo shrunk to an eighth ("bicubic")."""

    def __init__(self, codec: Literal["jpeg", "webp", "avif", "bicubic"], bits_per_pixel: float, label: str) -> None:
        self.codec, self.bits_per_pixel = codec, bits_per_pixel
        self.identity = Identity(label, "codec", codec)

    def reconstruct(self, image: Image) -> tuple[Image, float]:
        """The image after the codec, and the bits per pixel of its file; of 8-bit samples where it was shrunk."""
        if self.codec == "bicubic":
            return shrunk(image), 24.0 / 64
        data = compressed(image, self.codec, self.quality(image))
        return decompressed(data), 8 * len(data) / (image.shape[0] * image.shape[1])

    def quality(self, image: Image) -> int:
        """The best quality within the rate; the lowest where no file is small enough."""
        budget_bytes = self.bits_per_pixel * image.shape[0] * image.shape[1] / 8
        best, low, high = 1, 2, 95
        while low <= high:  # files grow with the quality
            quality = (low + high) // 2
            if len(compressed(image, self.codec, quality)) <= budget_bytes:
                best, low = quality, quality + 1
            else:
                high = quality - 1
        return best


def shrunk(image: Image) -> Image:
    """A photo of an eighth of the size, Lanczos down and bicubic up: 3 numbers for each 8x8 pixels."""
    photo = Pillow.fromarray(image)
    size = (math.ceil(photo.width / 8), math.ceil(photo.height / 8))
    return np.array(photo.resize(size, Pillow.Resampling.LANCZOS).resize(photo.size, Pillow.Resampling.BICUBIC))


def compressed(image: Image, codec: str, quality: int) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    Pillow.fromarray(image).save(file, codec, quality=quality, **_OPTIONS[codec])
    return file.getvalue()


def decompressed(data: bytes) -> Image:
    """The image in a file."""
    return np.array(Pillow.open(io.BytesIO(data)).convert("RGB"))
