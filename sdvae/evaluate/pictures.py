"""The pictures of a report: which images are shown, and the files of each."""

import io
import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from sdvae import atomic
from sdvae.evaluate.results import PICTURES_NAME, Picture, Reason, WorstRegion

Image = NDArray[np.uint8]  # (H, W, 3), or (H, W) for greyscale

NUM_PICTURED = 12
_NUM_WORST, _NUM_MEDIAN, _NUM_BEST = 4, 2, 2
_VIEW_PX = 1600  # of the longer side of a full view
_VIEW_QUALITY = 80
_WORST_PX = 96
ERROR_FULL_SCALE = 48.0  # levels
_MAP_PX = 256  # of the longer side of an error map: its blocks are at least 4 px


def choose(scores: Sequence[float], direction: Literal["higher", "lower"]) -> list[tuple[int, tuple[Reason, ...]]]:
    """Places of the images that are shown and why, the worst first; a score of NaN is not ranked."""
    ranked = [place for place, score in enumerate(scores) if not math.isnan(score)]
    ranked.sort(key=lambda place: (scores[place] if direction == "higher" else -scores[place], place))
    middle = max(0, (len(ranked) - _NUM_MEDIAN) // 2)
    groups: dict[Reason, list[int]] = {
        "worst": ranked[:_NUM_WORST],
        "median": ranked[middle : middle + _NUM_MEDIAN],
        "best": ranked[::-1][:_NUM_BEST],
        "first": sorted(ranked),
    }
    reasons: dict[int, list[Reason]] = {}
    for reason, places in groups.items():
        for place in places:
            if place in reasons or len(reasons) < NUM_PICTURED:
                reasons.setdefault(place, []).append(reason)
    order = {place: number for number, place in enumerate(ranked)}
    return [(place, tuple(reasons[place])) for place in sorted(reasons, key=order.__getitem__)]


class PictureFolder:
    """Writes the pictures of a report."""

    def __init__(self, report: Path) -> None:
        self.folder = report / PICTURES_NAME
        atomic.make_folder(self.folder)

    def view(self, name: str, image: Image) -> Picture:
        """A whole image as lossy WebP, shrunk where it is very large."""
        photo = Pillow.fromarray(image)
        factor = _VIEW_PX / max(photo.size)
        if factor < 1:
            size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
            photo = photo.resize(size, Pillow.Resampling.LANCZOS)
        return self._write(f"{name}.webp", photo, quality=_VIEW_QUALITY, method=4)

    def exact(self, name: str, image: Image) -> Picture:
        """An image as lossless PNG."""
        return self._write(f"{name}.png", Pillow.fromarray(image), optimize=True)

    def worst(self, name: str, original: Image, reconstruction: Image, original_name: str) -> WorstRegion:
        """The square of the largest error, as lossless crops."""
        top, left, size = find_worst(original, reconstruction)
        rows, columns = slice(top, top + size), slice(left, left + size)
        return WorstRegion(
            top, left, size, self.exact(original_name, original[rows, columns]),
            self.exact(name, reconstruction[rows, columns]),
        )  # fmt: skip

    def error(self, name: str, original: Image, reconstruction: Image) -> Picture:
        """The mean |difference| of blocks of pixels, white at ERROR_FULL_SCALE levels."""
        blocks = block_errors(original, reconstruction, max(4, math.ceil(max(original.shape) / _MAP_PX)))
        return self.exact(name, (blocks / ERROR_FULL_SCALE * 255).round().clip(0, 255).astype(np.uint8))

    def grey(
        self, name: str, planes: Tensor, low: float, high: float
    ) -> tuple[Picture, tuple[tuple[float, float], ...]]:
        """Planes (C, h, w) side by side, each from black at its quantile `low` to white at its quantile `high`."""
        values = planes.double().cpu().numpy()
        ranges = [(float(np.quantile(plane, low)), float(np.quantile(plane, high))) for plane in values]
        shades = [
            ((plane - black) / max(white - black, 1e-9) * 255).round().clip(0, 255)
            for plane, (black, white) in zip(values, ranges, strict=True)
        ]
        return self.exact(name, np.concatenate(shades, 1).astype(np.uint8)), tuple(ranges)

    def keep_only(self, names: Container[str]) -> None:
        """Remove what was written under other names."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in names:
                path.unlink()

    def _write(self, name: str, photo: Pillow.Image, **options: int | bool) -> Picture:
        file = io.BytesIO()
        is_lossless = name.endswith(".png")
        photo.save(file, "png" if is_lossless else "webp", **options)
        atomic.write_bytes(self.folder / name, file.getbuffer())
        return Picture(f"{PICTURES_NAME}/{name}", photo.width, photo.height, is_lossless)


def block_errors(original: Image, reconstruction: Image, block: int) -> NDArray[np.float64]:
    """Mean |difference| over channels and over blocks of pixels; those at the border may be smaller."""
    errors = np.abs(original.astype(np.float64) - reconstruction).mean(2)
    rows, columns = (np.arange(0, side, block) for side in errors.shape)
    sums = np.add.reduceat(np.add.reduceat(errors, rows, 0), columns, 1)
    heights, widths = (
        np.diff(np.append(starts, side)) for starts, side in zip((rows, columns), errors.shape, strict=True)
    )
    return cast(NDArray[np.float64], sums / np.outer(heights, widths))


def find_worst(original: Image, reconstruction: Image) -> tuple[int, int, int]:
    """(top, left, side) of the square whose mean |difference| is largest, on a grid of quarters of its side."""
    height, width = original.shape[:2]
    size = min(_WORST_PX, height, width)
    step = max(1, size // 4)
    errors = np.abs(original.astype(np.float64) - reconstruction).mean(2)
    total = np.pad(errors.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    tops, lefts = ([*range(0, side - size, step), side - size] for side in (height, width))
    grid = np.ix_(tops, lefts)
    below, right = (np.ix_([top + size for top in tops], lefts), np.ix_(tops, [left + size for left in lefts]))
    corner = np.ix_([top + size for top in tops], [left + size for left in lefts])
    sums = total[corner] - total[below] - total[right] + total[grid]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return tops[int(row)], lefts[int(column)], size
