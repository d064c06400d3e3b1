"""Settings of Pillow that decide about pixels and refusals: ours while we read, whatever a program has set."""

import sys
from typing import Any

from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin

MAX_IMAGE_PIXELS = 2**27

# Modules that are imported here are set from the first image on. Pillow imports the others late: their settings are its
# own, unless a program has imported and changed them.
_SETTINGS = {
    (Image.__name__, "MAX_IMAGE_PIXELS"): MAX_IMAGE_PIXELS,  # Pillow refuses twice as many, before we see a size
    (ImageFile.__name__, "LOAD_TRUNCATED_IMAGES"): False,
    (PngImagePlugin.__name__, "MAX_TEXT_CHUNK"): 2**26,  # a text of more than 1 MB would cost the picture
    (PngImagePlugin.__name__, "MAX_TEXT_MEMORY"): 2**27,
    (GifImagePlugin.__name__, "LOADING_STRATEGY"): GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST,
    ("PIL.TiffImagePlugin", "READ_LIBTIFF"): False,
    ("PIL.AvifImagePlugin", "DECODE_CODEC_CHOICE"): "auto",
    ("pillow_heif.options", "DECODE_THREADS"): 1,  # photos are decoded beside each other
    ("pillow_jxl.JpegXLImagePlugin", "DECODE_THREADS"): 0,
}
_theirs: dict[tuple[str, str], Any] = {}


def set_ours() -> None:
    """Set what we read with, and keep what the program had set."""
    for (module, name), value in _SETTINGS.items():
        if module in sys.modules and getattr(sys.modules[module], name, value) != value:
            _theirs[module, name] = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, value)


def set_theirs() -> None:
    """Bring back what `set_ours` kept, unless it was set anew in the meantime."""
    for (module, name), value in _theirs.items():
        if getattr(sys.modules[module], name) == _SETTINGS[module, name]:
            setattr(sys.modules[module], name, value)
    _theirs.clear()
