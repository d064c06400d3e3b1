import os
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import pytest
from PIL import Image

from sdvae.encoding import scan as scans
from sdvae.encoding.scan import scan
from sdvae.images.write import encode_image
from sdvae.sealed import seal
from sdvae.sources.entries import Entry
from sdvae.sources.folders import FolderSource
from sdvae.store.records import Record


class CountingSource(FolderSource):
    """Notes what is read, and fails like a cable where told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.failing: set[str] = set()

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        if key in self.failing:
            raise OSError(5, "Input/output error")
        return super().read(key)

    def scan(self, journal: Path, max_pixels: int = 10**6) -> list[Record]:
        self.reads.clear()
        return scan(self, self.entries(), max_pixels, journal, lambda num_done, num_all: None)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        Image.new("RGB", (20 + number, 10), (number, 0, 0)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_a_scan_reads_every_file_once_and_then_only_what_changed(photos: Path, tmp_path: Path) -> None:
    source, journal = CountingSource(photos), tmp_path / "scan.jsonl"
    first = source.scan(journal)
    assert [(record.key, record.original_px) for record in first] == [
        ("a.png", (10, 20)), ("b.png", (10, 21)), ("broken.png", None), ("c.png", (10, 22)), ("d.png", (10, 23)),
    ]  # fmt: skip
    assert first[2].step == "decode" and first[2].source_bytes == 8 and first[2].reason
    assert len(source.reads) == 5
    assert source.scan(journal) == first and source.reads == []

    Image.new("RGB", (5, 5)).save(photos / "b.png")
    (photos / "c.png").unlink()
    again = source.scan(journal)
    assert source.reads == ["b.png"]
    assert [(record.key, record.original_px) for record in again][:2] == [("a.png", (10, 20)), ("b.png", (5, 5))]
    assert source.scan(journal) == again and source.reads == []  # the later line of a key counts


def test_another_time_of_the_file_or_another_limit_reads_again(photos: Path, tmp_path: Path) -> None:
    source, journal = CountingSource(photos), tmp_path / "scan.jsonl"
    first = source.scan(journal)
    os.utime(photos / "a.png", ns=(1, 1))
    assert source.scan(journal) == first and source.reads == ["a.png"]
    assert [record.step for record in source.scan(journal, max_pixels=205)] == [None, "decode"] + ["decode"] * 3
    assert len(source.reads) == 5


def test_a_scan_torn_anywhere_is_continued_to_the_same_records(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "_CHUNK", 1)
    source, journal = CountingSource(photos), tmp_path / "scan.jsonl"
    first = source.scan(journal)
    whole = journal.read_bytes()
    reads = []
    for length in range(0, len(whole), 37):
        journal.write_bytes(whole[:length])
        assert source.scan(journal) == first
        reads.append(len(source.reads))
    assert reads == sorted(reads, reverse=True) and reads[0] == 5 and reads[-1] == 1


def test_a_failing_disk_is_asked_again_next_time(photos: Path, tmp_path: Path) -> None:
    source, journal = CountingSource(photos), tmp_path / "scan.jsonl"
    source.failing = {"a.png"}
    assert source.scan(journal)[0] == Record("a.png", step="read", reason="cannot be read: Input/output error")
    source.failing = set()
    assert source.scan(journal)[0].original_px == (10, 20)
    assert source.reads == ["a.png"]


class SlowSource:
    """Photos that take their time, and come in another order than they were asked for.

    The first come only when as many threads as were promised are reading at once.
    """

    name, root = "slow photos", None

    def __init__(self, delays_s: Sequence[float], num_threads: int = 1) -> None:
        self.delays_s = delays_s
        self.num_reads = 0
        self._all_threads_read = Event()
        self._barrier = Barrier(num_threads, self._all_threads_read.set)

    def entries(self) -> list[Entry]:
        return [Entry(f"{number:03d}", 1, 1) for number in range(len(self.delays_s))]

    def read(self, key: str) -> bytes:
        self.num_reads += 1
        if not self._all_threads_read.is_set():
            self._barrier.wait(120)
        time.sleep(self.delays_s[int(key)])
        return b"P5 %d 3 255\n" % (int(key) + 1) + bytes(3 * int(key) + 3)


def test_the_records_and_the_journal_are_the_same_with_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "_CHUNK", 3)
    delays_s = np.random.default_rng(0).uniform(0, 0.01, 100).tolist()

    def scanned(num_threads: int) -> tuple[list[Record], bytes, list[tuple[int, int]]]:
        source, journal = SlowSource(delays_s, num_threads), tmp_path / f"{num_threads}.jsonl"
        done: list[tuple[int, int]] = []
        records = scan(source, source.entries(), 10**6, journal, lambda *counts: done.append(counts), num_threads)
        return records, journal.read_bytes(), done

    records, journal, done = scanned(1)
    assert [record.original_px for record in records] == [(3, number + 1) for number in range(100)]
    assert done[0] == (0, 100) and done[-1] == (100, 100) and done == sorted(done)
    for num_threads in (3, 16):
        assert scanned(num_threads) == (records, journal, done)


def test_an_interrupted_scan_stops_at_once_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "_CHUNK", 1)
    source, journal = SlowSource([0.005] * 50 + [1.0] * 350), tmp_path / "scan.jsonl"

    def interrupt(num_done: int, num_all: int) -> None:
        if num_done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(source, source.entries(), 10**6, journal, interrupt, num_threads=2)
    assert source.num_reads < 100
    again = SlowSource([0.0] * 400)
    assert len(scan(again, again.entries(), 10**6, journal, lambda *counts: None)) == 400
    assert again.num_reads == 390


def test_what_a_listing_tells_is_never_taken_from_an_earlier_scan(tmp_path: Path) -> None:
    image = encode_image(np.zeros((4, 4, 3), np.uint8), "png")
    journal = tmp_path / "scan.jsonl"
    for caption in ("a cat", "a dog"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos/a.png").write_bytes(image)
        os.utime(tmp_path / "photos/a.png", ns=(1, 1))
        (tmp_path / "photos/a.txt").write_text(caption)
        source = CountingSource(tmp_path / "photos")
        (record,) = source.scan(journal)
        assert (record.caption, record.original_px) == (caption, (4, 4))
    assert source.reads == []
    (tmp_path / "photos/a.jpg").write_bytes(image)  # now the caption may be another photo's
    records = source.scan(journal)
    assert [(record.key, record.step, record.original_px) for record in records] == [
        ("a.jpg", "scan", None), ("a.png", "scan", None),
    ]  # fmt: skip


def test_lines_of_another_kind_in_a_journal_are_passed_over(photos: Path, tmp_path: Path) -> None:
    source, journal = CountingSource(photos), tmp_path / "scan.jsonl"
    journal.write_bytes(seal({"key": "a.png", "stamp": [1, 2]}))
    assert len(source.scan(journal)) == len(source.reads) == 5
