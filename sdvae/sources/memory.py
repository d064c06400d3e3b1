"""Photos that a program holds or makes: any iterable of images, paths or mappings."""

import errno
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdvae.errors import ImageError, SourceError
from sdvae.images.read import from_pil
from sdvae.sources.entries import (
    MAX_FILE_BYTES,
    PARSER_FAILURES,
    DoubtError,
    Entry,
    as_text,
    sorted_by_key,
    why_no_file,
    why_no_name,
)


class MemorySource:
    """The items of an iterable: images, or mappings with an `image` and a `key`, `caption`, `label`.

    An image is a path, the bytes of an image file, a Pillow image, or an array (H, W) or (H, W, 3) of uint8. What is no
    sequence is read once and kept. A key that is not given is the number of the item. `caption` names another member of
    the mappings. Nothing can tell whether such images are those of an earlier run, so every run looks at all of them
    again. An item that is no image, and one whose caption is no text, is quarantined.
    """

    root: Path | None = None
    remarks: Sequence[str] = ()

    def __init__(self, items: Iterable[Any], name: str = "the images in memory", caption: str = "caption") -> None:
        self.name = name
        self._items = items if isinstance(items, Sequence) else list(items)
        self._caption = caption
        self._begun_ns = time.time_ns()
        self._loading = Lock()
        self._kept: dict[str, bytes] = {}  # once loaded, a PNG no longer says in how many bits its transparent gray is
        self._number_of: dict[str, int] = {}
        members = {"image", "key", caption, "label"}
        for number, item in enumerate(self._items):
            if isinstance(item, Mapping) and not {"image"} <= item.keys() <= members:
                raise SourceError(
                    f"item {number} of {name} has {sorted(map(str, item))}; it needs an 'image', "
                    f"and may have a 'key', a {caption!r} and a 'label'"
                )
            key = self._key(number)
            if key in self._number_of:
                raise SourceError(
                    f"items {self._number_of[key]} and {number} of {name} have one key, {key!r}; give them two"
                )
            self._number_of[key] = number

    def entries(self) -> list[Entry]:
        """Every item, sorted by key."""
        return sorted_by_key((self._entry(key, number) for key, number in self._number_of.items()), self.name)

    def read(self, key: str) -> bytes:
        """The bytes of an image file: those that were given, or a lossless file of the image."""
        image = _image(self._items[self._number_of[key]])
        if isinstance(image, bytes):
            return image
        if isinstance(image, str | Path):
            return _read_file(image)
        try:
            return self._as_file(key, image) if isinstance(image, Image.Image) else _as_pnm(image)
        except ImageError as error:
            raise OSError(errno.EINVAL, str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        # Pillow's own pickles lose what a format alone knows; and another process must read the same bytes.
        items = [self._without_pillow(key) for key in sorted(self._number_of, key=self._number_of.__getitem__)]
        return vars(self) | {"_items": items, "_loading": None, "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _loading=Lock())

    def _key(self, number: int) -> str:
        item = self._items[number]
        key = item.get("key") if isinstance(item, Mapping) else None
        if key is None or key == "":
            return f"{number:09d}"
        if not isinstance(key, str | int) or why_no_name(str(key)):
            raise SourceError(f"the key of item {number} of {self.name} is {key!r:.60}; a key is a text")
        return str(key)

    def _entry(self, key: str, number: int) -> Entry:
        item = self._items[number]
        if not isinstance(item, Mapping):
            return Entry(key, mtime_ns=self._begun_ns)
        try:
            caption, label = as_text(item.get(self._caption), "caption"), as_text(item.get("label"), "label")
        except DoubtError as doubt:
            return Entry(key, mtime_ns=self._begun_ns, reason=str(doubt))
        return Entry(key, mtime_ns=self._begun_ns, caption=caption, label=label)

    def _as_file(self, key: str, image: Image.Image) -> bytes:
        """A Pillow image as its own file would be read: upright, in sRGB, with its alpha."""
        with self._loading:  # several items may be one image
            if key in self._kept:
                return self._kept[key]
            is_forgetful = image.mode == "L" and "transparency" in image.info and bool(getattr(image, "tile", None))
            pixels = from_pil(image, background=None)
        data = _as_pnm(pixels) if pixels.shape[2] == 3 else _as_png(pixels)
        if is_forgetful:
            self._kept[key] = data
        return data

    def _without_pillow(self, key: str) -> Any:
        item = self._items[self._number_of[key]]
        if not isinstance(_image(item), Image.Image):
            return item
        try:
            data: Any = self.read(key)
        except OSError as error:
            data = _Unreadable(str(error.strerror))
        return {**item, "image": data} if isinstance(item, Mapping) else data


class _Unreadable:
    """A Pillow image that cannot be read, in another process."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _image(item: Any) -> Any:
    return item["image"] if isinstance(item, Mapping) else item


def _read_file(path: str | Path) -> bytes:
    if reason := why_no_name(str(path)):
        raise OSError(errno.ENOENT, reason)
    if reason := why_no_file(Path(path).stat()):
        raise OSError(errno.EINVAL, reason)
    with Path(path).open("rb") as file:
        return file.read(MAX_FILE_BYTES)


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def _as_pnm(image: Any) -> bytes:
    """An array behind the shortest header there is: no library's version shows in the bytes."""
    if isinstance(image, _Unreadable):
        raise ImageError(image.reason)
    try:
        array = np.asarray(image)
    except PARSER_FAILURES as error:
        raise ImageError(f"a {type(image).__name__} is no image; an array is uint8, (H, W) or (H, W, 3)") from error
    is_gray, is_rgb = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (is_gray or is_rgb):
        raise ImageError(
            f"a {type(image).__name__} is {array.dtype} of shape {array.shape}; an array is uint8, (H, W) or (H, W, 3)"
        )
    if not array.size:
        raise ImageError("the image has no pixels")
    return b"P%d %d %d 255\n" % (5 if is_gray else 6, array.shape[1], array.shape[0]) + array.tobytes()
