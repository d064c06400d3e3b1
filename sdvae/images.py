"""Images: any file to an upright sRGB array, (H, W, 3) uint8, and back to a file.

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
import logging
import re
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, GifImagePlugin, Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

from sdvae.errors import ImageError

# 134 megapixels: the largest single shots (102 MP) fit, and even a progressive JPEG, whose coefficients
# are all in memory at once, decodes in less than 1.5 GB.
MAX_IMAGE_PIXELS = 2**27
BACKGROUND = (255, 255, 255)

# Pillow's names of what is read. The rest of its zoo (EPS runs Ghostscript, many others are unfuzzed) is never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO")
_SPELLING = {"WEBP": "WebP", "PPM": "PNM", "JPEG2000": "JPEG 2000", "MPO": "JPEG"}
_BAND_PIXELS = 2**20  # colours are converted in bands of rows, so that a big image is in memory twice, not five times

_log = logging.getLogger(__name__)


# --- Files to images ---


def read_image(
    source: Path | bytes | BinaryIO,
    *,
    background: tuple[int, int, int] = BACKGROUND,
    max_pixels: int = MAX_IMAGE_PIXELS,
    decoder: Literal["pillow", "simplejpeg"] = "pillow",
    at_least_px: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Read a file as an upright sRGB image, (H, W, 3) uint8.

    `decoder` is that of JPEG. With `at_least_px`, a JPEG is decoded at the smallest of its own scales that has that
    (height, width): quicker, and a little softer. Raises ImageError with the reason. Where `source` is a Path the
    message begins with it; a reason for bytes or a stream depends on nothing but those bytes.
    """
    with _opened(source, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            with _PillowFailures(image):
                orientation = _orientation(image)
                is_turned, _, _ = _ORIENTATIONS[orientation]
                stored_px = at_least_px[::-1] if at_least_px and is_turned else at_least_px
                samples = _samples_by_simplejpeg(image, stored_px) if decoder == "simplejpeg" else None
                if samples is not None:
                    upright, as_stored = _empty_upright(samples.shape[0], samples.shape[1], orientation)
                    as_stored[...] = samples
                    return upright
                if stored_px is not None:
                    image.draft(None, stored_px[::-1])
        return from_pil(image, background=background)


def read_size(source: Path | bytes | BinaryIO, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) of what `read_image` would return, from the header; raises ImageError for a bad header."""
    with _opened(source, max_pixels) as image:
        with _PillowFailures(image):
            if image.format == "PNG" and _has_late_metadata(image.fp):
                image.load()  # the one way to the orientation of a PNG that tells it after the picture
            is_turned, _, _ = _ORIENTATIONS[_orientation(image)]
        width, height = image.size
        return (width, height) if is_turned else (height, width)


def from_pil(image: Image.Image, *, background: tuple[int, int, int] | None = BACKGROUND) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to an upright sRGB array, (H, W, 3) uint8; loads it if need be.

    Without a background, an image that has alpha keeps it: (H, W, 4).
    """
    if 0 in image.size:
        raise ImageError("the image has no pixels")
    with _PillowFailures(image):
        transparent = _transparent_samples(image)  # before loading: it depends on the file's bit depth
        image.load()
        width, height = image.size
        to_rgb = _converter(image, background, transparent)
        num_rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, num_rows):
            bottom = min(top + num_rows, height)
            band = to_rgb(image.crop((0, top, width, bottom)))
            if top == 0:
                upright, as_stored = _empty_upright(height, width, _orientation(image), band.shape[2])
            as_stored[top:bottom] = band
    return upright


@contextmanager
def _opened(source: Path | bytes | BinaryIO, max_pixels: int) -> Iterator[Any]:
    """The image of a file, identified and small enough, not yet decoded."""
    try:
        with _stream(source) as stream:
            with _PillowFailures(None):
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
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise ImageError(_why_unidentified(stream.read(1024))) from error
    except Image.DecompressionBombError as error:
        # Pillow refuses twice its MAX_IMAGE_PIXELS (a global of the user's, not ours to set) before we see the size.
        own = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else max_pixels
        raise ImageError(f"too large: more than the limit of {min(own, max_pixels):,} pixels") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width}x{height} is more than the limit of {max_pixels:,} pixels")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_NEW_SUBFILE_TYPE, 0) == 1 or _DNG_VERSION in tags:
        raise ImageError(
            "a camera raw file, whose first image is only a preview; develop it to JPEG, PNG or TIFF first"
        )
    return image


_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _DNG_VERSION = 254, 258, 262, 50706  # TIFF tags


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


# --- Orientation ---

# EXIF orientation -> how the stored image lies in the upright one: axes swapped, then rows, then columns reversed.
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def _orientation(image: Image.Image) -> int:
    if ExifTags.Base.Orientation in getattr(image, "tag_v2", {}):
        return 1  # Pillow announces a TIFF upright, and turns it while loading
    try:
        # Not image.getexif(): a PNG's would decode the picture in search of EXIF.
        # Pillow does not turn an AVIF by its irot and imir boxes, but reports them as this.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _FAILURES:
        return 1  # EXIF that cannot be parsed says nothing
    return orientation if orientation in _ORIENTATIONS else 1


def _empty_upright(
    height: int, width: int, orientation: int, num_channels: int = 3
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An upright image to be filled, and a view of it that lies as the file stores it, (height, width, channels)."""
    is_turned, flip_rows, flip_columns = _ORIENTATIONS[orientation]
    sides = (width, height) if is_turned else (height, width)
    upright = np.empty((*sides, num_channels), np.uint8)
    as_stored = upright.swapaxes(0, 1) if is_turned else upright
    return upright, as_stored[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _has_late_metadata(stream: BinaryIO) -> bool:
    """Whether a PNG has chunks that can hold an orientation behind its picture, found without decoding it."""
    position = stream.tell()
    stream.seek(8)
    has_picture = is_late = False
    while not is_late and len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        has_picture |= kind == b"IDAT"
        is_late = has_picture and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(position)
    return is_late


# --- Samples to sRGB ---


def _converter(
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


def _transparent_samples(image: Image.Image) -> NDArray[np.int64] | None:
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


def _colour_transform(source: ImageCms.ImageCmsProfile, mode: str) -> Callable[[Image.Image], Image.Image]:
    directions = (source.profile.clut or {}).values()  # for each intent: has it a table in, out, to proof
    is_table = any(has_table_in for has_table_in, _, _ in directions) or not source.profile.is_matrix_shaper
    # Left to itself, LittleCMS resamples tables coarsely for speed: up to 29 levels off. Matrices stay exact.
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if is_table else 0)
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags
    )
    return lambda image: transform.apply(image.convert(mode))


# --- Failures ---

# What Pillow lets through when a file is bad, learned from its tests and from mutated files.
_FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, EOFError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

_REASONS = {  # a phrase of Pillow's -> ours
    "truncated": "truncated: the file ends before the image does",
    "Truncated": "truncated: the file ends before the image does",
    "not enough image data": "truncated: the file ends before the image does",
    "cannot load this image": "the file has a header but no image data",
    "exceeds limit": "too large: its data hold more pixels than the header says",
    "Decompressed data too large": "its text or colour profile is larger than 64 MiB; save it without",
    "Too much memory used in text": "its texts are larger than 128 MiB; save it without",
}


class _PillowFailures:
    """Run Pillow without its warnings, and turn what it raises on a bad file into ImageError.

    A class, for a scan enters it twice a photo: generators of contextlib would cost as much as a header.
    """

    def __init__(self, image: Image.Image | None) -> None:
        self._image = image
        self._muted = muted_pillow()

    def __enter__(self) -> None:
        self._muted.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._muted.__exit__(kind, error, trace)
        if not isinstance(error, _FAILURES):
            return
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        # Pillow's own words may hold addresses, and change with its version: they stay in the traceback.
        name = _spelled(self._image.format) if self._image and self._image.format else "image"
        reason = next(
            (ours for phrase, ours in _REASONS.items() if phrase in str(error)), f"the {name} data are corrupt"
        )
        raise ImageError(reason) from error


def _why_unidentified(head: bytes) -> str:  # the first bytes of a file that no decoder of ours accepts
    if not head:
        return "the file is empty"
    names = [_spelled(name) for name in FORMATS if (accepts := Image.OPEN[name][1]) and accepts(head[:16]) is True]
    if names:
        return f"the {names[0]} header is corrupt, or of a kind that cannot be decoded (12 bits, lossless, ...)"
    text = head.lstrip().lower()
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    known = {
        "HEIC": brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        "AVIF of a kind that cannot be decoded": brand in (b"avif", b"avis"),
        "JPEG XL": head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")),
        "SVG": b"<svg" in text,
        "HTML, perhaps a page saved in place of the image": text.startswith((b"<!doctype html", b"<html")),
        "a Git LFS pointer; fetch the file with `git lfs pull`": text.startswith(b"version https://git-lfs"),
        "PDF": text.startswith(b"%pdf"),
        "Photoshop": head.startswith(b"8BPS"),
    }
    for name, is_so in known.items():
        if is_so:
            return f"not an image in a format sdvae reads ({name})"
    return f"not an image in a format sdvae reads: {', '.join(_spelled(name) for name in FORMATS)}"


def _spelled(pillow_format: str) -> str:
    return _SPELLING.get(pillow_format, pillow_format)


_PILLOW = r"PIL\."
_muting = threading.Lock()
_num_muting = 0


# What decides about pixels and refusals is ours while we read, whatever a program has set for itself. Modules that are
# not imported here are set where a program has imported, and perhaps changed, them.
_SETTINGS = {
    (Image.__name__, "MAX_IMAGE_PIXELS"): MAX_IMAGE_PIXELS,  # Pillow refuses twice as many, before we see a size
    (ImageFile.__name__, "LOAD_TRUNCATED_IMAGES"): False,
    (PngImagePlugin.__name__, "MAX_TEXT_CHUNK"): 2**26,  # a text of more than 1 MB would cost the picture
    (PngImagePlugin.__name__, "MAX_TEXT_MEMORY"): 2**27,
    (GifImagePlugin.__name__, "LOADING_STRATEGY"): GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST,
    ("PIL.TiffImagePlugin", "READ_LIBTIFF"): False,
    ("PIL.AvifImagePlugin", "DECODE_CODEC_CHOICE"): "auto",
}
_theirs: dict[tuple[str, str], Any] = {}


class muted_pillow:  # noqa: N801 - it is used like a function, as contextlib's are
    """Ignore Pillow's warnings and the program's settings of Pillow for as long as any thread reads an image.

    Not `warnings.catch_warnings`: of two threads that overlap, the first to leave would bring the warnings back
    for the other, and the second would leave them ignored for good.
    """

    def __enter__(self) -> None:
        global _num_muting
        with _muting:
            if _num_muting == 0:
                warnings.filterwarnings("ignore", module=_PILLOW)
                _set_ours()
            _num_muting += 1

    def __exit__(self, *failure: object) -> None:
        global _num_muting
        with _muting:
            _num_muting -= 1
            if _num_muting == 0:
                rule = ("ignore", None, Warning, re.compile(_PILLOW), 0)  # as filterwarnings put it into the list
                if rule in warnings.filters:
                    warnings.filters.remove(rule)  # type: ignore[attr-defined]
                _set_theirs()


def _set_ours() -> None:
    for (module, name), value in _SETTINGS.items():
        if module in sys.modules and getattr(sys.modules[module], name, value) != value:
            _theirs[module, name] = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, value)


def _set_theirs() -> None:
    for (module, name), value in _theirs.items():
        if getattr(sys.modules[module], name) == _SETTINGS[module, name]:  # not set anew in the meantime
            setattr(sys.modules[module], name, value)
    _theirs.clear()


# --- Images to files ---

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
        raise ImageError(f"{format} cannot hold an image of {width}x{height}; write it as png") from error
    return file.getvalue()
