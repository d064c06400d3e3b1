"""Photos in zip files and tars (WebDataset's, too), read where they lie: nothing is ever extracted."""

import errno
import lzma
import os
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from sdvae.errors import SourceError
from sdvae.sources.entries import (
    MAX_FILE_BYTES,
    PARSER_FAILURES,
    Entry,
    absolute,
    class_folder,
    failing_as_one_photo,
    sorted_by_key,
    why_unsafe,
)
from sdvae.sources.img2dataset import failed_downloads
from sdvae.sources.kinds import HEAD_BYTES, remarks_on, sort_out
from sdvae.sources.pairing import MAX_TEXT_BYTES, Pairing, is_table

SUFFIXES = (".tar", ".zip")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class _Member:
    num_bytes: int
    reason: str | None
    offset: int = 0  # of its bytes in a tar


class _Archive(ABC):
    """The members of one file by name; opened at need, anew in every process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type["_Archive"], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def members(self) -> Mapping[str, _Member]:
        try:
            members: dict[str, _Member] = {}
            for name, member in self._list():
                if name in members:
                    raise SourceError(f"two files in {self.path} are both called {name!r}; pack it anew")
                members[name] = member
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror or error}") from error
        return members

    @abstractmethod
    def read(self, name: str, max_bytes: int) -> bytes:
        """The first bytes of a member."""

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, _Member]]:
        """All members, in the order of the file."""


class _Tar(_Archive):
    def read(self, name: str, max_bytes: int) -> bytes:
        member = self.members[name]
        with self.path.open("rb") as file:  # not kept open: a position would be shared with forked processes
            file.seek(member.offset)
            data = file.read(min(member.num_bytes, max_bytes))
        if len(data) < min(member.num_bytes, max_bytes):
            raise OSError(errno.EIO, "the archive ends before the file in it does")
        return data

    def _list(self) -> Iterator[tuple[str, _Member]]:
        with self.path.open("rb") as file:
            head = file.read(6)
        packing = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if packing:
            raise SourceError(
                f"{self.path} is packed by {packing}, and is read in any order; unpack it to a plain .tar"
            )
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    if not info.isdir():
                        yield _shown(info.name), _Member(info.size, _why_not_from_tar(info), info.offset_data)
                self._require_end(tar.offset)
        except (tarfile.TarError, *PARSER_FAILURES) as error:
            raise SourceError(f"{self.path} is damaged or no tar ({error}); fetch it again") from error

    def _require_end(self, offset: int) -> None:
        """Refuse a tar that goes on behind what tarfile takes for its end, for it ends at any damage."""
        with self.path.open("rb") as file:
            file.seek(offset)
            while block := file.read(2**20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"there is more behind byte {offset:,}, where its list of files ends")


def _why_not_from_tar(info: tarfile.TarInfo) -> str | None:
    if info.islnk() or info.issym():
        return "a link; links in archives are not followed"
    if not info.isreg() or info.issparse():
        return "not a plain file but a device, a pipe or one with holes"
    return _why_not(info.name, info.size)


class _Zip(_Archive):
    _open: tuple[int, zipfile.ZipFile] | None = None  # the process that opened it

    def read(self, name: str, max_bytes: int) -> bytes:
        spelling = self._spellings[name]
        try:
            with self._file().open(spelling) as file:
                return file.read(max_bytes)
        except (zipfile.BadZipFile, lzma.LZMAError, *PARSER_FAILURES) as error:
            raise OSError(errno.EIO, "its bytes in the zip file are damaged or packed in an unknown way") from error

    def _list(self) -> Iterator[tuple[str, _Member]]:
        try:
            for info in self._file().infolist():
                if not info.is_dir():
                    yield _shown(info.filename), _Member(info.file_size, _why_not_from_zip(info))
        except (zipfile.BadZipFile, *PARSER_FAILURES) as error:
            raise SourceError(f"{self.path} is damaged or no zip file ({error}); fetch it again") from error

    @cached_property
    def _spellings(self) -> dict[str, zipfile.ZipInfo]:
        return {_shown(info.filename): info for info in self._file().infolist()}

    def _file(self) -> zipfile.ZipFile:
        # A file that a forked process shares has one position for both: each opens its own.
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.path))
        return self._open[1]


def _why_not_from_zip(info: zipfile.ZipInfo) -> str | None:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link; links in archives are not followed"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "not a plain file but a device or a pipe"
    if info.flag_bits & 1:
        return "encrypted"
    return _why_not(info.filename, info.file_size)


def _why_not(name: str, num_bytes: int) -> str | None:
    if _shown(name) != name.removeprefix("./"):
        return "the name is not UTF-8; rename the file"
    if num_bytes < 0:
        return "its length is damaged"
    if num_bytes > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES:,} bytes"
    return why_unsafe(name)


def _shown(name: str) -> str:
    """A member's name as a key: JSON cannot hold what tarfile makes of bytes that are no UTF-8."""
    return name.removeprefix("./").encode(errors="surrogateescape").decode(errors="backslashreplace")


class ArchiveSource:
    """The photos in one zip file or tar, or in many of them.

    A record's key is the member's path; where a pattern names the archives, the path of the archive below `root`,
    without its suffix, stands before it. Captions and labels lie beside the photos (`dog.jpg`, `dog.txt`, `dog.cls`),
    as in a folder. Links, devices and names that lead out are entries with a reason. `caption` names the ending or the
    column of captions (see Pairing).
    """

    def __init__(self, root: Path, paths: tuple[str, ...] | None = None, caption: str | None = None) -> None:
        self.name, self._root = str(root), absolute(root)
        self._caption = caption
        self.remarks: Sequence[str] = ()
        # What lies beside archives that a pattern names is no part of the source: the store may.
        self.root = self._root if paths is None else None
        self._archives: dict[str, _Archive] = {}
        for path in [self._root] if paths is None else [self._root / path for path in paths]:
            prefix = "" if paths is None else path.relative_to(self._root).with_suffix("").as_posix() + "/"
            if prefix in self._archives:
                raise SourceError(f"two archives in {root} are both called {prefix[:-1]}; rename one")
            self._archives[prefix] = (_Zip if path.suffix.lower() == ".zip" else _Tar)(path)
        self._require_unmistakable()

    def entries(self) -> list[Entry]:
        """Every photo in the archives, sorted by key; SourceError for an archive that cannot be listed."""
        pairing, entries, aside = Pairing(self._caption), list[Entry](), list[str]()
        for prefix, archive in self._archives.items():
            found, others = self._entries(prefix, archive, pairing)
            entries += found
            aside += others
        stats = [f"{archive.path.with_suffix('')}_stats.json" for archive in self._archives.values()]
        self.remarks = [*pairing.remarks(), *failed_downloads(self._root, stats), *remarks_on([*aside, *pairing.aside])]
        return sorted_by_key(entries, self.name)

    def read(self, key: str) -> bytes:
        """The bytes of one member; OSError where the archive cannot be read, or they are damaged."""
        prefix = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in self._archives)
        with failing_as_one_photo():
            return self._archives[prefix].read(key[len(prefix) :], MAX_FILE_BYTES)

    def _require_unmistakable(self) -> None:
        for prefix in self._archives:
            folders = [f"{folder}/" for folder in PurePosixPath(prefix).parents]
            if mistakable := [folder for folder in folders if folder in self._archives]:
                raise SourceError(
                    f"{self.name} holds an archive {mistakable[0][:-1]} and a folder of that name with an archive: "
                    "their photos could be confused; rename one"
                )

    def _entries(self, prefix: str, archive: _Archive, pairing: Pairing) -> tuple[list[Entry], list[str]]:
        """The photos of one archive, and the names of what it holds besides."""
        place = self._root.name if archive.path == self._root else archive.path.relative_to(self._root).as_posix()
        mtime_ns = archive.path.stat().st_mtime_ns
        files = (
            Entry(name, member.num_bytes, mtime_ns, member.reason, label=class_folder(name))
            for name, member in archive.members.items()
        )
        listing = sort_out(files, pairing.is_text, lambda name: archive.read(name, HEAD_BYTES))

        def read_text(name: str) -> bytes:
            if reason := archive.members[name].reason:
                raise OSError(errno.EINVAL, reason)
            return archive.read(name, MAX_FILE_BYTES if is_table(name) else MAX_TEXT_BYTES + 1)

        paired = pairing.pair(listing.photos, listing.texts, read_text, prefix)
        named = [replace(entry, key=prefix + entry.key, uri=f"{place}!{entry.key}") for entry in paired]
        return named, [prefix + name for name in listing.aside]
