"""Stores on object storage: killed in the middle of an upload, resumed from anywhere, the same objects."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner, Result

from sdvae import atomic
from sdvae.cli.main import cli
from sdvae.errors import StoreError, VerifyError
from sdvae.reading.dataset import LatentDataset
from sdvae.store.remote import Mirror, local_copy, url_of
from sdvae.store.verify import verify
from sdvae.vae import VAE
from tests.faults.conftest import encode, encode_remotely, read_store


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A remote store in memory: the same driver interface, no server."""
    return f"memory://{tmp_path.name}/store"


def test_urls_are_told_from_folders() -> None:
    assert url_of("s3://bucket/store/") == url_of(Path("s3://bucket/store")) == "s3://bucket/store"
    assert url_of("out/store") is None and url_of(Path("/a:/b")) is None and url_of("C:/store") is None
    assert local_copy("out/store") == Path("out/store")


def _remote(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in files.find(root)}


def test_what_is_encoded_remotely_is_the_same_store(
    photos: Path, url: str, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes]
) -> None:
    encode_remotely(photos, Mirror(url, tmp_path / "here"), small_vae)
    assert _remote(url) == expected == read_store(tmp_path / "here")
    there = Mirror(url, tmp_path / "there")
    there.pull()
    assert read_store(there.local) == expected and verify(there.local).damages == []


def test_a_grown_store_grows_there(
    first_photos: Path, photos: Path, url: str, tmp_path: Path, small_vae: VAE, grown: Path
) -> None:
    encode_remotely(first_photos, Mirror(url, tmp_path / "here"), small_vae)
    assert "quarantine.jsonl" in _remote(url)
    encode_remotely(photos, Mirror(url, tmp_path / "elsewhere"), small_vae)
    assert _remote(url) == read_store(grown)
    Mirror(url, tmp_path / "here").pull()
    assert read_store(tmp_path / "here") == read_store(grown)


def test_what_was_begun_here_is_not_called_finished(
    first_photos: Path, photos: Path, url: str, tmp_path: Path, small_vae: VAE
) -> None:
    """The source grew and this machine died before it pushed: what lies there is finished, what lies here is not."""
    mirror = Mirror(url, tmp_path / "here")
    encode_remotely(first_photos, mirror, small_vae)
    encode(photos, mirror.local, small_vae)
    for name in ("done/00004.json", "quarantine.jsonl"):
        (mirror.local / name).unlink()
    mirror.pull()
    assert verify(mirror.local).is_unfinished


class _Death(BaseException):
    """What no code of ours catches."""


def test_it_may_die_before_every_object(
    photos: Path, url: str, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the resumed runs have the folder of the dead one, half begin elsewhere with nothing but the objects."""
    num_puts = 0
    for last in range(100):
        num_puts = 0

        def die(operation: str, path: Path, last: int = last) -> None:
            nonlocal num_puts
            num_puts += operation == "put"
            if num_puts > last:
                raise _Death

        monkeypatch.setattr(atomic, "hook", die)
        try:
            encode_remotely(photos, Mirror(url, tmp_path / "here"), small_vae)
        except _Death:
            is_done = False
        else:
            is_done = True
        monkeypatch.setattr(atomic, "hook", lambda operation, path: None)
        assert _remote(url).items() <= expected.items(), "what is there is whole"
        done = [name for name in _remote(url) if name.startswith("done/")]
        assert all(name.replace("done", "index").replace(".json", ".jsonl") in _remote(url) for name in done)
        encode_remotely(photos, Mirror(url, tmp_path / ("here" if last % 2 else "elsewhere")), small_vae)
        assert _remote(url) == expected
        for folder in ("here", "elsewhere"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        files, root = fsspec.core.url_to_fs(url)
        files.rm(root, recursive=True)
        if is_done:
            break
    assert last > 12


def test_another_store_is_not_overwritten(
    photos: Path, url: str, tmp_path: Path, small_vae: VAE, expected: dict[str, bytes], first_photos: Path
) -> None:
    encode_remotely(photos, Mirror(url, tmp_path / "here"), small_vae)
    other = Mirror(f"{url}-other", tmp_path / "elsewhere")
    encode_remotely(first_photos, other, small_vae)
    with pytest.raises(StoreError, match="with other bytes, of another store"):
        Mirror(url, other.local).push()
    with pytest.raises(StoreError, match="is not of the store in"):
        Mirror(url, other.local).pull()
    assert _remote(url) == expected


def test_damage_on_the_way_is_found(photos: Path, url: str, tmp_path: Path, small_vae: VAE) -> None:
    encode_remotely(photos, Mirror(url, tmp_path / "here"), small_vae)
    for name in ("shards/00000-32x32.safetensors", "done/00001.json"):
        files, root = fsspec.core.url_to_fs(url)
        whole = files.cat_file(f"{root}/{name}")
        files.pipe_file(f"{root}/{name}", bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(VerifyError, match=f"{name} is damaged"):
            Mirror(url, tmp_path / name.replace("/", "-")).pull()
        files.pipe_file(f"{root}/{name}", whole)


def test_the_commands_and_the_reader_take_urls(
    photos: Path, url: str, tmp_path: Path, small_vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDVAE_CACHE", str(tmp_path / "cache"))
    small_vae.save(tmp_path / "vae")

    def run(*arguments: object) -> Result:
        shared = ["--vae", tmp_path / "vae", "--device", "cpu", "--dtype", "fp32"]
        return CliRunner().invoke(cli, [str(argument) for argument in (*arguments, *shared)], prog_name="sdvae")

    encoding = ("encode", photos, url, "--size", 32, "--shard-rows", 3, "--workers", 0)
    result = run(*encoding)
    assert result.exit_code == 3, result.stderr  # two photos are broken
    assert f"7 of 9 photos stored in {url}, 2 quarantined in {url}/quarantine.jsonl" in result.stdout
    assert "quarantine.jsonl" in _remote(url)
    shutil.rmtree(tmp_path / "cache")  # as on another machine
    assert "nothing left to do" in run(*encoding).stdout
    assert len(LatentDataset(url)) == 7
    assert run("decode", url, tmp_path / "pictures").exit_code == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 7
    assert "verify needs a local folder" in run("verify", url).stderr
    result = run(*encoding, "--restart", "--yes")
    assert result.exit_code == 1 and "remove it with the tools of its storage" in result.stderr


def test_a_driver_that_is_not_there_is_named(photos: Path) -> None:
    with pytest.raises(StoreError, match="cannot use nowhere://bucket/store: Protocol not known"):
        Mirror("nowhere://bucket/store")


# --- A server that speaks S3 ---


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment in which s3:// is a server of this machine, with a bucket."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    assert _finish(_start(environment, "import fsspec; fsspec.filesystem('s3').mkdir('bucket')")) == 0
    yield environment
    server.kill()
    server.wait()


def _start(environment: dict[str, str], code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=os.environ | environment,
    )  # fmt: skip


def _finish(process: "subprocess.Popen[str]") -> int:
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


_ENCODE = """
import os, signal, sys
from pathlib import Path

import torch

from sdvae import atomic
from sdvae.store.remote import Mirror
from sdvae.vae import VAE
from tests.conftest import SMALL, random_model
from tests.faults.conftest import encode_remotely

photos, url, local, last = sys.argv[1:]
num_puts = 0

def die(operation, path):
    global num_puts
    num_puts += operation == "put"
    if num_puts > int(last):
        os.kill(os.getpid(), signal.SIGKILL)

atomic.hook = die
vae = VAE(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")
encode_remotely(Path(photos), Mirror(url, Path(local)), vae)
"""

_COMPARE = """
import sys
from pathlib import Path

import fsspec

from tests.faults.conftest import read_store

files, root = fsspec.core.url_to_fs(sys.argv[1])
found = {name.removeprefix(root + "/"): files.cat_file(name) for name in files.find(root)}
assert found == read_store(Path(sys.argv[2])), sorted(found)
"""


def _require_finished_elsewhere(s3: dict[str, str], photos: Path, url: str, folder: Path, pristine: Path) -> None:
    """By the same command, on a machine that has only the objects."""
    assert _finish(_start(s3, _ENCODE, photos, url, folder / "elsewhere", 1000)) == 0
    assert _finish(_start(s3, _COMPARE, url, pristine)) == 0
    for name in ("here", "elsewhere"):
        shutil.rmtree(folder / name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_between_uploads_to_s3(photos: Path, pristine: Path, tmp_path: Path, s3: dict[str, str]) -> None:
    """SIGKILL before the n-th object, for every n."""
    num_kills = 0
    while _finish(_start(s3, _ENCODE, photos, f"s3://bucket/{num_kills}", tmp_path / "here", num_kills)):
        _require_finished_elsewhere(s3, photos, f"s3://bucket/{num_kills}", tmp_path, pristine)
        num_kills += 1
    print(f"\nkilled before each of {num_kills} objects, each resumed to the same objects")
    assert num_kills > 12


class _Proxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, but of one upload only half of the body; then it says so, and waits."""

    daemon_threads = True

    def __init__(self, port: int, stall_at: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.to_port, self.stall_at = port, stall_at
        self.num_uploads = 0
        self.is_stalled = threading.Event()


class _Passing(BaseHTTPRequestHandler):
    server: _Proxy
    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        there = HTTPConnection("127.0.0.1", self.server.to_port)
        there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name != "Expect":  # it is answered here
                there.putheader(name, value)
        there.endheaders()
        num_bytes = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT":
            self.server.num_uploads += 1
            if self.server.num_uploads == self.server.stall_at:
                there.send(self.rfile.read(num_bytes // 2))
                self.server.is_stalled.set()
                self.close_connection = True
                with suppress(ConnectionResetError):
                    self.rfile.read()  # until the client is dead
                there.close()
                return
        there.send(self.rfile.read(num_bytes))
        answer = there.getresponse()
        data = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name not in ("Transfer-Encoding", "Content-Length", "Connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815 (their names are http.server's)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_while_an_upload_to_s3_is_in_flight(
    photos: Path, pristine: Path, tmp_path: Path, s3: dict[str, str]
) -> None:
    """SIGKILL when half of the n-th object has reached the server, for every n."""
    num_kills = 0
    while True:
        url = f"s3://bucket/half-{num_kills}"
        with _Proxy(int(s3["AWS_ENDPOINT_URL"].rpartition(":")[2]), stall_at=num_kills + 1) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            through = s3 | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}"}
            writer = _start(through, _ENCODE, photos, url, tmp_path / "here", 1000)
            while writer.poll() is None and not proxy.is_stalled.wait(0.01):
                pass
            writer.kill()
            is_done = _finish(writer) == 0
            proxy.shutdown()
        if is_done:
            break
        _require_finished_elsewhere(s3, photos, url, tmp_path, pristine)
        num_kills += 1
    print(f"\nkilled in the middle of each of {num_kills} uploads, each resumed to the same objects")
    assert num_kills > 12
