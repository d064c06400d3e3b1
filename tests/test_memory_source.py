"""Images that a program holds: read as their files are, or quarantined one by one."""

import io
import pickle
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from sdvae.errors import ImageError
from sdvae.images.read import from_pil, read_image, read_size
from sdvae.sources.open import open_source

RAMP = np.random.default_rng(3).integers(0, 256, (12, 9, 3), np.uint8)
RGB = Image.fromarray(RAMP)
ORIENTATION = 0x0112


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _turned(format: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(RGB, format, exif=exif)


def _palette() -> bytes:
    return saved(RGB.quantize(8), "PNG", transparency=3)


def _four_bits() -> bytes:
    """A gray PNG of 4 bits whose gray 5 is transparent."""
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    data = bytearray(saved(palette, "PNG", bits=4, transparency=5))
    return bytes(data)


FILES: dict[str, bytes] = {
    **{f"{format} on its side": _turned(format) for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")},
    "CMYK": saved(RGB.convert("CMYK"), "JPEG"),
    "YCbCr": saved(RGB.convert("YCbCr"), "TIFF"),
    "LAB": saved(RGB.convert("LAB"), "TIFF"),
    "F": saved(Image.fromarray(RAMP[..., 0].astype(np.float32) / 255), "TIFF"),
    "I": saved(Image.fromarray(RAMP[..., 0].astype(np.int32) * 200), "TIFF"),
    "I;16": saved(Image.fromarray(RAMP[..., 0].astype(np.uint16) * 200), "PNG"),
    "1": saved(RGB.convert("1"), "PNG"),
    "L": saved(RGB.convert("L"), "PNG"),
    "LA": saved(RGB.convert("LA"), "PNG"),
    "P": saved(RGB.quantize(8), "PNG"),
    "P with a transparent colour": _palette(),
    "gray with a transparent gray": _four_bits(),
    "RGBA": saved(Image.merge("RGBA", (*RGB.split(), RGB.convert("L"))), "PNG"),
    "RGB with a transparent colour": saved(RGB, "PNG", transparency=tuple(map(int, RAMP[3, 3]))),
    "RGB with a profile": saved(
        RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_a_pillow_image_is_read_as_its_file_is(name: str, background: tuple[int, int, int]) -> None:
    expected = read_image(FILES[name], background=background)
    source = open_source([Image.open(io.BytesIO(FILES[name]))])
    again = pickle.loads(pickle.dumps(source))
    reads = [each.read("000000000") for each in (source, source, again)]
    assert reads[0] == reads[1] == reads[2]
    assert np.array_equal(read_image(reads[0], background=background), expected)
    assert read_size(reads[0]) == expected.shape[:2]


@pytest.mark.parametrize("mode", ["HSV", "RGBX", "La", "RGBa", "PA", "F", "I", "LAB", "YCbCr"])
def test_modes_that_no_file_has_are_read_too(mode: str) -> None:
    base = RGB.convert("RGBA") if mode in ("RGBa",) else RGB.convert("LA") if mode == "La" else RGB
    image = base.quantize(8).convert("PA") if mode == "PA" else base.convert(mode)
    data = open_source([image]).read("000000000")
    assert np.array_equal(read_image(data), from_pil(image))


BAD: list[tuple[Any, str]] = [
    (np.zeros((2, 2, 3), np.float32), r"a ndarray is float32 of shape \(2, 2, 3\); an array is uint8"),
    (np.zeros((2, 2, 4), np.uint8), r"a ndarray is uint8 of shape \(2, 2, 4\)"),
    (np.zeros((0, 2, 3), np.uint8), "the image has no pixels"),
    (torch.zeros(3, 2, 2), "a Tensor is float32"),
    (torch.zeros(3, 2, 2, requires_grad=True), "a Tensor is no image"),
    (object(), "a object is object of shape"),
    (5, "a int is int64"),
    (Image.new("RGB", (0, 3)), "the image has no pixels"),
    (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN or infinity"),
    ("a\0b", "its name holds a NUL"),
    ("/", "not a file but a device"),
    ("gone.jpg", "No such file"),
]


@pytest.mark.parametrize(("item", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_an_item_that_is_no_image_costs_itself(item: Any, message: str) -> None:
    source = open_source([RGB, {"image": item, "key": "bad"}])
    assert [entry.key for entry in source.entries()] == ["000000000", "bad"]
    assert np.array_equal(read_image(source.read("000000000")), RAMP)
    with pytest.raises(OSError, match=message) as caught:
        source.read("bad")
    assert caught.value.strerror


# --- What a program sets in Pillow ---

TRUNCATED = saved(RGB.resize((90, 120)), "JPEG")[:900]


def test_the_settings_of_a_program_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    animated = saved(RGB.quantize(8), "GIF", save_all=True, append_images=[RGB.quantize(4)], transparency=2)
    expected = read_image(animated), read_image(FILES["I"])
    settings = {
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": True,
        "PIL.Image.MAX_IMAGE_PIXELS": 10,
        "PIL.PngImagePlugin.MAX_TEXT_CHUNK": 5,
        "PIL.PngImagePlugin.MAX_TEXT_MEMORY": 5,
        "PIL.GifImagePlugin.LOADING_STRATEGY": 2,
        "PIL.TiffImagePlugin.READ_LIBTIFF": True,
        "PIL.AvifImagePlugin.DECODE_CODEC_CHOICE": "none",
    }
    for name, value in settings.items():
        monkeypatch.setattr(name, value)
    with pytest.raises(ImageError, match="truncated"):
        read_image(TRUNCATED)
    with pytest.raises(ImageError, match="truncated"):
        from_pil(_opened_lazily(TRUNCATED))
    assert np.array_equal(read_image(animated), expected[0])
    assert np.array_equal(read_image(FILES["I"]), expected[1])
    assert read_image(FILES["AVIF on its side"]).shape == (9, 12, 3)
    assert ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 10  # as the program set them


def _opened_lazily(data: bytes) -> Image.Image:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(data))
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "behind", "profile"])
def test_metadata_do_not_cost_the_picture(kind: str) -> None:
    text, long = PngImagePlugin.PngInfo(), "node " * 1_000_000
    options: dict[str, Any] = {"pnginfo": text}
    if kind == "zTXt":
        text.add_text("workflow", long, zip=True)
    elif kind == "iTXt":
        text.add_itxt("workflow", long, zip=True)
    elif kind == "tEXt":
        text.add_text("workflow", long)
    elif kind == "behind":
        text.add(b"zTXt", b"workflow\0\0" + zlib.compress(long.encode()), after_idat=True)
    else:
        options = {"icc_profile": np.random.default_rng(0).bytes(3 * 2**20)}
    data = saved(RGB, "PNG", **options)
    assert read_size(data) == (12, 9)
    assert np.array_equal(read_image(data), RAMP)


def test_metadata_that_are_refused_are_named() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * (2**26 + 1), zip=True)
    with pytest.raises(ImageError, match="its text or colour profile is larger than 64 MiB; save it without"):
        read_image(saved(RGB, "PNG", pnginfo=text))
