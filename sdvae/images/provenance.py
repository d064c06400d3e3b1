"""Which VAE decoded a picture, kept in the picture; and what else its metadata say, as text that is safe to show.

The carrier is XMP, which PNG (in iTXt), JPEG and WebP hold alike. It has no date: equal pictures are equal files.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from sdvae import __version__
from sdvae.images.failures import FAILURES
from sdvae.images.formats import spelled
from sdvae.images.read import open_image
from sdvae.printable import printable

_SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xfe]|RIFF....WEBP|GIF8", re.DOTALL)
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:sdvae="urn:sdvae:picture" xmp:CreatorTool="sdvae {version}" '
    'sdvae:version="{version}" sdvae:fingerprint="{fingerprint}" sdvae:latentSpace="{latent_space}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
# Read by pattern, never by an XML parser: of all that XMP may hold, only these three short words are ours.
_OURS = re.compile(rb'sdvae:(version|fingerprint|latentSpace)="([\w.+-]{1,80})"')
_MOST_XMP_BYTES = 1 << 16
_MOST_TEXTS, _MOST_NAME, _MOST_TEXT = 20, 40, 100
_EXIF_IFD = 0x8769


@dataclass(frozen=True)
class Provenance:
    """The VAE that decoded a picture, and the sdvae that ran it."""

    fingerprint: str
    latent_space: str
    version: str = __version__

    def to_xmp(self) -> str:
        """The metadata of a picture."""
        return _XMP.format(**vars(self))

    @classmethod
    def from_xmp(cls, data: bytes | str) -> "Provenance | None":
        """The inverse of `to_xmp`; None for metadata that sdvae did not write."""
        data = data.encode(errors="replace") if isinstance(data, str) else data
        found = {
            name.decode(): value.decode("ascii", "replace") for name, value in _OURS.findall(data[:_MOST_XMP_BYTES])
        }
        if not re.fullmatch("[0-9a-f]{64}", found.get("fingerprint", "")) or len(found) < 3:
            return None
        return cls(found["fingerprint"], found["latentSpace"], found["version"])


@dataclass(frozen=True)
class PictureFacts:
    """What a picture's file says of itself; `texts` are cut short, and hold only what a terminal may show."""

    format: str
    height: int
    width: int
    provenance: Provenance | None
    texts: dict[str, str]


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture does."""
    with path.open("rb") as file:
        return _SIGNATURES.match(file.read(16)) is not None


def read_facts(path: Path) -> PictureFacts:
    """The metadata of a picture, which is not decoded; raises ImageError for a bad header."""
    with open_image(path) as image:
        width, height = image.size
        xmp = image.info.get("xmp")
        provenance = Provenance.from_xmp(xmp) if isinstance(xmp, bytes | str) else None
        texts = dict(islice(_texts(image, is_ours=provenance is not None), _MOST_TEXTS))
        return PictureFacts(spelled(image.format or "image"), height, width, provenance, texts)


def _texts(image: Image.Image, *, is_ours: bool) -> Iterator[tuple[str, str]]:
    for name, value in image.info.items():
        if name in ("exif", "XML:com.adobe.xmp") or (name == "xmp" and is_ours):
            continue
        if name == "comment" or isinstance(value, str):
            yield printable(str(name), _MOST_NAME), _text(value)
        elif isinstance(value, bytes):
            yield printable(str(name), _MOST_NAME), f"{len(value):,} bytes"
    for tag, value in _exif(image):
        if isinstance(value, str | bytes):
            yield f"EXIF {ExifTags.TAGS.get(tag, tag)}", _text(value)


def _exif(image: Image.Image) -> Iterator[tuple[int, Any]]:
    """The tags of EXIF's first directory, and of the one of the camera; no other directory is entered."""
    try:
        exif = Image.Image.getexif(image)  # not image.getexif(): a PNG's would decode the picture
        found = [*exif.items(), *exif.get_ifd(_EXIF_IFD).items()]
    except FAILURES:
        return
    yield from found


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        encoding = "utf-16-be" if value.startswith(b"UNICODE\0") else "utf-8"  # EXIF's UserComment names its own
        return printable(re.sub(rb"\A(UNICODE|ASCII\0\0)\0", b"", value).decode(encoding, "replace"), _MOST_TEXT)
    return printable(str(value), _MOST_TEXT)
