"""A photo resized and cropped as its geometry says."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from sdvae.store.buckets import Size
from sdvae.store.geometry import Geometry, Resample, Resizer


@cache
def choose_resizer(resample: Resample) -> Resizer:
    """Torch where it has this kernel for bytes: as near to the exact one as Pillow, and with AVX2 much faster."""
    try:
        _resize_by_torch(np.zeros((2, 2, 3), np.uint8), (1, 1), resample)
    except (RuntimeError, ValueError):  # how versions of torch say that they do not have it
        return "pillow"
    return "torch"


def apply(
    image: NDArray[np.uint8], geometry: Geometry, resample: Resample = "lanczos", resizer: Resizer = "pillow"
) -> NDArray[np.uint8]:  # (H, W, channels) -> (h, w, channels), contiguous
    """Cut the pixels of a plan out of a photo: those of the whole photo resized, then cropped."""
    from sdvae.pixels import pad

    top, left, height, width = geometry.crop_px
    if image.shape[:2] != geometry.resized_px:
        if resizer == "torch":
            image = _resize_by_torch(image, geometry.resized_px, resample)
        else:
            image, left = _resize_by_pillow(image, geometry, resample), 0
    cropped = image[top : top + height, left : left + width]
    return np.ascontiguousarray(pad(cropped, height, width))


def _resize_by_torch(image: NDArray[np.uint8], size: Size, resample: Resample) -> NDArray[np.uint8]:
    """The whole photo; the same bits whatever the threads."""
    import torch
    import torch.nn.functional as F

    # Flat first: torch takes some strides of arrays with sides of 1 for others, and mixes up the channels.
    planes = torch.from_numpy(image.ravel()).view(1, *image.shape).permute(0, 3, 1, 2)  # channels_last, no copy
    resized: NDArray[np.uint8] = F.interpolate(planes, size, mode=resample, antialias=True)[0].permute(1, 2, 0).numpy()
    return resized


def _resize_by_pillow(image: NDArray[np.uint8], geometry: Geometry, resample: Resample) -> NDArray[np.uint8]:
    """The columns of the crop, all rows.

    Pillow's resize of the cropped box alone rounds the box to fp32, which moved pixels of noise by up to 52 levels.
    """
    from PIL import Image  # a plan needs neither Pillow nor a decoder

    height, width = geometry.resized_px
    _, left, _, crop_width = geometry.crop_px
    photo, kernel = Image.fromarray(image), Image.Resampling[resample.upper()]
    if height < photo.height or width <= crop_width:
        return np.asarray(photo.resize((width, height), kernel))[:, left : left + crop_width]
    # Where no rows are lost Pillow resizes the rows first, to 8 bits, and then the columns: columns beside the crop can
    # go in between, a third of the work on a landscape photo that grows.
    rows = photo.resize((width, photo.height), kernel).crop((left, 0, left + crop_width, photo.height))
    return np.asarray(rows.resize((crop_width, height), kernel))
