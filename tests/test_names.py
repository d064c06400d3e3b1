import unicodedata
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae.reading.names import plan_names


def test_a_key_keeps_its_folders_and_stem() -> None:
    assert plan_names(["a.jpg", "trip/day 1/b.c.jpeg", "plain"], ".png") == ["a.png", "trip/day 1/b.c.png", "plain.png"]


def test_keys_that_differ_in_the_extension_keep_it() -> None:
    assert plan_names(["a.jpg", "a.webp", "b.jpg"], ".png") == ["a.jpg.png", "a.webp.png", "b.png"]


def test_a_kept_extension_may_meet_another_key() -> None:
    names = plan_names(["a.jpg", "a.webp", "a.jpg.tif"], ".png")
    assert names[0].startswith("a.jpg-")  # `a.jpg.png` is what a.jpg.tif asks for, too
    assert names[1:] == ["a.webp.png", "a.jpg.tif.png"]


def test_keys_that_differ_in_case_or_spelling_get_a_hash() -> None:
    names = plan_names(["Photo.jpg", "photo.jpg", "e\u0301.jpg", "\u00e9.jpg"], ".png")
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == 4
    assert names[0].startswith("Photo.jpg-")


def test_a_file_never_takes_the_place_of_a_folder() -> None:
    file, nested = plan_names(["a", "a.png/b.jpg"], ".png")
    assert nested == "a.png/b.png"
    assert file != "a.png"


HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", ".", "", "/", "// // ", "a\\..\\b.jpg", "C:\\x.jpg",
    "CON:.jpg", "a\0b", "new\nline.jpg", "\ud800.jpg", "dots...", "x" * 5000, "\u00e4" * 200 + ".jpg",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys_stay_inside(key: str) -> None:
    _check_safe(plan_names([key], ".png"))


@given(st.lists(st.text(alphabet=st.sampled_from("aAbé./\\ \0:Ж"), max_size=12), unique=True, max_size=12))
def test_names_are_safe_distinct_and_independent_of_order(keys: list[str]) -> None:
    names = plan_names(keys, ".png")
    _check_safe(names)
    folded = {unicodedata.normalize("NFC", name).casefold() for name in names}
    assert len(folded) == len(keys)
    folders = {str(folder) for name in folded for folder in PurePosixPath(name).parents}
    assert not folded & folders
    assert plan_names(keys[::-1], ".png") == names[::-1]


def _check_safe(names: list[str]) -> None:
    for name in names:
        parts = name.split("/")
        assert all(part.strip(". ") for part in parts)
        assert all(len(part.encode()) <= 200 for part in parts)
        assert not set(name) & set('\0\n\\:"<>|?*')
        assert name.endswith(".png")
