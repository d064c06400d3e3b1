"""How a stored image is turned and mirrored to be upright: EXIF's orientation."""

import io
import struct
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sdvae.images.failures import FAILURES

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


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied to this image, 1 to 8; 1 is upright."""
    if ExifTags.Base.Orientation in getattr(image, "tag_v2", {}):
        return 1  # Pillow announces a TIFF upright, and turns it while loading
    try:
        # Not image.getexif(): a PNG's would decode the picture in search of EXIF.
        # Pillow does not turn an AVIF by its irot and imir boxes, but reports them as this.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except FAILURES:
        return 1  # EXIF that cannot be parsed says nothing
    return orientation if orientation in _ORIENTATIONS else 1


def swaps_axes(orientation: int) -> bool:
    """Whether the height of the stored image is the width of the upright one."""
    return _ORIENTATIONS[orientation][0]


def empty_upright(
    height: int, width: int, orientation: int, num_channels: int = 3
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An upright image to be filled, and a view of it that lies as the file stores it, (height, width, channels)."""
    is_swapped, flip_rows, flip_columns = _ORIENTATIONS[orientation]
    sides = (width, height) if is_swapped else (height, width)
    upright = np.empty((*sides, num_channels), np.uint8)
    as_stored = upright.swapaxes(0, 1) if is_swapped else upright
    return upright, as_stored[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def has_late_metadata(stream: BinaryIO) -> bool:
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
