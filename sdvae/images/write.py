"""Images to files."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdvae.amounts import size_text
from sdvae.errors import ImageError
from sdvae.images.provenance import Provenance

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
    "webp": {"lossless": True},  # whoever accepts loss is better served by JPEG at 4:4:4: lossy WebP is always 4:2:0
}


def encode_image(
    image: NDArray[np.uint8],  # (H, W, 3)
    format: str,
    provenance: Provenance | None = None,
) -> bytes:
    """A file's bytes: "png" and "webp" lossless, "jpeg" at quality 95 without chroma subsampling.

    `provenance` becomes its metadata.
    """
    if format not in _SAVE_OPTIONS:
        raise ImageError(f"cannot write images as {format!r}; the formats are {', '.join(_SAVE_OPTIONS)}")
    file = io.BytesIO()
    try:
        Image.fromarray(image).save(file, format, **_SAVE_OPTIONS[format], **_metadata(format, provenance))
    except (OSError, ValueError) as error:
        height, width = image.shape[:2]
        raise ImageError(f"{format} cannot hold an image of {size_text(height, width)}; write it as png") from error
    return file.getvalue()


def _metadata(format: str, provenance: Provenance | None) -> dict[str, Any]:
    if provenance is None:
        return {}
    if format != "png":
        return {"xmp": provenance.to_xmp().encode()}
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", provenance.to_xmp())
    return {"pnginfo": texts}
