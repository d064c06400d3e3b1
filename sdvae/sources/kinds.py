"""Which files of a folder or an archive are photos, which tell something of photos, and which are left aside.

A file is a photo by its suffix, whatever is in it: what cannot be read is quarantined with a reason. One with a suffix
that says nothing, or with none, is a photo if it begins as image files do. All other files are left aside and counted;
what desktops leave behind is not even counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from sdvae.sources.entries import Entry, some_of

READABLE = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc",
    ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
UNREADABLE = (
    ".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg", ".tga", ".xcf",
)  # fmt: skip
PACKED = (".tar", ".zip", ".parquet", ".arrow")  # sources of their own
_NO_PHOTOS = (  # never opened to see how they begin
    *PACKED, ".aae", ".bak", ".bin", ".caption", ".cls", ".crdownload", ".csv", ".db", ".gz", ".html", ".ini", ".json",
    ".jsonl", ".log", ".md", ".mov", ".mp4", ".npy", ".npz", ".part", ".pickle", ".pkl", ".pt", ".pth", ".py",
    ".safetensors", ".sha256", ".tmp", ".toml", ".tsv", ".txt", ".xml", ".xmp", ".yaml", ".yml",
)  # fmt: skip
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin")
HEAD_BYTES = 32
_HEAD = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|BM....\0\0\0\0|P[1-6][\s#]|II[*+]\0|MM\0[*+]|\0\0\x01\0[^\0]\0"
    rb"|....ftyp(?:avi[fs]|mif1|msf1|hei[cfmsx]|hev[cmsx])|\0\0\0\x0cj(?:P  |XL )|\xff\x4f\xff\x51|\xff\x0a|8BPS",
    re.DOTALL,
)


def is_junk(name: str) -> bool:
    """Whether a path is what desktops, file servers and notebooks leave in folders, or hidden."""
    parts = name.lower().split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part in _JUNK for part in parts)


def can_be_read(name: str) -> bool:
    """Whether a photo of this name may be of a format that is read."""
    return PurePosixPath(name).suffix.lower() not in UNREADABLE


@dataclass
class Listing:
    """The files of one folder or archive, sorted by what they are."""

    photos: list[Entry] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)


def remarks_on(aside: list[str]) -> list[str]:
    """What there is to say of the files that are left aside: nothing, or a sentence."""
    if not aside:
        return []
    counts = Counter(PurePosixPath(name).suffix.lower() or "without a suffix" for name in aside)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(8))
    files = "file that is no photo was" if len(aside) == 1 else "files that are no photos were"
    return [f"{len(aside)} {files} left aside ({kinds}): {some_of(aside)}"]


def sort_out(files: Iterable[Entry], is_text: Callable[[str], bool], read_head: Callable[[str], bytes]) -> Listing:
    """Tell photos from other files; `read_head` gives the first HEAD_BYTES of one, or raises OSError."""
    listing = Listing()
    for entry in files:
        if is_junk(entry.key):
            continue
        if is_text(entry.key):
            listing.texts.append(entry.key)
        elif _is_photo(entry, read_head):
            listing.photos.append(entry)
        else:
            listing.aside.append(entry.key)
    return listing


def _is_photo(entry: Entry, read_head: Callable[[str], bytes]) -> bool:
    suffix = PurePosixPath(entry.key).suffix.lower()
    if suffix in READABLE or suffix in UNREADABLE:
        return True
    if suffix in _NO_PHOTOS:
        return False
    if entry.reason is not None:  # nobody may look: its reason is told
        return True
    try:
        return _HEAD.match(read_head(entry.key)) is not None
    except OSError:
        return True
