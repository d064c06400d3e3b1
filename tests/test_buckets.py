"""Bucket tables, and the nearest size against a search in exact fractions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdvae.errors import ConfigError
from sdvae.store.buckets import TABLES, Size, bucket_sizes, nearest_bucket

SIDES = st.integers(1, 20_000)


def test_the_named_tables_never_change() -> None:
    assert {tuple(sorted(size)) for size in TABLES["sd1"]} == {
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    }  # fmt: skip
    sdxl = TABLES["sdxl"]
    assert (len(sdxl), min(sdxl), max(sdxl)) == (41, (512, 1856), (2048, 512))
    assert {(1024, 1024), (832, 1216), (1344, 768), (704, 1344)} <= set(sdxl)
    for sizes, side in ((TABLES["sd1"], 512), (sdxl, 1024)):
        assert set(sizes) == {size[::-1] for size in sizes}
        assert all(height % 64 == width % 64 == 0 and height * width <= 1.06 * side**2 for height, width in sizes)


@given(SIDES, SIDES, st.sampled_from(["sd1", "sdxl"]))
def test_the_nearest_is_the_nearest_in_logarithms(height: int, width: int, name: str) -> None:
    sizes = bucket_sizes(name, 8)

    def distance(size: Size) -> float:
        return abs(math.log(height / width) - math.log(size[0] / size[1]))

    chosen = nearest_bucket(height, width, sizes)
    assert chosen in sizes
    assert distance(chosen) <= min(map(distance, sizes)) + 1e-12


@given(SIDES, SIDES)
def test_a_turned_photo_gets_the_turned_size(height: int, width: int) -> None:
    sizes = bucket_sizes("sd1")
    chosen, turned = nearest_bucket(height, width, sizes), nearest_bucket(width, height, sizes)
    assert turned == chosen[::-1]


def test_between_two_equally_near_sizes_the_wider_is_taken() -> None:
    sizes = bucket_sizes(((200, 100), (100, 200)))
    assert nearest_bucket(50, 50, sizes) == (100, 200)
    assert nearest_bucket(51, 50, sizes) == (200, 100)
    assert nearest_bucket(1, 9, bucket_sizes(((64, 64),))) == (64, 64)


@pytest.mark.parametrize(
    ("buckets", "downscale", "message"),
    [
        ("sd2", 8, "unknown buckets 'sd2'; did you mean sd1"),
        ((), 8, "no table of"),
        (((0, 8),), 8, "no table of"),
        (((64, 100),), 8, "a bucket of 100x64 is no multiple of 8"),
        (((64, 64), (96, 64), (128, 128)), 8, "64x64 and 128x128 have one aspect ratio"),
    ],
)
def test_tables_that_leave_a_photo_without_one_size_are_refused(
    buckets: str | tuple[Size, ...], downscale: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bucket_sizes(buckets, downscale)
