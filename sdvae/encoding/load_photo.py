"""One photo: read, checked against the scan, decoded, resized and cropped."""

import hashlib
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdvae.encoding.resize import apply
from sdvae.encoding.times import Times
from sdvae.errors import ImageError
from sdvae.sources.entries import Source
from sdvae.store.buckets import Size
from sdvae.store.geometry import Geometry, Preprocess
from sdvae.store.records import Record


@dataclass(frozen=True)
class Failure:
    """Why a record has no latents."""

    step: str
    reason: str


def load(
    source: Source, preprocess: Preprocess, record: Record, out: NDArray[np.uint8], times: Times
) -> Failure | None:
    """Put one photo into `out`, (H, W, 3) or with alpha; the reason where that fails, and then zeros."""
    begun = time.perf_counter()
    data = _read(source, record)
    read = time.perf_counter()
    image = data if isinstance(data, Failure) else _decode(data, preprocess, record)
    if isinstance(image, Failure):
        out[...] = 0
    else:
        out[...] = image
    times.read += read - begun
    times.decode += time.perf_counter() - read
    return image if isinstance(image, Failure) else None


def _read(source: Source, record: Record) -> bytes | Failure:
    try:
        data = source.read(record.key)
    except FileNotFoundError:
        return Failure("read", "vanished after the scan")
    except OSError as error:
        return Failure("read", f"cannot be read: {error.strerror}")
    if hashlib.sha256(data).hexdigest() != record.source_sha256:
        return Failure("read", "changed after the scan")
    return data


def _decode(data: bytes, preprocess: Preprocess, record: Record) -> NDArray[np.uint8] | Failure:
    assert record.original_px is not None and record.geometry is not None
    try:
        return read_crop(data, record.original_px, record.geometry, preprocess)
    except ImageError as error:
        return Failure("decode", str(error))


def read_crop(
    data: bytes, original_px: Size, geometry: Geometry, preprocess: Preprocess
) -> NDArray[np.uint8]:  # (h, w, 3), or with alpha
    """The pixels of a photo that enter the VAE; ImageError where its picture cannot be read, or has another size."""
    from sdvae.images.read import read_image

    image = read_image(
        data,
        background=preprocess.background,
        max_pixels=preprocess.max_pixels,
        decoder=preprocess.decoder,
        at_least_px=geometry.resized_px if preprocess.jpeg_draft else None,
    )
    is_reduced = preprocess.jpeg_draft and all(
        resized <= side <= original
        for resized, side, original in zip(geometry.resized_px, image.shape, original_px, strict=False)
    )
    if image.shape[:2] != original_px and not is_reduced:
        raise ImageError(f"its header says {original_px}, its picture is {image.shape[:2]}")
    if image.shape[2] < preprocess.num_channels:
        image = np.dstack([image, np.full_like(image[..., :1], 255)])
    return apply(image, geometry, preprocess.resample, preprocess.resizer)
