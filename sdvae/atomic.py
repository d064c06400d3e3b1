"""The only place where a file gets its final name: whole, synced and hashed, or not at all."""

import errno
import hashlib
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from sdvae.errors import OutputError

Buffer = bytes | memoryview  # a numpy array goes in as `array.data`

logger = logging.getLogger(__name__)

# .<place>.<process number>.<random>.tmp; sdvae once wrote the file's name where the place stands now
_TEMPORARY = re.compile(r"\.(.+)\.(\d{1,9})\.[0-9a-f]{8}\.tmp")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
# What vfat, SMB, NFS, AFS, Lustre, FUSE and vboxsf say, each in its way, of an operation that they do not have.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_NO_FOLDER_SYNC = _NOT_SUPPORTED | {errno.EBADF, errno.EPERM, errno.EACCES, errno.EISDIR}
_NO_HARD_LINKS = _NOT_SUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
NO_LOCKS = _NOT_SUPPORTED | {errno.ENOLCK, errno.EPERM, errno.EACCES, errno.EBADF}
_DAY_S = 24 * 3600


def _ignore(operation: str, path: Path) -> None:
    pass


# Called before every operation that can fail. Fault tests put a function here that raises or kills.
hook: Callable[[str, Path], None] = _ignore


def write_bytes(path: Path, *chunks: Buffer) -> str:
    """Put `chunks` under `path`, replacing what is there, and return their sha256 in hex.

    Raises OutputError when the disk is full, read-only or failing; then `path` is as it was before,
    or, where only the last sync failed, holds the new bytes.
    """
    with explained(path, chunks), _temporary(path, chunks) as temporary:
        hook("replace", path)
        temporary.replace(path)
    return _sha256(chunks)


def write_unsynced(path: Path, *chunks: Buffer) -> None:
    """As `write_bytes`, but a power cut may leave anything under `path`: for what carries its own digest."""
    with explained(path, chunks), _temporary(path, chunks, is_synced=False) as temporary:
        hook("replace", path)
        temporary.replace(path)


def write_stream(path: Path, chunks: Iterable[Buffer]) -> str:
    """As `write_bytes`, for chunks that are made one by one as they are written."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[Buffer]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    with explained(path, ()), _temporary(path, hashed()) as temporary:
        hook("replace", path)
        temporary.replace(path)
    return digest.hexdigest()


def create_bytes(path: Path, *chunks: Buffer) -> bool:
    """Put `chunks` under `path` unless it exists; True for the one process that did.

    A file system without hard links replaces instead: it cannot tell who was first, so callers must
    only let processes race for a name when they bring equal bytes.
    """
    with explained(path, chunks), _temporary(path, chunks) as temporary:
        hook("link", path)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            say_missing("hard links")
            if path.exists():
                return False
            temporary.replace(path)
    return True


def make_folder(path: Path) -> None:
    """Make `path` and its parents, so that they survive a power cut; it may exist already."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with explained(folder, ()):
            hook("mkdir", folder)
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)


def remove(*paths: Path) -> None:
    """Remove files, so that a power cut does not bring them back; a file that is gone already is no error."""
    for path in paths:
        with explained(path, ()):
            hook("unlink", path)
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        with explained(folder, ()):
            _sync_folder(folder)


def sweep(folder: Path) -> int:
    """Remove the temporaries that killed processes left under `folder`; returns their number.

    A process number means something only on the host and in the PID namespace that gave it. A temporary of another
    place is taken for a dead one's when nothing was written to it for a day, by the clock of the file system.
    """
    here, left = _place(), []
    foreign: list[Path] = []
    for path in folder.rglob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        if match[1] != here:
            foreign.append(path)
        elif path.name not in _being_written and not _is_alive(int(match[2])):
            left.append(path)
    if foreign:
        left += _older_than_a_day(foreign, folder)
    for path in left:
        remove(path)
    return len(left)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary of this module."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def _temporary(path: Path, chunks: Iterable[Buffer], is_synced: bool = True) -> Iterator[Path]:
    """A synced file beside `path` that holds `chunks`; the folder is synced after the body gave it its name."""
    temporary = path.with_name(f".{_place()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    _being_written.add(temporary.name)
    try:
        hook("open", path)
        # The kernel takes the umask off 0666; tempfile would make 0600, which no colleague can read.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for chunk in chunks:
                hook("write", path)
                write_all(file.fileno(), chunk)
            if is_synced:
                hook("fsync", path)
                _sync(file.fileno(), _NOT_SUPPORTED, "syncs of files")
        yield temporary
    finally:
        with suppress(OSError):  # the first error is the one to tell; `sweep` removes what stays
            temporary.unlink(missing_ok=True)
        _being_written.discard(temporary.name)
    if is_synced:
        _sync_folder(path.parent)


def write_all(descriptor: int, chunk: Buffer) -> None:
    """Write all of `chunk`, in as many calls as that takes."""
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]  # Linux writes 2 GiB at most


def _sync_folder(folder: Path) -> None:
    hook("fsync", folder)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder may be for writing only
        say_missing("syncs of folders")
        return
    try:
        _sync(descriptor, _NO_FOLDER_SYNC, "syncs of folders")
    finally:
        os.close(descriptor)


def _sync(descriptor: int, refusals: set[int], what: str) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in refusals:
            raise
        say_missing(what)


_COSTS = {
    "syncs of files": "a power cut may damage the newest files",
    "syncs of folders": "a power cut may take the newest files",
    "hard links": "of two processes that commit one file, the last wins",
    "locks": "processes that start at once all scan the photos",
}


@cache
def say_missing(what: str) -> None:
    """Warn, once, that the file system does without `what`, and what that costs."""
    logger.warning("this file system has no %s: %s; sdvae goes on", what, _COSTS[what])


@contextmanager
def explained(path: Path, chunks: Iterable[Buffer]) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `path` and the bytes that were to be written."""
    try:
        yield
    except OSError as error:
        num_bytes = sum(memoryview(chunk).nbytes for chunk in chunks)
        needs = f" ({num_bytes:,} bytes)" if num_bytes else ""
        next_step = "; free some space and run the same command again" if error.errno in _NO_SPACE else ""
        raise OutputError(f"cannot write {path}{needs}: {error.strerror}{next_step}") from error


def _sha256(chunks: Iterable[Buffer]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


# --- Whose temporary it is ---

_being_written: set[str] = set()  # by this process
_UNKNOWN_PLACE = secrets.token_hex(6)


def _place() -> str:
    """Where this process has its number: host, boot and PID namespace, as 12 hex digits."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        told = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (the text, not a path)
    except OSError:
        return _UNKNOWN_PLACE  # every other process counts as foreign
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:12]


def _is_alive(number: int) -> bool:
    """Whether a process of this place runs; of our own number, a namesake wrote what we are not writing."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user
        pass
    return True


def _older_than_a_day(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Those that were last written a day before now, as the file system tells time."""
    probe = folder / f".{_place()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with explained(folder, ()):
        probe.touch(exist_ok=False)
        now = probe.stat().st_mtime
        probe.unlink()
    old = []
    for path in paths:
        with suppress(FileNotFoundError):  # its writer was quicker
            if now - path.lstat().st_mtime > _DAY_S:
                old.append(path)
    return old
