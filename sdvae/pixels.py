"""The only place where uint8 images, (H, W, 3), meet float pixels, (3, H, W) in [-1, 1]; and padding."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ImageError, ShapeError

if TYPE_CHECKING:  # processes that only decode files should not pay for torch
    import torch
    from torch import Tensor

_CACHED_VALUES = 2**16  # that stay in a core's cache from one operation to the next
_GREY = (0.299, 0.587, 0.114)  # Rec. 601, as Pillow's mode L
_BAND_PIXELS = 2**20  # big images are converted in bands of rows, so that no second float copy is made


def to_pixels(images: NDArray[np.uint8]) -> "Tensor":  # (N, H, W, 3) uint8 -> (N, 3, H, W) fp32 in [-1, 1]
    """Images as the network reads them; bit for bit diffusers' `VaeImageProcessor.preprocess`.

    Of a fourth channel, alpha, 0 is clear as well: it becomes -1.
    """
    import torch

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ShapeError(f"images must be (N, H, W, 3) uint8; these are {images.shape} {images.dtype}")
    planes = images.transpose(0, 3, 1, 2)
    pixels = np.empty(planes.shape, np.float32)
    np.divide(planes, np.float32(255), out=pixels)
    pixels *= 2  # not 2/255 at once: that rounds differently
    pixels -= 1
    return torch.from_numpy(pixels)


def to_device(images: NDArray[np.uint8], device: "torch.device") -> "Tensor":  # as `to_pixels`, on `device`
    """The pixels of images, bit for bit those of `to_pixels`; bytes are copied, floats are made on the device.

    Rows of pixels lie in memory as in the images (channels_last). Needs no thread of torch's on a CPU.
    """
    import torch

    if device.type == "cpu":
        floats = np.empty(images.shape, np.float32)
        num_rows = max(1, _CACHED_VALUES // max(1, images.shape[2] * 3))
        for image, out in zip(images, floats, strict=True):
            for top in range(0, len(image), num_rows):
                band = out[top : top + num_rows]
                np.divide(image[top : top + num_rows], np.float32(255), out=band)
                band *= 2
                band -= 1
        return torch.from_numpy(floats).permute(0, 3, 1, 2)
    return from_levels(torch.from_numpy(images).to(device))


def from_levels(levels: "Tensor") -> "Tensor":  # (N, H, W, 3) uint8 -> (N, 3, H, W) fp32 in [-1, 1]
    """The pixels of images that are on a device already, bit for bit those of `to_pixels`."""
    import torch

    # CUDA divides by a number as it multiplies by the reciprocal, which rounds differently; by a tensor it divides.
    pixels = levels.float().div_(torch.full((1,), 255.0, dtype=torch.float32, device=levels.device)).mul_(2).sub_(1)
    return pixels.permute(0, 3, 1, 2)


def fit_channels(pixels: "Tensor", channels: int) -> "Tensor":  # (N, 3, H, W) -> (N, channels, H, W)
    """Pixels of photos for a VAE of so many channels: grey for 1. ShapeError for what no photo has."""
    if channels == pixels.shape[1]:
        return pixels
    if channels != 1:
        raise ShapeError(
            f"this VAE takes images of {channels} channels, of which photos make none: they have 3 channels, 1 as "
            "grey, or 4 with alpha"
        )
    red, green, blue = pixels[:, :3].unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def to_images(pixels: "Tensor") -> NDArray[np.uint8]:  # (N, 3, H, W) of any float dtype -> (N, H, W, 3) uint8
    """Pixels as images, clamped to [-1, 1]; bit for bit diffusers' `VaeImageProcessor.postprocess`.

    One channel is grey, in all three; four keep their alpha.
    Raises ImageError for NaN or infinity, which a cast would turn into noise.
    """
    import torch

    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3, 4) or not pixels.is_floating_point():
        raise ShapeError(f"pixels must be (N, 3, H, W) floats; these are {tuple(pixels.shape)} {pixels.dtype}")
    num_images, channels, height, width = pixels.shape
    images = np.empty((num_images, height, width, max(3, channels)), np.uint8)
    num_rows = max(1, _BAND_PIXELS // max(1, width))
    for i in range(num_images):
        for top in range(0, height, num_rows):
            band = pixels.detach()[i, :, top : top + num_rows]
            if not bool(torch.isfinite(band).all()):
                raise ImageError(f"image {i} of the batch holds NaN or infinite pixels; a wider dtype may help")
            images[i, top : top + num_rows] = to_levels(band).cpu().numpy()
    return images


def to_levels(pixels: "Tensor") -> "Tensor":  # (..., 3, H, W) of any float dtype -> (..., H, W, 3) uint8
    """The levels of finite pixels, on their device."""
    import torch

    if pixels.shape[-3] == 1:
        pixels = pixels.expand(*pixels.shape[:-3], 3, -1, -1)
    unit = (pixels * 0.5 + 0.5).clamp(0, 1)  # in the dtype of the pixels, as diffusers does
    return unit.float().mul_(255).round_().to(torch.uint8).movedim(-3, -1)


def pad(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:  # (H, W, 3) -> (height, width, 3)
    """Extend an image to the right and the bottom by reflection; by its last row or column where it is too small."""
    for axis, size in enumerate((height, width)):
        missing = size - image.shape[axis]
        if missing > 0:
            widths = [(0, missing if i == axis else 0) for i in range(3)]
            image = np.pad(image, widths, mode="reflect" if missing < image.shape[axis] else "edge")
    return image


def pad_to_multiple(image: NDArray[np.uint8], multiple: int) -> NDArray[np.uint8]:
    """`pad` to the next height and width that are multiples of `multiple`."""
    height, width = image.shape[:2]
    return pad(image, height + -height % multiple, width + -width % multiple)
