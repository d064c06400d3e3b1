from pathlib import Path

import pytest

from sdvae import sealed
from sdvae.errors import ReportError, VerifyError
from sdvae.evaluate.results import RESULTS_NAME, read_results, to_json, write_results
from tests.made_results import make_results


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    made = make_results(tmp_path)
    assert read_results(tmp_path) == made


def test_every_picture_named_is_there(tmp_path: Path) -> None:
    made = make_results(tmp_path)
    views = [view for image in made.images for view in image.views]
    pictures = [view.original for view in views] + [view.worst.original for view in views]
    assert pictures
    assert all((tmp_path / picture.file).is_file() for picture in pictures)


def test_unknown_fields_are_ignored_and_missing_ones_with_a_default_may_be(tmp_path: Path) -> None:
    made = make_results(tmp_path)
    value = to_json(made) | {"of_a_later_sdvae": [1]}
    value["recipe"]["of_a_later_sdvae"] = True
    del value["remarks"], value["candidates"][0]["tiling"]
    sealed.write_json(tmp_path / RESULTS_NAME, value)
    read = read_results(tmp_path)
    assert read.remarks == ()
    assert read.candidates == made.candidates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"num_images": None}, "None"),
        ({"columns": [{"name": "psnr"}]}, "label"),
        ({"columns": 3}, "not iterable"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    sealed.write_json(tmp_path / RESULTS_NAME, to_json(make_results(tmp_path)) | change)
    with pytest.raises(ReportError, match=message):
        read_results(tmp_path)


def test_a_folder_without_a_report_is_told_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="sdvae eval"):
        read_results(tmp_path)


def test_a_flipped_bit_is_damage(tmp_path: Path) -> None:
    make_results(tmp_path)
    path = tmp_path / RESULTS_NAME
    path.write_bytes(path.read_bytes().replace(b"photos", b"phutos", 1))
    with pytest.raises(VerifyError):
        read_results(tmp_path)


def test_results_are_written_whole(tmp_path: Path) -> None:
    made = make_results(tmp_path)
    write_results(tmp_path, made)
    assert not list(tmp_path.glob(".*.tmp"))
