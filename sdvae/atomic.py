"""The only place where a file gets its final name: whole, synced and hashed, or not at all."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdvae.errors import OutputError

Buffer = bytes | memoryview  # a numpy array goes in as `array.data`

_TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.[0-9a-f]{8}\.tmp")  # .name.<process number>.<random>.tmp
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # exFAT, SMB and some FUSE file systems


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


def remove(path: Path) -> None:
    """Remove one file, so that a power cut does not bring it back; a file that is gone already is no error."""
    with explained(path, ()):
        hook("unlink", path)
        path.unlink(missing_ok=True)
        _sync_folder(path.parent)


def sweep(folder: Path) -> int:
    """Remove the temporaries that killed processes left under `folder`; returns their number."""
    leftovers = [path for path in folder.rglob(".*.tmp") if is_temporary(path.name) and not _has_live_writer(path)]
    for path in leftovers:
        remove(path)
    return len(leftovers)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary of this module."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def _temporary(path: Path, chunks: Iterable[Buffer]) -> Iterator[Path]:
    """A synced file beside `path` that holds `chunks`; the folder is synced after the body gave it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        hook("open", path)
        # The kernel takes the umask off 0666; tempfile would make 0600, which no colleague can read.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for chunk in chunks:
                hook("write", path)
                write_all(file.fileno(), chunk)
            hook("fsync", path)
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):  # the first error is the one to tell; `sweep` removes what stays
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_all(descriptor: int, chunk: Buffer) -> None:
    """Write all of `chunk`, in as many calls as that takes."""
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]  # Linux writes 2 GiB at most


def _sync_folder(folder: Path) -> None:
    hook("fsync", folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _has_live_writer(path: Path) -> bool:
    """Whether the process named in a temporary still runs; our own number is a dead namesake's (sweeps come first)."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or int(match[1]) == os.getpid():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user
        pass
    return True
