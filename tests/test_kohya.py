"""A dataset config of sd-scripts as a source. What it means is read in its library/config_util.py and train_util.py."""

import json
import pickle
from pathlib import Path

import pytest

from sdvae.errors import SourceError
from sdvae.sources.kohya import KohyaSource
from sdvae.sources.open import open_source
from tests.test_sources import photo, put

CONFIG = """
[general]
caption_extension = ".txt"
shuffle_caption = true

[[datasets]]
resolution = 512
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "img/5_cat"
  num_repeats = 5
  class_tokens = "sks cat"

  [[datasets.subsets]]
  image_dir = 'REG'
  is_reg = true
  class_tokens = "cat"
  caption_extension = ".none"

[[datasets]]
resolution = [768, 768]

  [[datasets.subsets]]
  image_dir = "img/5_cat"

  [[datasets.subsets]]
  image_dir = "fine"
  metadata_file = "fine.json"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    reg = tmp_path / "elsewhere" / "reg"
    put(tmp_path / "project/img/5_cat", {
        "a.png": photo(1), "a.txt": b" a cat, sitting \nanother line\n", "b.png": photo(2), "b.caption": b"no",
        "c.png": photo(3), "c.txt": b"\xff", "deeper/d.png": photo(4),
    })  # fmt: skip
    put(reg, {"r.png": photo(5), "r.txt": b"not of this ending"})
    put(tmp_path / "project/fine", {"x.png": photo(6), "x.txt": b"not read", "y.png": photo(1), "z.png": photo(2)})
    metadata = {"x.png": {"caption": "a fine x", "tags": "x, y"}, "y.png": {"tags": "only"}, "gone.png": {}, "../y": {}}
    (tmp_path / "project/fine.json").write_text(json.dumps(metadata))
    (tmp_path / "project/my.toml").write_text(CONFIG.replace("REG", str(reg)))
    return tmp_path / "project/my.toml"


def test_photos_of_all_subsets_have_the_captions_that_sd_scripts_trains_with(config: Path) -> None:
    source = open_source(config)
    assert isinstance(source, KohyaSource)
    entries = {entry.key: entry for entry in source.entries()}
    assert {key: entry.caption for key, entry in entries.items() if not entry.reason} == {
        "img/5_cat/a.png": "a cat, sitting",
        "img/5_cat/b.png": "sks cat",
        "reg/r.png": "cat",
        "fine/x.png": "a fine x,x, y",
        "fine/y.png": "only",
    }
    assert {key: entry.reason for key, entry in entries.items() if entry.reason} == {
        "img/5_cat/c.png": "c.txt is not UTF-8",
        "fine/gone.png": "fine.json names it, but there is no such photo",
        "fine/../y": "a path that leads out of the source",
    }
    assert entries["reg/r.png"].label == "reg" and entries["img/5_cat/a.png"].label == "5_cat"
    again = pickle.loads(pickle.dumps(source))
    assert again.read("reg/r.png") == photo(5) and again.read("img/5_cat/a.png") == photo(1)


def test_what_is_not_taken_over_is_said_in_one_line(config: Path) -> None:
    source = open_source(config)
    source.entries()
    assert source.remarks[0] == (
        "not taken over from my.toml, tell the trainer again: enable_bucket, is_reg, num_repeats, "
        "resolution (here: --size, --buckets), shuffle_caption"
    )
    assert "several subsets; its photos are taken once" in source.remarks[1]
    assert "2 .txt" in source.remarks[2] or "1 .txt" in source.remarks[2]


def test_an_ending_on_the_command_line_comes_first(config: Path) -> None:
    captions = {entry.key: entry.caption for entry in open_source(config, ".caption").entries()}
    assert captions["img/5_cat/b.png"] == "no" and captions["img/5_cat/a.png"] == "sks cat"


def test_with_wildcards_a_caption_keeps_its_lines(tmp_path: Path) -> None:
    put(tmp_path / "a", {"a.png": photo(1), "a.caption": b"one\n\n two \n"})
    text = "[[datasets]]\nenable_wildcard = true\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    (tmp_path / "my.toml").write_text(text)
    assert [entry.caption for entry in open_source(tmp_path / "my.toml").entries()] == ["one\ntwo"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[datasets", "is no TOML"),
        ("[train]\nsteps = 3\n", r"has no \[\[datasets\.subsets\]\], as a dataset config of sd-scripts has"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1\n", "a subset without image_dir"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n", "there is no folder nowhere"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '../a/x'\n[[datasets.subsets]]\nimage_dir = '../b/x'\n",
            "two subsets called x, .*: rename one",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '../a/x'\nmetadata_file = 'my.toml'\n",
            "my.toml is no metadata_file of sd-scripts",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '.'\nmetadata_file = 'm.json'\n"
            "[[datasets.subsets]]\nimage_dir = '../a/x'\n",
            "could be confused with those of",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in ("a/x", "b/x", "project"):
        put(tmp_path / name, {"a.png": photo(1)})
    (tmp_path / "project/my.toml").write_text(text)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "project/my.toml").entries()
