import os
import socket
from pathlib import Path

import pytest

from sdvae.errors import SourceError
from sdvae.sources.folders import FolderSource

JPEG = b"\xff\xd8\xff"  # how one begins


def _reasons(root: Path) -> dict[str, str | None]:
    return {entry.key: entry.reason for entry in FolderSource(root).entries()}


def test_photos_are_found_in_all_folders_and_sorted(tmp_path: Path) -> None:
    names = [
        "b.jpg",
        "a/z.PNG",
        "a/b/c.webp",
        "é.jpg",
        "a.jpg",
        "A.jpg",
        "no suffix",
        "new\nline.jpg",
        "back\\slash.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG + name.encode())
    source = FolderSource(tmp_path)
    entries = source.entries()
    assert [entry.key for entry in entries] == sorted(names)
    assert [source.read(entry.key) for entry in entries] == [JPEG + name.encode() for name in sorted(names)]
    assert all(entry.reason is None and entry.num_bytes == len(JPEG + entry.key.encode()) for entry in entries)


def test_hidden_files_and_what_lies_beside_photos_are_no_records(tmp_path: Path) -> None:
    for name in ["a.jpg", ".b.jpg", "._a.jpg", ".git/c.jpg", "a.txt", "a.caption", "other.JSONL", "Thumbs.db"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(_reasons(tmp_path)) == ["a.jpg"]


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "datasets--me--set/blobs", tmp_path / "datasets--me--set/snapshots/0a1b"
    for folder in (blobs, snapshot / "sub"):
        folder.mkdir(parents=True)
    (blobs / "1234").write_bytes(b"a photo")
    (blobs / "5678").write_bytes(b"a fox")
    (tmp_path / "secret").write_bytes(b"no photo")
    for name, target in {"a.jpg": "../../blobs/1234", "a.txt": "../../blobs/5678", "b.jpg": "../../../secret"}.items():
        (snapshot / name).symlink_to(target)
    (snapshot / "sub/c.jpg").symlink_to("../../../blobs/1234")
    found = {entry.key: (entry.reason, entry.caption) for entry in FolderSource(snapshot).entries()}
    assert found == {
        "a.jpg": (None, "a fox"),
        "b.jpg": ("a link that leads out of the source folder", None),
        "sub/c.jpg": (None, None),
    }
    assert FolderSource(snapshot).read("a.jpg") == b"a photo"
    assert [entry.reason for entry in FolderSource(snapshot / "sub").entries()] == [None]


def test_links_are_followed_inside_the_source_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "photos", tmp_path / "outside"
    for folder in (root / "real", outside):
        folder.mkdir(parents=True)
        (folder / "photo.jpg").write_bytes(b"photo")
    links = {
        "inside.jpg": "real/photo.jpg",
        "outside.jpg": "../outside/photo.jpg",
        "absolute.jpg": str(outside / "photo.jpg"),
        "folder": "real",
        "outside folder": "../outside",
        "up": "..",
        "nowhere.jpg": "missing.jpg",
        "loop.jpg": "loop.jpg",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "chain.jpg").symlink_to("outside.jpg")
    reasons = _reasons(root)
    assert {key for key, reason in reasons.items() if reason is None} == {"inside.jpg", "real/photo.jpg"}
    assert {key for key, reason in reasons.items() if reason and "leads out" in reason} == {
        "outside.jpg", "absolute.jpg", "chain.jpg",
    }  # fmt: skip
    assert {key for key, reason in reasons.items() if reason and "a link to a folder" in reason} == {
        "folder", "outside folder", "up",
    }  # fmt: skip
    assert reasons["nowhere.jpg"] == "cannot be opened: No such file or directory"
    assert reasons["loop.jpg"] == "cannot be opened: Too many levels of symbolic links"


def test_devices_pipes_and_sockets_are_counted_but_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "device.jpg").symlink_to("/dev/zero")  # reading it would never end
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    reasons = _reasons(tmp_path)
    assert reasons["pipe.jpg"] == reasons["socket.jpg"] == "not a file but a device, a pipe or a socket"
    assert reasons["device.jpg"] == "a link that leads out of the source folder"


def test_a_name_that_is_not_utf8_is_named_and_left_alone(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    assert _reasons(tmp_path) == {"caf\\xe9.jpg": "the name is not UTF-8; rename the file"}
    (tmp_path / "caf\\xe9.jpg").write_bytes(b"the name the other one is shown by")
    with pytest.raises(SourceError, match="rename one"):
        FolderSource(tmp_path).entries()


def test_a_file_too_large_to_be_a_photo_is_not_read(tmp_path: Path) -> None:
    for name in ("film.jpg", "film.unknown"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**30 + 1)  # sparse
    assert _reasons(tmp_path) == dict.fromkeys(("film.jpg", "film.unknown"), "larger than 1,073,741,824 bytes")


def test_what_is_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(SourceError, match="is not a folder"):
        FolderSource(tmp_path / "a.jpg")
    with pytest.raises(SourceError, match="there is no folder"):
        FolderSource(tmp_path / "missing")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = FolderSource(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"cannot list .*: Permission denied"):
        source.entries()


def test_the_label_is_the_folder_a_photo_lies_in(tmp_path: Path) -> None:
    for name in ("a.jpg", "cats/a.jpg", "animals/cats/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    labels = {entry.key: entry.label for entry in FolderSource(tmp_path).entries()}
    assert labels == {"a.jpg": None, "cats/a.jpg": "cats", "animals/cats/a.jpg": "cats"}


def test_a_folder_of_archives_says_how_to_name_them(tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"holds no photos, but files that hold some; name those, as in '.*/\*\.tar'"):
        FolderSource(tmp_path).entries()
    (tmp_path / "a.jpg").write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert [entry.key for entry in source.entries()] == ["a.jpg"]
    assert source.remarks == [
        "3 files that are no photos were left aside (2 .tar, 1 .json): 00000.tar, 00000_stats.json, 00001.tar"
    ]
