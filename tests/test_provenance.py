"""Which VAE decoded a picture: in its metadata, read back, and never trusted."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sdvae import __version__
from sdvae.cli.main import cli
from sdvae.images.provenance import Provenance, read_facts
from sdvae.images.read import read_image
from sdvae.images.write import encode_image
from sdvae.printable import printable
from sdvae.vae import VAE

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
OURS = Provenance("0f" * 32, "sd1", "0.1.0")
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def run_cli(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="sdvae")

    return run_cli


@pytest.fixture
def vae(small_vae: VAE, tmp_path: Path) -> list[str]:
    small_vae.save(tmp_path / "vae")
    return ["--vae", str(tmp_path / "vae"), "--device", "cpu", "--dtype", "fp32"]


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_in_every_format(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(encode_image(IMAGE, format, OURS))
    facts = read_facts(path)
    assert (facts.format.lower(), facts.height, facts.width) == (format, 16, 24)
    assert (facts.provenance, facts.texts) == (OURS, {})
    plain = tmp_path / "plain"
    plain.write_bytes(encode_image(IMAGE, format))
    assert read_facts(plain).provenance is None
    assert np.array_equal(read_image(path), read_image(plain))
    assert encode_image(IMAGE, format, OURS) == path.read_bytes() != plain.read_bytes()


def test_png_and_jpeg_carry_it_where_xmp_says() -> None:
    """Exiftool and photo managers look in these places."""
    assert b"iTXtXML:com.adobe.xmp\0\0\0\0\0<?xpacket begin=" in encode_image(IMAGE, "png", OURS)
    assert b"http://ns.adobe.com/xap/1.0/\0<?xpacket begin=" in encode_image(IMAGE, "jpeg", OURS)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_every_verb_that_decodes_signs_its_pictures(
    suffix: str, run: Run, vae: list[str], small_vae: VAE, tmp_path: Path
) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    latents = small_vae.encode_images([Image.fromarray(IMAGE)]).latents[0]
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    photo, size = tmp_path / "photo.png", ["--size", "16"]
    verbs = {
        "decode": [tmp_path / "latents.safetensors", tmp_path / f"decode{suffix}", "--latents", "raw"],
        "roundtrip": [photo, "-o", tmp_path / f"roundtrip{suffix}"],
        "sample": ["-n", "1", "-o", tmp_path / f"sample{suffix}", *size],
        "interpolate": [photo, photo, "-o", tmp_path / f"interpolate{suffix}", *size, "--steps", "2"],
    }
    for verb, arguments in verbs.items():
        written = tmp_path / f"{verb}{suffix}"
        bytes_of = []
        for more in ([], [], ["--no-metadata"]):
            done = run(verb, *arguments, *vae, *more)
            assert done.exit_code == 0, done.output
            bytes_of.append(written.read_bytes())
        assert bytes_of[0] == bytes_of[1]  # no dates
        assert b"sdvae" not in bytes_of[2] and small_vae.fingerprint.encode() not in bytes_of[2]
        assert "metadata name no VAE" in run("inspect", written).stdout
        written.write_bytes(bytes_of[0])
        shown = run("inspect", written).stdout
        assert f"decoded by   the VAE {small_vae.fingerprint}, sdvae {__version__}\n" in shown
        space = small_vae.latent_space if verb == "decode" else "sd1"  # the others do not ask the probe
        assert f"latents      {space}\n" in shown
        found = json.loads(run("inspect", written, "--json").stdout)
        assert found["provenance"] == {
            "fingerprint": small_vae.fingerprint, "latent_space": space, "version": __version__,
        }  # fmt: skip


# --- metadata of strangers ---


def png(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return saved("png", pnginfo=info)


def saved(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, format, **options)
    return file.getvalue()


def exif(*, user_comment: bytes = b"", **texts: str) -> bytes:
    made = Image.Exif()
    for tag, text in {0x010E: texts.get("description"), 0x0131: texts.get("software")}.items():
        if text is not None:
            made[tag] = text
    if user_comment:
        made.get_ifd(0x8769)[0x9286] = user_comment
    return made.tobytes()


def endless_exif() -> bytes:
    """A directory whose only entry points to itself as the directory of the camera, which points to itself again."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8)


def raw_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk, which Pillow itself would not write."""
    whole = saved("png")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole[:33] + chunk + whole[33:]


FORGED = OURS.to_xmp()
HOSTILE = {
    "escapes in a text": (png(parameters="\x1b]0;owned\x07 a\r\nb\u202e"), r"\x1b]0;owned\x07 a\r\nb\u202e"),
    "escapes in a name": (png(**{"na\x1bme": "x"}), r"na\x1bme: x"),
    "megabytes": (png(workflow="{" + "w" * 5_000_000), "... (5,000,001 characters)"),
    "many": (png(**{f"key{i}": "v" for i in range(500)}), "key19: v"),
    "latin-1 that is no UTF-8": (raw_chunk(b"iTXt", b"Comment\0\0\0\0\0caf\xe9"), ""),
    "a text chunk cut short": (raw_chunk(b"tEXt", b"\0"), ""),
    "a profile that is no profile": (raw_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\x1b[2J")), "4 bytes"),
    "JPEG comment": (saved("jpeg", comment=b"\x1b[31m\xff\xfe"), r"\x1b[31m"),
    "EXIF": (saved("jpeg", exif=exif(software="\x1b[1m", description="d" * 60_000)), r"EXIF Software: \x1b[1m"),
    "EXIF of A1111": (saved("jpeg", exif=exif(user_comment=b"UNICODE\0\0\x1b\0c\0a\0t")), r"UserComment: \x1bcat"),
    "EXIF that points to itself": (saved("jpeg", exif=endless_exif()), ""),
    "EXIF that is none": (saved("webp", exif=b"Exif\0\0\xff\xff\xff\xff"), ""),
    "XMP with entities": (saved("jpeg", xmp=b"<!DOCTYPE x [<!ENTITY a 'aaa'>]><x>&a;</x>"), "xmp: "),
    "a forged fingerprint": (saved("jpeg", xmp=FORGED.replace("0f0f", "\x1b[0m").encode()), "name no VAE"),
    "a forged space": (saved("webp", xmp=FORGED.replace('"sd1"', '"\x1b[7m"').encode()), "name no VAE"),
    "a forged version": (saved("jpeg", xmp=FORGED.replace("0.1.0", "9" * 500).encode()), "name no VAE"),
    "a word for another": (saved("jpeg", xmp=b'sdvae:fingerprint="abc" sdvae:latentSpace="x" sdvae:version="1"'), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_are_shown_as_text_and_within_bounds(name: str, run: Run, tmp_path: Path) -> None:
    content, told = HOSTILE[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    done = run("inspect", path)
    assert done.exit_code == 0, done.output
    assert told in done.stdout
    assert all(line.isprintable() and len(line) < 300 for line in done.stdout.splitlines())
    assert len(done.stdout) < 6000
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["provenance"] is None and len(json.dumps(found)) < 6000
    assert read_image(path).shape == IMAGE.shape  # as a photo it is read all the same, and nothing of it is believed


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\x89PNG\r\n\x1a\n", "PNG header is corrupt"), (b"\xff\xd8\xff\xe0\0", "JPEG header is corrupt")],
)
def test_a_picture_that_is_none_is_one_sentence(content: bytes, told: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    done = run("inspect", tmp_path / "a.png")
    assert done.exit_code == 1 and told in done.stderr and done.stderr.count("\n") == 1


def test_printable_cuts_and_escapes() -> None:
    assert printable("a\x1bb\nc") == r"a\x1bb\nc"
    assert printable("abcdef", 3) == "abc... (6 characters)"
    assert printable("abc", 3) == "abc"
    assert printable("\ud800 \u200b ü 猫") == r"\ud800 \u200b ü 猫"
