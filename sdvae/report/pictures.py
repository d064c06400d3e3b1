"""Arrays to pictures inside a page: photos, error heat maps, latent channels, maps of the posterior's std."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdvae.report.view import Picture

Levels = NDArray[np.uint8]  # (H, W, 3), or (H, W) for grey

WHOLE_PX = 768  # the longer side of a whole view
ERROR_PX = 384  # of an error map, which is smooth enough
HEAT_LEVELS = 48  # of 255: the error at which the heat map is at its brightest
LATENT_STDS = 3.0  # scaled latents from -3 (black) to 3 (white)
STD_RANGE = (1e-3, 1.0)  # of scaled latents, in the map of the posterior's std; its scale is logarithmic
_WEBP_QUALITY = 82
# From black through the accent of the page to paper white; lightness grows evenly.
_HEAT_STOPS = np.array([(12, 11, 16), (74, 24, 36), (163, 45, 27), (226, 94, 30), (250, 169, 75), (255, 243, 214)])


def lossless(levels: Levels, alt: str) -> Picture:
    """A picture whose every pixel is kept."""
    return _saved(Image.fromarray(levels), alt, "png" if levels.ndim == 2 else "webp", lossless=True)


def quick(levels: Levels, alt: str) -> Picture:
    """A picture whose every pixel is kept, large but soon made."""
    return _saved(Image.fromarray(levels), alt, "png", optimize=False, compress_level=1)


def heated(unit: NDArray[np.floating], alt: str) -> Picture:  # (H, W) in [0, 1], clipped
    """Numbers as heat, from black over the page's accent to white, in 256 steps."""
    image = Image.fromarray((unit.clip(0, 1) * 255).round().astype(np.uint8)).convert("P")
    steps = np.linspace(0, 255, len(_HEAT_STOPS))
    colours = [np.interp(np.arange(256), steps, _HEAT_STOPS[:, colour]) for colour in range(3)]
    image.putpalette(np.stack(colours, -1).round().astype(np.uint8).tobytes())
    return _saved(image, alt, "png")


def whole(levels: Levels, alt: str, longest_px: int = WHOLE_PX) -> Picture:
    """A view of a whole photo, no larger than `longest_px`, compressed with loss."""
    return _saved(_fitted(levels, longest_px), alt, "webp", quality=_WEBP_QUALITY)


def error_map(before: Levels, after: Levels, alt: str, longest_px: int = ERROR_PX) -> Picture:
    """Where two photos differ: the mean over the colours of the absolute difference, as heat."""
    difference = np.abs(before.astype(np.int16) - after.astype(np.int16)).mean(-1)
    grey = (difference / HEAT_LEVELS * 255).clip(0, 255).round().astype(np.uint8)
    return heated(np.asarray(_fitted(grey, longest_px)) / 255, alt)


def channels(scaled: NDArray[np.floating], of: str) -> list[Picture]:  # (C, h, w) scaled latents
    """Each channel of the latents in greys, on one scale."""
    levels = ((scaled / LATENT_STDS + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
    return [lossless(plane, f"Latent channel {number} of {of}") for number, plane in enumerate(levels)]


def std_map(std: NDArray[np.floating], of: str) -> Picture:  # (C, h, w), of scaled latents
    """How uncertain the posterior is where: the std, its mean over the channels, as heat on a logarithmic scale."""
    low, high = np.log(STD_RANGE)
    return heated((np.log(std.mean(0).clip(1e-12)) - low) / (high - low), f"Posterior std of {of}")


def _fitted(levels: Levels, longest_px: int) -> Image.Image:
    image = Image.fromarray(levels)
    longest = max(image.size)
    if longest <= longest_px:
        return image
    width, height = (max(1, round(side * longest_px / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _saved(image: Image.Image, alt: str, kind: str, **options: Any) -> Picture:
    file = io.BytesIO()
    image.save(file, kind, **({"optimize": True} if kind == "png" else {"method": 4}) | options)
    src = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(src, alt, image.width, image.height, kind == "png" or options.get("lossless", False))
