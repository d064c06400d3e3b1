"""Plans of integers, held to their rules over all sizes, and the pixels they lead to."""

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from skimage import data as skimage_data

from sdvae.encoding.load_photo import read_crop
from sdvae.encoding.manifest import decoder_identity
from sdvae.encoding.resize import apply, choose_resizer
from sdvae.errors import ConfigError, ImageError
from sdvae.images.read import read_image
from sdvae.images.write import encode_image
from sdvae.store.buckets import Size, bucket_sizes
from sdvae.store.geometry import Geometry, Preprocess, Resample, plan_geometry

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


SETTINGS = st.sampled_from(
    [
        Preprocess(64, max_upscale=1.5),
        Preprocess(None, buckets="sd1", max_upscale=40.0),
        Preprocess(None, buckets="sdxl"),
    ]
)


@given(SIDES, SIDES, SETTINGS)
def test_a_photo_covers_its_crop_and_grows_no_more_than_allowed(
    height: int, width: int, preprocess: Preprocess
) -> None:
    assert preprocess.max_upscale is not None
    table = bucket_sizes(preprocess.buckets) if preprocess.buckets else ((64, 64),)
    target = min(table, key=lambda size: (_distance((height, width), size), size[0] / size[1]))
    factor = max(Fraction(target[0], height), Fraction(target[1], width))
    try:
        geometry = plan_geometry(height, width, preprocess, 8)
    except ImageError as error:
        expected = "too small" if factor > Fraction(preprocess.max_upscale) else "too long and thin"
        assert expected in str(error)
        return
    assert factor <= Fraction(preprocess.max_upscale)
    top, left, *crop = geometry.crop_px
    assert tuple(crop) == target
    for side, resized, start, cropped in zip((height, width), geometry.resized_px, (top, left), crop, strict=True):
        assert abs(resized - side * factor) <= Fraction(1, 2)
        assert resized >= cropped
        assert start == (resized - cropped) // 2
    assert any(resized == cropped for resized, cropped in zip(geometry.resized_px, crop, strict=True))


def _distance(size: Size, other: Size) -> Fraction:
    """How far apart two aspect ratios are: the larger over the smaller."""
    ratio = Fraction(size[0] * other[1], size[1] * other[0])
    return max(ratio, 1 / ratio)


@given(SIDES, SIDES, st.integers(0, 2**40), st.text(max_size=20))
def test_a_random_crop_is_somewhere_inside(height: int, width: int, seed: int, key: str) -> None:
    try:
        center = plan_geometry(height, width, Preprocess(64), 8)
    except ImageError:
        return
    preprocess = Preprocess(64, "random", seed=seed)
    geometry = plan_geometry(height, width, preprocess, 8, key)
    assert geometry == plan_geometry(height, width, Preprocess(64, "random", seed=seed), 8, key)
    assert geometry.resized_px == center.resized_px
    top, left, *crop = geometry.crop_px
    assert crop == [64, 64]
    assert 0 <= top <= geometry.resized_px[0] - 64
    assert 0 <= left <= geometry.resized_px[1] - 64


def test_random_crops_reach_every_place_and_stay_where_they_are() -> None:
    preprocess = Preprocess(64, "random")
    places = [plan_geometry(64, 67, preprocess, 8, f"{number}.jpg").crop_px[1] for number in range(400)]
    counts = [places.count(left) for left in range(4)]
    assert sum(counts) == 400
    assert min(counts) > 70  # of 100; 3.5 standard deviations
    other_seed = Preprocess(64, "random", seed=1)
    assert places != [plan_geometry(64, 67, other_seed, 8, f"{number}.jpg").crop_px[1] for number in range(400)]
    # Golden: stores are continued by later versions.
    assert plan_geometry(1000, 640, other_seed, 8, "cats/a.jpg") == Geometry((100, 64), (30, 0, 64, 64))


def test_photos_that_are_too_small_are_refused_with_a_reason() -> None:
    with pytest.raises(ImageError, match=r"^too small: a side has fewer than 100 pixels$"):
        plan_geometry(99, 3000, Preprocess(64, min_size_px=100), 8)
    plan_geometry(100, 3000, Preprocess(64, min_size_px=100), 8)
    with pytest.raises(ImageError, match=r"^too small: it would have to be enlarged by more than 1\.5$"):
        plan_geometry(42, 90, Preprocess(64, max_upscale=1.5), 8)
    assert plan_geometry(43, 90, Preprocess(64, max_upscale=1.5), 8).resized_px == (64, 134)
    assert plan_geometry(1, 1, Preprocess(64), 8).resized_px == (64, 64)  # no limit unless asked for
    with pytest.raises(ImageError, match=r"enlarged by more than 1\.0"):  # but with buckets
        plan_geometry(511, 511, Preprocess(None, buckets="sd1"), 8)
    assert plan_geometry(512, 512, Preprocess(None, buckets="sd1"), 8).crop_px == (0, 0, 512, 512)


@pytest.mark.parametrize("kernel", ["lanczos", "bicubic"])
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
def test_a_crop_anywhere_is_cut_out_of_the_whole_photo_resized(
    kernel: Resample, height: int, width: int, seed: int
) -> None:
    photo = noise(height, width)
    preprocess = Preprocess(16, "random", seed=seed, resample=kernel)
    geometry = plan_geometry(height, width, preprocess, 8, "key")
    resized_height, resized_width = geometry.resized_px
    resample = Image.Resampling[kernel.upper()]
    whole = np.asarray(Image.fromarray(photo).resize((resized_width, resized_height), resample))
    top, left, *_ = geometry.crop_px
    image = apply(photo, geometry, preprocess.resample)
    assert np.array_equal(image, whole[top : top + 16, left : left + 16])


# --- Resizers beside the exact one ---

needs_torch_2_13 = pytest.mark.skipif(
    choose_resizer("lanczos") != "torch", reason="this torch has no lanczos for bytes"
)

RESIZED = [  # (height, width), side: photos that shrink, that grow, that do a little, lines, and one that shrinks 190x
    ((300, 400), 64), ((61, 40), 128), ((201, 199), 200), ((1, 40), 64), ((50, 1), 64), ((7, 900), 16), ((640, 11), 32),
    ((640, 11), 1), ((3, 2), 1), ((1520, 1600), 8),
]  # fmt: skip


def contents(kind: str, height: int, width: int) -> np.ndarray:
    if kind == "photo":
        return np.array(Image.fromarray(skimage_data.astronaut()).resize((width, height)))
    return noise(height, width) if kind == "noise" else noise(height, width) // 128 * 255


def filter_matrix(num_in: int, num_out: int, kernel: str) -> np.ndarray:  # (num_out, num_in) fp64, rows sum to 1
    """Pillow's definition: a kernel as wide as the step between outputs, at middles of pixels, cut at the border."""
    step = num_in / num_out
    x = (np.arange(num_in) + 0.5 - (np.arange(num_out)[:, None] + 0.5) * step) / max(step, 1.0)
    if kernel == "lanczos":
        weights = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    else:
        near, far = (1.5 * abs(x) - 2.5) * x**2 + 1, ((-0.5 * abs(x) + 2.5) * abs(x) - 4) * abs(x) + 2
        weights = np.where(abs(x) < 1, near, np.where(abs(x) < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def exact(photo: np.ndarray, size: Size, kernel: str, *, in_bytes: bool) -> np.ndarray:
    """Columns, then rows; `in_bytes` rounds and clips in between, as both resizers do."""
    columns = np.einsum("oi,hic->hoc", filter_matrix(photo.shape[1], size[1], kernel), photo, optimize=True)
    columns = np.clip(np.floor(columns + 0.5), 0, 255) if in_bytes else columns
    return np.einsum("oi,iwc->owc", filter_matrix(photo.shape[0], size[0], kernel), columns, optimize=True).clip(0, 255)


@needs_torch_2_13
@pytest.mark.parametrize("kind", ["photo", "noise", "black and white"])
@pytest.mark.parametrize("kernel", ["lanczos", "bicubic"])
def test_torch_resizes_as_exactly_as_pillow(kernel: Resample, kind: str) -> None:
    for (height, width), side in RESIZED:
        photo = contents(kind, height, width)
        resized = plan_geometry(height, width, Preprocess(side, "none"), 8).resized_px
        whole = Geometry(resized, (0, 0, *resized))
        by_torch, by_pillow = (apply(photo, whole, kernel, resizer) for resizer in ("torch", "pillow"))
        in_bytes = exact(photo, resized, kernel, in_bytes=True)
        # Half a level of rounding, and another half before the second pass, where the weights' absolute values sum up
        # to 1.9 at most; some for weights of 16 bits.
        assert np.abs(by_torch - in_bytes).max() < 2
        errors = [image - exact(photo, resized, kernel, in_bytes=False) for image in (by_torch, by_pillow)]
        of_torch, of_pillow = (np.sqrt(np.mean(error**2)) for error in errors)
        assert of_torch < 1.02 * of_pillow + 0.01  # Pillow's passes may come in the other order, which changes as much


@needs_torch_2_13
@given(st.integers(1, 90), st.integers(1, 90))
def test_a_resized_photo_depends_neither_on_threads_nor_on_its_layout(height: int, width: int) -> None:
    photo = noise(height, width)
    geometry = plan_geometry(height, width, Preprocess(64), 8)
    expected = apply(photo, geometry, resizer="torch")
    slices = np.s_[::2], np.s_[:, ::2]
    threads = torch.get_num_threads()
    torch.set_num_threads(4 if threads == 1 else 1)
    try:
        for layout in (photo, np.asfortranarray(photo), *(photo.repeat(2, axis)[slices[axis]] for axis in (0, 1))):
            assert np.array_equal(apply(layout, geometry, resizer="torch"), expected)
    finally:
        torch.set_num_threads(threads)


@needs_torch_2_13
def test_the_resizer_is_chosen_by_what_torch_can(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(resizer="torch")
    assert choose_resizer("lanczos") == "torch"
    assert decoder_identity(preprocess)["resizer"] == {"library": "torch", "version": version("torch")}
    choose_resizer.cache_clear()

    def unknown(*args: object, **settings: object) -> None:
        raise ValueError("Anti-alias option is restricted to bilinear and bicubic modes")

    with monkeypatch.context() as older:
        older.setattr("torch.nn.functional.interpolate", unknown)
        assert choose_resizer("lanczos") == "pillow"
        with pytest.raises(ConfigError, match=r"has no lanczos for bytes; install torch 2\.13"):
            decoder_identity(preprocess)
    choose_resizer.cache_clear()


def test_reading_a_crop_is_reading_the_photo_and_cutting() -> None:
    photo = noise(60, 90)
    data = encode_image(photo, "png")
    preprocess = Preprocess(32, resample="bicubic")
    geometry = plan_geometry(60, 90, preprocess, 8)
    assert np.array_equal(read_crop(data, (60, 90), geometry, preprocess), apply(photo, geometry, "bicubic"))
    for settings in (preprocess, replace(preprocess, jpeg_draft=True)):
        with pytest.raises(ImageError, match=r"its header says \(90, 60\), its picture is \(60, 90\)"):
            read_crop(data, (90, 60), geometry, settings)


def test_a_draft_is_decoded_small_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:800, :1200]
    photo = np.stack([128 + 100 * np.sin(x / 50), 128 + 100 * np.cos(y / 40), x / 5], -1).astype(np.uint8)
    data = encode_image(photo, "jpeg")
    sizes = []

    def noted(*args: object, **settings: object) -> np.ndarray:
        image = read_image(*args, **settings)  # type: ignore[arg-type]
        sizes.append(image.shape[:2])
        return image

    monkeypatch.setattr("sdvae.images.read.read_image", noted)
    exact = Preprocess(64)
    geometry = plan_geometry(800, 1200, exact, 8)
    reference = read_crop(data, (800, 1200), geometry, exact).astype(int)
    for decoder in ("pillow", "simplejpeg"):
        draft = read_crop(data, (800, 1200), geometry, replace(exact, jpeg_draft=True, decoder=decoder))
        assert np.abs(draft - reference).max() <= 6
    assert sizes == [(800, 1200), (100, 150), (100, 150)]  # an eighth: the smallest of JPEG's scales with 64x96


def test_the_decoder_is_named_with_its_version() -> None:
    identity = decoder_identity(Preprocess())
    assert identity["library"] == "pillow" and identity["codecs"].keys() == {
        "libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif", "zlib", "littlecms2",
    }  # fmt: skip
    both = decoder_identity(Preprocess(decoder="simplejpeg"))
    assert both == identity | {"jpeg": {"library": "simplejpeg", "version": version("simplejpeg")}}


def test_a_missing_decoder_is_told_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'sdvae\[fast\]'"):
        decoder_identity(Preprocess(decoder="simplejpeg"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_px": None}, "a center crop needs a size"),
        ({"size_px": None, "crop": "random"}, "a random crop needs a size"),
        ({"size_px": 0}, "a size of 0 pixels"),
        ({"crop": "middle"}, "unknown crop 'middle'; it is 'center' or 'random' or 'none'"),
        ({"resample": "nearest"}, "unknown resample 'nearest'"),
        ({"decoder": "opencv"}, "unknown decoder 'opencv'"),
        ({"resizer": "opencv"}, "unknown resizer 'opencv'; it is 'pillow' or 'torch'"),
        ({"background": (0, 0, 256)}, "three levels of 0..255"),
        ({"background": (0, 0)}, "three levels of 0..255"),
        ({"buckets": "sd1"}, "buckets have sizes of their own; leave size_px None, it is 512"),
        ({"size_px": None, "buckets": "sdx"}, "unknown buckets 'sdx'; did you mean sdxl"),
        ({"size_px": None, "buckets": "sd1", "crop": "none"}, "photos are cropped to their bucket"),
        ({"size_px": None, "crop": "none", "max_upscale": 1.0}, "give a size or buckets"),
        ({"max_upscale": 0}, "max_upscale is 0"),
        ({"max_upscale": float("inf")}, "max_upscale is inf"),
        ({"min_size_px": 0}, "a minimum of 0 pixels"),
        ({"seed": 1}, "with crop 'center' it means nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess(**values)


def test_a_crop_must_fit_the_latents() -> None:
    with pytest.raises(ConfigError, match="a crop of 500 pixels is no multiple of 8"):
        plan_geometry(1000, 1000, Preprocess(500, "center"), 8)


def test_settings_survive_json() -> None:
    table = ((64, 96), (96, 64))
    for preprocess in (
        Preprocess(256),
        Preprocess(None, "none", (1, 2, 3), 10**6),
        Preprocess(None, buckets=table, max_upscale=1.25, min_size_px=64, resample="bicubic", flip=True),
        Preprocess(64, "random", seed=7, decoder="simplejpeg", jpeg_draft=True, max_upscale=2, resizer="torch"),
    ):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    with pytest.raises(ConfigError, match="sharpen"):
        Preprocess.from_json(Preprocess().to_json() | {"sharpen": True})
    values = Preprocess().to_json()
    del values["crop"]
    with pytest.raises(ConfigError, match="crop"):
        Preprocess.from_json(values)
    assert Preprocess(None, buckets=[[64, 96], [96, 64]], max_upscale=1) == Preprocess(None, buckets=table)  # type: ignore[arg-type]


def test_a_store_that_was_begun_before_a_setting_existed_reads_and_writes_the_same() -> None:
    before = {"size_px": 512, "crop": "center", "background": [255, 255, 255], "max_pixels": 134_217_728}
    assert Preprocess.from_json(before) == Preprocess()
    assert Preprocess().to_json() == before
    buckets = Preprocess(None, buckets="sd1", flip=True).to_json()
    assert buckets == before | {"size_px": None, "buckets": "sd1", "max_upscale": 1.0, "flip": True}


def test_the_default_limit_is_that_of_reading() -> None:
    from sdvae.images.read import BACKGROUND, MAX_IMAGE_PIXELS

    assert (Preprocess().max_pixels, Preprocess().background) == (MAX_IMAGE_PIXELS, BACKGROUND)


def test_planning_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, sdvae.store.geometry; print(sorted({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
