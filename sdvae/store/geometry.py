"""Which pixels of a photo are encoded: the settings, and the plan for one photo. Integers; nothing is opened here."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sdvae.amounts import size_text
from sdvae.errors import ConfigError, ImageError
from sdvae.store.buckets import Size, bucket_sizes, nearest_bucket

Crop = Literal["center", "random", "none"]
Resample = Literal["lanczos", "bicubic"]
Decoder = Literal["pillow", "simplejpeg"]
Resizer = Literal["pillow", "torch"]


TOO_SMALL = "too small: it would have to be enlarged by more than"  # max_upscale


@dataclass(frozen=True)
class Preprocess:
    """The settings that decide which pixels of a photo are encoded; the same settings give the same pixels.

    A photo is resized until it covers `size_px`, or the bucket whose aspect ratio is nearest, and the rest is
    cropped. With `size_px` None and no buckets it keeps its own size.
    """

    size_px: int | None = 512  # of the shorter side; None with buckets, and for photos in their own size
    crop: Crop = "center"
    background: tuple[int, int, int] | None = (255, 255, 255)  # under transparent images; None: all have alpha
    max_pixels: int = 2**27  # of a photo as stored, and as resized
    buckets: str | tuple[Size, ...] | None = None  # "sd1", "sdxl", or sizes (height, width)
    max_upscale: float | None = None  # photos that need more are refused; None: no limit, but 1.0 with buckets
    min_size_px: int | None = None  # photos with a shorter side are refused
    resample: Resample = "lanczos"  # both are antialiased
    flip: bool = False  # whether each photo is also encoded mirrored, left to right
    seed: int = 0  # of random crops
    decoder: Decoder = "pillow"  # of JPEG
    jpeg_draft: bool = False  # whether JPEG is decoded at the smallest of its own scales that covers the resized size
    resizer: Resizer = "pillow"  # see `choose_resizer`

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = " or ".join(map(repr, get_args(choices)))
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; it is {known}")
        if self.buckets is not None:
            self._require_bucket_settings(self.buckets)
            object.__setattr__(self, "max_upscale", 1.0 if self.max_upscale is None else self.max_upscale)
        elif self.size_px is None and self.crop != "none":
            raise ConfigError(f"a {self.crop} crop needs a size; give one, or keep whole photos with crop 'none'")
        if self.size_px is not None and self.size_px < 1:
            raise ConfigError(f"a size of {self.size_px} pixels is no size")
        if self.max_upscale is not None:
            if self.size_px is None and self.buckets is None:
                raise ConfigError("max_upscale is for photos that are resized; give a size or buckets, too")
            if not 0 < self.max_upscale < float("inf"):
                raise ConfigError(f"max_upscale is {self.max_upscale}; it is a factor, such as 1.0 or 1.5")
            object.__setattr__(self, "max_upscale", float(self.max_upscale))
        if self.min_size_px is not None and self.min_size_px < 1:
            raise ConfigError(f"a minimum of {self.min_size_px} pixels is no size")
        if self.seed and self.crop != "random":
            raise ConfigError(f"a seed places random crops; with crop {self.crop!r} it means nothing")
        if self.background is None and self.resizer != "pillow":
            raise ConfigError(
                f"photos with alpha are resized by pillow, not {self.resizer}: it weighs colours by alpha"
            )
        if self.background is not None and not (
            len(self.background) == 3 and all(0 <= level <= 255 for level in self.background)
        ):
            raise ConfigError(f"the background {self.background} is not three levels of 0..255")

    @property
    def num_channels(self) -> int:
        """Of the images that are encoded: RGB, or with alpha."""
        return 4 if self.background is None else 3

    def _require_bucket_settings(self, buckets: str | tuple[Size, ...]) -> None:
        if not isinstance(buckets, str):
            buckets = tuple((height, width) for height, width in buckets)
            object.__setattr__(self, "buckets", buckets)
        bucket_sizes(buckets)
        if self.size_px is not None:
            raise ConfigError(f"buckets have sizes of their own; leave size_px None, it is {self.size_px}")
        if self.crop == "none":
            raise ConfigError("photos are cropped to their bucket; with buckets, crop is 'center' or 'random'")

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, for a manifest.

        Of the members that came after the first stores, those that say what was done before are left out: a store
        begun then is continued.
        """
        values = {name: getattr(self, name) for name in _DEFAULTS}
        written = {name: value for name, value in values.items() if name in _FIRST or value != _DEFAULTS[name]}
        return {name: _as_lists(value) for name, value in written.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_json`; raises ConfigError for keys that are missing or unknown."""
        differing = sorted(values.keys() - _DEFAULTS.keys() | _FIRST - values.keys())
        if differing:
            raise ConfigError(f"preprocessing settings lack or do not know: {', '.join(differing)}")
        plain: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in values.items()}
        return cls(**plain)


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


_CHOICES = {"crop": Crop, "resample": Resample, "decoder": Decoder, "resizer": Resizer}
_FIRST = {"size_px", "crop", "background", "max_pixels"}  # in every manifest
_DEFAULTS = {field.name: field.default for field in fields(Preprocess)}


@dataclass(frozen=True)
class Geometry:
    """Where the pixels come from: the photo resized, then a crop of that; beyond its border the crop is padded."""

    resized_px: tuple[int, int]  # (height, width)
    crop_px: tuple[int, int, int, int]  # (top, left, height, width)


def plan_geometry(height: int, width: int, preprocess: Preprocess, downscale: int, key: str = "") -> Geometry:
    """Plan an upright photo of (height, width); the crop is a multiple of `downscale` on both sides.

    A random crop is a function of the seed and of `key` alone. Raises ConfigError for a crop that is no such
    multiple, and ImageError for a photo that is too small, or so long and thin that resizing it would make more
    than `max_pixels`.
    """
    if preprocess.min_size_px is not None and min(height, width) < preprocess.min_size_px:
        raise ImageError(f"too small: a side has fewer than {preprocess.min_size_px} pixels")
    target = _target_size(height, width, preprocess, downscale)
    resized = (height, width)
    if target is not None:
        limit = preprocess.max_upscale
        if limit is not None and (target[0] > limit * height or target[1] > limit * width):
            raise ImageError(f"{TOO_SMALL} {limit}")
        resized = _size_to_cover(height, width, target)
    if resized[0] * resized[1] > preprocess.max_pixels:
        raise ImageError(
            f"too long and thin: {size_text(height, width)} resized to {size_text(*resized)} is more than "
            f"the limit of {preprocess.max_pixels:,} pixels"
        )
    if target is None or preprocess.crop == "none":
        return Geometry(resized, (0, 0, resized[0] + -resized[0] % downscale, resized[1] + -resized[1] % downscale))
    spare = (resized[0] - target[0], resized[1] - target[1])
    corner = (
        _random_corner(spare, preprocess.seed, key) if preprocess.crop == "random" else (spare[0] // 2, spare[1] // 2)
    )
    return Geometry(resized, (*corner, *target))


def _target_size(height: int, width: int, preprocess: Preprocess, downscale: int) -> Size | None:
    """The size that the photo is resized to cover; None where it keeps its own."""
    if preprocess.buckets is not None:
        return nearest_bucket(height, width, bucket_sizes(preprocess.buckets, downscale))
    size = preprocess.size_px
    if size is None:
        return None
    if size % downscale and preprocess.crop != "none":
        raise ConfigError(f"a crop of {size} pixels is no multiple of {downscale}, which one latent covers")
    return (size, size)


def _size_to_cover(height: int, width: int, target: Size) -> Size:
    """(height, width) scaled until one side is that of `target` and the other at least as long."""
    if target[0] * width >= target[1] * height:  # the height needs the larger factor
        return target[0], _scaled(width, target[0], height)
    return _scaled(height, target[1], width), target[1]


def _scaled(side: int, numerator: int, denominator: int) -> int:
    return (2 * side * numerator + denominator) // (2 * denominator)  # rounded to the nearest, halves up


def _random_corner(spare: Size, seed: int, key: str) -> Size:
    """(top, left) anywhere from (0, 0) to `spare`; in integers, so that every machine finds the same."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    top, left = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
    return top * (spare[0] + 1) >> 64, left * (spare[1] + 1) >> 64
