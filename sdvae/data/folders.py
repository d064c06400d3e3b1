"""A folder of photos, listed in a fixed order and read without leaving it."""

import os
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from sdvae.data.entries import MAX_FILE_BYTES, Entry
from sdvae.errors import StoreError

# What people and desktops keep beside photos. Every other file is a record, and is quarantined if it is no photo.
NOT_PHOTOS = (b".caption", b".csv", b".db", b".ini", b".json", b".jsonl", b".md", b".tsv", b".txt")


class FolderSource:
    """All photos in a folder and the folders in it; a record's key is its path below `root`, with `/`.

    Hidden names (a leading dot) and the suffixes of NOT_PHOTOS are no records. Links to files inside
    `root` are followed. Links that lead out of it or to folders, devices, pipes, sockets and names
    that are not UTF-8 are entries with a reason: counted, never opened.
    """

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise StoreError(f"there is no folder {root}")
        if not root.is_dir():
            raise StoreError(f"{root} is not a folder; give the folder that holds the photos")
        self.root = root.resolve()
        self.name = str(root)

    def entries(self) -> list[Entry]:
        """Every record of the folder, sorted by key; StoreError when a folder in it cannot be listed."""
        entries = sorted(map(self._entry, self._names()), key=lambda entry: entry.key)
        for before, entry in pairwise(entries):
            if before.key == entry.key:
                raise StoreError(f"two files in {self.root} are both called {entry.key!r} in UTF-8; rename one")
        return entries

    def read(self, key: str) -> bytes:
        """The bytes of one file, at most MAX_FILE_BYTES of them; OSError as the file system gives it."""
        with self._place(key.encode()).open("rb") as file:
            return file.read(MAX_FILE_BYTES)

    def _names(self) -> Iterator[bytes]:
        """Paths below `root` as the file system spells them: bytes."""
        folders = [b""]
        while folders:
            folder = folders.pop()
            try:
                children = list(os.scandir(os.fsencode(self.root) + b"/" + folder))
            except OSError as error:
                raise StoreError(f"cannot list {self._place(folder)}: {error.strerror}") from error
            for child in children:
                if child.name.startswith(b"."):
                    continue
                if child.is_dir(follow_symlinks=False):
                    folders.append(folder + child.name + b"/")
                elif not child.name.lower().endswith(NOT_PHOTOS):
                    yield folder + child.name

    def _entry(self, name: bytes) -> Entry:
        # Bytes that are no UTF-8 become \xff: a key to show, which JSON can hold and nobody will open.
        key = name.decode("utf-8", "backslashreplace")
        if key.encode() != name:
            return Entry(key, reason="the name is not UTF-8; rename the file")
        place = self._place(name)
        try:
            status = place.stat()
        except OSError as error:  # a link to nowhere, a loop of links, a file removed this moment
            return Entry(key, reason=f"cannot be opened: {error.strerror}")
        if place.is_symlink() and stat.S_ISDIR(status.st_mode):
            return Entry(key, reason="a link to a folder; links to folders are not followed")
        if not place.resolve().is_relative_to(self.root):
            return Entry(key, reason="a link that leads out of the source folder")
        if not stat.S_ISREG(status.st_mode):
            return Entry(key, reason="not a file but a device, a pipe or a socket")
        if status.st_size > MAX_FILE_BYTES:
            return Entry(key, reason=f"larger than {MAX_FILE_BYTES:,} bytes")
        return Entry(key, status.st_size, status.st_mtime_ns, label=_class_folder(key))

    def _place(self, name: bytes) -> Path:
        return self.root / os.fsdecode(name)


def _class_folder(key: str) -> str | None:
    return key.rpartition("/")[0].rpartition("/")[2] or None
