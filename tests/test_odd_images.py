"""A museum of odd, damaged and hostile image files: each is read as its format means it, or refused with a reason."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from pillow_heif.as_plugin import HeifImageFile

from sdvae.errors import ImageError
from sdvae.images.read import read_image, read_size

BACKGROUND = (255, 255, 255)

# Why each file that Pillow does not load is refused, in words a person understands.
REASONS = {
    "truncated_image.png": "truncated: the file ends before the image does",
    "truncated_end_chunk.png": "truncated: the file ends before the image does",
    "incomplete_image.jpg": "truncated: the file ends before the image does",
    "broken.png": "the PNG header is corrupt, or of a kind that cannot be decoded",
    "broken_data_stream.png": "the PNG data are corrupt",
    "crash-4f085cc12ece8cde18758d42608bed6a2a2cfb1c.tif": "the TIFF data are corrupt",
    "libtiff_segfault.tif": "the TIFF header is corrupt, or of a kind that cannot be decoded",
    "decompression_bomb.gif": "too large: more than the limit of 134,217,728 pixels",
    "decompression_bomb.ico": "too large: more than the limit of 134,217,728 pixels",
    "Bad_reallybig.bad_bmp": "too large: more than the limit of 134,217,728 pixels",
    "unbound_variable.jp2": "the JPEG 2000 header is corrupt, or of a kind that cannot be decoded",
    "hpredict_cmyk.tiff": "the TIFF header is corrupt, or of a kind that cannot be decoded",
    "testorig12.jpg": "the JPEG header is corrupt, or of a kind that cannot be decoded (12 bits",
    "xdtn0g01.png": "the file has a header but no image data",
    "xs1n0g01.png": "not an image in a format sdvae reads: JPEG, PNG, WebP, GIF",
    "5dcac9cf22ff28ffd07a39eb2738435ba786b992.crash": "the PNG header is corrupt, or of a kind that cannot be decoded",
    "corrupted.heic": "the HEIC data are corrupt",
    "empty.heic": "the file is empty",
}


@pytest.fixture(scope="session")
def odd(data_dir: Path) -> dict[Path, bool]:
    """Every file, and whether Pillow loads it, or one of its plugins."""
    with (data_dir / "odd" / "MANIFEST.csv").open(newline="") as file:
        said = {row["file"]: row["pillow13"] for row in csv.DictReader(file)}
    return {
        data_dir / "odd" / name: says.endswith("loads") or " loads " in says or name == "zPug_3.heic"
        for name, says in said.items()
    }


def reference(path: Path) -> np.ndarray:  # (H, W, 3), float or uint8
    """What the file shows on white paper, by plain Pillow, numpy and the formats' own words."""
    with HeifImageFile(io.BytesIO(path.read_bytes())) if path.suffix == ".heic" else Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    profile = image.info.get("icc_profile")

    if image.mode in ("I", "I;16"):
        return gray(np.asarray(image) / 65535 * 255)
    if image.mode == "F":  # this one is no photo and holds -pi..pi: stretched, as sdvae says it does
        values = np.asarray(image).astype(float)
        return gray((values - values.min()) / (values.max() - values.min()) * 255)
    if image.mode == "LAB":
        return lab_to_srgb(np.asarray(image))
    if image.mode == "CMYK":
        assert profile is None
        cyan_magenta_yellow, black = np.split(np.asarray(image) / 255, [3], axis=-1)
        return (1 - cyan_magenta_yellow) * (1 - black) * 255

    colours = image.convert("RGB")
    if profile is not None and len(profile) > 128:  # shorter than an ICC header is no profile
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if image.width * image.height < 2**20:  # the exact way takes a minute for 33 megapixels
            flags |= ImageCms.Flags.NOOPTIMIZE
        colours = ImageCms.profileToProfile(
            colours, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=flags,
        )  # fmt: skip
    if not image.has_transparency_data:
        return np.asarray(colours)
    alpha = np.asarray(image.convert("RGBA"))[..., 3:] / 255
    return np.asarray(colours) * alpha + np.array(BACKGROUND) * (1 - alpha)


def gray(levels: np.ndarray) -> np.ndarray:
    return levels[..., None].repeat(3, axis=-1)


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* (8 bits, D50) to sRGB: the CIE's formula, Bradford's adaptation, IEC 61966-2-1."""
    lightness = lab[..., 0] * (100 / 255)
    a, b = (lab[..., i].view(np.int8).astype(float) for i in (1, 2))
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1.0, 0.82521]
    d50_to_linear_srgb = np.array(  # Lindbloom: Bradford-adapted
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ d50_to_linear_srgb.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_manifest_lists_the_folder(odd: dict[Path, bool], data_dir: Path) -> None:
    assert set(odd) | {data_dir / "odd" / "MANIFEST.csv"} == set((data_dir / "odd").iterdir())
    assert {path.name for path, loads in odd.items() if not loads} == set(REASONS)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # the reference reads the same corrupt EXIF, without a mute
def test_what_pillow_loads_is_read_within_one_level(odd: dict[Path, bool]) -> None:
    num_read = 0
    for path in (path for path, loads in odd.items() if loads):
        image, expected = read_image(path), reference(path)
        assert image.dtype == np.uint8
        assert image.shape == expected.shape, path.name
        assert np.abs(image.astype(np.int16) - expected).max() <= 1, path.name
        assert read_size(path) == image.shape[:2], path.name
        num_read += 1
    assert num_read == len(odd) - len(REASONS) == 50


def test_everything_else_is_refused_with_a_reason(odd: dict[Path, bool]) -> None:
    for path in (path for path, loads in odd.items() if not loads):
        reason = REASONS[path.name]
        with pytest.raises(ImageError, match=re.escape(reason)) as from_path:
            read_image(path)
        with pytest.raises(ImageError, match="^" + re.escape(reason)) as from_bytes:
            read_image(path.read_bytes())
        assert str(from_path.value) == f"{path}: {from_bytes.value}"


def test_rotated_photos_are_upright(odd: dict[Path, bool]) -> None:
    """Sky above, ground below: a rotation applied twice, or not at all, would show here."""
    found = {path.name: path for path in odd}
    for name, is_portrait in (("Landscape_3.jpg", False), ("Portrait_5.jpg", True), ("rot1mir0.avif", False)):
        image = read_image(found[name])
        height, width, _ = image.shape
        assert (height > width) == is_portrait
        top, bottom = image[: height // 8].mean(), image[-height // 8 :].mean()
        assert top > 1.15 * bottom, name


def test_33_megapixels_take_little_more_than_their_own_array(odd: dict[Path, bool]) -> None:
    path = next(path for path in odd if path.name == "large_no_samp_7680_4320.jpg")
    code = (
        "import resource, sys, pathlib, PIL.JpegImagePlugin; from sdvae.images.read import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); image = read_image(pathlib.Path(sys.argv[1])); print(image.nbytes, (peak() - before) * 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    image_bytes, peak_bytes = map(int, run.stdout.split())
    assert image_bytes == 7680 * 4320 * 3
    decoder_bytes = 7680 * 4320 * 4  # Pillow keeps RGB in 4 bytes
    assert peak_bytes < image_bytes + decoder_bytes + 64 * 2**20
