"""Plans of integers, held to their rules over all sizes, and the pixels they lead to."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from sdvae.data.preprocess import Geometry, Preprocess, apply, plan_geometry
from sdvae.errors import ConfigError, ImageError

SIDES = st.integers(1, 12_000)
DOWNSCALES = st.sampled_from([4, 8, 16])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), np.uint8)


def plan(height: int, width: int, preprocess: Preprocess, downscale: int) -> Geometry:
    """A plan, or hypothesis's next example where the photo is refused as too long and thin."""
    try:
        return plan_geometry(height, width, preprocess, downscale)
    except ImageError:
        size = preprocess.size_px
        assert size is None or size**2 * max(height, width) / min(height, width) > 0.99 * preprocess.max_pixels
        assume(False)
        raise


def assert_resized(height: int, width: int, size: int | None, geometry: Geometry) -> None:
    resized_height, resized_width = geometry.resized_px
    if size is None:
        assert geometry.resized_px == (height, width)
    else:
        assert min(geometry.resized_px) == size  # the shorter side, exactly
        scale = size / min(height, width)
        assert abs(resized_height - height * scale) <= 0.5 + 1e-6  # the aspect, to half a pixel
        assert abs(resized_width - width * scale) <= 0.5 + 1e-6


@given(SIDES, SIDES, st.integers(1, 64), DOWNSCALES)
def test_a_centre_crop_is_square_inside_and_central(height: int, width: int, latent_size: int, downscale: int) -> None:
    size = latent_size * downscale
    geometry = plan(height, width, Preprocess(size, "center"), downscale)
    assert_resized(height, width, size, geometry)
    (resized_height, resized_width), (top, left, *crop) = geometry.resized_px, geometry.crop_px
    assert crop == [size, size]
    below, right = resized_height - top - size, resized_width - left - size
    assert min(top, left, below, right) >= 0
    assert below - top in (0, 1)
    assert right - left in (0, 1)


@given(SIDES, SIDES, st.none() | st.integers(1, 1024), DOWNSCALES)
def test_a_whole_photo_keeps_every_pixel(height: int, width: int, size: int | None, downscale: int) -> None:
    geometry = plan(height, width, Preprocess(size, "none"), downscale)
    assert_resized(height, width, size, geometry)
    top, left, *crop = geometry.crop_px
    assert (top, left) == (0, 0)
    for cropped, resized in zip(crop, geometry.resized_px, strict=True):
        assert cropped % downscale == 0
        assert 0 <= cropped - resized < downscale


@given(SIDES, SIDES, st.integers(1, 64))
def test_a_turned_photo_has_the_turned_plan(height: int, width: int, latent_size: int) -> None:
    preprocess = Preprocess(8 * latent_size, "center")
    geometry = plan(height, width, preprocess, 8)
    top, left, _, _ = geometry.crop_px
    turned = plan_geometry(width, height, preprocess, 8)
    assert turned.resized_px == geometry.resized_px[::-1]
    assert turned.crop_px[:2] == (left, top)


def test_plans_one_can_check_by_hand() -> None:
    center, whole = Preprocess(512, "center"), Preprocess(None, "none")
    assert plan_geometry(1200, 1800, center, 8) == Geometry((512, 768), (0, 128, 512, 512))
    assert plan_geometry(101, 100, center, 8) == Geometry((517, 512), (2, 0, 512, 512))
    assert plan_geometry(512, 512, center, 8) == Geometry((512, 512), (0, 0, 512, 512))
    assert plan_geometry(427, 640, whole, 8) == Geometry((427, 640), (0, 0, 432, 640))


def test_a_thread_of_pixels_is_refused_before_it_grows() -> None:
    with pytest.raises(ImageError, match=r"too long and thin: 1x30000 resized to 512x15360000 is more than the limit"):
        plan_geometry(30_000, 1, Preprocess(512, "center"), 8)
    assert plan_geometry(30_000, 1, Preprocess(None, "none"), 8) == Geometry((30_000, 1), (0, 0, 30_000, 8))
    exactly = Preprocess(512, "center", max_pixels=512 * 1024)
    assert plan_geometry(100, 200, exactly, 8).resized_px == (512, 1024)
    with pytest.raises(ImageError, match="more than the limit of 524,288 pixels"):
        plan_geometry(1000, 2001, exactly, 8)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16, 24]))
def test_a_crop_is_the_middle_of_the_resized_photo(height: int, width: int, size: int) -> None:
    photo = noise(height, width)
    geometry = plan_geometry(height, width, Preprocess(size, "center"), 8)
    resized_height, resized_width = geometry.resized_px
    whole = np.asarray(Image.fromarray(photo).resize((resized_width, resized_height), Image.Resampling.LANCZOS))
    top, left = (resized_height - size) // 2, (resized_width - size) // 2
    image = apply(photo, geometry)
    assert image.flags.c_contiguous
    assert np.array_equal(image, whole[top : top + size, left : left + size])


def test_padding_reflects_what_is_there() -> None:
    photo = noise(13, 20)
    image = apply(photo, plan_geometry(13, 20, Preprocess(None, "none"), 8))
    assert np.array_equal(image, np.pad(photo, ((0, 3), (0, 4), (0, 0)), mode="reflect"))
    thin = apply(noise(1, 20), plan_geometry(1, 20, Preprocess(None, "none"), 8))
    assert np.array_equal(thin[:, :20], noise(1, 20).repeat(8, axis=0))


def test_a_photo_that_fits_is_left_alone() -> None:
    photo = noise(64, 64)
    assert np.array_equal(apply(photo, plan_geometry(64, 64, Preprocess(64, "center"), 8)), photo)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_px": None}, "a centre crop needs a size"),
        ({"size_px": 0}, "a size of 0 pixels"),
        ({"crop": "random"}, "unknown crop 'random'"),
        ({"background": (0, 0, 256)}, "three levels of 0..255"),
        ({"background": (0, 0)}, "three levels of 0..255"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess(**values)


def test_a_crop_must_fit_the_latents() -> None:
    with pytest.raises(ConfigError, match="a crop of 500 pixels is no multiple of 8"):
        plan_geometry(1000, 1000, Preprocess(500, "center"), 8)


def test_settings_survive_json() -> None:
    for preprocess in (Preprocess(256), Preprocess(None, "none", (1, 2, 3), 10**6)):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    values = Preprocess().to_json()
    assert values == {"size_px": 512, "crop": "center", "background": [255, 255, 255], "max_pixels": 134_217_728}
    with pytest.raises(ConfigError, match="flip"):
        Preprocess.from_json(values | {"flip": True})
    del values["crop"]
    with pytest.raises(ConfigError, match="crop"):
        Preprocess.from_json(values)


def test_the_default_limit_is_that_of_reading() -> None:
    from sdvae.images import BACKGROUND, MAX_IMAGE_PIXELS

    assert (Preprocess().max_pixels, Preprocess().background) == (MAX_IMAGE_PIXELS, BACKGROUND)


def test_planning_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, sdvae.data.preprocess; print(sorted({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
