"""An image file of any kind to an upright sRGB array, (H, W, 3) uint8.

What a file means, where formats leave it open:

- **orientation**: EXIF (or XMP) is applied, and only the first frame is read;
- **alpha**: composited over `background`, in sRGB, after the colour profile;
- **deep samples**: scaled to 8 bits, never clipped: 16-bit integers by 65535, 12-bit ones by 4095, floats by 1.
  An image that leaves that range has no agreed white, so its own range is stretched: lowest black, highest white;
- **colour profile**: converted to sRGB, relative colorimetric with black point compensation (Photoshop's default).
  One that is sRGB already is not run: it would only add rounding. One that is broken or made for other channels
  is logged and the colours are read as untagged ones, as a browser does; CMYK without a profile is (1-C)(1-K);
- **damage**: a file that ends early or does not decode is refused. There are no half-gray photos.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sdvae.amounts import size_text
from sdvae.errors import ImageError
from sdvae.images.colour import rgb_converter, transparent_samples
from sdvae.images.failures import PillowFailures
from sdvae.images.formats import FORMATS, why_unidentified
from sdvae.images.orientation import empty_upright, has_late_metadata, read_orientation, swaps_axes
from sdvae.images.plugins import HEAD_BYTES, open_by_plugin, plugin_kind
from sdvae.images.settings import MAX_IMAGE_PIXELS

# 134 megapixels: the largest single shots (102 MP) fit, and even a progressive JPEG, whose coefficients
# are all in memory at once, decodes in less than 1.5 GB.
BACKGROUND = (255, 255, 255)

_BAND_PIXELS = 2**20  # colours are converted in bands of rows, so that a big image is in memory twice, not five times
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PLANAR_CONFIGURATION, _SAMPLE_FORMAT, _DNG_VERSION = 254, 258, 284, 339, 50706


def read_image(
    source: Path | bytes | BinaryIO,
    *,
    background: tuple[int, int, int] | None = BACKGROUND,
    max_pixels: int = MAX_IMAGE_PIXELS,
    decoder: Literal["pillow", "simplejpeg"] = "pillow",
    at_least_px: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Read a file as an upright sRGB image, (H, W, 3) uint8; (H, W, 4) of one with alpha where `background` is None.

    `decoder` is that of JPEG. With `at_least_px`, a JPEG is decoded at the smallest of its own scales that has that
    (height, width): quicker, and a little softer. Raises ImageError with the reason. Where `source` is a Path the
    message begins with it; a reason for bytes or a stream depends on nothing but those bytes.
    """
    with open_image(source, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            with PillowFailures(image):
                orientation = read_orientation(image)
                stored_px = at_least_px[::-1] if at_least_px and swaps_axes(orientation) else at_least_px
                samples = _samples_by_simplejpeg(image, stored_px) if decoder == "simplejpeg" else None
                if samples is not None:
                    upright, as_stored = empty_upright(samples.shape[0], samples.shape[1], orientation)
                    as_stored[...] = samples
                    return upright
                if stored_px is not None:
                    image.draft(None, stored_px[::-1])
        return from_pil(image, background=background)


def read_size(source: Path | bytes | BinaryIO, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) of what `read_image` would return, from the header; raises ImageError for a bad header."""
    with open_image(source, max_pixels) as image:
        with PillowFailures(image):
            if image.format == "PNG" and has_late_metadata(image.fp):
                image.load()  # the one way to the orientation of a PNG that tells it after the picture
            is_swapped = swaps_axes(read_orientation(image))
        width, height = image.size
        return (width, height) if is_swapped else (height, width)


def from_pil(image: Image.Image, *, background: tuple[int, int, int] | None = BACKGROUND) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to an upright sRGB array, (H, W, 3) uint8; loads it if need be.

    Without a background, an image that has alpha keeps it: (H, W, 4).
    """
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    with PillowFailures(image):
        transparent = transparent_samples(image)  # before loading: it depends on the file's bit depth
        image.load()
        width, height = image.size
        to_rgb = rgb_converter(image, background, transparent)
        num_rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, num_rows):
            bottom = min(top + num_rows, height)
            band = to_rgb(image.crop((0, top, width, bottom)))
            if top == 0:
                upright, as_stored = empty_upright(height, width, read_orientation(image), band.shape[2])
            as_stored[top:bottom] = band
    return upright


@contextmanager
def open_image(source: Path | bytes | BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Any]:
    """Pillow's image of a file, identified and small enough, not yet decoded; raises ImageError."""
    try:
        with _stream(source) as stream:
            with PillowFailures(None):
                image = _identify(stream, max_pixels)
            with image:
                yield image
    except ImageError as error:
        if isinstance(source, Path):
            raise ImageError(f"{source}: {error}") from error
        raise


def _stream(source: Path | bytes | BinaryIO) -> BinaryIO:
    """A handle, never a name: Pillow maps named files into memory, and one cut short while mapped kills the process."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return source.open("rb") if isinstance(source, Path) else io.BytesIO(source.read())
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def _identify(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """Open an image by its header; refuse a bomb before anything is decoded."""
    kind = plugin_kind(stream.read(HEAD_BYTES))
    stream.seek(0)
    try:
        image = open_by_plugin(kind, stream, max_pixels) if kind else Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise ImageError(why_unidentified(stream.read(1024))) from error
    except Image.DecompressionBombError as error:
        # Pillow refuses twice its MAX_IMAGE_PIXELS (a global of the user's, not ours to set) before we see the size.
        own = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else max_pixels
        raise ImageError(f"too large: more than the limit of {min(own, max_pixels):,} pixels") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {size_text(height, width)} is more than the limit of {max_pixels:,} pixels")
    if reason := _why_not_tiff(image):
        raise ImageError(reason)
    return image


def _why_not_tiff(image: Any) -> str | None:
    """Why a TIFF that Pillow decodes would not be the picture that was meant."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_NEW_SUBFILE_TYPE, 0) == 1 or _DNG_VERSION in tags:
        return "a camera raw file, whose first image is only a preview; develop it to JPEG, PNG or TIFF first"
    bits = tags.get(_BITS_PER_SAMPLE, (1,))
    is_planar = len(bits) > 1 and tags.get(_PLANAR_CONFIGURATION, 1) == 2
    if is_planar and max(bits) > 8 and image.tile and image.tile[0].codec_name == "raw":  # Pillow takes them for bytes
        return "a TIFF with its deep colours in separate planes; save it with the colours of a pixel side by side"
    if bits == (32,) and image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
        return "a TIFF of 32-bit integers, which Pillow cuts to 31; save it with 8 or 16 bits"
    return None


def _samples_by_simplejpeg(image: Any, at_least_px: tuple[int, int] | None) -> NDArray[np.uint8] | None:
    """The picture of a JPEG, as it is stored; None where it is for Pillow to read, or to refuse with a reason."""
    import simplejpeg

    if image.mode not in ("L", "RGB") or image.info.get("icc_profile"):
        return None
    image.fp.seek(0)
    min_height, min_width = at_least_px or (0, 0)
    try:
        samples: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            image.fp.read(), "RGB", min_height=min_height, min_width=min_width
        )
        return samples
    except ValueError:  # it also refuses what Pillow, and libjpeg, only warn of
        return None
