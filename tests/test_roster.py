import hashlib
import json
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sdvae.store.buckets import Size
from sdvae.store.geometry import Preprocess
from sdvae.store.records import Record
from sdvae.store.roster import Roster, Task, place, plan_records, roster_lines

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
    return place(plan_records(records, WHOLE, 8), lambda bucket_px: num_rows)


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
    planned = plan_records([_record("a", (1, 9000))], Preprocess(size_px=8, max_pixels=10_000), 8)
    (task,) = place(planned, lambda bucket_px: 1)
    (record,) = task.records
    assert task.bucket_px is None and record.step == "preprocess" and "too long and thin" in str(record.reason)


@given(record_sets)
def test_the_roster_file_says_the_same_as_the_tasks(records: list[Record]) -> None:
    tasks = _place(records, 3)
    header, *lines = [json.loads(line) for line in b"".join(roster_lines(tasks)).splitlines()]
    shards, changes = header.pop("shards"), header.pop("changes")
    assert changes == {"num_changes": 0, "num_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    assert header == {
        "generation": 0, "previous": None, "first_shard": 0, "num_shards": len(tasks), "num_records": len(records),
    }  # fmt: skip
    told = [(line["key"], line["shard"], line["bucket_px"] and tuple(line["bucket_px"])) for line in lines]
    assert told == [(record.key, task.number, task.bucket_px) for task in tasks for record in task.records]
    assert [(shard["bucket_px"] and tuple(shard["bucket_px"]), shard["num_records"]) for shard in shards] == [
        (task.bucket_px, len(task.records)) for task in tasks
    ]


def _write(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def _as_read(task: Task) -> Task:
    """A record that was read names its uri, be it the key."""
    return replace(task, records=tuple(replace(record, uri=record.uri or record.key) for record in task.records))


def test_each_shard_is_found_in_the_roster_of_its_generation(tmp_path: Path) -> None:
    first = _place([_record(key, size) for key, size in zip("abcde", [(8, 8), (8, 8), (8, 16), None, (8, 8)])], 2)  # noqa: B905
    new = [_record("x", (8, 8)), replace(_record("y", (9, 20)), uri="tar/y", caption='a "shard":7\u2028', label="é")]
    second = place(plan_records(new, WHOLE, 8), lambda bucket_px: 2, first_shard=len(first))
    assert [task.number for task in second] == [len(first), len(first) + 1]
    roster = Roster(
        [
            _write(tmp_path / "0", roster_lines(first)),
            _write(tmp_path / "1", roster_lines(second, 1, SHA256, len(first))),
        ]
    )
    tasks = [*first, *second]
    assert [roster.task(task.number) for task in reversed(tasks)] == [_as_read(task) for task in reversed(tasks)]
    assert [(shard.bucket_px, shard.num_records) for shard in roster.shards] == [
        (task.bucket_px, len(task.records)) for task in tasks
    ]


def test_a_batch_of_large_photos_has_fewer_rows() -> None:
    records = tuple(_record(str(number), (1024, 1024)) for number in range(5))
    assert [len(batch) for batch in Task(0, (1024, 1024), records).batches(8)] == [2, 2, 1]
    assert Task(0, None, records).batches(8) == []
