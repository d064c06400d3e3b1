"""Stores on object storage: written and read through a folder of this machine, by the protocol of docs/store.md.

An object appears whole or not at all, so there are no temporaries. A commit is put on condition that nothing has its
name: of two writers one wins, and the other finds out whether it brought the same bytes.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sdvae import atomic, sealed
from sdvae.errors import StoreError, VerifyError
from sdvae.store.paths import StorePaths
from sdvae.store.store import Store

_URL = re.compile(r"([a-z0-9]{2,}):/{1,2}(.+)")  # a Path makes one slash of two
_CHUNK_BYTES = 2**24


def url_of(path: str | Path) -> str | None:
    """The URL ("s3://bucket/store") that `path` means, None for a folder of this machine."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def open_mirror(path: str | Path) -> "Mirror | None":
    """The mirror of the store that `path` means; None for a folder of this machine."""
    url = url_of(path)
    return None if url is None else Mirror(url)


def local_copy(path: str | Path) -> Path:
    """`path` itself, or for a URL the folder that what is committed there was copied into."""
    mirror = open_mirror(path)
    if mirror is None:
        return Path(path)
    mirror.pull()
    return mirror.local


class Mirror:
    """A remote store, and the folder of this machine through which it is read and written."""

    def __init__(self, url: str, local: Path | None = None) -> None:
        """`local` is by default a folder in SDVAE_CACHE or ~/.cache/sdvae; StoreError where no driver knows `url`."""
        import fsspec  # type: ignore[import-untyped]

        cache = Path(os.environ.get("SDVAE_CACHE", "~/.cache/sdvae")).expanduser().absolute()
        self.url = url
        self.local = local or cache / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.paths = StorePaths(self.local)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot use {url}: {error}; for s3:// install sdvae[s3]") from error
        self._pushed: set[Path] = set()  # commits that are there

    def pull(self) -> None:
        """Copy what is committed there and not here; VerifyError where its bytes are not those committed.

        StoreError where the folder mirrors another store.
        """
        manifest = self._read(self.paths.manifest)
        if manifest is None:
            return
        self.paths.make_folders()
        generations = [path for path in self._list("roster") if path.suffix == ".json"]
        first = {self.paths.roster(0): self.paths.manifest}  # in version 1, the commit of the first roster
        for roster, commit in (first | {path.with_suffix(".jsonl"): path for path in generations}).items():
            if not (commit.exists() and roster.exists()):  # without its commit, what is here is one in the making
                self._pull_file(roster)
        for path in (self.paths.manifest, *generations):
            self._commit_here(path, manifest if path == self.paths.manifest else self._read(path))
        for path in self._list("done"):
            if not path.exists():
                self._pull_shard(path)
        quarantine = self._read(self.paths.quarantine)
        if quarantine is not None and self._is_complete():  # what was begun here may be more than what is there
            atomic.write_bytes(self.paths.quarantine, quarantine)

    def push(self) -> None:
        """Copy what is committed here and not there; StoreError where another store is there."""
        if not self._pushed:
            self._pushed |= set(self._list("done"))
        first = self.paths.generation(0)
        begun = first if first.exists() else self.paths.manifest  # what commits the first roster
        if begun not in self._pushed and self._read(begun) is None:
            self._commit_there(self.paths.roster(0))
        self._commit_there(self.paths.manifest)
        for path in sorted(first.parent.glob("*.json")):
            if path not in self._pushed and self._read(path) is None:
                self._remove_there(self.paths.quarantine)  # its presence says that nothing is left to do
                if path != first:
                    self._put(path.with_suffix(".jsonl"))
            self._commit_there(path)
        store = Store.open(self.local)
        for number in self.paths.committed():
            path = self.paths.done(number)
            if path not in self._pushed:
                for file in store.shard(number).files:
                    self._put(file.path)
                self._commit_there(path)

    def finish(self) -> None:
        """Bring both sides to the same; what several machines have encoded is finished by the last of them."""
        self.push()
        self.pull()
        if self._is_complete():
            Store.open(self.local).finalise()
            self._put(self.paths.quarantine)

    @contextmanager
    def pushing(self) -> Iterator[Callable[[], None]]:
        """Push on a thread: what it gives is to be called when something was committed. After the body all is there."""
        with ThreadPoolExecutor(1, "sdvae-upload") as pool:
            upload = pool.submit(self.push)

            def push() -> None:
                nonlocal upload
                if upload.done():
                    upload.result()  # what failed there ends the run here
                    upload = pool.submit(self.push)

            yield push
            upload.result()
        self.push()

    def _is_complete(self) -> bool:
        return Store.open(self.local).is_finished

    # --- One object ---

    def _pull_shard(self, path: Path) -> None:
        data = self._read(path) or b""
        done = sealed.unseal(data)
        if done is None:
            raise VerifyError(f"{self._object_of(path)} is damaged: its bytes do not agree with the digest inside it")
        for file in Store.open(self.local).parse_commit(path, done).files:
            if self._pull_file(file.path) != file.sha256:
                raise VerifyError(f"{self._object_of(file.path)} is damaged: its bytes are not those committed")
        atomic.create_bytes(path, data)

    def _pull_file(self, path: Path) -> str:
        def chunks() -> Iterator[bytes]:
            with self._explained(path), self._files.open(self._object_of(path), "rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk

        return atomic.write_stream(path, chunks())

    def _commit_here(self, path: Path, data: bytes | None) -> None:
        if data is not None and not atomic.create_bytes(path, data) and path.read_bytes() != data:
            raise StoreError(f"{path} is not of the store in {self.url}; remove {self.local}, or give another URL")

    def _commit_there(self, path: Path) -> None:
        """Create an object, which makes what it describes exist; it may be there already, with the same bytes."""
        if path in self._pushed:
            return
        data = path.read_bytes()
        atomic.hook("put", path)
        there = self._read(path)
        if there is None:
            try:
                with self._explained(path):
                    self._files.pipe_file(self._object_of(path), data, mode="create")
            except StoreError:
                there = self._read(path)  # another writer was first
                if there is None:
                    raise
        if there is not None and there != data:
            raise StoreError(f"{self._object_of(path)} is there with other bytes, of another store; give another URL")
        self._pushed.add(path)

    def _put(self, path: Path) -> None:
        atomic.hook("put", path)
        with self._explained(path):
            self._files.put_file(str(path), self._object_of(path))

    def _remove_there(self, path: Path) -> None:
        atomic.hook("put", path)
        if self._read(path) is not None:
            with self._explained(path):
                self._files.rm_file(self._object_of(path))

    def _read(self, path: Path) -> bytes | None:
        with self._explained(path):
            try:
                data: bytes = self._files.cat_file(self._object_of(path))
            except FileNotFoundError:
                return None
            return data

    def _list(self, folder: str) -> list[Path]:
        with self._explained(self.local / folder):
            self._files.invalidate_cache()
            try:
                names: list[str] = self._files.ls(f"{self._root}/{folder}", detail=False)
            except FileNotFoundError:
                return []
        return sorted(self.local / folder / name.rpartition("/")[2] for name in names)

    def _object_of(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self.local).as_posix()}"

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except _errors() as error:
            raise StoreError(f"cannot use {self.url}/{path.relative_to(self.local).as_posix()}: {error}") from error


def _errors() -> tuple[type[Exception], ...]:
    """What drivers raise; that of s3:// has errors of its own for a missing key or network."""
    try:
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError)
