"""HEIC and JPEG XL by Pillow's plugins, against what the plugins' own libraries decode."""

import base64
import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps
from pillow_heif import as_plugin
from pillow_jxl import JpegXLImagePlugin

from sdvae.errors import ImageError
from sdvae.images import plugins
from sdvae.images.read import read_image, read_size

# 64x40 pixels whose header turns them by 90 degrees; made by libjxl and a patch of the header. No plugin writes this.
TURNED = base64.b64decode(
    b"/woJjgViAAgAAQC0AksoMd2kve2OFBQeZoWH9SEVFCSUnCSCiALHQ2QMVo8aJ0devMPdEsTISMYgEgtChw7EYNUYvOoCoQcYiQ4A"
    b"jNf6u/wfYg0TGcs/+/j/B5D/AK3/gDifwGG/A47oAeAxGM//AIf/ABRUICUPRdcxEDQKnHnzwxWEFfgu2DJ8HpvCYYQMJsCZ3n1I"
    b"iKxyP8/mkkx7W8UN6sq0FK6QNgjNISD8VXkWXZx2mL9I4GQB"
)


def photo(height: int = 40, width: int = 64) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([4 * rows, 2 * columns, 255 - 3 * rows], -1).clip(0, 255).astype(np.uint8)
    image[:8, :8] = [255, 0, 0]
    return image


def heic(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.encoderinfo = {"quality": -1, "chroma": 444, **options}  # type: ignore[attr-defined]
    as_plugin._save_heif(image, file, "")
    return file.getvalue()


def jpeg_xl(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.encoderinfo = {"lossless": True, **options}  # type: ignore[attr-defined]
    JpegXLImagePlugin._save(image, file, "")
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def display_p3() -> bytes:
    """sRGB's profile with the primaries of Display P3, adapted to D50."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for tag, xyz in primaries.items():
        (place,) = struct.unpack(">I", profile[profile.index(tag) + 4 :][:4])
        values = struct.pack(">3i", *(round(value * 65536) for value in xyz))
        profile = profile[: place + 8] + values + profile[place + 20 :]
    return profile


def photo_in_turned() -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:40, :64]
    image = (4 * rows + 2 * columns)[..., None] + np.array([0, 20, 40])
    image[:8, :8] = [255, 0, 0]
    return image.clip(0, 255).astype(np.uint8)


def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_upright_by_its_own_boxes(orientation: int) -> None:
    image = Image.fromarray(photo())
    image.info["exif"] = turned(orientation)
    data = heic(image)
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert read_size(data) == upright.shape[:2]
    assert distance(read_image(data), upright) <= 2


def test_a_heic_in_display_p3_becomes_srgb() -> None:
    profile = display_p3()
    image = Image.fromarray(photo())
    image.info["icc_profile"] = profile
    data = heic(image)
    own = pillow_heif.open_heif(data).to_pillow()
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.profileToProfile(own, source, ImageCms.createProfile("sRGB"), 1, flags=flags)
    assert srgb is not None and distance(np.asarray(srgb), photo()) > 20
    assert distance(read_image(data), np.asarray(srgb)) <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_lossless_jpeg_xl_is_exact_in_every_mode(mode: str) -> None:
    image = Image.fromarray(np.dstack([photo(), photo()[..., 1]])).convert(mode)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    assert distance(read_image(jpeg_xl(image)), np.asarray(canvas.convert("RGB"))) <= 1


def test_a_deep_jpeg_xl_is_read_by_its_profile() -> None:
    light = photo()[..., 0] / 255  # the plugin declares 16 bits as linear light
    deep = Image.fromarray(np.rint(light * 65535).astype(np.uint16))
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    lit = np.s_[16:]  # 8 bits of linear light are coarse in the dark
    assert distance(read_image(jpeg_xl(deep))[lit][..., 0], np.rint(255 * curve[lit]).astype(np.uint8)) <= 2


def test_a_jpeg_xl_is_upright_by_its_header_and_not_by_exif() -> None:
    assert distance(read_image(TURNED), np.rot90(photo_in_turned(), -1)) == 0 and read_size(TURNED) == (64, 40)
    data = jpeg_xl(Image.fromarray(photo()), exif=turned(6), use_container=True)
    assert distance(read_image(data), photo()) == 0


def test_a_jpeg_in_a_jpeg_xl_is_upright_by_exif(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=turned(6))
    with Image.open(tmp_path / "a.jpg") as image:
        data = jpeg_xl(image, lossless_jpeg=True)
    assert distance(read_image(data), read_image(tmp_path / "a.jpg")) == 0 and read_size(data) == (64, 40)


def test_a_huge_jpeg_xl_is_refused_by_its_header() -> None:
    bits = [0, 1, 1, *[1] * 30, 1, 0, 0]  # 2^30 rows, and as many columns
    header = sum(bit << place for place, bit in enumerate(bits)).to_bytes(8, "little")
    bare = b"\xff\x0a" + header
    for data in (bare, b"\0\0\0\x0cJXL \r\n\x87\n" + (8 + 4 + len(bare)).to_bytes(4, "big") + b"jxlp\0\0\0\0" + bare):
        with pytest.raises(ImageError, match="too large: 1073741824x1073741824 is more than"):
            read_size(data)


@pytest.mark.parametrize("kind", ["HEIC", "JPEG XL"])
def test_a_damaged_file_is_refused_with_a_reason(kind: str) -> None:
    whole = (heic if kind == "HEIC" else jpeg_xl)(Image.fromarray(photo()))
    for length in range(16, len(whole) - 8, max(1, len(whole) // 23)):
        with pytest.raises(ImageError, match=rf"the {kind} data are corrupt|truncated"):
            read_image(whole[:length])


def test_an_hdr_heic_is_refused() -> None:
    image = pillow_heif.from_pillow(Image.fromarray(photo()))
    file = io.BytesIO()
    image.save(
        file, quality=90, color_primaries=9, transfer_characteristics=16, matrix_coefficients=9, full_range_flag=1
    )
    with pytest.raises(ImageError, match="an HDR image"):
        read_image(file.getvalue())


@pytest.mark.parametrize(("kind", "module"), [("HEIC", "pillow_heif"), ("JPEG XL", "pillow_jxl")])
def test_without_the_plugin_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch, kind: str, module: str) -> None:
    data = (heic if kind == "HEIC" else jpeg_xl)(Image.fromarray(photo()))
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)
    with pytest.raises(ImageError) as refused:
        read_image(data)
    assert str(refused.value) == f"reading {kind} needs {module}, which is not installed; pip install 'sdvae[formats]'"


def test_an_avif_in_a_heif_brand_stays_with_pillow() -> None:
    def head(major: bytes, *others: bytes) -> bytes:
        box = b"ftyp" + major + b"\0\0\0\0" + b"".join(others)
        return (4 + len(box)).to_bytes(4, "big") + box

    assert plugins.plugin_kind(head(b"mif1", b"mif1", b"avif")) is None
    assert plugins.plugin_kind(head(b"avif", b"mif1")) is None
    assert plugins.plugin_kind(head(b"mif1", b"heic")) == plugins.plugin_kind(head(b"heic")) == "HEIC"


def test_plugins_are_not_imported_before_they_are_needed() -> None:
    code = (
        "import sys, io; from PIL import Image; from sdvae.images.read import read_image\n"
        "file = io.BytesIO(); Image.new('RGB', (4, 4)).save(file, 'PNG'); read_image(file.getvalue())\n"
        "print([name for name in sys.modules if name.startswith(('pillow_heif', 'pillow_jxl'))], 'HEIF' in Image.OPEN)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[] False"
