"""What happens between a photo and the network: a plan in integers, then Lanczos, a crop and padding."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ConfigError, ImageError


@dataclass(frozen=True)
class Preprocess:
    """The settings that decide which pixels of a photo are encoded; the same settings give the same pixels."""

    size_px: int | None = 512  # of the shorter side; None keeps the photo's own size
    crop: Literal["center", "none"] = "center"
    background: tuple[int, int, int] = (255, 255, 255)  # under transparent images
    max_pixels: int = 2**27  # of a photo as stored, and as resized
    flip: bool = False  # encode the photo mirrored left to right, too

    def __post_init__(self) -> None:
        if self.crop not in ("center", "none"):
            raise ConfigError(f"unknown crop {self.crop!r}; it is 'center' or 'none'")
        if self.crop == "center" and self.size_px is None:
            raise ConfigError("a centre crop needs a size; give one, or keep whole photos with crop 'none'")
        if self.size_px is not None and self.size_px < 1:
            raise ConfigError(f"a size of {self.size_px} pixels is no size")
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ConfigError(f"the background {self.background} is not three levels of 0..255")

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, for a manifest."""
        return asdict(self) | {"background": list(self.background)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_json`; raises ConfigError for keys that are missing or unknown."""
        differing = sorted({field.name for field in fields(cls)} ^ values.keys())
        if differing:
            raise ConfigError(f"preprocessing settings lack or do not know: {', '.join(differing)}")
        return cls(**(dict(values) | {"background": tuple(values["background"])}))


@dataclass(frozen=True)
class Geometry:
    """Where the pixels come from: the photo resized, then a crop of that; beyond its border the crop is padded."""

    resized_px: tuple[int, int]  # (height, width)
    crop_px: tuple[int, int, int, int]  # (top, left, height, width)


def plan_geometry(height: int, width: int, preprocess: Preprocess, downscale: int) -> Geometry:
    """Plan an upright photo of (height, width); the crop is a multiple of `downscale` on both sides.

    Raises ConfigError for a crop size that is no such multiple, and ImageError for a photo so long and thin
    that resizing its shorter side would make more than `max_pixels`.
    """
    size = preprocess.size_px
    if size is None:
        resized = (height, width)
    else:
        short = min(height, width)
        resized = (_scaled(height, size, short), _scaled(width, size, short))
    if resized[0] * resized[1] > preprocess.max_pixels:
        raise ImageError(
            f"too long and thin: {width}x{height} resized to {resized[1]}x{resized[0]} is more than "
            f"the limit of {preprocess.max_pixels:,} pixels"
        )
    if preprocess.crop == "none":
        return Geometry(resized, (0, 0, resized[0] + -resized[0] % downscale, resized[1] + -resized[1] % downscale))
    assert size is not None
    if size % downscale:
        raise ConfigError(f"a crop of {size} pixels is no multiple of {downscale}, which one latent covers")
    return Geometry(resized, ((resized[0] - size) // 2, (resized[1] - size) // 2, size, size))


def _scaled(side: int, numerator: int, denominator: int) -> int:
    return (2 * side * numerator + denominator) // (2 * denominator)  # rounded to the nearest, halves up


def apply(image: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:  # (H, W, 3) -> (h, w, 3), contiguous
    """Cut the pixels of a plan out of a photo.

    The whole photo is resized before it is cropped. Pillow's resize of the cropped box alone rounds the box to
    fp32, which moved pixels of noise by up to 52 levels.
    """
    from PIL import Image  # a plan needs neither Pillow nor a decoder

    from sdvae.pixels import pad

    height, width = geometry.resized_px
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    top, left, crop_height, crop_width = geometry.crop_px
    cropped = image[top : top + crop_height, left : left + crop_width]
    return np.ascontiguousarray(pad(cropped, crop_height, crop_width))
