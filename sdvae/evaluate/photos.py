"""The photos of a source, read ahead by threads, in the order of the source."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdvae.errors import ImageError
from sdvae.images.read import read_image
from sdvae.sources.entries import Entry, Source

NUM_THREADS = 4
_AHEAD = 8  # photos that are decoded and wait


@dataclass(frozen=True)
class Photo:
    """A photo by its place in the source, or why there is none."""

    index: int
    key: str
    image: NDArray[np.uint8] | None  # (H, W, 3)
    reason: str = ""


def read_photos(source: Source, entries: Sequence[tuple[int, Entry]]) -> Iterator[Photo]:
    """Each photo of `entries`, in their order; a few at a time are in memory.

    Pillow decodes and resizes outside the lock of the interpreter, so threads are enough beside a network.
    """
    with ThreadPoolExecutor(NUM_THREADS, "sdvae-eval") as pool:
        waiting = deque(entries)
        coming = deque(pool.submit(_read, source, *waiting.popleft()) for _ in range(min(_AHEAD, len(waiting))))
        try:
            while coming:
                photo = coming.popleft().result()
                if waiting:
                    coming.append(pool.submit(_read, source, *waiting.popleft()))
                yield photo
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: Source, index: int, entry: Entry) -> Photo:
    if entry.reason is not None:
        return Photo(index, entry.key, None, entry.reason)
    try:
        return Photo(index, entry.key, read_image(source.read(entry.key)))
    except OSError as error:
        return Photo(index, entry.key, None, f"cannot be read: {error.strerror}")
    except ImageError as error:
        return Photo(index, entry.key, None, str(error))
