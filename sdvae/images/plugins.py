"""HEIC and JPEG XL, which Pillow leaves to its plugins: the extra `formats`.

A plugin is imported when the first photo of its kind is read.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, BinaryIO

from sdvae.amounts import size_text
from sdvae.errors import ImageError
from sdvae.images.failures import FAILURES

HEAD_BYTES = 256  # what tells the kind
_MODULES = {"HEIC": "pillow_heif", "JPEG XL": "pillow_jxl"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_ANY_BRANDS = (b"mif1", b"msf1")  # HEIF of any codec: those it is compatible with tell
_AVIF_BRANDS = {b"avif", b"avis"}
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL "
_HDR_TRANSFERS = (16, 18)  # PQ and HLG, in nclx profiles (ITU-T H.273)


def plugin_kind(head: bytes) -> str | None:
    """Which plugin a file is for, HEIC or JPEG XL, by its first bytes; None for what Pillow reads, and for the rest."""
    if head.startswith((_JXL_CODESTREAM, _JXL_CONTAINER)):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return None
    end = int.from_bytes(head[:4], "big")
    brands = {head[place : place + 4] for place in range(16, min(end, len(head)), 4)}
    is_heic = head[8:12] in _HEIC_BRANDS or (head[8:12] in _ANY_BRANDS and not brands & _AVIF_BRANDS)
    return "HEIC" if is_heic else None


def open_by_plugin(kind: str, stream: BinaryIO, max_pixels: int) -> Any:
    """The Pillow image of a HEIC or JPEG XL file; ImageError for a bad header, and where the plugin is missing.

    Both are upright by their own means, which come before EXIF's orientation; a JPEG in a JPEG XL has only the latter.
    """
    if find_spec(_MODULES[kind]) is None:
        raise ImageError(f"reading {kind} needs {_MODULES[kind]}, which is not installed; pip install 'sdvae[formats]'")
    try:
        return _open_heic(stream) if kind == "HEIC" else _open_jpeg_xl(stream, max_pixels)
    except FAILURES as error:
        raise ImageError(f"the {kind} data are corrupt, or of a kind that cannot be decoded") from error


def _open_heic(stream: BinaryIO) -> Any:
    image = import_module("pillow_heif.as_plugin").HeifImageFile(stream)
    _forget_orientation(image)  # libheif turns it by its irot and imir
    if image.info.get("nclx_profile", {}).get("transfer_characteristics") in _HDR_TRANSFERS:
        raise ImageError("an HDR image (PQ or HLG), which has no agreed meaning in sRGB; export it as an SDR image")
    return image


def _open_jpeg_xl(stream: BinaryIO, max_pixels: int) -> Any:
    data = stream.read()
    width, height = _jpeg_xl_size(data)  # the plugin decodes when it opens
    if width * height > max_pixels:
        raise ImageError(f"too large: {size_text(height, width)} is more than the limit of {max_pixels:,} pixels")
    stream.seek(0)
    image = import_module("pillow_jxl.JpegXLImagePlugin").JXLImageFile(stream)
    if not image.jpeg:
        _forget_orientation(image)  # libjxl turns it by its header
    return image


def _forget_orientation(image: Any) -> None:
    for name in ("exif", "xmp"):
        image.info.pop(name, None)


def _jpeg_xl_size(data: bytes) -> tuple[int, int]:  # (width, height) as stored
    """The size in the header of a JPEG XL file: ISO/IEC 18181-1, SizeHeader; ValueError where there is none."""
    bits = _bits(_codestream(data)[2:16])

    def number(num_bits: int) -> int:
        return sum(next(bits) << place for place in range(num_bits))

    def side(is_small: int) -> int:
        return 8 * (number(5) + 1) if is_small else 1 + number((9, 13, 18, 30)[number(2)])

    is_small = number(1)
    height = side(is_small)
    ratio = number(3)
    if ratio == 0:
        return side(is_small), height
    times, over = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * times // over, height


def _bits(data: bytes) -> Iterator[int]:
    for byte in data:
        yield from ((byte >> place) & 1 for place in range(8))
    raise ValueError("the header ends early")


def _codestream(data: bytes) -> bytes:
    """The codestream, from its beginning: of a container, where its first box with a part of it lies."""
    place = 0
    while not data.startswith(_JXL_CODESTREAM):
        num_bytes, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        head = 8
        if num_bytes == 1:
            num_bytes, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return data[place + head + 4 * (kind == b"jxlp") :]  # a part is numbered first
        if num_bytes < head:
            raise ValueError("the container holds no codestream")
        place += num_bytes
    return data
