"""Reading and writing images: every expectation here comes from the formats, written without sdvae's own helpers."""

import base64
import io
import logging
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import sdvae.images.colour
import sdvae.images.read
from sdvae.errors import ImageError
from sdvae.images.read import from_pil, read_image, read_size
from sdvae.images.write import encode_image

ORIENTATION = 0x0112


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of packed rows without filter bytes, with more chunks before and after its picture."""
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(lines)) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def deep_planes(dtype: type) -> bytes:
    """A TIFF whose reds, greens and blues lie apart."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((3, 2, 2), dtype), photometric="rgb", planarconfig="separate")
    return file.getvalue()


def tiff(width: int, height: int, bits: int, data: bytes, **tags: int) -> bytes:
    """A little-endian, uncompressed, one-strip, one-channel TIFF."""
    number = {"subfile": 254, "photometric": 262, "sample_format": 339, "dng_version": 50706}
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    values |= {number[name]: value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(values)) + entries + b"\0" * 4


@pytest.mark.parametrize(("format", "magic"), [("png", b"\x89PNG"), ("webp", b"RIFF")])
def test_lossless_formats_return_every_pixel(format: str, magic: bytes) -> None:
    image = noise(33, 20)
    data = encode_image(image, format)
    assert data.startswith(magic)
    assert np.array_equal(read_image(data), image)


def test_jpeg_keeps_colour_at_full_resolution() -> None:
    red_and_blue = np.zeros((16, 16, 3), np.uint8)
    red_and_blue[:, ::2, 0] = red_and_blue[:, 1::2, 2] = 255  # 4:2:0 would mix the columns to purple
    difference = read_image(encode_image(red_and_blue, "jpeg")).astype(int) - red_and_blue
    assert np.abs(difference).max() < 16


def test_what_cannot_be_written_is_said() -> None:
    with pytest.raises(ImageError, match="cannot write images as 'tiff'; the formats are png, jpeg, webp"):
        encode_image(noise(8, 8), "tiff")
    with pytest.raises(ImageError, match="webp cannot hold an image of 16400x1"):
        encode_image(noise(1, 16400), "webp")


# --- Orientation ---

# What each EXIF orientation asks for, in the words of the standard: where the stored row 0 and column 0 are.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.transpose(1, 0, 2),  # left, top
    6: lambda stored: np.rot90(stored, -1),  # right, top
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),  # right, bottom
    8: lambda stored: np.rot90(stored),  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}), ("JPEG", {"quality": 100, "subsampling": 0}),
    ],
)  # fmt: skip
def test_orientation_is_applied_once(
    format: str, options: dict[str, object], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdvae.images.read, "_BAND_PIXELS", 24 * 5)  # bands of 5 rows: 5, 5, 5, 1
    stored = noise(4, 6, seed=orientation).repeat(4, axis=0).repeat(4, axis=1)  # 16x24 blocks: kind to lossy codecs
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(Image.fromarray(stored), format, exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    image = read_image(data)
    assert image.shape == expected.shape
    assert read_size(data) == expected.shape[:2]
    tolerance = 0 if format in ("PNG", "WEBP", "TIFF") else 12  # YCbCr at the highest quality
    assert np.abs(image.astype(int) - expected).max() <= tolerance


def test_orientation_behind_the_picture_of_a_png_counts() -> None:
    stored = noise(2, 3)
    exif = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, ORIENTATION, 3, 1, 6) + b"\0" * 4
    plain = png(3, 2, 8, 2, stored.tobytes())
    late = png(3, 2, 8, 2, stored.tobytes(), after=chunk(b"eXIf", exif))
    assert read_size(plain) == (2, 3)
    assert read_size(late) == (3, 2)
    assert np.array_equal(read_image(late), UPRIGHT[6](stored))


def test_a_tiff_that_tells_its_orientation_in_xmp_alone() -> None:
    stored = noise(2, 3)
    data = saved(Image.fromarray(stored), "TIFF", tiffinfo={700: b'<x tiff:Orientation="6"/>'})
    assert read_size(data) == (3, 2)
    assert np.array_equal(read_image(data), UPRIGHT[6](stored))


def test_an_icon_has_the_size_of_its_image() -> None:
    icon = bytearray(saved(Image.new("RGB", (64, 64)), "ICO", sizes=[(64, 64)]))
    icon[6] = icon[7] = 16  # what its directory says
    assert read_size(bytes(icon)) == read_image(bytes(icon)).shape[:2] == (64, 64)


def test_read_size_decodes_nothing() -> None:
    whole = png(3000, 2000, 8, 0, bytes(3000 * 2000))
    assert read_size(whole[: len(whole) // 2]) == (2000, 3000)


def test_exif_that_makes_no_sense_is_no_orientation() -> None:
    stored = noise(2, 3)
    for junk in (b"Exif\0\0junk", b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, ORIENTATION, 3, 1, 9) + b"\0" * 4):
        data = png(3, 2, 8, 2, stored.tobytes(), before=chunk(b"eXIf", junk))
        assert np.array_equal(read_image(data), stored)


# --- Transparency ---


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    a = alpha[..., None] / 255
    return colour * a + np.array(background) * (1 - a)


@given(
    st.tuples(*[st.integers(0, 255)] * 3), st.integers(0, 255), st.tuples(*[st.integers(0, 255)] * 3),
    st.sampled_from(["PNG", "WEBP", "TIFF"]),
)  # fmt: skip
@settings(max_examples=60)
def test_alpha_is_composited_over_the_background(
    colour: tuple[int, int, int], alpha: int, background: tuple[int, int, int], format: str
) -> None:
    image = Image.new("RGBA", (3, 2), (*colour, alpha))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    got = read_image(saved(image, format, **options), background=background)
    expected = over(np.full((2, 3, 3), colour), np.full((2, 3), alpha), background)
    assert np.abs(got - expected).max() <= 0.5 + 1e-9  # the nearest level


def test_gray_with_alpha_and_palettes_with_alpha() -> None:
    gray, alpha = noise(4, 5)[..., 0], noise(4, 5, seed=1)[..., 0]
    background = (10, 200, 90)
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    expected = over(gray[..., None].repeat(3, -1), alpha, background)
    assert np.abs(read_image(saved(image, "PNG"), background=background) - expected).max() <= 0.5 + 1e-9

    indices = bytes([0, 1, 2, 2, 1, 0])
    palette, alphas = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]), bytes([0, 128])  # the third colour is opaque
    data = png(3, 2, 8, 3, indices, before=chunk(b"PLTE", palette) + chunk(b"tRNS", alphas))
    colours = np.frombuffer(palette, np.uint8).reshape(3, 3)[list(indices)].reshape(2, 3, 3)
    expected = over(colours, np.array([0, 128, 255])[list(indices)].reshape(2, 3), background)
    assert np.abs(read_image(data, background=background) - expected).max() <= 0.5 + 1e-9


def test_premultiplied_alpha_is_undone_before_compositing() -> None:
    premultiplied = Image.frombytes("RGBa", (1, 1), bytes([100, 50, 0, 128]))
    # What is there plus what shines through: 100 + (1 - 128/255) * 255 = 227 and so on.
    assert np.abs(from_pil(premultiplied)[0, 0].astype(int) - [227, 177, 127]).max() <= 1


@pytest.mark.parametrize(
    ("bits", "rows", "key", "expected"),
    [
        (1, [0b01000000], 1, [0, 7, 0]),
        (2, [0b00011011], 2, [0, 85, 7]),
        (4, [0x05, 0xA0], 5, [0, 7, 170]),
        (8, [9, 5, 0], 5, [9, 7, 0]),
        (16, [1, 0, 1, 1, 255, 255], 0x0101, [1, 7, 255]),  # 0x0100 is another gray, though it looks the same
    ],
)
def test_the_transparent_gray_of_a_png(bits: int, rows: list[int], key: int, expected: list[int]) -> None:
    data = png(3, 1, bits, 0, bytes(rows), before=chunk(b"tRNS", struct.pack(">H", key)))
    assert read_image(data, background=(7, 7, 7))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png(bits: int) -> None:
    colours = np.array([[[10, 20, 30], [10, 20, 31], [0, 0, 0]]], np.uint16) * (1 if bits == 8 else 257)
    rows = colours.astype(">u2" if bits == 16 else np.uint8).tobytes()
    data = png(3, 1, bits, 2, rows, before=chunk(b"tRNS", struct.pack(">3H", *colours[0, 0].tolist())))
    assert read_image(data)[0].tolist() == [[255, 255, 255], [10, 20, 31], [0, 0, 0]]


def test_an_opaque_image_does_not_see_the_background() -> None:
    image = noise(4, 4)
    for mode in ("RGB", "RGBA", "RGBX"):
        assert np.array_equal(from_pil(Image.fromarray(image).convert(mode), background=(1, 2, 3)), image)


# --- More than 8 bits ---


def test_16_bits_are_scaled_to_the_nearest_level() -> None:
    values = np.arange(0, 65536, 7, dtype=np.uint16)[:9362].reshape(62, 151)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(read_image(png(151, 62, 16, 0, values.astype(">u2").tobytes()))[..., 1], expected)
    assert np.array_equal(read_image(tiff(151, 62, 16, values.astype("<u2").tobytes()))[..., 1], expected)
    assert np.array_equal(read_image(b"P5 151 62 65535 " + values.astype(">u2").tobytes())[..., 1], expected)
    assert np.array_equal(from_pil(Image.fromarray(values.astype(np.int32)))[..., 1], expected)


def test_other_depths_are_scaled_by_their_own_white() -> None:
    ten_bits = np.arange(0, 1024, 3, dtype=">u2")
    image = read_image(b"P5 %d 1 1023 " % len(ten_bits) + ten_bits.tobytes())
    assert np.abs(image[0, :, 0] - ten_bits / 1023 * 255).max() <= 0.51  # through 16 bits: one rounding more
    twelve_bits = tiff(2, 1, 12, bytes([0xFF, 0xF8, 0x00]))  # 4095 and 2048, packed
    assert read_image(twelve_bits)[0, :, 0].tolist() == [255, 128]
    white_is_zero = tiff(3, 1, 16, np.array([0, 257, 65535], "<u2").tobytes(), photometric=0)
    assert read_image(white_is_zero)[0, :, 0].tolist() == [255, 254, 0]


def test_16_bit_colour_is_scaled_within_one_level() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 3)).astype(">u2")
    image = read_image(png(16, 16, 16, 2, values.tobytes()))
    assert np.abs(image - values / 257).max() <= 1  # Pillow keeps the high byte
    image = read_image(b"P6 16 16 65535 " + values.tobytes())
    assert np.abs(image - values / 257).max() <= 1


def test_floats_mean_0_to_1_or_else_their_own_range() -> None:
    def read(*values: float) -> list[int]:
        data = tiff(len(values), 1, 32, np.array(values, "<f4").tobytes(), sample_format=3)
        return read_image(data)[0, :, 0].tolist()

    assert read(0.0, 0.5, 1.0) == [0, 128, 255]
    assert read(0.25, 0.2, 0.31) == [64, 51, 79]  # inside the range nothing is stretched
    assert read(-1.0, 0.0, 3.0) == [0, 64, 255]
    assert read(100.0, 200.0, 300.0) == [0, 128, 255]
    assert read(5.0, 5.0, 5.0) == [0, 0, 0]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for position in range(3):
            with pytest.raises(ImageError, match="NaN or infinity"):
                read(*(bad if i == position else 0.5 for i in range(3)))
    signaling_nan = b"\x01\0\x80\x7f" + np.float32(0.5).tobytes()
    with pytest.raises(ImageError, match="NaN or infinity"):
        read_image(tiff(2, 1, 32, signaling_nan, sample_format=3))


def test_32_bit_integers_beyond_16_bits_use_their_own_range() -> None:
    image = Image.fromarray(np.array([[-100_000, 0, 100_000]], np.int32))
    assert from_pil(image)[0, :, 0].tolist() == [0, 128, 255]


# --- Colour ---


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def red_blue_swapped_profile() -> bytes:
    """An RGB profile whose red light is sRGB's blue, and the other way round."""
    data = srgb_profile()
    assert data.count(b"rXYZ") == data.count(b"bXYZ") == 1
    return data.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")


def cmyk_profile() -> bytes:
    """A printer whose cyan ink is orange: paper white, black black, cyan at Lab (65, 50, 70), the rest black."""

    def lab8(lightness: float, a: float, b: float) -> list[int]:
        return [round(lightness * 2.55), round(a + 128), round(b + 128)]

    clut = [lab8(0, 0, 0)] * 16  # 2 points an ink; black ink runs fastest
    clut[0b0000] = lab8(100, 0, 0)
    clut[0b1000] = lab8(65, 50, 70)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *[65536 if i % 4 == 0 else 0 for i in range(9)])
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(np.array(clut, np.uint8)) + ramp * 3
    lut += b"\0" * (-len(lut) % 4)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text\0\0\0\0none\0\0\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78 + b"\0" * 0
    description += b"\0" * (-len(description) % 4)
    tags, body, offset = b"", b"", 128 + 4 + 12 * 4
    for name, data in ((b"A2B0", lut), (b"wtpt", white), (b"cprt", text), (b"desc", description)):
        tags += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4s4s4s4s4s", offset + len(body), b"\0" * 4, b"\x02\x10\0\0", b"prtr", b"CMYK", b"Lab ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061) + b"\0" * 48
    return header + struct.pack(">I", 4) + tags + body


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_a_profile_is_converted_to_srgb(format: str) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:] = (200, 60, 20)
    data = saved(Image.fromarray(image), format, icc_profile=red_blue_swapped_profile(), quality=100)
    assert np.abs(read_image(data).astype(int) - (20, 60, 200)).max() <= 3  # one level, and what the codec loses


def test_the_profile_holds_for_the_image_and_not_for_the_background() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    data = saved(image, "PNG", icc_profile=red_blue_swapped_profile())
    expected = [[0, 0, 255], [255, 128, 0]]
    assert np.abs(read_image(data, background=(255, 128, 0))[0].astype(int) - expected).max() <= 1


def test_an_srgb_profile_changes_no_pixel() -> None:
    image = noise(64, 64)
    assert np.array_equal(read_image(saved(Image.fromarray(image), "PNG", icc_profile=srgb_profile())), image)


def test_gray_under_an_rgb_profile_stays_gray() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None]
    image = read_image(saved(Image.fromarray(ramp), "PNG", icc_profile=red_blue_swapped_profile()))
    assert np.abs(image.astype(int) - ramp[..., None]).max() <= 1


def test_cmyk_with_and_without_a_profile() -> None:
    inks = Image.new("CMYK", (3, 1), (0, 0, 0, 0))
    inks.putpixel((1, 0), (255, 0, 0, 0))
    inks.putpixel((2, 0), (0, 0, 0, 255))
    plain = read_image(saved(inks, "TIFF"))
    assert plain[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    profiled = read_image(saved(inks, "TIFF", icc_profile=cmyk_profile()))[0].astype(int)
    assert np.abs(profiled[0] - 255).max() <= 2
    assert np.abs(profiled[2]).max() <= 2
    assert np.abs(profiled[1] - [249, 115, 19]).max() <= 12  # Lab (65, 50, 70) as computed from CIE's formulas


def test_lab_is_converted() -> None:
    lab = Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 138, 81, 70]))  # a and b are signed: white; Lab (54, 81, 70)
    image = from_pil(lab)[0].astype(int)
    assert np.abs(image - [[255, 255, 255], [255, 0, 0]]).max() <= 8  # sRGB's red, to Lab's whole numbers


@pytest.mark.parametrize(
    ("mode", "profile", "logged"),
    [
        ("RGB", b"junk", "cannot be used"),
        ("RGB", srgb_profile()[:200], "cannot be used"),
        ("RGB", cmyk_profile(), "a colour profile for CMYK in a RGB image is ignored"),
        ("CMYK", srgb_profile(), "a colour profile for RGB in a CMYK image is ignored"),
    ],
)
def test_a_profile_that_cannot_be_used_is_logged(
    mode: str, profile: bytes, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    sdvae.images.colour._srgb_transform.cache_clear()  # each profile is logged once
    image = Image.fromarray(noise(8, 8)).convert(mode)
    with caplog.at_level(logging.WARNING, logger="sdvae.images.colour"):
        got = read_image(saved(image, "TIFF", icc_profile=profile))
    assert np.array_equal(got, np.asarray(image.convert("RGB")))
    assert [logged in record.message for record in caplog.records] == [True]


# --- Formats ---

# An arithmetic-coded JPEG (jpegtran -arithmetic) of 2x3 blocks of colour, 8 px each.
ARITHMETIC = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU
GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAQABgDASIA
AhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD3JA0zGkm09Mt795KUxpnMyRGFGDVwEUmOWWDuy031dZIKLUpfY6GQAqFliamsRgpz9tMjGP/Z
"""


def test_arithmetic_jpeg() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    expected = blocks.repeat(8, axis=0).repeat(8, axis=1)
    image = read_image(base64.b64decode(ARITHMETIC))
    luma = np.array([0.299, 0.587, 0.114])  # the chroma of neighbouring blocks is mixed: 4:2:0
    assert np.abs((image - expected.astype(float)) @ luma).max() < 8


def test_adobe_cmyk_and_progressive_jpeg() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 200, 40, 30))  # Pillow writes Adobe's marker and inverted inks, as Photoshop
    expected = np.array([255, 55, 215]) * (225 / 255)
    assert np.abs(read_image(saved(ink, "JPEG", quality=100)) - expected).max() <= 3
    image = np.full((32, 32, 3), (180, 90, 30), np.uint8)
    assert np.abs(read_image(saved(Image.fromarray(image), "JPEG", progressive=True)).astype(int) - image).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_the_first_frame_is_read(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(read_image(data).astype(int) - (200, 0, 0)).max() <= 6
    assert read_size(data) == (16, 16)


@pytest.mark.parametrize("format", ["BMP", "JPEG2000", "PPM", "ICO", "TIFF", "PNG"])
def test_lossless_formats_are_read_exactly(format: str) -> None:
    image = noise(16, 16)
    options = {"irreversible": False} if format == "JPEG2000" else {}
    assert np.array_equal(read_image(saved(Image.fromarray(image), format, **options)), image)


def test_bilevel_and_palette() -> None:
    assert read_image(b"P1 3 1 1 0 1")[0, :, 0].tolist() == [0, 255, 0]  # in PBM 1 is black
    palette = bytes([9, 8, 7, 90, 80, 70])
    assert read_image(png(2, 1, 8, 3, b"\1\0", before=chunk(b"PLTE", palette)))[0].tolist() == [[90, 80, 70], [9, 8, 7]]


def test_every_kind_of_source(tmp_path: Path) -> None:
    image = noise(3, 5)
    data = encode_image(image, "png")
    path = tmp_path / "photo.jpg"  # the name says nothing: the bytes do
    path.write_bytes(data)
    stream = io.BytesIO(data)
    for source in (path, data, stream):
        assert np.array_equal(read_image(source), image)
    assert not stream.closed
    with pytest.raises(AttributeError, match="read"):  # a mistake of the caller is no damaged image
        read_image(image)
    assert np.array_equal(from_pil(Image.open(path)), image)


# --- Refusals ---


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "the HEIC data are corrupt, or of a kind that cannot be decoded"),
        (b"\xff\x0a\xfa\x7f", "the JPEG XL data are corrupt"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "the JPEG XL data are corrupt"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', r"\(SVG\)"),
        (b"\n<!DOCTYPE html><html>", r"\(HTML, perhaps a page saved in place of the image\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"%PDF-1.7", r"\(PDF\)"),
        (b"8BPS\0\1", r"\(Photoshop\)"),
        (b"hello", "not an image in a format sdvae reads: JPEG, PNG, WebP, "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format sdvae reads: "),
        (saved(Image.new("RGB", (8, 8)), "PCX"), "not an image in a format sdvae reads: "),  # Pillow could
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x08\0\x08\1\1\x11\0", "the JPEG header is corrupt, or of a kind"),
        (png(1, 1, 8, 0, b"\0")[:20], "the PNG header is corrupt|truncated"),
        (tiff(1, 1, 8, b"\0", dng_version=1), "a camera raw file, whose first image is only a preview"),
        (tiff(1, 1, 8, b"\0", subfile=1), "a camera raw file, whose first image is only a preview"),
        (tiff(1, 1, 32, b"\0\0\0\xff"), "a TIFF of 32-bit integers, which Pillow cuts to 31"),
        (deep_planes(np.uint16), "a TIFF with its deep colours in separate planes"),
        (deep_planes(np.float32), r"the TIFF header is corrupt, or of a kind that .* \(colours of 12 bits or in float"),
    ],
)
def test_what_is_no_image_is_told_what_it_is(data: bytes, reason: str) -> None:
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match=reason) as caught:
            read(data)
        assert " at 0x" not in str(caught.value)


def test_a_path_is_named_and_bytes_are_not(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"hello")
    with pytest.raises(ImageError, match=f"^{path}: not an image"):
        read_image(path)
    with pytest.raises(ImageError, match=r"^not an image"):
        read_image(b"hello")
    with pytest.raises(ImageError, match=f"^{tmp_path / 'none.png'}: cannot be read: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        read_size(tmp_path)


def test_bombs_are_refused_by_their_header() -> None:
    bomb = png(30_000, 30_000, 1, 0, b"\0" * 30_000)  # 900 megapixels, and rows for none of them
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match="too large: more than the limit of 134,217,728 pixels"):
            read(bomb)
    medium = png(12_000, 12_000, 1, 0, b"\0" * 12_000)  # Pillow lets 144 megapixels pass with a warning
    with pytest.raises(ImageError, match="too large: 12000x12000 is more than the limit of 134,217,728 pixels"):
        read_image(medium)
    assert read_size(medium, max_pixels=144_000_000) == (12_000, 12_000)
    small = saved(Image.new("L", (10, 10)), "PNG")
    assert read_image(small, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="10x10 is more than the limit of 99 pixels"):
        read_image(small, max_pixels=99)


ALL_FORMATS = {
    "JPEG": {}, "PNG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "PPM": {}, "AVIF": {}, "JPEG2000": {},
    "TIFF": {}, "TIFF lzw": {"compression": "tiff_lzw"}, "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "WEBP lossless": {"lossless": True}, "JPEG progressive": {"progressive": True}, "ICO": {"sizes": [(48, 48)]},
}  # fmt: skip


def photo_like(format: str) -> bytes:
    ramp = np.linspace(0, 255, 48)
    image = np.stack([ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, (ramp[:, None] + ramp) / 2], -1)
    image = np.clip(image + np.random.default_rng(1).normal(0, 9, image.shape), 0, 255).astype(np.uint8)
    return saved(Image.fromarray(image), format.split()[0], **ALL_FORMATS[format])


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_truncated_file_is_refused(format: str) -> None:
    data = photo_like(format)
    whole = read_image(data)
    num_refused = 0
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        try:
            # What little can be missing without harm is a trailer: then the picture is whole.
            assert np.array_equal(read_image(data[:length]), whole), length
        except ImageError as error:
            num_refused += 1
            assert " at 0x" not in str(error)
    assert num_refused >= 55


# --- Warnings ---


def warns(data: bytes) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            image.getexif()
    return bool(caught)


def test_pillow_s_warnings_stay_inside() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 9, ORIENTATION, 2, 99, 99)  # announces what is not there
    corrupt_exif = saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif)
    large = png(10_000, 9_000, 1, 0, bytes(1250 * 9_000))  # above Pillow's first limit
    assert warns(corrupt_exif)
    assert warns(large)
    before = list(warnings.filters)
    assert read_image(corrupt_exif).shape == (8, 8, 3)  # under pytest's "error" filter
    assert read_size(large) == (9_000, 10_000)
    assert list(warnings.filters) == before


def test_warnings_stay_inside_while_threads_overlap() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 9, ORIENTATION, 2, 99, 99)
    data = saved(Image.fromarray(noise(64, 64)), "JPEG", exif=exif, icc_profile=red_blue_swapped_profile())
    assert warns(data)
    before = list(warnings.filters)
    expected = read_image(data)
    with ThreadPoolExecutor(4) as threads:  # they also share one colour transform
        for image in threads.map(read_image, [data] * 200):
            assert np.array_equal(image, expected)
    assert list(warnings.filters) == before


# --- The other JPEG decoder ---


def _jpeg(mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(5).integers(0, 256, (37, 53, 3), np.uint8)
    smooth = Image.fromarray(noise).resize((150, 101), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    smooth.save(file, "jpeg", **options)
    return file.getvalue()


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return _jpeg(exif=exif.tobytes())


def _with_a_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return _jpeg(icc_profile=profile.tobytes())


@pytest.mark.parametrize(
    ("data", "is_decoded"),
    [
        *((_turned(orientation), True) for orientation in range(1, 9)),
        (_jpeg("L"), True),
        (_jpeg(progressive=True, subsampling="4:2:0"), True),
        (_jpeg(quality=30, subsampling="4:2:2"), True),
        (_jpeg("CMYK"), False),
        (_with_a_profile(), False),
    ],
)
def test_simplejpeg_gives_what_pillow_gives(data: bytes, is_decoded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def noted(*args: object, **settings: object) -> np.ndarray:
        decoded.append(simplejpeg_decode(*args, **settings))
        return decoded[-1]

    simplejpeg_decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    image = read_image(data, decoder="simplejpeg")
    assert image.flags.c_contiguous
    assert np.array_equal(image, read_image(data))
    assert len(decoded) == is_decoded


def test_what_simplejpeg_refuses_is_for_pillow_to_judge(data_dir: Path) -> None:
    files = [path for path in (data_dir / "odd").iterdir() if path.suffix in (".jpg", ".jpeg")]
    assert len(files) > 10
    for path in files:
        outcomes = []
        for decoder in ("pillow", "simplejpeg"):
            try:
                outcomes.append(read_image(path.read_bytes(), decoder=decoder).tobytes())  # type: ignore[arg-type]
            except ImageError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], path.name


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_has_at_least_the_size_asked_for(decoder: str, orientation: int) -> None:
    upright = (150, 101) if orientation == 6 else (101, 150)
    for wanted, expected in (((40, 40), 2), ((50, 75), 2), ((51, 75), 1), ((25, 37), 4), ((101, 150), 1), ((12, 9), 8)):
        wanted = wanted[::-1] if orientation == 6 else wanted
        image = read_image(_turned(orientation), decoder=decoder, at_least_px=wanted)  # type: ignore[arg-type]
        assert image.shape[0] >= wanted[0] and image.shape[1] >= wanted[1]
        if decoder == "pillow":
            assert image.shape[:2] == tuple(-(-side // expected) for side in upright)
        else:  # it has scales in between
            assert image.shape[0] <= -(-upright[0] // expected) and image.shape[1] <= -(-upright[1] // expected)


def test_only_jpeg_has_drafts() -> None:
    data = encode_image(np.zeros((64, 64, 3), np.uint8), "png")
    assert read_image(data, at_least_px=(8, 8)).shape == (64, 64, 3)


def test_a_pillow_without_littlecms_reads_as_srgb_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setitem(sys.modules, "PIL._imagingcms", None)
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", refuse)
    monkeypatch.setattr(ImageCms, "createProfile", refuse)
    sdvae.images.colour._warn_of_no_littlecms.cache_clear()
    sdvae.images.colour._srgb_transform.cache_clear()
    for number in range(2):
        assert sdvae.images.colour._srgb_transform("RGB", b"a profile %d" % number) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "colour profiles are ignored, and images that have one read as sRGB: this Pillow"
    )
    with pytest.raises(ImageError, match="a Lab image, which needs LittleCMS; this Pillow was built without"):
        sdvae.images.colour._srgb_transform("LAB", None)
    sdvae.images.colour._srgb_transform.cache_clear()
