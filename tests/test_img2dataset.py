"""What img2dataset 1.47 wrote, with webdataset 0.2.111, of six addresses: four made photos, a page and a dead link."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sdvae.errors import SourceError
from sdvae.images.read import read_image
from sdvae.sources.img2dataset import failed_downloads
from sdvae.sources.open import open_source

GOLDEN = Path(__file__).parent / "golden" / "img2dataset"


def test_its_tars_are_a_source() -> None:
    source = open_source(str(GOLDEN / "tars" / "*.tar"))
    entries = source.entries()
    assert [(entry.key, entry.caption, entry.reason) for entry in entries] == [
        ("00000/000000.jpg", "a picture 0.jpg", None),
        ("00000/000001.jpg", "a picture 1.jpg", None),
    ]
    assert read_image(source.read("00000/000001.jpg")).shape == (32, 32, 3)
    assert list(source.remarks) == [
        "img2dataset fetched 2 of 3 photos; the others are not there (1 HTTP Error 404: File not found)"
    ]


def test_its_files_are_a_source() -> None:
    source = open_source(GOLDEN / "files")
    entries = source.entries()
    assert [(entry.key, entry.caption) for entry in entries] == [
        ("00001/000010.jpg", "a picture 2.jpg"),
        ("00001/000012.jpg", "a picture 3.jpg"),
    ]
    failed, aside = source.remarks
    assert failed == "img2dataset fetched 2 of 3 photos; the others are not there (1 Image decoding error)"
    assert aside == "2 files that are no photos were left aside (1 .parquet, 1 .json): 00001.parquet, 00001_stats.json"


def test_a_caption_that_only_the_json_has_is_taken(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "files", tmp_path / "files")
    (tmp_path / "files/00001/000010.txt").unlink()
    captions = {entry.key: entry.caption for entry in open_source(tmp_path / "files").entries()}
    assert captions["00001/000010.jpg"] == "a picture 2.jpg"


def test_the_folder_of_tars_names_the_tars_and_not_the_tables() -> None:
    with pytest.raises(SourceError, match=r"name those, as in '.*/\*\.tar'"):
        open_source(GOLDEN / "tars").entries()


def test_statistics_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    for name, told in {"0_stats.json": {"count": 3}, "1_stats.json": [1], "x_stats.json": {"count": 1}}.items():
        (tmp_path / name).write_text(json.dumps(told))
    (tmp_path / "2_stats.json").write_text("{")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert failed_downloads(tmp_path, ["0_stats.json", "1_stats.json", "2_stats.json", "gone/3_stats.json"]) == []
    assert not any("img2dataset" in remark for remark in open_source(tmp_path).remarks)
