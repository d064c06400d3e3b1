"""Samples of any mode, depth, alpha and colour profile to sRGB."""

import io
import logging
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from sdvae.errors import ImageError

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags

_NO_LITTLECMS = "this Pillow was built without LittleCMS, which its wheels have: pip install --upgrade pillow"

_log = logging.getLogger(__name__)


def rgb_converter(
    image: Image.Image, background: tuple[int, int, int] | None, transparent: NDArray[np.int64] | None
) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """A function from a band of rows of this loaded image to sRGB, (rows, W, 3) uint8, or with its alpha 4."""
    deep_range = _deep_range(image)
    mode = "L" if deep_range else _COLOUR_MODES.get(image.mode)
    if mode is None:
        raise ImageError(f"Pillow's mode {image.mode} has no agreed meaning as a photo; convert it to RGB first")
    has_alpha = image.mode in _ALPHA_MODES or (image.mode == "P" and image.has_transparency_data)
    to_srgb = _srgb_transform(mode, image.info.get("icc_profile"))

    def to_rgb(band: Image.Image) -> NDArray[np.uint8]:
        alpha = None
        if has_alpha:
            band = band.convert(_ALPHA_MODES.get(band.mode, "RGBA"))
            alpha = band.getchannel("A")
        elif transparent is not None:
            band.info.pop("transparency")  # or Pillow would drag it through the conversions below
            samples = np.asarray(band.convert("L") if band.mode == "1" else band)
            is_clear = (samples.reshape(band.height, band.width, -1) == transparent).all(-1)
            alpha = Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))
        if deep_range:
            band = _scale_to_8_bits(band, *deep_range)
        band = band if band.mode == mode else band.convert(mode)
        band = to_srgb(band) if to_srgb else band if mode == "RGB" else band.convert("RGB")
        if alpha is None:
            return np.asarray(band)
        if background is None:
            return np.dstack([np.asarray(band), np.asarray(alpha)])
        canvas = Image.new("RGB", band.size, background)
        canvas.paste(band, mask=alpha)
        return np.asarray(canvas)

    return to_rgb


_ALPHA_MODES = {"LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}  # to straight alpha
_COLOUR_MODES = {
    "1": "L", "L": "L", "LA": "L", "La": "L",
    "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB",
    "CMYK": "CMYK", "LAB": "LAB",
}  # fmt: skip


def transparent_samples(image: Image.Image) -> NDArray[np.int64] | None:
    """The one gray or colour that a PNG's tRNS chunk makes transparent, in the samples that Pillow decodes to."""
    value = image.info.get("transparency")
    if value is None or not (image.mode in ("1", "L", "RGB") or image.mode.startswith("I;16")):
        return None
    samples = np.atleast_1d(np.asarray(value, np.int64))
    raw_mode = str(image.tile[0].args) if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    if raw_mode in ("L;2", "L;4"):  # the file's 2 or 4 bits, which Pillow spreads over 0..255 in the image only
        samples = samples * 255 // (2 ** int(raw_mode[-1]) - 1)
    if raw_mode.startswith("RGB;16"):  # decoded to the high byte
        samples = samples >> 8
    return samples


def _deep_range(image: Image.Image) -> tuple[float, float] | None:
    """(black, white) of an image with more than 8 bits a sample; None for the ordinary ones."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        white = 2.0 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        is_inverted = tags.get(_PHOTOMETRIC) == 0  # WhiteIsZero, which Pillow undoes for 8 bits only
        return (white, 0.0) if is_inverted else (0.0, white)
    if image.mode not in ("I", "F"):
        return None
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    white = 65535.0 if image.mode == "I" else 1.0
    return (0.0, white) if 0 <= low <= high <= white else (low, high)


def _scale_to_8_bits(band: Image.Image, black: float, white: float) -> Image.Image:
    values = np.asarray(band)
    if not (np.isfinite([black, white]).all() and np.isfinite(values).all()):  # before a cast that would warn
        raise ImageError("the image holds NaN or infinity")
    unit = (values.astype(np.float64) - black) / ((white - black) or 1.0)
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8))


@lru_cache(maxsize=8)
def _srgb_transform(mode: str, profile: bytes | None) -> Callable[[Image.Image], Image.Image] | None:
    """What turns images of `mode` with this ICC profile into sRGB; None where they are to be read as they are."""
    if (mode == "LAB" or profile) and not features.check_module("littlecms2"):
        if mode == "LAB":
            raise ImageError(f"a Lab image, which needs LittleCMS; {_NO_LITTLECMS}")
        _warn_of_no_littlecms()
        return None
    if mode == "LAB":
        return _colour_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), mode)  # says all by itself
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and mode == "L":
            mode = "RGB"  # a gray photo saved with the profile of its colour original
        if space != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode]:
            _log.warning("a colour profile for %s in a %s image is ignored", space, mode)
            return None
        transform = _colour_transform(source, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        _log.warning("a colour profile that cannot be used is ignored, and the image read as sRGB: %s", error)
        return None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15).astype(np.uint8)
        lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
        probe = Image.fromarray(lattice).convert(mode)
        change = np.asarray(transform(probe)).astype(int) - np.asarray(probe.convert("RGB"))
        if np.abs(change).max() <= 1:
            return None  # sRGB by another name
    return transform


@cache
def _warn_of_no_littlecms() -> None:  # once for a process, not for each profile
    _log.warning("colour profiles are ignored, and images that have one read as sRGB: %s", _NO_LITTLECMS)


def _colour_transform(source: ImageCms.ImageCmsProfile, mode: str) -> Callable[[Image.Image], Image.Image]:
    directions = (source.profile.clut or {}).values()  # for each intent: has it a table in, out, to proof
    is_table = any(has_table_in for has_table_in, _, _ in directions) or not source.profile.is_matrix_shaper
    # Left to itself, LittleCMS resamples tables coarsely for speed: up to 29 levels off. Matrices stay exact.
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if is_table else 0)
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags
    )
    return lambda image: transform.apply(image.convert(mode))
