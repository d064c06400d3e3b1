"""What a source of photos is: entries, listed in a fixed order, and the bytes of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_FILE_BYTES = 2**30  # a photo is read whole; a video that strayed into a source must not fill the memory


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
        """The folder or file that everything is read from; None where there is no such place."""

    def entries(self) -> list[Entry]:
        """Every photo, sorted by key, each key once; StoreError where they cannot be listed."""

    def read(self, key: str) -> bytes:
        """The bytes of one photo, at most MAX_FILE_BYTES; OSError, with a `strerror`, where this one cannot be read."""
