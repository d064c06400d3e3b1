import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae import atomic, sealed
from sdvae.errors import OutputError, StoreError, VerifyError
from sdvae.journal import Journal, read_journal

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé\u0000\n🐈"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé"), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text("abcé", min_size=1), json_values, max_size=4)


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], list[str]]]:
    """Make the n-th operation (from 1) fail with an errno; the list names the operations asked for."""

    def install(nth: int, code: int) -> list[str]:
        operations: list[str] = []

        def hook(operation: str, path: Path) -> None:
            operations.append(operation)
            if len(operations) == nth:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(atomic, "hook", hook)
        return operations

    yield install


def test_write_returns_the_digest_of_all_chunks_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    array = np.arange(6, dtype=np.float16)
    assert atomic.write_bytes(path, b"head", array.data) == _sha256(path.read_bytes())
    assert path.read_bytes() == b"head" + array.tobytes()
    assert _names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_get_the_mode_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write_bytes(tmp_path / "a", b"x")
        atomic.create_bytes(tmp_path / "b", b"x")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o666 & ~mask}


def test_create_is_won_once_and_changes_nothing_after(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    assert atomic.create_bytes(path, b"first") is True
    assert atomic.create_bytes(path, b"second") is False
    assert path.read_bytes() == b"first"
    assert _names(tmp_path) == ["done.json"]


def test_create_falls_back_where_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert atomic.create_bytes(tmp_path / "a", b"first") is True
    assert atomic.create_bytes(tmp_path / "a", b"second") is False
    assert (tmp_path / "a").read_bytes() == b"first"
    assert _names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("write", [atomic.write_bytes, atomic.create_bytes])
def test_every_failing_operation_leaves_old_or_new_bytes_and_no_temporary(
    tmp_path: Path, fail_at: Callable[[int, int], list[str]], write: Callable[..., object], code: int
) -> None:
    path = tmp_path / "a"
    num_failures = 0
    for nth in range(1, 20):
        path.unlink(missing_ok=True)
        operations = fail_at(nth, code)
        if write is atomic.write_bytes:
            path.write_bytes(b"old")
        try:
            write(path, b"new ", b"bytes")
        except OutputError as error:
            num_failures += 1
            assert str(path) in str(error) and "9 bytes" in str(error) and os.strerror(code) in str(error)
        else:
            break
        assert not path.exists() or path.read_bytes() in (b"old", b"new bytes")
        assert set(_names(tmp_path)) <= {"a"}
    assert num_failures == len(operations) >= 6


def test_a_full_disk_says_what_to_do(tmp_path: Path, fail_at: Callable[[int, int], list[str]]) -> None:
    fail_at(2, errno.ENOSPC)
    with pytest.raises(OutputError, match=r"a \(3 bytes\): No space left on device; free some space and run"):
        atomic.write_bytes(tmp_path / "a", b"abc")


def test_a_real_limit_of_the_file_size_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import os, resource, signal
from pathlib import Path
from sdvae import atomic, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path({str(tmp_path)!r})
atomic.write_bytes(folder / "small", bytes(1000))
try:
    atomic.write_bytes(folder / "large", bytes(1001))
except errors.OutputError as error:
    print(sorted(os.listdir(folder)), error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("['small'] cannot write") and "File too large" in result.stdout


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    atomic.make_folder(tmp_path / "a" / "b")
    atomic.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Not a directory"):
        atomic.make_folder(tmp_path / "file" / "below")


def test_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = atomic._place()
    (tmp_path / "shards").mkdir()
    left = [tmp_path / f".{here}.{dead.pid}.0123abcd.tmp", tmp_path / "shards" / f".{here}.{os.getpid()}.0123abcd.tmp"]
    kept = [tmp_path / f".{here}.{os.getppid()}.0123abcd.tmp", tmp_path / ".hidden.tmp", tmp_path / "a.tmp"]
    for path in left + kept:
        path.write_bytes(b"x")
    assert atomic.sweep(tmp_path) == 2
    assert [path.exists() for path in left] == [False, False]
    assert all(path.exists() for path in kept)


def test_what_other_places_left_is_swept_when_it_is_a_day_old(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".{'0' * 12}.{dead.pid}.0123abcd.tmp", f".a.json.{dead.pid}.0123abcd.tmp"]  # the second of an old sdvae
    for name in names:
        assert atomic.is_temporary(name)
        (tmp_path / name).write_bytes(b"x")
    assert atomic.sweep(tmp_path) == 0
    now = (tmp_path / names[0]).stat().st_mtime
    for name in names:
        os.utime(tmp_path / name, (now, now - 2 * 24 * 3600))
    assert atomic.sweep(tmp_path) == 2
    assert _names(tmp_path) == []


def test_sweep_spares_what_this_process_is_writing(tmp_path: Path) -> None:
    swept = []

    def chunks() -> Iterator[bytes]:
        yield b"half"
        swept.append(atomic.sweep(tmp_path))
        yield b" and half"

    atomic.write_stream(tmp_path / "a", chunks())
    assert swept == [0] and (tmp_path / "a").read_bytes() == b"half and half"


_SLOW_WRITER = """
import sys
from pathlib import Path
from sdvae import atomic

def chunks():
    yield b"half"
    print("writing", flush=True)
    sys.stdin.readline()
    yield b" and half"

atomic.write_stream(Path(sys.argv[1]), chunks())
"""
_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
_STAND_IN = "from sdvae import atomic; import os; atomic._place = lambda: '0' * 12; os.getpid = lambda: 999_999_999"


def _has_namespaces() -> bool:
    try:
        return subprocess.run([*_NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["PID namespace", "stand-in"])
def test_a_start_in_another_pid_namespace_takes_nothing_from_a_writer(tmp_path: Path, kind: str) -> None:
    if kind == "PID namespace" and not _has_namespaces():
        pytest.skip("unshare needs root")
    code = _SLOW_WRITER if kind == "PID namespace" else f"{_STAND_IN}\n{_SLOW_WRITER}"
    command = [*(_NAMESPACE if kind == "PID namespace" else []), sys.executable, "-c", code, str(tmp_path / "a")]

    def start() -> "subprocess.Popen[bytes]":
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        return writer

    with start() as writer:
        (temporary,) = tmp_path.iterdir()
        assert atomic.sweep(tmp_path) == 0
        writer.communicate(b"\n")
    assert writer.returncode == 0 and (tmp_path / "a").read_bytes() == b"half and half"

    with start() as writer:
        writer.kill()
    (temporary,) = (path for path in tmp_path.iterdir() if path.name != "a")
    assert atomic.sweep(tmp_path) == 0  # it could be alive
    written = temporary.stat().st_mtime
    os.utime(temporary, (written, written - 2 * 24 * 3600))
    assert atomic.sweep(tmp_path) == 1
    assert _names(tmp_path) == ["a"]


_REFUSALS = [
    *((name, code) for name in ("fsync", "link") for code in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM")),
    ("fsync", "EBADF"),
    *(("link", code) for code in ("EACCES", "EMLINK", "EXDEV")),
]


@pytest.mark.parametrize(("operation", "code"), _REFUSALS)
def test_a_file_system_may_lack_syncs_of_folders_and_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operation: str, code: str
) -> None:
    real_fsync = os.fsync

    def refuse(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, code), "not here")

    def fsync(descriptor: int) -> None:
        (refuse if stat.S_ISDIR(os.fstat(descriptor).st_mode) else real_fsync)(descriptor)

    monkeypatch.setattr(os, operation, fsync if operation == "fsync" else refuse)
    atomic.say_missing.cache_clear()
    atomic.make_folder(tmp_path / "a")
    for name in "bc":
        assert atomic.create_bytes(tmp_path / "a" / name, b"first") is True
        assert atomic.create_bytes(tmp_path / "a" / name, b"second") is False
        atomic.write_bytes(tmp_path / "a" / "d", b"x")
    atomic.remove(tmp_path / "a" / "d")
    assert [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())] == [b"first", b"first"]
    assert len(caplog.messages) == 1 and "this file system has no" in caplog.messages[0]


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EROFS"])
def test_a_sync_that_fails_is_no_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(getattr(errno, code), "gone wrong")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="gone wrong"):
        atomic.write_bytes(tmp_path / "a", b"x")


@given(json_objects)
def test_sealed_objects_come_back(value: dict[str, object]) -> None:
    value.pop("digest", None)
    assert sealed.unseal(sealed.seal(value)) == value


def test_every_bit_of_a_sealed_object_counts() -> None:
    data = sealed.seal({"a": [1, 2.5, None, "é\n"], "b": {"c": True}})
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            assert sealed.unseal(bytes(flipped)) is None, (position, bit)
    assert all(sealed.unseal(data[:length]) is None for length in range(len(data)))


def test_canonical_json_is_one_spelling_and_refuses_nan() -> None:
    assert sealed.canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        sealed.canonical_json({"a": float("nan")})


def test_the_digest_can_be_checked_without_parsing() -> None:
    """What docs/store.md promises to readers in other languages: cut the member out of the text and hash the rest."""
    for value in ({}, {"a": 1}, {"z": 1}, {"a": 1, "z": 2}):
        text = sealed.seal(value).decode()
        digest = json.loads(text)["digest"]
        member = f'"digest":"{digest}"'
        rest = text.replace(member + ",", "").replace("," + member, "").replace(member, "")
        assert _sha256(rest.encode()) == digest


def test_read_json_tells_damage_from_absence(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    sealed.write_json(path, {"a": 1})
    assert sealed.read_json(path) == {"a": 1}
    path.write_bytes(path.read_bytes().replace(b":1,", b":2,"))
    with pytest.raises(VerifyError, match="damaged"):
        sealed.read_json(path)
    with pytest.raises(StoreError, match="No such file"):
        sealed.read_json(tmp_path / "b.json")


def test_a_journal_survives_a_tear_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "scan.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append({"number": number})
    whole = path.read_bytes()
    starts = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Journal(path) as journal:
            journal.append({"number": "new"})
        num_whole = sum(start <= length for start in starts[1:])
        # A line that lost only its newline gets it back: it is whole again.
        num_whole += length + 1 in starts[1:]
        assert [line["number"] for line in read_journal(path)] == [*range(num_whole), "new"]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
