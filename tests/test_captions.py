"""What tells of photos, and what does not: the same in folders, zip files, tars, tables and memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdvae.errors import SourceError
from sdvae.sources.open import Source, open_source
from tests.test_sources import photo, put, tar, zipped

HOLDERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "folder": put,
    "zip": lambda root, files: zipped(root.with_suffix(".zip"), files),
    "tar": lambda root, files: tar(root.with_suffix(".tar"), files),
}
PHOTO = photo(1)


@pytest.fixture(params=HOLDERS)
def hold(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    return lambda files: HOLDERS[request.param](tmp_path / "photos", files)


def captions(source: Source) -> dict[str, str | None]:
    return {entry.key: entry.caption for entry in source.entries() if entry.reason is None}


def refusals(source: Source) -> dict[str, str | None]:
    return {entry.key: entry.reason for entry in source.entries() if entry.reason is not None}


# --- Which files are photos ---

ASIDE = (".npz", ".xmp", ".AAE", ".pt", ".npy", ".safetensors", ".MOV", ".yaml", ".html", ".json", ".part", ".odd")


def test_what_is_no_photo_takes_no_caption_and_is_counted(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {"SHA256SUMS": b"ab12  a.jpg\n", "Thumbs.db": b"x", "sub/desktop.ini": b"x", ".DS_Store": b"x"}
    files |= {"@eaDir/x.jpg": PHOTO, "__MACOSX/._x.jpg": b"x", ".ipynb_checkpoints/x.jpg": PHOTO}
    for number, suffix in enumerate(ASIDE):
        files |= {f"{number}.jpg": PHOTO, f"{number}.txt": b"mine", f"{number}{suffix}": b"PK\3\4" + bytes(40)}
    source = open_source(hold(files))
    assert captions(source) == {f"{number}.jpg": "mine" for number in range(len(ASIDE))}
    assert refusals(source) == {}
    assert len(source.remarks) == 1
    assert source.remarks[0].startswith(f"{len(ASIDE) + 1} files that are no photos were left aside (1 ")


def test_a_file_with_another_suffix_or_none_is_a_photo_if_it_begins_like_one(
    hold: Callable[[dict[str, bytes]], Path],
) -> None:
    files = {
        "a": PHOTO,
        "b.image": PHOTO,
        "c.0001": PHOTO,
        "a.txt": b"mine",
        "d.jpg": b"<html>",
        "e": b"P5\n",
        "f": b"",
    }
    assert captions(open_source(hold(files))) == {
        "a": "mine", "b.image": None, "c.0001": None, "d.jpg": None, "e": None,
    }  # fmt: skip


def test_a_photo_of_a_format_that_is_not_read_is_no_rival(hold: Callable[[dict[str, bytes]], Path]) -> None:
    source = open_source(hold({"a.jpg": PHOTO, "a.CR2": b"raw", "a.txt": b"mine"}))
    assert captions(source)["a.jpg"] == "mine"


# --- What tells nothing is said ---


def test_texts_of_no_photo_are_named(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {
        "0.image.jpg": PHOTO,
        "0.txt": b"a fox",
        "1.jpg": PHOTO,
        "1.caption.txt": b"a cat",
        "2.txt": b"",
        "3.cls": b"",
    }
    source = open_source(hold(files))
    assert captions(source) == {"0.image.jpg": None, "1.jpg": None}
    assert source.remarks == ["4 texts belong to no photo: 0.txt, 1.caption.txt, 2.txt, ..."]


def test_what_many_archives_leave_aside_is_one_remark(tmp_path: Path) -> None:
    for shard in range(20):
        tar(tmp_path / f"{shard:02d}.tar", {"a.jpg": PHOTO, "a.json": b"{}", "b.txt": b""})
    source = open_source(f"{tmp_path}/*.tar")
    assert len(source.entries()) == 20
    assert source.remarks == [
        "20 texts belong to no photo: 00/b.txt, 01/b.txt, 02/b.txt, ...",
        "20 files that are no photos were left aside (20 .json): 00/a.json, 01/a.json, 02/a.json, ...",
    ]


def _tables(root: Path, values: dict[str, Any]) -> dict[str, Path]:
    """One photo in every table, with these columns."""
    put(root, {"a.jpg": PHOTO, "folder/a.jpg": PHOTO})
    line = json.dumps({"file_name": "a.jpg"} | values)
    put(root, {"list.jsonl": line.encode(), "folder/metadata.jsonl": line.encode()})
    header, row = ",".join(["path", *values]), ",".join(["a.jpg", *map(str, values.values())])
    put(root, {"list.csv": f"{header}\n{row}\n".encode()})
    pq.write_table(pa.table({"image": [PHOTO]} | {name: [value] for name, value in values.items()}), root / "l.parquet")
    return {name: root / name for name in ("list.jsonl", "list.csv", "l.parquet", "folder")}


def test_a_table_without_captions_is_named(tmp_path: Path) -> None:
    for name, path in _tables(tmp_path, {"prompt": "a fox", "label": "7"}).items():
        source = open_source(path)
        assert [(entry.caption, entry.label) for entry in source.entries()] == [(None, "7")], name
        (remark,) = source.remarks
        assert "has no column 'caption' or 'text'; --caption takes another of its columns: prompt" in remark
        (entry,) = open_source(path, "prompt").entries()
        assert (entry.caption, entry.reason) == ("a fox", None), name
        assert not open_source(path).entries()[0].caption
        with pytest.raises(SourceError, match="column 'else'"):
            open_source(path, "else").entries()
    (entry,) = open_source([{"image": PHOTO, "prompt": "a fox"}], "prompt").entries()
    assert entry.caption == "a fox"


def test_a_table_with_captions_needs_no_remark(tmp_path: Path) -> None:
    for name, path in _tables(tmp_path, {"text": "a fox", "prompt": "?"}).items():
        source = open_source(path)
        assert [entry.caption for entry in source.entries()] == ["a fox"], name
        assert source.remarks in ([], ()), name


def test_the_ending_of_captions_can_be_named(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {
        "a.jpg": PHOTO,
        "a.txt": b"1girl, solo",
        "a.caption": b"a girl alone",
        "a.TAGS.txt": b"tags",
        "a.cls": b"7",
    }
    path = hold(files)
    assert "--caption names the ending" in str(refusals(open_source(path))["a.jpg"])
    for name, expected in ((".txt", "1girl, solo"), ("caption", "a girl alone"), (".tags.txt", "tags")):
        source = open_source(path, name)
        assert [(entry.caption, entry.label) for entry in source.entries()] == [(expected, "7")]
    with pytest.raises(SourceError, match=r"no file of captions ends in '\.prompt', and no table has a column"):
        open_source(path, "prompt").entries()


def test_the_columns_of_people_and_spreadsheets(tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": PHOTO, "b.jpg": PHOTO})
    for text in ("path, caption\na.jpg, x\n", "Path,Caption,\na.jpg,x,\n", ",path,caption,\n0,a.jpg,x,\n"):
        source = open_source(put(tmp_path, {"l.csv": text.encode()}) / "l.csv")
        assert captions(source) == {"a.jpg": "x"}


# --- Unicode ---


def test_the_forms_of_a_name_are_alike(hold: Callable[[dict[str, bytes]], Path]) -> None:
    composed, decomposed = normalize("NFC", "é"), normalize("NFD", "é")
    files = {f"{composed}.jpg": PHOTO, f"{decomposed}.txt": b"mine", f"sub/{decomposed}.jpg": PHOTO}
    files["sub/metadata.jsonl"] = json.dumps({"file_name": f"{composed}.jpg", "text": "yours"}).encode()
    source = open_source(hold(files))
    assert captions(source) == {f"{composed}.jpg": "mine", f"sub/{decomposed}.jpg": "yours"}
    assert not refusals(source) and not source.remarks


def test_two_photos_whose_names_are_alike_are_in_doubt(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {normalize(form, "é.jpg"): PHOTO for form in ("NFC", "NFD")} | {"é.txt": b"whose?"}
    source = open_source(hold(files))
    assert captions(source) == {} and len(refusals(source)) == 2


def test_a_list_finds_photos_in_whichever_form(tmp_path: Path) -> None:
    put(tmp_path, {normalize("NFD", "é.jpg"): PHOTO, normalize("NFC", "ö.jpg"): PHOTO})
    rows = [{"path": normalize("NFC", "é.jpg")}, {"path": normalize("NFD", "ö.jpg")}]
    source = open_source(put(tmp_path, {"l.jsonl": "\n".join(map(json.dumps, rows)).encode()}) / "l.jsonl")
    assert not refusals(source)
    assert [source.read(entry.key) for entry in source.entries()] == [PHOTO, PHOTO]


# --- What is no text ---

NO_TEXTS = [["a", "b"], [], {"a": 1}, 5, 0.5, True, "a fox \ud83d"]


@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
def test_what_is_no_text_is_no_caption_and_costs_one_photo(value: Any, tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": PHOTO, "b.jpg": PHOTO, "folder/a.jpg": PHOTO, "folder/b.jpg": PHOTO})
    rows = [{"file_name": "a.jpg", "text": value}, {"file_name": "b.jpg", "text": "a cat"}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    put(tmp_path, {"list.jsonl": lines, "folder/metadata.jsonl": lines})
    items = [{"image": PHOTO, "key": row["file_name"], "caption": row["text"]} for row in rows]
    for source in (open_source(tmp_path / "list.jsonl"), open_source(tmp_path / "folder"), open_source(items)):
        assert captions(source) == {"b.jpg": "a cat"}
        (reason,) = refusals(source).values()
        assert reason and ("its caption is a" in reason or "its caption holds half a character" in reason)


def test_labels_are_texts_or_whole_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PHOTO] * 3, "label": [0.0, 1.0, None]}), tmp_path / "a.parquet")
    assert [entry.label for entry in open_source(tmp_path / "a.parquet").entries()] == ["0", "1", None]
    pq.write_table(pa.table({"image": [PHOTO] * 2, "label": [[], [1]]}), tmp_path / "b.parquet")
    assert len(refusals(open_source(tmp_path / "b.parquet"))) == 2
    items = [{"image": PHOTO, "label": value} for value in (7, np.int64(7), "7", 7.5)]
    entries = open_source(items).entries()
    assert [entry.label for entry in entries] == ["7", "7", "7", None]
    assert entries[3].reason == "its label is a float, which is no text"


@pytest.mark.parametrize("name", ["b\0.jpg", "b\ud83d.jpg"])
def test_a_name_that_no_file_can_have_costs_one_photo(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": PHOTO, "folder/a.jpg": PHOTO})
    lines = b"\n".join(json.dumps({"file_name": each}).encode() for each in ("a.jpg", name))
    put(tmp_path, {"list.jsonl": lines, "folder/metadata.jsonl": lines})
    for source in (open_source(tmp_path / "list.jsonl"), open_source(tmp_path / "folder")):
        assert list(captions(source)) == ["a.jpg"]
        ((key, reason),) = refusals(source).items()
        assert key.encode() and "\0" not in key
        assert reason and reason.startswith("its name holds")


# --- The name that was given ---


def test_a_link_to_a_file_without_a_suffix_is_read_by_its_own_name(tmp_path: Path) -> None:
    hub = tmp_path / "snapshots/1"
    put(tmp_path / "blobs", {"0": PHOTO, "1": b"path,caption\na.jpg,a fox\n"})
    zipped(tmp_path / "blobs/2", {"a.jpg": PHOTO, "a.txt": b"a fox"})
    tar(tmp_path / "blobs/3", {"a.jpg": PHOTO, "a.txt": b"a fox"})
    pq.write_table(pa.table({"image": [PHOTO], "text": ["a fox"]}), tmp_path / "blobs/4")
    hub.mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "l.csv", "p.ZIP", "p.tar", "T.PARQUET")):
        (hub / name).symlink_to(f"../../blobs/{number}")
    for name in ("l.csv", "p.ZIP", "p.tar", "T.PARQUET"):
        source = open_source(hub / name)
        assert [(source.read(entry.key), entry.caption) for entry in source.entries()] == [(PHOTO, "a fox")], name


@pytest.mark.parametrize("folder", ["[2024] shoot", "{set}", "what?", "a*"])
def test_folders_that_exist_are_named_in_patterns(folder: str, tmp_path: Path) -> None:
    put(tmp_path, {f"{folder}/a.jpg": PHOTO, f"{folder}/sub/b.jpg": PHOTO, f"{folder}/c.txt": b""})
    assert list(captions(open_source(f"{tmp_path}/{folder}/*.jpg"))) == ["a.jpg"]
    assert list(captions(open_source(f"{tmp_path}/{folder}/{{a,sub/b}}.jpg"))) == ["a.jpg", "sub/b.jpg"]


@pytest.mark.parametrize("pattern", ["**a/*.jpg", "{a,b/*.jpg", "", "a\0*", "a\ud83d"])
def test_what_is_no_pattern_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        open_source(f"{tmp_path}/{pattern}" if pattern else "").entries()


def test_an_arrow_file_with_an_index_is_read(tmp_path: Path) -> None:
    table = pa.table({"image": [PHOTO], "text": ["a fox"]})
    for name, write in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with write(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        source = open_source(tmp_path / name)
        assert source.entries()[0].caption == "a fox"
        assert source.read("000000000") == PHOTO


def test_a_tar_that_is_damaged_in_the_middle_does_not_end_there(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {f"{number}.jpg": bytes([number]) * 600 for number in range(5)})
    whole = path.read_bytes()
    header = 2 * (512 + 1024)
    for data in (whole[:header] + b"\xff" * 512 + whole[header + 512 :], whole + whole, whole[: header + 100]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match="is damaged or no tar"):
            open_source(path).entries()


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path: Path) -> None:
    hub, snapshot = tmp_path / "datasets--me--set", tmp_path / "datasets--me--set/snapshots/1"
    put(hub / "blobs", {"0": PHOTO, "1": b"a fox"})
    put(tmp_path, {"elsewhere": PHOTO})
    snapshot.mkdir(parents=True)
    for name, target in {"a.jpg": "blobs/0", "a.txt": "blobs/1", "b.jpg": "../elsewhere", "c.jpg": "refs"}.items():
        (snapshot / name).symlink_to(f"../../{target}")
    source = open_source(snapshot)
    assert captions(source) == {"a.jpg": "a fox"}
    assert source.read("a.jpg") == PHOTO
    assert refusals(source)["b.jpg"] == "a link that leads out of the source folder"


# --- JSON beside photos, Parquet above them ---


def test_json_beside_a_photo_tells_its_caption(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {f"{name}.jpg": PHOTO for name in "abcdef"} | {"f.png": PHOTO}
    files |= {"a.json": b'{"caption": "an a", "status": "success"}', "b.json": b'{"Text": "a b"}', "b.txt": b"a b\n"}
    files |= {"c.json": b'{"shapes": []}', "c.txt": b"a c", "d.json": b'{"caption": "one"}', "d.txt": b"two"}
    files |= {"e.json": b'{"caption": ["a", "list"]}', "f.json": b"{}", "g.json": b'{"caption": "of nobody"}'}
    source = open_source(hold(files))
    assert captions(source) == {"a.jpg": "an a", "b.jpg": "a b", "c.jpg": "a c", "f.jpg": None, "f.png": None}
    assert refusals(source) == {
        "d.jpg": "it has captions that differ, in d.json and d.txt; --caption names the ending or the column "
        "that is meant",
        "e.jpg": "its caption is a list, which is no text",
    }
    assert any(
        "3 files that are no photos were left aside (3 .json): c.json, f.json, g.json" in x for x in source.remarks
    )


def test_json_is_shared_by_two_photos_only_if_it_tells_nothing(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {"a.jpg": PHOTO, "a.png": PHOTO, "a.json": b'{"caption": "whose?"}', "b.jpg": PHOTO}
    files |= {"b.jpg.json": b'{"title": "of an album"}', "b.txt": b"a b"}
    source = open_source(hold(files))
    assert refusals(source)["a.jpg"] == "a.json fits other photos, too; call what belongs to this one a.jpg.txt"
    assert captions(source) == {"b.jpg": "a b"}


def test_caption_names_a_member_of_json(hold: Callable[[dict[str, bytes]], Path]) -> None:
    files = {"a.jpg": PHOTO, "a.json": b'{"caption": "short", "prompt": "long"}', "a.txt": b"other"}
    assert captions(open_source(hold(files), "prompt")) == {"a.jpg": "long"}
    assert captions(open_source(hold(files), ".json")) == {"a.jpg": "short"}


def test_metadata_in_parquet(hold: Callable[[dict[str, bytes]], Path], tmp_path: Path) -> None:
    table = pa.table({"file_name": ["a.jpg", "sub/b.jpg", "c.jpg"], "text": ["an a", None, "a c"], "label": [1, 2, 3]})
    pq.write_table(table, tmp_path / "made.parquet")
    data = (tmp_path / "made.parquet").read_bytes()
    source = open_source(hold({"a.jpg": PHOTO, "sub/b.jpg": PHOTO, "metadata.parquet": data}))
    assert captions(source) == {"a.jpg": "an a", "sub/b.jpg": None}
    assert [entry.label for entry in source.entries()] == ["1", None, "2"]
    assert refusals(source) == {"c.jpg": "metadata.parquet, line 3 names it, but there is no such photo"}


def test_a_damaged_parquet_of_metadata_is_refused(hold: Callable[[dict[str, bytes]], Path]) -> None:
    with pytest.raises(SourceError, match=r"metadata\.parquet is damaged or no Parquet file"):
        open_source(hold({"a.jpg": PHOTO, "metadata.parquet": b"PAR1 and no more"})).entries()
