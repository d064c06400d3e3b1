"""The digits of MNIST and what is packed like them: idx files, with labels in a file beside the images."""

import gzip
import math
import zlib
from collections.abc import Sequence
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

    remarks: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.name, self.root = str(path), absolute(path)

    def entries(self) -> list[Entry]:
        """Every image, labelled where a file of labels lies beside; SourceError for files that are no idx."""
        num_bytes = self._images[0].nbytes if len(self._images) else 0
        labels = self._labels()
        status = self.root.stat()
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
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_packed else path.open("rb") as data:
            head = data.read(4 + 4 * num_axes)
            shape = [int(side) for side in np.frombuffer(head[4:].ljust(4 * num_axes, b"\0"), ">u4")]
            values = data.read(math.prod(shape))  # no more: little that is packed may be much
            is_longer = bool(data.read(1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (OverflowError, MemoryError):  # no file is as long as its header says
        values, is_longer = b"", True
    is_idx = head[:4] == bytes([0, 0, 8, num_axes]) and all(shape[1:])
    if not is_idx or is_longer or len(values) != math.prod(shape):
        raise SourceError(f"{path} is no idx file of bytes with {num_axes} axes, or is cut short; fetch it again")
    return np.frombuffer(values, np.uint8).reshape(shape)
