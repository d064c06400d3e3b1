"""Grids of images under their titles, with the names of their rows."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sdvae import atomic
from theory.work import Work, sheet

GAP = 2  # pixels between images


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
    figure = Figure(figsize=(width, height), layout="constrained")
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    atomic.write_bytes(work.folder / f"{name}.png", buffer.getbuffer())
    return f"{name}.png"
