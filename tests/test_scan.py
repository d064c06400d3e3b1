import os
from pathlib import Path

import pytest
from PIL import Image

from sdvae.data.folders import FolderSource
from sdvae.data.roster import Record
from sdvae.data.scan import scan


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


def test_a_scan_torn_anywhere_is_continued_to_the_same_records(photos: Path, tmp_path: Path) -> None:
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
