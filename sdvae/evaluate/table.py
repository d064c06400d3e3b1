"""Results as the table that a person reads, with the recipe as its caption."""

from collections.abc import Iterator, Sequence

from sdvae.amounts import count
from sdvae.evaluate.results import Candidate, MetricColumn, Results, Summary


def table(results: Results) -> Iterator[str]:
    """The lines: caption, candidates with 95% intervals, what the latents are like, networks, remarks."""
    left_out = sum(results.left_out.values())
    yield results.caption
    yield (
        f"{count(results.num_images, 'image')} of {results.source}"
        + (f", {left_out} left out" if left_out else "")
        + "; means, and 95% intervals of the mean by bootstrap"
    )
    yield ""
    heads = ["", *(_head(column) for column in results.columns), "bits/px", "encode s", "decode s", "peak MB"]
    yield from _aligned([heads, *(_row(candidate, results.columns) for candidate in results.candidates)])
    judged = [candidate for candidate in results.candidates if candidate.latents is not None]
    if judged:
        yield ""
        yield from _aligned([_LATENT_HEADS, *map(_latent_row, judged)])
        yield f"half size, quarter turn and 16 trips: {results.recipe.probed()}"
    yield from (
        f"published for {one.vae}: {one.metric} {one.value:g} ({one.source})" for one in results.recipe.published
    )
    for network in dict.fromkeys(network for column in results.columns for network in column.networks):
        yield f"{network.file}: sha256 {network.sha256}"
    yield from results.remarks


_LATENT_HEADS = [
    "", "std", "posterior SNR", "dead channels", "half size", "quarter turn", "colour shift", "contrast", "16 trips",
]  # fmt: skip


def _latent_row(candidate: Candidate) -> list[str]:
    latents = candidate.latents
    assert latents is not None
    num = len(latents.channels)
    snr = [channel.snr_db for channel in latents.channels if channel.snr_db is not None]
    follows = {one.transform: f"{one.latent_error:.0%}" for one in latents.equivariance}
    return [
        candidate.label,
        f"{sum(channel.std for channel in latents.channels) / num:.2f}",
        f"{sum(snr) / len(snr):.1f} dB" if snr else "",
        f"{sum(channel.is_dead for channel in latents.channels)} of {num}",
        follows.get("half size", ""),
        follows.get("quarter turn", ""),
        " ".join(f"{shift:+.1f}" for shift in latents.colour_shift),
        " ".join(f"{gain:.3f}" for gain in latents.contrast_gain),
        f"{latents.decay.y[-1]:.2f} dB" if latents.decay.y else "",
    ]


def _head(column: MetricColumn) -> str:
    return f"{column.label} {column.unit}".strip() + {"higher": " ↑", "lower": " ↓"}[column.direction]


def _row(candidate: Candidate, columns: Sequence[MetricColumn]) -> list[str]:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    return [
        candidate.label + (f" ({candidate.dtype})" if candidate.dtype else ""),
        *(_number(column, candidate.summaries.get(column.name)) for column in columns),
        "" if candidate.bits_per_pixel is None else f"{candidate.bits_per_pixel:.2f}",
        seconds(candidate.encode_s),
        seconds(candidate.decode_s),
        "" if candidate.peak_bytes is None else f"{candidate.peak_bytes / 1e6:.0f}",
    ]


def _number(column: MetricColumn, summary: Summary | None) -> str:
    if summary is None:
        return ""
    digits = 2 if column.unit or column.scope == "set" else 4
    text = f"{summary.mean:.{digits}f}"
    if summary.low is None or summary.high is None:
        return text
    return f"{text} [{summary.low:.{digits}f}, {summary.high:.{digits}f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()
