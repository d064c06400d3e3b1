import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae.data.preprocess import Preprocess
from sdvae.data.roster import Record, Size, Task, place, read_roster, require_same_records, roster_lines
from sdvae.errors import StoreError

WHOLE = Preprocess(size_px=None, crop="none", max_pixels=10_000)
SHA256 = "0" * 64


def _record(key: str, size: Size | None = (64, 64)) -> Record:
    if size is None:
        return Record(key, step="scan", reason="a device")
    return Record(key, 100, SHA256, size)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(200, 200), None])
record_sets = st.dictionaries(st.text("ab/é", min_size=1), sizes, min_size=1, max_size=40).map(
    lambda found: [_record(key, size) for key, size in found.items()]
)


def _place(records: list[Record], num_rows: int) -> list[Task]:
    return place(records, WHOLE, 8, lambda bucket_px: num_rows)


@given(record_sets, st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_partition_is_a_function_of_the_set_of_records(records: list[Record], num_rows: int, random) -> None:  # type: ignore[no-untyped-def]
    tasks = _place(records, num_rows)
    shuffled = list(records)
    random.shuffle(shuffled)
    assert _place(shuffled, num_rows) == tasks
    assert [task.number for task in tasks] == list(range(len(tasks)))
    placed = [record.key for task in tasks for record in task.records]
    assert sorted(placed) == sorted(record.key for record in records)
    for task in tasks:
        assert 1 <= len(task.records) <= num_rows
        assert {record.bucket_px for record in task.records} == {task.bucket_px}
        if task.bucket_px is not None:
            assert task.bucket_px[0] % 8 == task.bucket_px[1] % 8 == 0
            assert all(record.reason is None for record in task.records)
        else:
            assert all(record.reason for record in task.records)
    assert [task.bucket_px is None for task in tasks] == sorted(task.bucket_px is None for task in tasks)


def test_shards_are_full_and_in_order() -> None:
    records = [
        _record("c", (8, 16)),
        _record("a", (8, 16)),
        _record("b", (8, 8)),
        _record("d", (7, 15)),
        _record("e", None),
    ]
    tasks = _place(records, 2)
    assert [(task.bucket_px, [record.key for record in task.records]) for task in tasks] == [
        ((8, 8), ["b"]), ((8, 16), ["a", "c"]), ((8, 16), ["d"]), (None, ["e"]),
    ]  # fmt: skip


def test_a_photo_without_a_geometry_is_quarantined_with_the_reason() -> None:
    (task,) = place([_record("a", (1, 9000))], Preprocess(size_px=8, max_pixels=10_000), 8, lambda bucket_px: 1)
    (record,) = task.records
    assert task.bucket_px is None and record.step == "preprocess" and "too long and thin" in str(record.reason)


@given(record_sets)
def test_the_roster_file_says_the_same_as_the_tasks(records: list[Record]) -> None:
    tasks = _place(records, 3)
    header, *lines = [json.loads(line) for line in b"".join(roster_lines(tasks)).splitlines()]
    assert header == {
        "generation": 0, "previous": None, "first_shard": 0, "num_shards": len(tasks), "num_records": len(records),
    }  # fmt: skip
    told = [(line["key"], line["shard"], line["bucket_px"] and tuple(line["bucket_px"])) for line in lines]
    assert told == [(record.key, task.number, task.bucket_px) for task in tasks for record in task.records]


def test_a_changed_source_is_refused_by_name(tmp_path: Path) -> None:
    before = [_record(key) for key in "abcdefgh"]
    path = tmp_path / "roster.jsonl"
    path.write_bytes(b"".join(roster_lines(_place(before, 3))))
    stored = read_roster(path)
    require_same_records(stored, _place(before, 3))

    changed = [replace(before[0], source_sha256="1" * 64), *before[1:]]
    with pytest.raises(StoreError, match=r"^since this store was begun, 1 file \(a\) changed in the source; put back"):
        require_same_records(stored, _place(changed, 3))
    with pytest.raises(StoreError, match=r"1 file \(a\) changed and 1 file \(h\) vanished"):
        require_same_records(stored, _place(changed[:-1], 3))
    with pytest.raises(StoreError, match=r"7 files \(b, c, d, e, f, \.\.\.\) vanished"):
        require_same_records(stored, _place(before[:1], 3))
    with pytest.raises(StoreError, match=r"2 files \(x, y\) came to the source; encode the new ones into a store"):
        require_same_records(stored, _place([*before, _record("y"), _record("x")], 3))
