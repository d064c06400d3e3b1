"""The power goes at any moment: what was not synced is gone or torn, and nothing torn is ever trusted.

SIGKILL cannot show that: the kernel keeps what it was given. So the disk is modelled. Every sync of atomic.py is
observed, and before each of its operations stands a moment at which the power may go. What is then on the disk is
built again: files whose bytes were not synced are torn; names that were not synced with their folder are those of
before, or, as a kernel may write back when it likes, those of now, in one folder and not in another.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from sdvae import atomic
from sdvae.errors import StoreError
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.faults.conftest import encode, read_store

Names = Mapping[int, Mapping[str, int]]  # folder -> name -> what it names, by inode
Tree = dict[str, bytes]  # files by path

TEARS: dict[str, Callable[[bytes], bytes]] = {
    "lost": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
}


@dataclass
class Moment:
    """The disk before one operation: as programs see it, and what of it a power cut leaves."""

    operation: str
    names: dict[int, dict[str, int]]
    contents: dict[int, bytes]
    synced_names: dict[int, dict[str, int]]
    synced_contents: dict[int, bytes]

    def left(self, root: int, tear: Callable[[bytes], bytes], written_back: Callable[[str], bool]) -> Tree:
        """The files after a power cut; the folders of `written_back` have the names of now."""

        def walk(folder: int, path: str) -> Iterator[tuple[str, bytes]]:
            names: Names = self.names if written_back(path) else self.synced_names
            for name, inode in names.get(folder, {}).items():
                if inode in self.names:
                    yield f"{path}{name}/", b""
                    yield from walk(inode, f"{path}{name}/")
                elif inode in self.synced_contents:
                    yield f"{path}{name}", self.synced_contents[inode]
                else:
                    yield f"{path}{name}", tear(self.contents.get(inode, b""))

        return dict(walk(root, ""))


@dataclass
class Disk:
    """Watches a folder through atomic.py's hook and the syncs it makes."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    synced_names: dict[int, dict[str, int]] = field(default_factory=dict)
    synced_contents: dict[int, bytes] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)  # a descriptor keeps its inode from being used again
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def before(self, operation: str, path: Path) -> None:
        """The hook."""
        with self._lock:
            names = {folder: self._list(path) for folder, path in self._folders()}
            files = {inode: path for path in self.root.rglob("*") if (inode := _file_inode(path))}
            contents = {inode: path.read_bytes() for inode, path in files.items()}
            self.moments.append(Moment(operation, names, contents, dict(self.synced_names), dict(self.synced_contents)))

    def after_sync(self, descriptor: int) -> None:
        """What was synced stays."""
        with self._lock:
            self._held.append(os.dup(descriptor))
            inode = os.fstat(descriptor).st_ino
            path = Path(f"/proc/self/fd/{descriptor}")
            if path.is_dir():
                self.synced_names[inode] = self._list(path)
            else:
                self.synced_contents[inode] = path.read_bytes()

    def sync_everything(self) -> None:
        """What was there long before is on the disk."""
        for path in [self.root, *self.root.rglob("*")]:
            descriptor = os.open(path, os.O_RDONLY)
            self.after_sync(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _folders(self) -> Iterator[tuple[int, Path]]:
        yield from ((path.stat().st_ino, path) for path in [self.root, *self.root.rglob("*")] if path.is_dir())

    def _list(self, folder: Path) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _file_inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino if path.is_file() else None
    except FileNotFoundError:  # a temporary of another thread
        return None


def _record(monkeypatch: pytest.MonkeyPatch, root: Path, job: Callable[[], None], sync: Callable[[int], None]) -> Disk:
    disk = Disk(root)
    disk.sync_everything()

    def watched(descriptor: int) -> None:
        sync(descriptor)
        disk.after_sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "hook", disk.before)
        patch.setattr(os, "fsync", watched)
        job()
    disk.before("the end", root)
    disk.close()
    return disk


def _trees(disk: Disk) -> dict[frozenset[tuple[str, bytes]], str]:
    """Every different state in which a power cut may leave the disk, and how it came about."""
    root = disk.root.stat().st_ino
    written_back: dict[str, Callable[[str], bool]] = {
        "nothing": lambda path: False,
        "all names": lambda path: True,
        "the commits": lambda path: path.endswith("/done/"),
        "the root": lambda path: path.count("/") <= 1,
        "roster and root": lambda path: path.endswith("/roster/") or path.count("/") <= 1,
    }
    found: dict[frozenset[tuple[str, bytes]], str] = {}
    for number, moment in enumerate(disk.moments):
        for tear, names in product(TEARS, written_back):
            tree = moment.left(root, TEARS[tear], written_back[names])
            where = f"before operation {number} ({moment.operation}), unsynced bytes {tear}, written back: {names}"
            found.setdefault(frozenset(tree.items()), where)
    return found


def _build(tree: frozenset[tuple[str, bytes]], root: Path) -> None:
    for name, data in sorted(tree):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            (root / name).write_bytes(data)


def _distrust(out: Path) -> None:
    """Assert that whatever claims to be there is there, and whole."""
    if (out / "manifest.json").exists():
        for damage in verify(out).damages:
            is_behind = damage.state == "not encoded yet" or (damage.path.name, damage.state) == (
                "quarantine.jsonl",
                "missing",
            )
            assert is_behind, damage
    else:
        assert not list(out.glob("done/*.json"))


def _check_all(disk: Disk, share: int, finish: Callable[[Path], None], expected: Tree, tmp_path: Path) -> int:
    """Look at every state, and let one in `share` be finished; their number."""
    trees = _trees(disk)
    print(f"\n{len(disk.moments)} moments, {len(trees)} states of the disk, 1 in {share} finished")
    for number, (tree, where) in enumerate(trees.items()):
        root = tmp_path / str(number)
        root.mkdir()
        _build(tree, root)
        try:
            _distrust(root / "out")
            if number % share == 0:
                finish(root / "out")
                assert read_store(root / "out") == expected
        except (AssertionError, StoreError) as error:
            raise AssertionError(where) from error
    return len(trees)


@pytest.mark.parametrize("share", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_the_power_goes_then_the_run_is_finished(
    photos: Path, tmp_path: Path, small_vae: VAE, expected: Tree, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    disk = _record(monkeypatch, watched, lambda: encode(photos, watched / "out", small_vae), os.fsync)
    num_trees = _check_all(disk, share, lambda out: encode(photos, out, small_vae), expected, tmp_path)
    assert len(disk.moments) > 90 and num_trees > 150


@pytest.mark.parametrize("share", [24, pytest.param(1, marks=pytest.mark.slow)])
def test_the_power_goes_while_a_store_grows(
    first_photos: Path,
    photos: Path,
    grown: Path,
    tmp_path: Path,
    small_vae: VAE,
    monkeypatch: pytest.MonkeyPatch,
    share: int,
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    encode(first_photos, watched / "out", small_vae)
    disk = _record(monkeypatch, watched, lambda: encode(photos, watched / "out", small_vae), os.fsync)
    num_trees = _check_all(disk, share, lambda out: encode(photos, out, small_vae), read_store(grown), tmp_path)
    assert len(disk.moments) > 50 and num_trees > 50


@pytest.mark.parametrize("skipped", ["files", "folders"])
def test_the_model_notices_when_a_sync_is_missing(
    photos: Path, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch, skipped: str
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    real = Disk.after_sync

    def forgetful(disk: Disk, descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir() == (skipped == "files"):
            real(disk, descriptor)

    monkeypatch.setattr(Disk, "after_sync", forgetful)
    disk = _record(monkeypatch, watched, lambda: encode(photos, watched / "out", small_vae), os.fsync)
    num_torn = 0
    for number, tree in enumerate(_trees(disk)):
        root = tmp_path / str(number)
        root.mkdir()
        _build(tree, root)
        try:
            _distrust(root / "out")
        except (AssertionError, StoreError):
            num_torn += 1
    assert num_torn > 0
