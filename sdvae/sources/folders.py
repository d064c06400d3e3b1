"""A folder of photos, listed in a fixed order and read without leaving it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sdvae.errors import SourceError
from sdvae.sources.entries import MAX_FILE_BYTES, Entry, class_folder, sorted_by_key, why_no_file
from sdvae.sources.img2dataset import failed_downloads
from sdvae.sources.kinds import HEAD_BYTES, PACKED, Listing, is_junk, remarks_on, sort_out
from sdvae.sources.pairing import MAX_TEXT_BYTES, Pairing, is_table


class FolderSource:
    """All photos in a folder and the folders in it; a record's key is its path below `root`, with `/`.

    Which files are photos, `kinds` says; hidden names (a leading dot) are passed over. Links to files inside `root` are
    followed, and in a snapshot of the Hugging Face hub's cache those to its blobs. Links that lead out of it or to
    folders, devices, pipes, sockets and names that are not UTF-8 are entries with a reason: counted, never opened.

    `only` names the files and folders below `root` that count; what lies beside them still tells their captions.
    `caption` names the ending or the column of captions (see Pairing).
    """

    def __init__(self, root: Path, only: Iterable[str] = ("",), caption: str | None = None) -> None:
        if not root.exists():
            raise SourceError(f"there is no folder {root}")
        if not root.is_dir():
            raise SourceError(f"{root} is not a folder; give the folder that holds the photos")
        self.root = root.resolve()
        self._homes = [self.root, *_hub_blobs(self.root)]
        self.name = str(root)
        self._only = frozenset(only)
        self._caption = caption
        self.remarks: Sequence[str] = ()

    def entries(self) -> list[Entry]:
        """Every record of the folder, sorted by key; SourceError when a folder in it cannot be listed."""
        pairing = Pairing(self._caption)
        listing = self.listing(pairing.is_text)
        suffixes = {PurePosixPath(name).suffix.lower() for name in listing.aside}
        packed = next((suffix for suffix in PACKED if suffix in suffixes), None)
        if packed and not listing.photos:
            raise SourceError(
                f"{self.name} holds no photos, but files that hold some; name those, as in '{self.name}/*{packed}'"
            )
        photos = (replace(entry, label=class_folder(entry.key)) for entry in listing.photos)
        paired = pairing.pair(photos, listing.texts, self.read_text)
        aside = list(filter(self._counts, [*listing.aside, *pairing.aside]))
        self.remarks = [*pairing.remarks(), *failed_downloads(self.root, listing.texts), *remarks_on(aside)]
        return sorted_by_key((entry for entry in paired if self._counts(entry.key)), self.name)

    def read(self, key: str) -> bytes:
        """The bytes of one file, at most MAX_FILE_BYTES of them; OSError as the file system gives it."""
        with self._path_of(key.encode()).open("rb") as file:
            return file.read(MAX_FILE_BYTES)

    def listing(self, is_text: Callable[[str], bool]) -> Listing:
        """All its files, sorted by what they are."""
        return sort_out((self._entry(*child) for child in self._children()), is_text, self._read_head)

    def read_text(self, key: str) -> bytes:
        """The bytes of a file that tells of photos, one more than MAX_TEXT_BYTES at most but of a table."""
        place = self._path_of(key.encode())
        status = place.lstat()
        is_link = stat.S_ISLNK(status.st_mode)  # resolving every path would take longer than all the rest
        reason = self._why_not_to_open(place, place.stat()) if is_link else why_no_file(status)
        if reason is not None:
            raise OSError(errno.EINVAL, reason)
        with place.open("rb") as file:
            return file.read() if is_table(key) else file.read(MAX_TEXT_BYTES + 1)

    def _counts(self, key: str) -> bool:
        if "" in self._only or key in self._only:
            return True
        return any(str(folder) in self._only for folder in PurePosixPath(key).parents)

    def _children(self) -> Iterator[tuple[bytes, "os.DirEntry[bytes]"]]:
        """Every file to look at, with its path below `root` as the file system spells it: bytes."""
        whole = [name for name in self._only if (self.root / name).is_dir()]
        listed: set[bytes] = set()
        for folder in sorted(os.fsencode(name) for name in whole):
            yield from self._walk(folder, listed, is_deep=True)
        for folder in sorted({os.fsencode(name.rpartition("/")[0]) for name in self._only.difference(whole)}):
            yield from self._walk(folder, listed, is_deep=False)

    def _walk(self, top: bytes, listed: set[bytes], *, is_deep: bool) -> Iterator[tuple[bytes, "os.DirEntry[bytes]"]]:
        if self._path_of(top).resolve() != self._path_of(top):
            raise SourceError(
                f"{self._path_of(top)} is reached by a link to a folder; links to folders are not followed"
            )
        folders = [top]
        while folders:
            folder = folders.pop()
            if folder in listed:
                continue
            listed.add(folder)
            try:
                children = list(os.scandir(os.fsencode(self._path_of(folder))))
            except OSError as error:
                raise SourceError(f"cannot list {self._path_of(folder)}: {error.strerror}") from error
            for child in children:
                path = folder + b"/" + child.name if folder else child.name
                if is_junk(os.fsdecode(child.name)):
                    continue
                if not child.is_dir(follow_symlinks=False):
                    yield path, child
                elif is_deep:
                    folders.append(path)

    def _entry(self, name: bytes, child: "os.DirEntry[bytes]") -> Entry:
        # Bytes that are no UTF-8 become \xff: a key to show, which JSON can hold and nobody will open.
        key = name.decode("utf-8", "backslashreplace")
        if key.encode() != name:
            return Entry(key, reason="the name is not UTF-8; rename the file")
        try:
            status = child.stat()
        except OSError as error:  # a link to nowhere, a loop of links, a file removed this moment
            return Entry(key, reason=f"cannot be opened: {error.strerror}")
        reason = self._why_not_to_open(self._path_of(name), status) if child.is_symlink() else why_no_file(status)
        if reason is not None:
            return Entry(key, reason=reason)
        return Entry(key, status.st_size, status.st_mtime_ns)

    def _why_not_to_open(self, place: Path, status: os.stat_result) -> str | None:
        if place.is_symlink() and stat.S_ISDIR(status.st_mode):
            return "a link to a folder; links to folders are not followed"
        if not any(map(place.resolve().is_relative_to, self._homes)):
            return "a link that leads out of the source folder"
        return why_no_file(status)

    def _read_head(self, key: str) -> bytes:
        with self._path_of(key.encode()).open("rb") as file:
            return file.read(HEAD_BYTES)

    def _path_of(self, name: bytes) -> Path:
        return self.root / os.fsdecode(name)


def _hub_blobs(folder: Path) -> list[Path]:
    """Where the files of a snapshot in the hub's cache lie; their names in the snapshot are links to there."""
    snapshots = (parent for parent in folder.parents if parent.name == "snapshots")
    return [blobs for parent in snapshots if (blobs := parent.with_name("blobs")).is_dir()]
