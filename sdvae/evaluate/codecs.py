"""Codecs as the floor that a VAE is held against: JPEG, WebP and AVIF at a rate, and shrinking."""

import io
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from sdvae.evaluate.candidates import Identity

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
            return _shrunk(image), 24.0 / 64
        budget_bytes = self.bits_per_pixel * image.shape[0] * image.shape[1] / 8
        best = _compressed(image, self.codec, 1)  # also where no file is small enough
        low, high = 2, 95
        while low <= high:  # files grow with the quality
            quality = (low + high) // 2
            data = _compressed(image, self.codec, quality)
            if len(data) <= budget_bytes:
                best, low = data, quality + 1
            else:
                high = quality - 1
        return _decompressed(best), 8 * len(best) / (image.shape[0] * image.shape[1])


def _shrunk(image: Image) -> Image:
    """A photo of an eighth of the size, Lanczos down and bicubic up: 3 numbers for each 8x8 pixels."""
    photo = Pillow.fromarray(image)
    size = (math.ceil(photo.width / 8), math.ceil(photo.height / 8))
    return np.array(photo.resize(size, Pillow.Resampling.LANCZOS).resize(photo.size, Pillow.Resampling.BICUBIC))


def _compressed(image: Image, codec: str, quality: int) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(image).save(file, codec, quality=quality, **_OPTIONS[codec])
    return file.getvalue()


def _decompressed(data: bytes) -> Image:
    return np.array(Pillow.open(io.BytesIO(data)).convert("RGB"))
