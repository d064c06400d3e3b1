"""Picture files of a report's folder, as pictures inside its page."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from sdvae.errors import ReportError
from sdvae.evaluate.results import Picture as File
from sdvae.report.pictures import heated, lossless
from sdvae.report.view import Picture

_KINDS = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg"}
_MOST_PIXELS = 2**24  # of a small grey picture that is drawn anew


def embed(folder: Path, picture: File, alt: str) -> Picture:
    """The file as it is."""
    data = _read(folder, picture)
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    if kind is None:
        raise ReportError(f"{folder / picture.file} is neither PNG nor WebP nor JPEG; run sdvae eval again")
    src = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(src, alt, picture.width, picture.height, picture.is_lossless)


def embed_heat(folder: Path, picture: File, alt: str) -> Picture:
    """A grey file as heat: black stays black, white becomes the brightest."""
    return heated(_grey(folder, picture) / 255.0, alt)


def embed_squares(folder: Path, picture: File, count: int, of: str) -> list[Picture]:
    """The planes of a grey file that has them side by side."""
    planes = np.split(_grey(folder, picture), count, axis=1)
    return [lossless(plane, f"Latent channel {number} of {of}") for number, plane in enumerate(planes)]


def _grey(folder: Path, picture: File) -> np.ndarray:
    with Image.open(io.BytesIO(_read(folder, picture))) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ReportError(f"{folder / picture.file} is larger than any picture of a report; run sdvae eval again")
        return np.asarray(image.convert("L"))


def _read(folder: Path, picture: File) -> bytes:
    path = (folder / picture.file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ReportError(f"results.json names {picture.file}, which lies outside of {folder}; it is not read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}; run sdvae eval again") from error
