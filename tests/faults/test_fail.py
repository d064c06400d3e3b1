"""Every operation that can fail does: the run ends with a sentence, and the next one with the same bytes."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdvae import atomic
from sdvae.errors import OutputError, StoreError
from sdvae.vae import VAE
from tests.faults.conftest import encode, read_store

CODES = [errno.ENOSPC, errno.EIO, errno.EFBIG]


def _fail_at(monkeypatch: pytest.MonkeyPatch, nth: int, code: int) -> list[str]:
    """Let the n-th operation (from 1) fail; the list names the operations asked for."""
    operations: list[str] = []

    def hook(operation: str, path: Path) -> None:
        operations.append(operation)
        if len(operations) == nth:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "hook", hook)
    return operations


def _check_failed_then_finished(
    photos: Path, out: Path, vae: VAE, expected: dict[str, bytes], nth: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether there was an n-th operation."""
    operations = _fail_at(monkeypatch, nth, code)
    try:
        encode(photos, out, vae)
    except OutputError as error:
        assert os.strerror(code) in str(error) and str(out) in str(error)
        assert not any(Path(name).name.endswith(".tmp") for name in read_store(out)), "no temporary is left"
        assert read_store(out).items() <= expected.items(), "what has its name is complete"
    else:
        assert len(operations) < nth, "a failure that nobody heard of"
        return False
    finally:
        monkeypatch.setattr(atomic, "hook", lambda operation, path: None)
    encode(photos, out, vae)
    assert read_store(out) == expected
    return True


def _count_operations(photos: Path, out: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    operations = _fail_at(monkeypatch, 0, 0)
    encode(photos, out, vae)
    return operations


def test_an_operation_fails_here_and_there(
    photos: Path, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = _count_operations(photos, tmp_path / "whole", small_vae, monkeypatch)
    assert {"open", "write", "fsync", "replace", "link", "mkdir", "append"} <= set(operations)
    for number, nth in enumerate(range(1, len(operations), len(operations) // 11)):
        out = tmp_path / str(nth)
        assert _check_failed_then_finished(photos, out, small_vae, expected, nth, CODES[number % 3], monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_every_operation_fails(
    photos: Path, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    operations = _count_operations(photos, tmp_path / "whole", small_vae, monkeypatch)
    nth = 1
    while _check_failed_then_finished(photos, tmp_path / "out", small_vae, expected, nth, code, monkeypatch):
        shutil.rmtree(tmp_path / "out")
        nth += 1
    print(f"\n{nth - 1} operations failed with {errno.errorcode[code]}, each resumed to the same bytes")
    assert nth - 1 >= len(operations) > 90


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Sets a limit of the kernel: a write beyond so many bytes fails with EFBIG."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_the_kernel_refuses_large_files(
    photos: Path,
    tmp_path: Path,
    small_vae: VAE,
    expected: dict[str, bytes],
    limit_files: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def limit(operation: str, path: Path) -> None:
        if path.suffix == ".safetensors":  # not before: memory that processes share counts as a file, too
            limit_files(4200)

    monkeypatch.setattr(atomic, "hook", limit)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"shards/.*File too large"):
        encode(photos, out, small_vae)
    assert not list(out.rglob("*.tmp")) and read_store(out).items() < expected.items()
    monkeypatch.setattr(atomic, "hook", lambda operation, path: None)
    limit_files(resource.RLIM_INFINITY)
    encode(photos, out, small_vae)
    assert read_store(out) == expected


def test_memory_to_share_that_is_refused_is_said_so(
    photos: Path, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes], limit_files: Callable[[int], None]
) -> None:
    out = tmp_path / "out"
    limit_files(10_000)  # enough for the journals; two batches of two photos take more
    with pytest.raises(StoreError, match=r"cannot have 12,288 bytes of memory .*: File too large; raise the limits"):
        encode(photos, out, small_vae)
    limit_files(resource.RLIM_INFINITY)
    encode(photos, out, small_vae)
    assert read_store(out) == expected


_ON_A_SMALL_DISK = """
import os, sys
from pathlib import Path

import torch

from sdvae.errors import OutputError
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import encode, read_store

photos, pristine, disk = map(Path, sys.argv[1:])
vae = VAE(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")
expected = read_store(pristine)
ballast = disk / "ballast"
for number, num_free in enumerate(range(8192, 90_000, 16384)):
    out = disk / str(number)
    ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - num_free))
    try:
        encode(photos, out, vae)
    except OutputError as error:
        print(error)
    assert not list(out.rglob("*.tmp")) and read_store(out).items() < expected.items()
    ballast.unlink()
    encode(photos, out, vae)
    assert read_store(out) == expected
"""


def test_a_real_disk_is_full(photos: Path, pristine: Path, tmp_path: Path) -> None:
    """A tmpfs in a name space of its own, where the machine allows that."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets no test mount a tmpfs")
    script = [sys.executable, "-c", _ON_A_SMALL_DISK, *map(str, (photos, pristine, tmp_path))]
    done = subprocess.run([*mounted, *script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 5, "the disk was full each time"
    assert all("No space left on device; free some space and run the same command again" in line for line in sentences)
