"""One small dataset in every form: the same photos, captions and labels from each; and what is odd in each."""

import gzip
import io
import json
import os
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdvae.encoding.scan import scan
from sdvae.errors import SourceError
from sdvae.images.read import read_image
from sdvae.images.write import encode_image
from sdvae.sources.open import Entry, Source, open_source


def photo(number: int) -> bytes:
    image = np.full((4 + number, 5, 3), 40 * number, np.uint8)
    return encode_image(image, "png")


FILES = {
    "cats/a.png": photo(1), "cats/a.txt": b"a cat\n", "dogs/b.png": photo(2), "dogs/b.txt": b"two dogs",
    "dogs/c.png": photo(3), "dogs/c.txt": "\ufeffdrei H\u00fcnde".encode(),
}  # fmt: skip
EXPECTED = [(photo(1), "a cat", "cats"), (photo(2), "two dogs", "dogs"), (photo(3), "drei Hünde", "dogs")]
ROWS = [{"path": f"photos/{key}", "caption": caption, "label": label} for (key, (_, caption, label)) in zip(
    ("cats/a.png", "dogs/b.png", "dogs/c.png"), EXPECTED, strict=True)]  # fmt: skip


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar(path: Path, files: dict[str, bytes], **members: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for member, value in members.get(name, {}).items():
                setattr(info, member, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _csv(root: Path) -> Path:
    put(root / "photos", FILES)
    lines = ["path,caption,label,width", *(f"{row['path']},{row['caption']},{row['label']},5" for row in ROWS)]
    (root / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return root / "list.csv"


def _jsonl(root: Path) -> Path:
    put(root / "photos", FILES)
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return root / "list.jsonl"


def _imagefolder(root: Path) -> Path:
    photos = {name: data for name, data in FILES.items() if name.endswith(".png")}
    lines = [
        {"file_name": name, "text": caption} for name, (_, caption, _) in zip(sorted(photos), EXPECTED, strict=True)
    ]
    photos["metadata.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return put(root, photos)


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cats", "dogs"], "_type": "ClassLabel"},
    "caption": {"dtype": "string", "_type": "Value"},
}


def _table() -> pa.Table:
    table = pa.table(
        {
            "image": [{"bytes": data, "path": f"{number}.png"} for number, (data, _, _) in enumerate(EXPECTED)],
            "label": pa.array([0, 1, 1], pa.int64()),
            "caption": [caption for _, caption, _ in EXPECTED],
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def _parquet(root: Path) -> Path:
    pq.write_table(_table(), root / "photos.parquet", row_group_size=2)
    return root / "photos.parquet"


def _saved(root: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(_table()).save_to_disk(root / "saved", num_shards=2)
    return root / "saved"


def _mappings(root: Path) -> list[dict[str, object]]:
    return [
        {"image": data, "key": f"{number}.png", "caption": caption, "label": label}
        for number, (data, caption, label) in enumerate(EXPECTED)
    ]


FORMS: dict[str, Callable[[Path], Any]] = {
    "folder": lambda root: put(root, FILES),
    "imagefolder": _imagefolder,
    "zip": lambda root: zipped(root / "photos.zip", FILES),
    "tar": lambda root: tar(root / "photos.tar", FILES),
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "saved dataset": _saved,
    "mappings": _mappings,
    "pattern of photos": lambda root: f"{put(root, FILES)}/**/*.png",
    "pattern of folders": lambda root: f"{put(root, FILES)}/{{cats,dogs}}",
}


def told(source: Source) -> list[tuple[bytes, str | None, str | None]]:
    entries = source.entries()
    assert entries == sorted(entries, key=lambda entry: entry.key)
    assert all(entry.reason is None for entry in entries), entries
    return [(source.read(entry.key), entry.caption, entry.label) for entry in entries]


def reasons(source: Source) -> dict[str, str | None]:
    return {entry.key: entry.reason for entry in source.entries()}


def _read_all(source: Source, keys: list[str]) -> list[bytes]:
    return [source.read(key) for key in keys]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_photos_captions_and_labels(form: str, tmp_path: Path) -> None:
    source = open_source(FORMS[form](tmp_path))
    assert told(source) == EXPECTED
    keys = [entry.key for entry in source.entries()]
    expected = [data for data, _, _ in EXPECTED]
    again = pickle.loads(pickle.dumps(source))
    assert _read_all(again, keys[::-1]) == expected[::-1]  # in any order, before anything is listed
    assert again.entries() == source.entries() and again.name == source.name
    with get_context("fork").Pool(2) as pool:  # a handle that two processes share has one position
        both = [pool.apply_async(_read_all, (source, keys * 50)) for _ in range(2)]
        assert [result.get() for result in both] == [expected * 50] * 2
    records = scan(source, source.entries(), 10**6, tmp_path / "scan.jsonl", lambda num_done, num_all: None)
    assert [(record.key, record.original_px, record.caption, record.label) for record in records] == [
        (key, (5 + number, 5), caption, label)
        for number, (key, (_, caption, label)) in enumerate(zip(keys, EXPECTED, strict=True))
    ]
    assert all(not record.to_json()["uri"].startswith("/") for record in records)


@pytest.mark.parametrize("form", ["zip", "tar", "csv", "jsonl", "parquet"])
def test_a_file_is_what_its_given_name_says_even_if_a_link_leads_to_a_blob(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path)
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)
    source = open_source(path)
    assert told(source) == EXPECTED
    assert told(pickle.loads(pickle.dumps(source))) == EXPECTED
    assert all("0123abcd" not in (entry.uri or "") for entry in source.entries())


def test_a_pickled_source_is_small(tmp_path: Path) -> None:
    many = {f"{number:05d}.png": b"x" for number in range(2000)}
    listed = [json.dumps({"path": name}) for name in put(tmp_path / "p", many) and many]
    (tmp_path / "p/list.jsonl").write_text("\n".join(listed))
    for spec in (
        tmp_path / "p",
        zipped(tmp_path / "p.zip", many),
        tar(tmp_path / "p.tar", many),
        tmp_path / "p/list.jsonl",
    ):
        source = open_source(spec)
        assert len(source.entries()) == 2000
        assert len(pickle.dumps(source)) < 1000


# --- Patterns ---


def test_archives_of_a_pattern_keep_their_names_in_the_keys(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        tar(tmp_path / f"{shard}.tar", {"dog.jpg": shard.encode(), "dog.txt": b"in " + shard.encode()})
    source = open_source(f"{tmp_path}/{{00000..00001}}.tar")
    assert [(entry.key, entry.uri, entry.caption) for entry in source.entries()] == [
        ("00000/dog.jpg", "00000.tar!dog.jpg", "in 00000"), ("00001/dog.jpg", "00001.tar!dog.jpg", "in 00001"),
    ]  # fmt: skip
    assert source.read("00001/dog.jpg") == b"00001"
    assert [entry.key for entry in open_source(tmp_path / "00001.tar").entries()] == ["dog.jpg"]
    assert open_source(f"{tmp_path}/*.tar").entries() == source.entries()
    with pytest.raises(SourceError, match=r"nothing matches .*00002\.tar"):
        open_source(f"{tmp_path}/{{00000..00002}}.tar")


def test_tables_of_a_pattern_keep_their_names_in_the_keys(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"jpg": [split.encode()], "text": [split]}), tmp_path / f"{split}.parquet")
    source = open_source(f"{tmp_path}/*.parquet")
    assert [(entry.key, entry.uri, entry.caption) for entry in source.entries()] == [
        ("test/000000000", "test.parquet#0", "test"), ("train/000000000", "train.parquet#0", "train"),
    ]  # fmt: skip
    assert source.read("train/000000000") == b"train"


def test_a_store_may_lie_beside_the_files_of_a_pattern_but_not_among_photos(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.jpg": b"1"})
    _parquet(tmp_path)
    put(tmp_path, {"x.jpg": b"1"})
    assert open_source(f"{tmp_path}/*.tar").root is None
    assert open_source(f"{tmp_path}/*.parquet").root is None
    assert open_source(f"{tmp_path}/*.jpg").root == open_source(tmp_path).root == tmp_path
    assert open_source(tmp_path / "a.tar").root == tmp_path / "a.tar"


def test_a_pattern_leaves_out_what_it_does_not_match_but_not_from_the_captions(tmp_path: Path) -> None:
    put(
        tmp_path, {"a.jpg": b"1", "a.png": b"2", "a.txt": b"whose?", "b.jpg": b"3", "b.txt": b"mine", "sub/c.jpg": b"4"}
    )
    entries = open_source(f"{tmp_path}/*.jpg").entries()
    assert [(entry.key, entry.caption) for entry in entries] == [("a.jpg", None), ("b.jpg", "mine")]
    assert entries[0].reason and "a.txt fits other photos, too" in entries[0].reason


def test_a_name_with_special_characters_is_no_pattern_where_it_exists(tmp_path: Path) -> None:
    put(tmp_path, {"a[1]/x.jpg": b"1", "a1/y.jpg": b"2"})
    assert list(reasons(open_source(tmp_path / "a[1]"))) == ["x.jpg"]
    assert list(reasons(open_source(f"{tmp_path}/a[12]"))) == ["a1/y.jpg"]


def test_a_pattern_of_several_kinds_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"a.tar": b"", "b.jpg": b""})
    with pytest.raises(SourceError, match=r"matches a\.tar and files of other kinds"):
        open_source(f"{tmp_path}/*")


def test_a_pattern_does_not_leave_through_a_link(tmp_path: Path) -> None:
    put(tmp_path, {"outside/x.jpg": b"1", "photos/y/y.jpg": b"2"})
    (tmp_path / "photos/link").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="links to folders are not followed"):
        open_source(f"{tmp_path}/photos/*/*.jpg").entries()


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "there is no"), ("film.mp4", r"neither a folder nor one of \.tar"), ("*.jpg", "nothing matches")],
)
def test_what_is_no_source_is_refused(name: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, {"film.mp4": b""})
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdvae.sources.open.find_spec", lambda name: None)
    for spec in (_parquet(tmp_path), "hf://org/name", f"{tmp_path}/{{a,b}}"):
        with pytest.raises(SourceError, match=r"pip install 'sdvae\[data\]'"):
            open_source(spec)


# --- Captions and labels ---


MEANT = "--caption names the ending or the column that is meant"


def test_a_caption_that_may_be_anothers_is_nobodys(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"1", "a.png": b"2", "a.txt": b"whose?",
        "b.jpg": b"3", "b.png": b"4", "b.txt": b"the png's", "b.jpg.txt": b"the jpg's",
        "c.jpg": b"5", "c.txt": b"one", "c.caption": b"another",
        "d.jpg": b"6", "d.txt": b"the same ", "d.caption": b"the same",
        "e.jpg": b"7", "e.txt": b"\xff\xfe", "f.jpg": b"8", "f.txt": b"x" * (2**20 + 1), "g.jpg": b"9", "g.TXT": b"",
        "h.v1.jpg": b"10", "h.jpg": b"11", "h.txt": b"the plain one", "i.jpg": b"12", "i.cls": b"7",
    }  # fmt: skip
    for source in (
        open_source(put(tmp_path / "photos", files)),
        open_source(zipped(tmp_path / "photos.zip", files)),
        open_source(tar(tmp_path / "photos.tar", files)),
    ):
        entries = {entry.key: entry for entry in source.entries()}
        assert entries["a.jpg"].reason == "a.txt fits other photos, too; call what belongs to this one a.jpg.txt"
        assert entries["a.png"].reason == "a.txt fits other photos, too; call what belongs to this one a.png.txt"
        assert entries["c.jpg"].reason == f"it has captions that differ, in c.caption and c.txt; {MEANT}"
        assert entries["e.jpg"].reason == "e.txt is not UTF-8"
        assert entries["f.jpg"].reason == "f.txt is larger than 1,048,576 bytes"
        assert {key: entry.caption for key, entry in entries.items() if entry.reason is None} == {
            "b.jpg": "the jpg's", "b.png": "the png's", "d.jpg": "the same", "g.jpg": "",
            "h.jpg": "the plain one", "h.v1.jpg": None, "i.jpg": None,
        }  # fmt: skip
        assert {key for key, entry in entries.items() if entry.label} == {"i.jpg"}
        assert entries["i.jpg"].label == "7"


def test_a_caption_is_not_read_through_a_link_that_leads_out(tmp_path: Path) -> None:
    put(tmp_path, {"secret": b"password", "photos/a.jpg": b"1", "photos/b.jpg": b"2"})
    (tmp_path / "photos/a.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "photos/b.txt")  # opening it would wait for ever
    assert reasons(open_source(tmp_path / "photos")) == {
        "a.jpg": "a.txt cannot be read: a link that leads out of the source folder",
        "b.jpg": "b.txt cannot be read: not a file but a device, a pipe or a socket",
    }


def test_metadata_speaks_for_photos_in_its_folder_and_below(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "x/a.jpg": b"1", "x/y/b.jpg": b"2", "c.jpg": b"3", "c.txt": b"another", "d.jpg": b"4", "d.txt": b"same",
            "x/metadata.csv": b"file_name,text,label\na.jpg,in x,7\ny/b.jpg,in y,\n",
            "metadata.jsonl": b"\n".join(
                json.dumps(row).encode()
                for row in [
                    {"file_name": "./c.jpg", "text": "one"},
                    {"file_name": "d.jpg", "text": "same", "label": 3},
                    {"file_name": "gone.jpg", "text": "?"},
                    {"file_name": "../up.jpg", "text": "?"},
                    {"file_name": "/etc/passwd", "text": "?"},
                ]
            ),
        },
    )  # fmt: skip
    entries = {entry.key: entry for entry in open_source(tmp_path).entries()}
    assert {key: (entry.caption, entry.label) for key, entry in entries.items() if entry.reason is None} == {
        "x/a.jpg": ("in x", "7"), "x/y/b.jpg": ("in y", "y"), "d.jpg": ("same", "3"),
    }  # fmt: skip
    assert {key: entry.reason for key, entry in entries.items() if entry.reason} == {
        "c.jpg": f"it has captions that differ, in c.txt and metadata.jsonl, line 1; {MEANT}",
        "gone.jpg": "metadata.jsonl, line 3 names it, but there is no such photo",
        "../up.jpg": "a path that leads out of the source",
        "/etc/passwd": "an absolute path",
    }


# --- Archives ---


def test_members_that_lead_out_or_are_no_files_are_counted_but_never_opened(tmp_path: Path) -> None:
    files = dict.fromkeys(("../up.jpg", "/absolute.jpg", "a/../../b.jpg", "./fine.jpg", "link.jpg", "dev.jpg"), b"x")
    files["._hidden.jpg"] = files[".git/x.jpg"] = b"x"
    special = {"link.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}}
    special["dev.jpg"] = {"type": tarfile.CHRTYPE, "size": 0}
    assert reasons(open_source(tar(tmp_path / "odd.tar", files, **special))) == {
        "../up.jpg": "a path that leads out of the source",
        "/absolute.jpg": "an absolute path",
        "a/../../b.jpg": "a path that leads out of the source",
        "dev.jpg": "not a plain file but a device, a pipe or one with holes",
        "fine.jpg": None,
        "link.jpg": "a link; links in archives are not followed",
    }
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, mode in {
            **dict.fromkeys(files, stat.S_IFREG),
            "link.jpg": stat.S_IFLNK,
            "dev.jpg": stat.S_IFCHR,
        }.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"x")
    assert reasons(open_source(path)) == {
        "../up.jpg": "a path that leads out of the source",
        "/absolute.jpg": "an absolute path",
        "a/../../b.jpg": "a path that leads out of the source",
        "dev.jpg": "not a plain file but a device or a pipe",
        "fine.jpg": None,
        "link.jpg": "a link; links in archives are not followed",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.tar", "odd.zip"]  # nothing was unpacked


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, (data, caption, _) in enumerate(EXPECTED):
            writer.write({"__key__": f"sub/{number:06d}", "png": data, "txt": caption, "cls": number, "json": {"w": 5}})
    source = open_source(tmp_path / "a.tar")
    assert told(source) == [(data, caption, str(number)) for number, (data, caption, _) in enumerate(EXPECTED)]
    assert [entry.key for entry in source.entries()] == ["sub/000000.png", "sub/000001.png", "sub/000002.png"]


def test_a_member_whose_name_is_no_utf8_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"caf\udce9.jpg": b"x"})
    assert reasons(open_source(path)) == {"caf\\xe9.jpg": "the name is not UTF-8; rename the file"}


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (b"1", b"22"):
            info = tarfile.TarInfo("dog.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(SourceError, match=r"two files in .*a\.tar are both called 'dog\.jpg'"):
        open_source(tmp_path / "a.tar").entries()


def test_archives_whose_photos_could_be_confused_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"b/x.jpg": b"1"})
    (tmp_path / "a").mkdir()
    tar(tmp_path / "a/b.tar", {"x.jpg": b"2"})
    with pytest.raises(SourceError, match="could be confused"):
        open_source(f"{tmp_path}/**/*.tar")
    zipped(tmp_path / "a.zip", {"x.jpg": b"3"})
    with pytest.raises(SourceError, match="both called a"):
        open_source(f"{tmp_path}/a.*")


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_a_damaged_archive_is_refused_and_a_damaged_member_is_one_photo(name: str, tmp_path: Path) -> None:
    files = {f"{number}.jpg": np.random.default_rng(number).bytes(5000) for number in range(4)}
    path = (tar if name == "a.tar" else zipped)(tmp_path / name, files)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(SourceError, match="damaged"):
        open_source(path).entries()
    path.write_bytes(whole)
    source = open_source(path)
    source.entries()
    path.write_bytes(whole[:3000] if name == "a.tar" else whole[:500] + b"\xff" * 50 + whole[550:])
    with pytest.raises(OSError, match=r"ends before|damaged"):
        source.read("0.jpg")
    (tmp_path / "b.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(SourceError, match="packed by gzip"):
        open_source(tmp_path / "b.tar").entries()


@pytest.mark.parametrize("form", ["zip", "tar", "csv", "parquet"])
def test_what_vanishes_after_the_listing_is_one_photo_that_cannot_be_read(form: str, tmp_path: Path) -> None:
    place = FORMS[form](tmp_path)
    source, key = open_source(place), open_source(place).entries()[-1].key
    place.unlink()
    with pytest.raises(OSError) as failure:
        source.read(key)
    assert failure.value.strerror and str(tmp_path) not in failure.value.strerror
    fewer = {name: data for name, data in FILES.items() if name < "dogs/c"}
    if form == "csv":
        place.write_text("path\nphotos/cats/a.png\n")
    elif form == "parquet":
        pq.write_table(_table()[:1], place)
    else:
        (zipped if form == "zip" else tar)(place, fewer)
    with pytest.raises(FileNotFoundError, match="it is no longer in the file that held it"):
        open_source(place).read(key)


def test_a_damaged_column_is_photos_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    photos = [np.random.default_rng(number).integers(0, 4, 1000, np.uint8).tobytes() for number in range(20)]
    pq.write_table(pa.table({"jpg": photos}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[1000:2000] = bytes(1000)
    path.write_bytes(data)
    source = open_source(path)
    key = source.entries()[3].key
    with pytest.raises(OSError) as failure:
        source.read(key)
    assert failure.value.strerror == "the file that holds it is damaged or gone"


# --- Lists ---


def test_a_list_may_name_photos_elsewhere_by_a_key(tmp_path: Path) -> None:
    put(tmp_path, {"photos/a.jpg": b"1", "lists/b.jpg": b"2", "lists/c.jpg": b"3"})
    path = tmp_path / "lists/list.jsonl"
    rows: list[dict[str, object]] = [
        {"path": "../photos/a.jpg", "key": "first"},
        {"path": str(tmp_path / "lists/b.jpg"), "label": 5},
        {"path": "sub/../c.jpg", "key": "cats/c"},
        {"path": "gone.jpg", "caption": "gone"},
        {"path": "/dev/zero", "key": "zero"},
        {"path": ".", "key": "folder"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(path)
    (tmp_path / "lists/sub").mkdir()
    assert [(entry.key, entry.uri, entry.label, entry.reason) for entry in source.entries()] == [
        ("b.jpg", "b.jpg", "5", None),
        ("cats/c", "c.jpg", None, None),
        ("first", None, None, None),
        ("folder", ".", None, "a folder, not a file"),
        ("gone.jpg", "gone.jpg", None, "cannot be opened: No such file or directory"),
        ("zero", None, None, "not a file but a device, a pipe or a socket"),
    ]
    assert source.read("first") == b"1"
    path.write_text(json.dumps({"path": "../photos/a.jpg"}))
    with pytest.raises(SourceError, match=r"line 1: \.\./photos/a\.jpg is not below .*; give the line a 'key'"):
        open_source(path).entries()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "path,caption\na.jpg,x\nb.jpg\n", "line 3 has not as many fields"),
        ("l.csv", "path,caption\na.jpg,x,y\n", "line 2 has not as many fields"),
        ("l.csv", "name,caption\na.jpg,x\n", "line 2 has no path"),
        ("l.csv", "path\na.jpg\nsub/../a.jpg\n", "lines 2 and 3 have one key, 'a.jpg'"),
        ("l.csv", "path,caption,text\na.jpg,x,y\n", "line 2 has both 'caption' and 'text'"),
        ("l.tsv", "path\tcaption\na.jpg\tx\ty\n", "line 2 has not"),
        ("l.jsonl", '{"path":"a.jpg"}\n{"path":\n', "line 2 is no JSON"),
        ("l.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("l.jsonl", '{"path":["a.jpg"]}', r'\["a.jpg"\] is no text, and so no path'),
        ("l.jsonl", "[" * 10**5, "line 1 is no JSON"),
        ("l.csv", 'path,caption\na.jpg,"never closed\nb.jpg,y\n', "is no CSV: unexpected end of data"),
        ("l.csv", "path,caption,Caption \na.jpg,x,y\n", "has two columns 'caption'"),
        ("l.jsonl", '{"path":"https://x/a.jpg"}', "line 1: https://x/a.jpg is no file; fetch it first"),
        ("l.jsonl", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_list_that_is_not_clear_is_refused_with_the_line(
    name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    put(tmp_path, {name: text if isinstance(text, bytes) else text.encode(), "a.jpg": b"1"})
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name).entries()


# --- Tables ---


def test_which_column_holds_the_images_is_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    struct = [{"bytes": b"in the struct", "path": None}]
    for columns, expected in [
        ({"jpg": [b"x"], "mask": [b"y"]}, b"x"),
        ({"picture": [b"x"], "text": ["t"]}, b"x"),
        ({"anything": struct, "png": [b"x"]}, b"in the struct"),
    ]:
        pq.write_table(pa.table(columns), path)
        assert open_source(path).read("000000000") == expected
    for columns, message in [
        ({"jpg": [b"x"], "png": [b"y"]}, "has images in jpg, png; keep the column"),
        ({"text": ["t"]}, "has no column of images, only text"),
        ({"jpg": [b"x"], "caption": ["a"], "text": ["b"]}, "has the columns 'caption' and 'text'; --caption names"),
        ({"jpg": [b"x"], "caption": [[1]]}, "has list<element: int64> in column 'caption', which is no text"),
        ({"jpg": [b"x"], "caption": [1]}, "has int64 in column 'caption', which is no text"),
    ]:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(SourceError, match=message):
            source = open_source(path)
            source.entries()
            source.read("000000000")


def test_a_row_without_an_image_is_one_photo_that_cannot_be_read(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"x", "path": None}]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    with pytest.raises(OSError, match="the row holds no image, only the name of a file"):
        source.read("000000000")
    assert source.read("000000001") == b"x"


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="damaged or no table"):
        open_source(path).entries()


def test_a_saved_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(SourceError, match=r"holds several splits; give one of them: .*train, .*test"):
        open_source(tmp_path)


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder of this name for a repository: the same way, without the net."""
    import datasets.config

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(_table(), tmp_path / f"org/name/{split}.parquet")
    source = open_source("hf://org/name:train")
    assert source.name == "hf://org/name:train"
    assert told(source) == EXPECTED
    assert [entry.key for entry in source.entries()] == ["000000000", "000000001", "000000002"]
    with pytest.raises(SourceError, match="give one: hf://org/name:train"):
        open_source("hf://org/name")
    with pytest.raises(SourceError, match=r"cannot load hf://org/name:validation: "):
        open_source("hf://org/name:validation")
    with pytest.raises(SourceError, match="hf://name is no dataset"):
        open_source("hf://name")


# --- Digits and images in memory ---


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_digits_come_with_their_labels(suffix: str, tmp_path: Path) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (12, 28, 27), np.uint8)
    pack = gzip.compress if suffix else bytes
    images, labels = tmp_path / f"train-images-idx3-ubyte{suffix}", tmp_path / f"train-labels-idx1-ubyte{suffix}"
    images.write_bytes(pack(_idx(digits)))
    source = open_source(images)
    assert {entry.label for entry in source.entries()} == {None}
    labels.write_bytes(pack(_idx(np.arange(12, dtype=np.uint8) % 10)))
    entries = source.entries()
    assert [(entry.key, entry.label) for entry in entries] == [(f"{n:07d}", str(n % 10)) for n in range(12)]
    for entry, digit in zip(entries, digits, strict=True):
        assert np.array_equal(
            read_image(pickle.loads(pickle.dumps(source)).read(entry.key)), digit[..., None].repeat(3, 2)
        )
    labels.write_bytes(pack(_idx(np.zeros(11, np.uint8))))
    with pytest.raises(SourceError, match="11 labels for 12 images"):
        source.entries()
    images.write_bytes(pack(_idx(digits)[:-1]))
    with pytest.raises(SourceError, match="is cut short"):
        open_source(images).entries()
    if suffix:
        images.write_bytes(images.read_bytes()[:-20])
        with pytest.raises(SourceError, match="is damaged"):
            open_source(images).entries()


def test_the_digits_of_mnist(data_dir: Path) -> None:
    entries = open_source(data_dir / "mnist/t10k-images-idx3-ubyte.gz").entries()
    assert [entry.label for entry in entries[:8]] == ["7", "2", "1", "0", "4", "1", "4", "9"]
    assert len(entries) == 10_000


def test_images_in_memory_are_those_that_were_given(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    (tmp_path / "x.png").write_bytes(encode_image(rgb, "png"))
    gray = rgb[:, :, 0]
    images = [rgb, gray, Image.fromarray(rgb), encode_image(rgb, "png"), tmp_path / "x.png", str(tmp_path / "x.png")]
    for source in (open_source(images), open_source(iter(images)), open_source({"image": image} for image in images)):
        entries = source.entries()
        assert [entry.key for entry in entries] == [f"{number:09d}" for number in range(6)]
        found = [read_image(source.read(entry.key)) for entry in entries]
        for number, image in enumerate(found):
            assert np.array_equal(image, gray[..., None].repeat(3, 2) if number == 1 else rgb)
    first, second = (open_source(images).entries()[0] for _ in range(2))
    assert first.mtime_ns != second.mtime_ns, "findings of an earlier run are not taken for these"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"picture": b""}], r"item 0 of the images in memory has \['picture'\]; it needs an 'image'"),
        ([{"image": b"", "text": "x"}], "it needs an 'image'"),
        ([{"image": b"", "key": "a"}, {"image": b"", "key": "a"}], "items 0 and 1 .* have one key, 'a'"),
        ([{"image": b"", "key": ["a"]}], r"the key of item 0 .* is \['a'\]; a key is a text"),
        ([{"image": b"", "key": "a\0"}], "the key of item 0"),
    ],
)
def test_items_that_say_something_else_are_refused(items: list[Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(items)


def test_entries_are_plain_values() -> None:
    entry = Entry("a", 1, 2)
    assert pickle.loads(pickle.dumps(entry)) == entry
    assert not hasattr(entry, "__dict__")  # a million of them fit
