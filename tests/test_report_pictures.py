import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.pictures import NUM_PICTURED, PictureFolder, block_errors, choose, find_worst


def test_worst_median_best_and_first_are_chosen_worst_first() -> None:
    scores = [float(value) for value in np.random.default_rng(0).permutation(100)]
    chosen = choose(scores, "higher")
    assert len(chosen) == NUM_PICTURED
    shown = [scores[place] for place, _ in chosen]
    assert shown == sorted(shown)
    by_reason = {one: [scores[place] for place, why in chosen if one in why] for one in ("worst", "median", "best")}
    assert by_reason == {"worst": [0, 1, 2, 3], "median": [49, 50], "best": [98, 99]}
    assert {place for place, why in chosen if "first" in why} >= {0, 1, 2, 3}


def test_of_lower_is_better_the_highest_is_the_worst_and_nan_is_not_ranked() -> None:
    chosen = choose([0.1, math.nan, 0.9, 0.5], "lower")
    assert [place for place, _ in chosen] == [2, 3, 0]
    assert choose([], "lower") == []


def test_the_worst_square_is_where_the_error_is() -> None:
    original = np.full((300, 400, 3), 128, np.uint8)
    broken = original.copy()
    broken[200:260, 310:370] = 0
    top, left, size = find_worst(original, broken)
    assert size == 96
    assert top <= 200 and top + size >= 260
    assert left <= 310 and left + size >= 370
    assert find_worst(original[:40, :30], broken[:40, :30]) == (0, 0, 30)


def test_block_errors_are_means_also_at_the_border() -> None:
    original = np.zeros((6, 9, 3), np.uint8)
    broken = original.copy()
    broken[4:, 8] = 12
    errors = block_errors(original, broken, 4)
    assert errors.shape == (2, 3)
    assert errors[1, 2] == 12.0
    assert errors.sum() == 12.0


def test_full_views_are_bounded_and_lossy_and_crops_exact(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (100, 3000, 3), dtype=np.uint8)
    view = folder.view("view", image)
    assert (view.width, view.height, view.is_lossless) == (1600, 53, False)
    region = folder.worst("after", image, 255 - image, "before")
    rows, columns = slice(region.top, region.top + region.size_px), slice(region.left, region.left + region.size_px)
    for picture, source in ((region.original, image), (region.reconstruction, 255 - image)):
        assert picture.is_lossless
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / picture.file)), source[rows, columns])


def test_planes_become_greys_side_by_side(tmp_path: Path) -> None:
    planes = torch.stack([torch.linspace(-1, 1, 16).view(4, 4), torch.full((4, 4), 3.0)])
    picture, ranges = PictureFolder(tmp_path).grey("channels", planes, 0.0, 1.0)
    assert (picture.width, picture.height) == (8, 4)
    assert ranges[0] == (-1.0, 1.0)
    grey = np.asarray(Image.open(tmp_path / picture.file))
    assert (grey[0, 0], grey[3, 3]) == (0, 255)


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_a_codec_takes_the_best_quality_within_its_bits(codec: str) -> None:
    rows, columns = np.mgrid[:128, :128]
    photo = np.stack([127 + 100 * np.sin(rows / 9 + c) * np.cos(columns / 7) for c in range(3)], -1)
    photo = (photo + np.random.default_rng(0).normal(0, 8, photo.shape)).clip(0, 255).astype(np.uint8)
    low, high = (CodecCandidate(codec, bits, codec).reconstruct(photo) for bits in (1.0, 2.0))  # type: ignore[arg-type]
    assert 0.7 < low[1] <= 1.0 < high[1] <= 2.0
    errors = [np.square(after.astype(float) - photo).mean() for after, _ in (low, high)]
    assert errors[1] < errors[0]


def test_a_rate_that_no_file_keeps_gives_the_smallest_file() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    _, bits = CodecCandidate("jpeg", 0.001, "JPEG").reconstruct(noise)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "jpeg", quality=1, optimize=True)
    assert bits == 8 * len(file.getvalue()) / 64**2
