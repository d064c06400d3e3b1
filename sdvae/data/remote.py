"""Stores on object storage: written and read through a folder of this machine, by the protocol of docs/store.md.

An object appears whole or not at all, so there are no temporaries. A commit is put on condition that nothing has its
name: of two writers one wins, and the other finds out whether it brought the same bytes.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdvae import atomic
from sdvae.data.store import Layout, Store
from sdvae.errors import StoreError, VerifyError

if TYPE_CHECKING:
    from sdvae.data.entries import Source
    from sdvae.data.runners import Runner
    from sdvae.data.tasks import Progress, Work
    from sdvae.data.times import Times
    from sdvae.vae import VAE

_URL = re.compile(r"([a-z0-9]{2,}):/{1,2}(.+)")  # a Path makes one slash of two
_CHUNK_BYTES = 2**24


def url_of(path: str | Path) -> str | None:
    """The URL ("s3://bucket/store") that `path` means, None for a folder of this machine."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def local_copy(path: str | Path) -> Path:
    """`path` itself, or for a URL the folder that what is committed there was copied into."""
    url = url_of(path)
    if url is None:
        return Path(path)
    mirror = Mirror(url)
    mirror.pull()
    return mirror.local


@contextmanager
def local_folder(out: str | Path) -> "Iterator[tuple[Path, Callable[[Runner], Runner]]]":
    """The folder to encode into where a store is to be in `out`, and what makes a runner upload.

    After the body, the store in `out` is what the folder is. For a folder of this machine nothing else happens.
    """
    url = url_of(out)
    if url is None:
        yield Path(out), lambda runner: runner
        return
    mirror = Mirror(url)
    mirror.pull()
    yield mirror.local, mirror.runner
    mirror.finish()


class Mirror:
    """A remote store, and the folder of this machine through which it is read and written."""

    def __init__(self, url: str, local: Path | None = None) -> None:
        """`local` is by default a folder in SDVAE_CACHE or ~/.cache/sdvae; StoreError where no driver knows `url`."""
        import fsspec  # type: ignore[import-untyped]

        cache = Path(os.environ.get("SDVAE_CACHE", "~/.cache/sdvae")).expanduser()
        self.url = url
        self.local = local or cache / "stores" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.layout = Layout(self.local)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot use {url}: {error}; for s3:// install sdvae[s3]") from error
        self._pushed: set[Path] = set()  # commits that are there

    def pull(self) -> None:
        """Copy what is committed there and not here; VerifyError where its bytes are not those committed.

        StoreError where the folder mirrors another store.
        """
        manifest = self._read(self.layout.manifest)
        if manifest is None:
            return
        self.layout.make_folders()
        generations = [path for path in self._list("roster") if path.suffix == ".json"]
        for roster in (self.layout.roster(number) for number in range(len(generations) + 1)):
            if not roster.exists():
                self._pull_file(roster)
        for path in (self.layout.manifest, *generations):
            self._commit_here(path, manifest if path == self.layout.manifest else self._read(path))
        for path in self._list("done"):
            if not path.exists():
                self._pull_shard(path)
        quarantine = self._read(self.layout.quarantine)
        if quarantine is not None and self._is_complete():  # what was begun here may be more than what is there
            atomic.write_bytes(self.layout.quarantine, quarantine)

    def push(self) -> None:
        """Copy what is committed here and not there; StoreError where another store is there."""
        if not self._pushed:
            self._pushed |= {path for folder in ("done", "roster") for path in self._list(folder)}
        self._commit_there(self.layout.roster(0))
        self._commit_there(self.layout.manifest)
        for path in sorted(self.layout.generation(1).parent.glob("*.json")):
            if path not in self._pushed:
                self._remove_there(self.layout.quarantine)  # its presence says that nothing is left to do
                self._put(path.with_suffix(".jsonl"))
                self._commit_there(path)
        store = Store.open(self.local)
        for path in sorted(self.layout.done(0).parent.glob("*.json")):
            if path not in self._pushed:
                for file in store.shard(int(path.stem)).files:
                    self._put(file.path)
                self._commit_there(path)

    def finish(self) -> None:
        """Bring both sides to the same; what several machines have encoded is finished by the last of them."""
        self.push()
        self.pull()
        if self._is_complete():
            Store.open(self.local).finalise()
            self._put(self.layout.quarantine)

    def runner(self, inner: "Runner") -> "Runner":
        """`inner`, with each shard pushed on a thread once it is committed."""

        def run(
            store: Store, numbers: Sequence[int], source: "Source", vae: "VAE", work: "Work", progress: "Progress"
        ) -> "Times":
            with ThreadPoolExecutor(1, "sdvae-upload") as pool:
                upload = pool.submit(self.push)

                def tell(num_records: int) -> None:
                    nonlocal upload
                    if upload.done():
                        upload.result()  # what failed there ends the run here
                        upload = pool.submit(self.push)
                    progress(num_records)

                times = inner(store, numbers, source, vae, work, tell)
                upload.result()
            self.push()
            return times

        return run

    def _is_complete(self) -> bool:
        return all(self.layout.done(number).exists() for number in range(Store.open(self.local).num_shards))

    # --- One object ---

    def _pull_shard(self, path: Path) -> None:
        data = self._read(path) or b""
        done = atomic.unseal(data)
        if done is None:
            raise VerifyError(f"{self._place(path)} is damaged: its bytes do not agree with the digest inside it")
        files = {self.layout.index(done["shard"]): done["index"]}
        if done["tensors"] is not None:
            height, width = done["bucket_px"]
            files[self.layout.tensors(done["shard"], (height, width))] = done["tensors"]
        for file, entry in files.items():
            if self._pull_file(file) != entry["sha256"]:
                raise VerifyError(f"{self._place(file)} is damaged: its bytes are not those committed")
        atomic.create_bytes(path, data)

    def _pull_file(self, path: Path) -> str:
        def chunks() -> Iterator[bytes]:
            with self._explained(path), self._files.open(self._place(path), "rb") as file:
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
                    self._files.pipe_file(self._place(path), data, mode="create")
            except StoreError:
                there = self._read(path)  # another writer was first
                if there is None:
                    raise
        if there is not None and there != data:
            raise StoreError(f"{self._place(path)} is there with other bytes, of another store; give another URL")
        self._pushed.add(path)

    def _put(self, path: Path) -> None:
        atomic.hook("put", path)
        with self._explained(path):
            self._files.put_file(str(path), self._place(path))

    def _remove_there(self, path: Path) -> None:
        atomic.hook("put", path)
        if self._read(path) is not None:
            with self._explained(path):
                self._files.rm_file(self._place(path))

    def _read(self, path: Path) -> bytes | None:
        with self._explained(path):
            try:
                data: bytes = self._files.cat_file(self._place(path))
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

    def _place(self, path: Path) -> str:
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
