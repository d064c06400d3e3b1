"""Keys to file names: every image gets a name of its own inside the output folder, whatever its key says."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f\ud800-\udfff<>:"\\|?*]|[. ]+$'
)  # what some file system refuses, or reads as something else
_MAX_BYTES = 150  # of a part; file systems allow 255, and a temporary's name and a hash must fit, too


def plan_names(keys: Sequence[str], suffix: str) -> list[str]:  # relative, with forward slashes
    """The output name of each key: its folders and stem, and `suffix` (".png").

    Keys that would share a name (also on a file system that ignores case) all keep their own extension:
    `a.jpg` and `a.webp` become `a.jpg.png` and `a.webp.png`. Keys that still would, get the start of their
    sha256. A name depends on the set of keys, not on their order.
    """
    degrees = [0] * len(keys)
    while True:
        names = [_name(key, suffix, degree) for key, degree in zip(keys, degrees, strict=True)]
        taken = Counter(_fold(name) for name in names)
        folders = {_fold(str(folder)) for name in names for folder in PurePosixPath(name).parents}
        clashes = [taken[_fold(name)] > 1 or _fold(name) in folders for name in names]
        raised = [min(degree + clash, 2) for degree, clash in zip(degrees, clashes, strict=True)]
        if raised == degrees:
            return names
        degrees = raised


def _name(key: str, suffix: str, degree: int) -> str:
    parts = [part for part in key.split("/") if part.strip(". ")] or ["image"]
    *folders, last = [_UNSAFE.sub("_", part) for part in parts]
    stem = _cut(last if degree else PurePosixPath(last).stem)
    if degree == 2:
        stem += "-" + hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
    return "/".join([*map(_cut, folders), stem + suffix])


def _cut(part: str) -> str:
    return part.encode()[:_MAX_BYTES].decode(errors="ignore")


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
