"""Pictures with titles, and curves."""

import io
from collections.abc import Mapping

from torch import Tensor

from sdvae import atomic
from theory.work import Work


def draw_panels(work: Work, name: str, sheets: Mapping[str, Tensor]) -> str:  # title -> (H, W) in [0, 1]
    """Sheets of grey images beside each other, each under its title, as NAME.png; returns the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 10.0 / len(sheets) * max(len(of) / of.shape[1] for of in sheets.values()) + 0.3))
    for axes, (title, of) in zip(figure.subplots(1, len(sheets), squeeze=False)[0], sheets.items(), strict=True):
        axes.imshow(of.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize=12)
        axes.set_axis_off()
    return save_figure(work, name, figure)


def save_figure(work: Work, name: str, figure: object) -> str:
    """Keep a matplotlib figure as NAME.png; returns the file's name."""
    figure.set_layout_engine("constrained")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    atomic.write_bytes(work.folder / f"{name}.png", buffer.getbuffer())
    return f"{name}.png"
