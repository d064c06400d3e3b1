"""The digits of MNIST and what is packed like them: idx files, with labels in a file beside the images."""

import gzip
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import SourceError
from sdvae.sources.entries import Entry, absolute, failing_as_one_photo

_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"  # in the names of the files


def is_idx(path: Path) -> bool:
    """Whether a file is called as images in idx format are."""
    return path.name.removesuffix(".gz").endswith("-idx3-ubyte")


class MnistSource:
    """The images of one idx file, packed or not; a record's key is the number of the image."""

    def __init__(self, path: Path) -> None:
        self.name, self.root = str(path), absolute(path)

    def entries(self) -> list[Entry]:
        """Every image, labelled where a file of labels lies beside; SourceError for files that are no idx."""
        status = self.root.stat()
        num_bytes = self._images[0].nbytes if len(self._images) else 0
        labels = self._labels()
        return [
            Entry(f"{row:07d}", num_bytes, status.st_mtime_ns, label=None if labels is None else str(labels[row]))
            for row in range(len(self._images))
        ]

    def read(self, key: str) -> bytes:
        """One image as a PGM file, which is its bytes behind a short header."""
        with failing_as_one_photo():
            image = self._images[int(key)]
        height, width = image.shape
        return b"P5 %d %d 255\n" % (width, height) + bytes(image)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root,)

    @cached_property
    def _images(self) -> NDArray[np.uint8]:  # (num_images, height, width)
        return _read_idx(self.root, 3)

    def _labels(self) -> NDArray[np.uint8] | None:
        path = self.root.with_name(self.root.name.replace(_IMAGES, _LABELS))
        if path == self.root or not path.exists():
            return None
        labels = _read_idx(path, 1)
        if len(labels) != len(self._images):
            raise SourceError(f"{path} has {len(labels)} labels for {len(self._images)} images; fetch both again")
        return labels


def _read_idx(path: Path, num_axes: int) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    header = np.frombuffer(data[4 : 4 + 4 * num_axes], ">u4")
    if data[:4] != bytes([0, 0, 8, num_axes]) or len(data) != 4 + 4 * num_axes + int(np.prod(header, dtype=np.int64)):
        raise SourceError(f"{path} is no idx file of bytes with {num_axes} axes, or is cut short; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(tuple(header))
