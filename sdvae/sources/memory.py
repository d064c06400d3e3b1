"""Photos that a program holds or makes: any iterable of images, paths or mappings."""

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdvae.errors import SourceError
from sdvae.sources.entries import MAX_FILE_BYTES, Entry, sorted_by_key

_MEMBERS = {"image", "key", "caption", "label"}


class MemorySource:
    """The items of an iterable: images, or mappings with an `image` and a `key`, `caption`, `label`.

    An image is a path, the bytes of an image file, a Pillow image, or an array (H, W) or (H, W, 3) of uint8. What is no
    sequence is read once and kept. A key that is not given is the number of the item. Nothing can tell whether such
    images are those of an earlier run, so every run looks at all of them again.
    """

    root: Path | None = None

    def __init__(self, items: Iterable[Any], name: str = "the images in memory") -> None:
        self.name = name
        self._items = items if isinstance(items, Sequence) else list(items)
        self._begun_ns = time.time_ns()
        self._number_of: dict[str, int] = {}
        for number, item in enumerate(self._items):
            if isinstance(item, Mapping) and not {"image"} <= item.keys() <= _MEMBERS:
                raise SourceError(
                    f"item {number} of {name} has {sorted(map(str, item))}; it needs an 'image', "
                    "and may have a 'key', a 'caption' and a 'label'"
                )
            key = str(_told(item, "key") or f"{number:09d}")
            if key in self._number_of:
                raise SourceError(
                    f"items {self._number_of[key]} and {number} of {name} have one key, {key!r}; give them two"
                )
            self._number_of[key] = number

    def entries(self) -> list[Entry]:
        """Every item, sorted by key."""
        return sorted_by_key(
            (
                Entry(
                    key,
                    mtime_ns=self._begun_ns,
                    caption=_told(self._items[number], "caption"),
                    label=_told(self._items[number], "label"),
                )
                for key, number in self._number_of.items()
            ),
            self.name,
        )

    def read(self, key: str) -> bytes:
        """The bytes of an image file: those that were given, or a lossless file of the image."""
        item = self._items[self._number_of[key]]
        image = item["image"] if isinstance(item, Mapping) else item
        if isinstance(image, bytes):
            return image
        if isinstance(image, str | Path):
            with Path(image).open("rb") as file:
                return file.read(MAX_FILE_BYTES)
        if isinstance(image, Image.Image):
            return _as_png(image)
        return _as_pnm(image, f"item {self._number_of[key]} of {self.name}")


def _told(item: Any, member: str) -> str | None:
    value = item.get(member) if isinstance(item, Mapping) else None
    return None if value is None else str(value)


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def _as_pnm(image: Any, where: str) -> bytes:
    """An array behind the shortest header there is: no library's version shows in the bytes."""
    array = np.asarray(image)
    is_gray, is_rgb = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (is_gray or is_rgb):
        raise SourceError(f"{where} is {array.dtype} of shape {array.shape}; an array is uint8, (H, W) or (H, W, 3)")
    return b"P%d %d %d 255\n" % (5 if is_gray else 6, array.shape[1], array.shape[0]) + array.tobytes()
