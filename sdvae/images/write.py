"""Images to files."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdvae.amounts import size_text
from sdvae.errors import ImageError

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
    "webp": {"lossless": True},  # whoever accepts loss is better served by JPEG at 4:4:4: lossy WebP is always 4:2:0
}


def encode_image(image: NDArray[np.uint8], format: str) -> bytes:  # (H, W, 3) uint8
    """A file's bytes: "png" and "webp" lossless, "jpeg" at quality 95 without chroma subsampling."""
    if format not in _SAVE_OPTIONS:
        raise ImageError(f"cannot write images as {format!r}; the formats are {', '.join(_SAVE_OPTIONS)}")
    file = io.BytesIO()
    try:
        Image.fromarray(image).save(file, format, **_SAVE_OPTIONS[format])
    except (OSError, ValueError) as error:
        height, width = image.shape[:2]
        raise ImageError(f"{format} cannot hold an image of {size_text(height, width)}; write it as png") from error
    return file.getvalue()
