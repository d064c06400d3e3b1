"""Pictures for docs/theory.md: grids of images with the names of their rows, sheets and clouds of points."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from sdvae import atomic
from theory.work import Work, sheet

GAP = 2  # pixels between images
COLUMNS = 2  # of panels


@dataclass(frozen=True)
class Grid:
    """Grey images in [0, 1], and what stands above and left of them."""

    title: str
    images: Tensor  # (rows, columns, H, W)
    row_names: Sequence[str] = ()


def draw_grids(work: Work, name: str, grids: Sequence[Grid], width: float = 10.0) -> str:
    """The grids beside each other, as NAME.png, `width` times 100 pixels wide; returns the file's name."""
    from matplotlib.figure import Figure

    sheets = [sheet(grid.images.flatten(0, 1), grid.images.shape[1], gap=GAP).numpy() for grid in grids]
    names_width = sum(1.4 for grid in grids if grid.row_names)
    pixels_wide = sum(of.shape[1] for of in sheets)
    height = (width - names_width) * max(len(of) for of in sheets) / pixels_wide + 0.4
    figure = Figure(figsize=(width, height))
    ratios = [of.shape[1] for of in sheets]
    panels = figure.subplots(1, len(grids), squeeze=False, width_ratios=ratios)[0]
    for axes, grid, of in zip(panels, grids, sheets, strict=True):
        axes.imshow(of, cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(grid.title, fontsize=12)
        axes.set_frame_on(False)
        axes.tick_params(length=0, labelsize=11)
        step = grid.images.shape[2] + GAP
        axes.set_yticks([step * (row + 0.5) - GAP for row in range(len(grid.row_names))], grid.row_names)
        axes.set_xticks([])
    return save_figure(work, name, figure)


def draw_panels(
    work: Work,
    name: str,
    sheets: Mapping[str, Tensor],  # title -> (H, W) grey, in [0, 1]
    clouds: Mapping[str, tuple[Tensor, Tensor]] | None = None,  # title -> (N, 2) places in [0, 1], (N,) digits
) -> str:
    """Sheets of images, then points coloured by their digit, two beside each other, as NAME.png; returns its name."""
    from matplotlib.figure import Figure

    clouds = clouds or {}
    num_rows = -(-(len(sheets) + len(clouds)) // COLUMNS)
    tallest = max(len(of) / of.shape[1] for of in sheets.values())
    figure = Figure(figsize=(10.0, num_rows * (10.0 / COLUMNS * tallest + 0.35)))
    panels = list(figure.subplots(num_rows, COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, of) in zip(panels, sheets.items(), strict=False):
        axes.imshow(of.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize=13)
    for axes, (title, (places, labels)) in zip(panels[len(sheets) :], clouds.items(), strict=False):
        _scatter(axes, places, labels)
        axes.set_title(title, fontsize=13)
    return save_figure(work, name, figure)


def _scatter(axes: Any, places: Tensor, labels: Tensor) -> None:
    """Points in a square, and in the middle of each digit's points its name."""
    axes.set_axis_on()
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0), xticks=[], yticks=[], aspect="equal")
    axes.scatter(*places.T.numpy(), c=labels.numpy(), cmap="tab10", vmin=-0.5, vmax=9.5, s=2.0)
    for digit in labels.unique():
        middle = places[labels == digit].median(0).values.tolist()
        box = {"boxstyle": "circle", "facecolor": "white", "alpha": 0.85}
        axes.text(*middle, str(int(digit)), fontsize=14, ha="center", va="center", bbox=box)


def save_figure(work: Work, name: str, figure: Any) -> str:
    """Keep a matplotlib figure as NAME.png, of 128 colours at most; returns the file's name."""
    figure.set_layout_engine("constrained")
    drawn, kept = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, bbox_inches="tight", pad_inches=0.05)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(kept, "PNG", optimize=True)
    atomic.write_bytes(work.folder / f"{name}.png", kept.getbuffer())
    return f"{name}.png"
