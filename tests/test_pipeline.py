"""The decoding processes: order, crashes, kills, and that none of them outlives anybody."""

import hashlib
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdvae.encoding.load_photo import Failure
from sdvae.encoding.pipeline import Decoders
from sdvae.encoding.times import Times
from sdvae.errors import StoreError
from sdvae.sources.entries import Entry
from sdvae.sources.folders import FolderSource
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.store.records import Record

SIZE = (16, 24)
PREPROCESS = Preprocess(size_px=None, crop="none")
NUM_PHOTOS = 12
FOREVER_S = 3600  # longer than any guard of a test


class Photos:
    """Photos of one colour each, by number; `deeds` says what befalls the process that reads one."""

    def __init__(self, counts: Path, deeds: dict[str, tuple[str, int]] | None = None) -> None:
        self.counts = counts  # how often each was read, whatever became of the reader
        self.deeds = deeds or {}  # key -> (what, how many times)
        self.name = "photos"
        self.root = None

    def entries(self) -> list[Entry]:
        return []

    def read(self, key: str) -> bytes:
        with (self.counts / key).open("ab") as count:
            count.write(b"x")
        what, times = self.deeds.get(key, ("", 0))
        if (self.counts / key).stat().st_size <= times:
            if what == "exit":
                os._exit(7)
            if what == "sleep":
                time.sleep(FOREVER_S)
            if what == "missing":
                raise FileNotFoundError
            os.kill(os.getpid(), signal.Signals[what])
        return photo(key)

    def num_reads(self, key: str) -> int:
        return (self.counts / key).stat().st_size


def photo(key: str) -> bytes:
    image = np.full((*SIZE, 3), int(key), np.uint8)
    header = f"P6 {SIZE[1]} {SIZE[0]} 255\n".encode()
    return header + image.tobytes()


def batches(num_photos: int = NUM_PHOTOS, num_rows: int = 3) -> list[tuple[tuple[int, int], Sequence[Record]]]:
    keys = [str(number) for number in range(num_photos)]
    records = [
        Record(
            key,
            source_sha256=hashlib.sha256(photo(key)).hexdigest(),
            original_px=SIZE,
            geometry=plan_geometry(*SIZE, PREPROCESS, 8),
        )
        for key in keys
    ]
    return [(SIZE, records[start : start + num_rows]) for start in range(0, num_photos, num_rows)]


def decoders(source: Photos, num_workers: int, plan: list[tuple[tuple[int, int], Sequence[Record]]] | None = None):  # type: ignore[no-untyped-def]
    plan = batches() if plan is None else plan
    slot_bytes = max(len(records) for _, records in plan) * SIZE[0] * SIZE[1] * 3
    return Decoders(source, PREPROCESS, plan, slot_bytes, np.copy, Times(num_workers=num_workers))


def run(source: Photos, num_workers: int) -> tuple[NDArray[np.uint8], list[Failure | None]]:
    with decoders(source, num_workers) as made:
        found = list(made)
    assert children() == []
    return np.concatenate([images for images, _ in found]), [failure for _, failures in found for failure in failures]


def children() -> list[psutil.Process]:
    """Decoding processes of this one; other tests may keep a server or a tracker."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE and "sdvae" in " ".join(child.cmdline())]


def require_right(images: NDArray[np.uint8], failed: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    assert images.shape == (NUM_PHOTOS, *SIZE, 3)
    for number, image in enumerate(images):
        assert (image == (0 if number in failed else number)).all(), number


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_whoever_decodes(tmp_path: Path, num_workers: int) -> None:
    source = Photos(tmp_path)
    images, failures = run(source, num_workers)
    require_right(images)
    assert failures == [None] * NUM_PHOTOS
    assert all(source.num_reads(str(number)) == 1 for number in range(NUM_PHOTOS))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_black_and_has_a_reason(tmp_path: Path, num_workers: int) -> None:
    images, failures = run(Photos(tmp_path, {"4": ("missing", 1)}), num_workers)
    require_right(images, {4})
    assert failures[4] == Failure("read", "vanished after the scan")
    assert sum(failure is not None for failure in failures) == 1


def test_a_photo_that_crashes_its_decoder_twice_is_left_out(tmp_path: Path) -> None:
    crashes = {4: "SIGSEGV", 7: "SIGBUS", 8: "SIGABRT"}
    once = {"5": ("SIGSEGV", 1)}
    source = Photos(tmp_path, {str(number): (crash, 9) for number, crash in crashes.items()} | once)
    images, failures = run(source, 2)
    require_right(images, set(crashes))
    for number, crash in crashes.items():
        assert failures[number] == Failure(
            "decode", f"its decoder crashed, and again in a process of its own ({crash})"
        )
    assert sum(failure is not None for failure in failures) == len(crashes)
    assert [source.num_reads(str(number)) for number in (4, 5, 7, 8)] == [2, 2, 2, 2]


def test_a_killed_process_blames_no_photo(tmp_path: Path) -> None:
    source = Photos(tmp_path, {"4": ("SIGKILL", 2), "7": ("SIGKILL", 1)})
    images, failures = run(source, 2)
    require_right(images)
    assert failures == [None] * NUM_PHOTOS


@pytest.mark.parametrize("deed", [("sleep", 0), ("SIGSEGV", 1)])
def test_whoever_forks_may_be_killed(tmp_path: Path, deed: tuple[str, int]) -> None:
    """Its processes work on; for those that are missing, another one takes its place."""
    source = Photos(tmp_path, {"8": deed})
    before = set(psutil.Process().children())  # of other tests
    with decoders(source, 2) as made:
        iterator = iter(made)
        images = [next(iterator)[0]]
        (nursery,) = set(psutil.Process().children()) - before
        nursery.kill()
        images += [batch for batch, _ in iterator]
    require_right(np.concatenate(images))
    assert children() == []


def test_processes_that_cannot_start_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for executable, message in (
        ("false", r"of photos ended with exit code 1 at its start"),
        ("kills", r"killed 3 times at their start"),
    ):
        (tmp_path / "kills").write_text("#!/bin/sh\nkill -KILL $$\n")
        (tmp_path / "kills").chmod(0o755)
        monkeypatch.setattr(sys, "executable", shutil.which(executable) or tmp_path / executable)
        with pytest.raises(StoreError, match=message):
            run(Photos(tmp_path), 2)
        assert children() == []


def test_processes_that_are_killed_over_and_over_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"killed 3 times by SIGKILL, at last at 4; should memory be short, give fewer"
    ):
        run(Photos(tmp_path, {"4": ("SIGKILL", 99)}), 2)
    assert children() == []


def test_a_process_that_gives_up_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"of photos ended with exit code 7 at 4, its message is above"):
        run(Photos(tmp_path, {"4": ("exit", 1)}), 2)
    assert children() == []


def test_photos_are_decoded_while_others_are_in_the_network_and_memory_stays_bounded(tmp_path: Path) -> None:
    source, plan = Photos(tmp_path), batches(num_photos=60)
    with decoders(source, 1, plan) as made:
        iterator = iter(made)
        next(iterator)
        wait_for(lambda: len(list(tmp_path.iterdir())) >= 6)
        time.sleep(0.3)  # it might go on and on
        assert len(list(tmp_path.iterdir())) <= 6 * 3  # slots, the batch that waits and the one in use
        assert sum(1 for _ in iterator) == 19


def test_an_error_of_who_encodes_ends_the_processes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), decoders(Photos(tmp_path, {"5": ("sleep", 1)}), 2) as made:
        next(iter(made))
        raise ZeroDivisionError
    assert children() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sdvae")]


def wait_for(condition: Callable[[], bool], guard_s: float = 120) -> None:
    end = time.monotonic() + guard_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose two decoders are in the middle of a photo that takes forever."""
    code = (
        "import pathlib, sys; from tests.test_pipeline import Photos, decoders\n"
        f"source = Photos(pathlib.Path({str(tmp_path)!r}), {{'0': ('sleep', 1), '1': ('sleep', 1)}})\n"
        "with decoders(source, 2) as made: list(made)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        yield process
        process.kill()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_encoder(encoder: subprocess.Popen[bytes], end: signal.Signals) -> None:
    workers = psutil.Process(encoder.pid).children(recursive=True)
    assert len(workers) == 1 + 2
    os.killpg(encoder.pid, end)
    encoder.wait(120)
    wait_for(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


def test_an_image_of_another_size_than_its_header_said_is_no_photo(tmp_path: Path) -> None:
    """The plan was made for the header; what is stored must be what was planned."""
    path = tmp_path / "0.png"
    Image.new("RGB", (8, 8)).save(path)
    ((_, records), *_) = batches(1, 1)
    source = Photos(tmp_path)
    source.read = lambda key: path.read_bytes()  # type: ignore[method-assign]
    with decoders(source, 0, [(SIZE, records)]) as made:
        ((images, failures),) = list(made)
    assert failures == [Failure("read", "changed after the scan")] and not images.any()


def test_what_libraries_print_of_a_bad_file_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(file, "tiff", compression="tiff_adobe_deflate")
    bad = file.getvalue().replace(zlib.compress(bytes(SIZE[0] * SIZE[1] * 3))[:12], b"\xff" * 12)
    assert bad != file.getvalue()
    (tmp_path / "bad.tif").write_bytes(bad)
    record = Record(
        "bad.tif",
        source_sha256=hashlib.sha256(bad).hexdigest(),
        original_px=SIZE,
        geometry=plan_geometry(*SIZE, PREPROCESS, 8),
    )
    source = FolderSource(tmp_path)
    with Decoders(source, PREPROCESS, [(SIZE, [record])], math.prod(SIZE) * 3, np.copy, Times(num_workers=1)) as made:
        ((_, failures),) = made
    assert failures[0] and failures[0].step == "decode"
    assert capfd.readouterr().err == ""
