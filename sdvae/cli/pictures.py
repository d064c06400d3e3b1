"""Image files that verbs make for people to look at: a grid with captions, a GIF."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sdvae.amounts import size_text
from sdvae.errors import OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdvae.vae import VAE

    Image = NDArray[np.uint8]  # (H, W, 3)

METADATA = click.option(
    "--no-metadata", is_flag=True, help="Leave the VAE and sdvae's version out of the metadata of the image files."
)

_FORMATS: dict[str, Literal["png", "jpeg", "webp"]] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_GAP_PX = 8
_FRAME_MS = 80


def check_output(output: Path, *inputs: Path, others: tuple[str, ...] = ()) -> None:
    """Refuse an image file that cannot be written, or is one of the inputs, before any work is done."""
    suffixes = (*_FORMATS, *others)
    if output.suffix.lower() not in suffixes:
        raise click.BadParameter(f"{output} must end with one of {' '.join(suffixes)}.", param_hint="--output")
    require_place(output)
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise OutputError(f"{output} is the input, too; give -o another name")


def require_place(output: Path) -> None:
    """Refuse a file that cannot be written, before any work is done."""
    if output.is_dir() or not output.parent.is_dir():
        what = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise OutputError(f"cannot write {output}: {what}")


def read_square(path: Path, size_px: int) -> "Image":
    """The square in the middle of a photo, (size_px, size_px, 3)."""
    from sdvae.encoding.resize import apply
    from sdvae.images.read import read_image
    from sdvae.store.geometry import Preprocess, plan_geometry

    photo = read_image(path)
    height, width, _ = photo.shape
    return apply(photo, plan_geometry(height, width, Preprocess(size_px, "center"), downscale=1))


def write_picture(path: Path, image: "Image", vae: "VAE", *, has_metadata: bool) -> None:
    """Write an image that a VAE decoded, in the format its file name asks for."""
    from sdvae import atomic
    from sdvae.images.provenance import Provenance
    from sdvae.images.write import encode_image

    provenance = Provenance(vae.fingerprint, vae.told_space) if has_metadata else None
    atomic.write_bytes(path, encode_image(image, _FORMATS[path.suffix.lower()], provenance))


def picture_facts(path: Path) -> tuple[list[str], dict[str, Any]]:
    """What the metadata of a picture say: lines for a person, and values for JSON."""
    from sdvae.images.provenance import read_facts

    found = read_facts(path)
    lines = [f"{path}: {found.format} picture, {size_text(found.height, found.width)} px"]
    if found.provenance is None:
        lines.append("decoded by   unknown: its metadata name no VAE of sdvae's")
    else:
        lines.append(f"decoded by   the VAE {found.provenance.fingerprint}, sdvae {found.provenance.version}")
        lines.append(f"latents      {found.provenance.latent_space}")
    lines += [f"metadata     {name}: {text}" for name, text in found.texts.items()]
    return lines, {"file": str(path)} | asdict(found)


def write_gif(path: Path, frames: Sequence["Image"]) -> None:
    """Write a GIF that plays the frames forward and backward in a loop."""
    from PIL import Image

    from sdvae import atomic

    first, *rest = [Image.fromarray(frame) for frame in (*frames, *frames[-2:0:-1])]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=_FRAME_MS, loop=0)
    atomic.write_bytes(path, buffer.getvalue())


def grid(images: Sequence["Image"], columns: int, captions: Sequence[str] = ()) -> "Image":
    """Images of one size in rows of `columns`, with gaps, each with its caption beneath."""
    import numpy as np

    height, width, _ = images[0].shape
    caption_px = max(12, width // 32) if captions else 0
    row_px, column_px = height + 2 * caption_px + _GAP_PX, width + _GAP_PX
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * row_px + _GAP_PX, columns * column_px + _GAP_PX, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * row_px + _GAP_PX, index % columns * column_px + _GAP_PX
        sheet[top : top + height, left : left + width] = image[..., :3]  # alpha is for files
        if captions:
            strip = sheet[top + height : top + height + 2 * caption_px, left : left + width]
            strip[:] = _text(captions[index], strip.shape[0], width, caption_px)
    return sheet


def fit_square(image: "Image", size_px: int) -> "Image":
    """A whole image in the middle of a white square, shrunk where it is larger."""
    import numpy as np
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size_px, size_px), "white")
    square.paste(small, ((size_px - small.width) // 2, (size_px - small.height) // 2))
    return np.asarray(square)


def _text(text: str, height: int, width: int, size_px: int) -> "Image":
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, height // 2), text, "black", ImageFont.load_default(size_px), anchor="lm")
    return np.asarray(strip)
