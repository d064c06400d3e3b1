"""What a source of photos is: entries, listed in a fixed order, and the bytes of each."""

import errno
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol

from sdvae.errors import SourceError

MAX_FILE_BYTES = 2**30  # a photo is read whole; a video that strayed into a source must not fill the memory

# What parsers of zip files, tars, tables and JSON let through when a file is bad, learned from mutated files.
PARSER_FAILURES = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, EOFError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One photo of a source, by its metadata alone; `reason` says why it must not be opened.

    `num_bytes` and `mtime_ns` change when its bytes may have changed; a source that cannot tell the length
    without reading says 0. `uri` says where the bytes are, relative to the source; None says `key`.
    """

    key: str
    num_bytes: int = 0
    mtime_ns: int = 0
    reason: str | None = None
    uri: str | None = None
    caption: str | None = None
    label: str | None = None


class Source(Protocol):
    """Photos by key. Pickled, it is small and opens again in another process, where any order of reads is right."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def root(self) -> Path | None:
        """The folder or file that a store has to be kept apart from; None where it may lie anywhere."""

    @property
    def remarks(self) -> Sequence[str]:
        """What the last listing left aside, in short sentences: texts of no photo, files that are no photos."""

    def entries(self) -> list[Entry]:
        """Every photo, sorted by key, each key once; SourceError where they cannot be listed."""

    def read(self, key: str) -> bytes:
        """The bytes of one photo, at most MAX_FILE_BYTES; nothing but OSError, with a `strerror`, where that fails."""


def sorted_by_key(entries: Iterable[Entry], name: str) -> list[Entry]:
    """Entries in the order of a source; SourceError where two have one key, for nothing could tell them apart later."""
    ordered = sorted(entries, key=attrgetter("key"))
    for before, entry in pairwise(ordered):
        if before.key == entry.key:
            places = " and ".join(dict.fromkeys(found.uri or found.key for found in (before, entry)))
            raise SourceError(f"two photos in {name} are both called {entry.key!r} ({places}); rename one")
    return ordered


def absolute(path: Path) -> Path:
    """Where `path` is, whatever the current folder becomes. A link to a file keeps its name, which tells what it is."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def some_of(names: Iterable[str]) -> str:
    """A few of these names."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


def why_unsafe(name: str) -> str | None:
    """Why a name inside an archive or a table must not be followed; None for a path below where it stands."""
    if name.startswith("/"):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads out of the source"
    return None


class DoubtError(Exception):
    """Why it is not certain what a photo's caption or label is."""


def as_text(value: Any, member: Literal["caption", "label"]) -> str | None:
    """A caption or a label that some file or program gives; DoubtError for what is no text, or cannot be stored.

    A label may be a whole number, also one that a table with gaps made a float.
    """
    if member == "label" and isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    if member == "label" and isinstance(value, Integral):
        return str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DoubtError(f"its {member} is a {type(value).__name__}, which is no text")
    if not is_utf8(value):
        raise DoubtError(f"its {member} holds half a character (a lone surrogate)")
    return str(value)


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: JSON can spell halves of characters that UTF-8 cannot."""
    return text.isascii() or text.encode(errors="replace").decode() == text


def why_no_name(name: str) -> str | None:
    """Why no file can have this name; None for one that some file may have."""
    if "\0" in name:
        return "its name holds a NUL"
    return None if is_utf8(name) else "its name holds half a character (a lone surrogate)"


def shown(name: str) -> str:
    """A name that no file can have, as a key: JSON holds it, and nobody takes it for another."""
    return name.replace("\0", "\\x00").encode(errors="backslashreplace").decode()


@contextmanager
def failing_as_one_photo() -> Iterator[None]:
    """Let what is wrong with the file that holds many photos be said of the one that is read.

    A reason goes into the store, so it names no path of this machine.
    """
    try:
        yield
    except LookupError as error:
        raise FileNotFoundError(errno.ENOENT, "it is no longer in the file that held it") from error
    except (SourceError, *PARSER_FAILURES) as error:
        raise OSError(errno.EIO, "the file that holds it is damaged or gone") from error


def why_no_file(status: os.stat_result) -> str | None:
    """Why something on disk must not be opened as a photo; None for a plain file of bearable size."""
    if not stat.S_ISREG(status.st_mode):
        return "not a file but a device, a pipe or a socket"
    if status.st_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES:,} bytes"
    return None


def class_folder(key: str) -> str | None:
    """The name of the folder a photo lies in: its class, in the datasets that sort photos so."""
    return key.rpartition("/")[0].rpartition("/")[2] or None
