"""What Pillow says about bad files: its exceptions become ImageError, its warnings are ignored."""

import re
import struct
import threading
import warnings
import zlib
from types import TracebackType

from PIL import Image

from sdvae.errors import ImageError
from sdvae.images.formats import spelled
from sdvae.images.settings import set_ours, set_theirs

# What Pillow lets through when a file is bad, learned from its tests and from mutated files.
FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, EOFError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

_REASONS = {  # a phrase of Pillow's -> ours
    "truncated": "truncated: the file ends before the image does",
    "Truncated": "truncated: the file ends before the image does",
    "not enough image data": "truncated: the file ends before the image does",
    "cannot load this image": "the file has a header but no image data",
    "Decompressed data too large": "its text or colour profile is larger than 64 MiB; save it without",
    "Too much memory used in text": "its texts are larger than 128 MiB; save it without",
    "exceeds limit": "too large: its data hold more pixels than the header says",
}


class PillowFailures:
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
        if not isinstance(error, FAILURES):
            return
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"cannot be read: {error.strerror}") from error
        # Pillow's own words may hold addresses, and change with its version: they stay in the traceback.
        name = spelled(self._image.format) if self._image and self._image.format else "image"
        reason = next(
            (ours for phrase, ours in _REASONS.items() if phrase in str(error)), f"the {name} data are corrupt"
        )
        raise ImageError(reason) from error


_PILLOW = r"PIL\."
_muting = threading.Lock()
_num_muting = 0


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
                set_ours()
            _num_muting += 1

    def __exit__(self, *failure: object) -> None:
        global _num_muting
        with _muting:
            _num_muting -= 1
            if _num_muting == 0:
                set_theirs()
                rule = ("ignore", None, Warning, re.compile(_PILLOW), 0)  # as filterwarnings put it into the list
                if rule in warnings.filters:
                    warnings.filters.remove(rule)  # type: ignore[attr-defined]
