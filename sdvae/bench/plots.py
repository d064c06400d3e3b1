"""Throughput and peak memory against size, as one picture."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sdvae import atomic
from sdvae.bench.throughput import Measurement
from sdvae.errors import BenchError


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Write a PNG: megapixels a second and peak bytes over the size, a line for each contender and direction."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"plots need matplotlib: pip install 'sdvae[bench]' ({error})") from error
    import io

    figure = Figure(figsize=(12, 5), layout="constrained")  # no pyplot: nothing global, no display
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2)
    speeds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    peaks: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for measurement in measurements:
        megapixels = measurement.height * measurement.width / 1e6
        for row in measurement.rows:
            name = f"{measurement.direction}: {row.name}, {row.dtype}"
            if row.median_s:
                speeds[name].append((megapixels, measurement.batch_size * megapixels / row.median_s))
            if row.peak_bytes:
                peaks[name].append((megapixels, row.peak_bytes / 1e9))
    for axes, lines, label in ((speed, speeds, "megapixels a second"), (memory, peaks, "peak GB beside the weights")):
        for name, points in lines.items():
            style = "-" if ": sdvae" in name else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
        axes.set(xlabel="megapixels of an image", ylabel=label, xscale="log", ylim=(0, None))
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic.write_bytes(path, buffer.getvalue())
