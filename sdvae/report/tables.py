"""The tables of an evaluation: quality beside its price, and what the latents are like."""

import math
from collections.abc import Callable, Sequence

from sdvae.evaluate.results import Candidate, Equivariance, LatentReport, MetricColumn, Results
from sdvae.report.text import number
from sdvae.report.view import Cell, Metric, Row, Table

_DIGITS = {"dB": 2, "": 3}
_SET_DIGITS = 2  # rFID and its kin are large


def metric_of(column: MetricColumn) -> Metric:
    """How a page names and writes a metric."""
    digits = _SET_DIGITS if column.scope == "set" else _DIGITS.get(column.unit, 2)
    return Metric(column.name, column.label, column.unit, column.direction, digits)


_COSTS: Sequence[tuple[Metric, Callable[[Candidate], float | None]]] = (
    (Metric("bits", "Rate", "bits/px"), lambda one: one.bits_per_pixel),
    (Metric("encode", "Encode", "images/s", "higher"), lambda one: 1 / one.encode_s if one.encode_s else None),
    (Metric("decode", "Decode", "images/s", "higher"), lambda one: 1 / one.decode_s if one.decode_s else None),
    (Metric("peak", "Peak memory", "MB", "lower", 0), lambda one: one.peak_bytes / 1e6 if one.peak_bytes else None),
)


def summary(results: Results) -> Table:
    """One row a candidate: every metric with its interval, then rate, speed and memory."""
    found: list[tuple[Metric, list[float | None], list[str]]] = []
    for column in results.columns:
        summaries = [candidate.summaries.get(column.name) for candidate in results.candidates]
        metric = metric_of(column)
        notes = [
            f"{number(one.low, metric.digits)} – {number(one.high, metric.digits)}"
            if one and one.low is not None
            else ""
            for one in summaries
        ]
        found.append((metric, [one.mean if one else None for one in summaries], notes))
    for metric, value in _COSTS:
        values = [value(candidate) for candidate in results.candidates]
        if any(one is not None for one in values):
            found.append((metric, values, [""] * len(values)))
    cells = [_column(metric, values, notes) for metric, values, notes in found]
    rows = [
        Row(candidate.label, _about(candidate), [column[place] for column in cells])
        for place, candidate in enumerate(results.candidates)
    ]
    return Table([metric for metric, _, _ in found], rows)


def _column(metric: Metric, values: Sequence[float | None], notes: Sequence[str]) -> list[Cell]:
    """The cells of a column, the best ones marked: those that read the same are equally good."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    texts = [number(value, metric.digits) for value in values]
    best = ""
    if metric.better and len({number(value, metric.digits) for value in known}) > 1:
        best = number((max if metric.better == "higher" else min)(known), metric.digits)
    return [Cell(text, note, text == best) for text, note in zip(texts, notes, strict=True)]


def _about(candidate: Candidate) -> str:
    if candidate.kind == "codec":
        return "codec"
    parts = []
    if candidate.latent_channels and candidate.downscale:
        parts.append(f"{candidate.latent_channels} channels at 1/{candidate.downscale}")
    if candidate.num_parameters:
        parts.append(f"{candidate.num_parameters / 1e6:.1f} M parameters")
    parts.append(" ".join(part for part in (candidate.dtype, f"on {candidate.device}") if part))
    if candidate.tiling != "none":
        parts.append(f"tiles: {candidate.tiling}")
    if candidate.num_failed:
        parts.append(f"{candidate.num_failed} photos failed")
    return ", ".join(parts)


def latents_tables(results: Results) -> list[tuple[str, str, Table]]:
    """What a diffusion model and an artist will notice, one row a VAE: title, caption, table."""
    judged = [(one.label, one.latents) for one in results.candidates if one.latents]
    if not judged:
        return []
    columns = [_dead(judged), *(_under(transform, judged) for transform in _transforms(judged))]
    columns = [_told(_KL, judged, lambda one: number(one.bits_per_pixel, 2)), *columns]
    columns += [_told(metric, judged, text) for metric, text in _TOLD]
    rows = [Row(label, "", [cells[place] for _, cells in columns]) for place, (label, _) in enumerate(judged)]
    caption = (
        "Of scaled latents. KL is the rate of the posterior. A dead channel does not depend on the photo. The error "
        f"under half size and quarter turn is 0 where latents follow the photo, on {results.recipe.probed()}. "
        "A gain of 1 keeps the contrast."
    )
    return [("What a diffusion model will feel", caption, Table([metric for metric, _ in columns], rows))]


_Judged = Sequence[tuple[str, LatentReport]]
_Column = tuple[Metric, list[Cell]]

_KL = Metric("kl", "KL", "bits/px")
_TOLD: Sequence[tuple[Metric, Callable[[LatentReport], str]]] = (
    (Metric("snr", "Signal to noise", "dB, worst to best channel"), lambda one: _span(one)),
    (
        Metric("shift", "Colour shift", "levels: red, green, blue"),
        lambda one: ", ".join(f"{shift:+.1f}".replace("-", "−") for shift in one.colour_shift),
    ),
    (
        Metric("gain", "Contrast gain", "red, green, blue"),
        lambda one: ", ".join(number(gain, 2) for gain in one.contrast_gain),
    ),
)


def _told(metric: Metric, judged: _Judged, text: Callable[[LatentReport], str]) -> _Column:
    return metric, [Cell(text(latents)) for _, latents in judged]


def _span(latents: LatentReport) -> str:
    snr = [channel.snr_db for channel in latents.channels if channel.snr_db is not None]
    return f"{number(min(snr), 1)} to {number(max(snr), 1)}" if snr else "–"


def _dead(judged: _Judged) -> _Column:
    metric = Metric("dead", "Dead channels", "%", "lower", 0)
    return metric, _column(metric, [100 * latents.dead_share for _, latents in judged], [""] * len(judged))


def _transforms(judged: _Judged) -> list[str]:
    return list(dict.fromkeys(one.transform for _, latents in judged for one in latents.equivariance))


def _under(transform: str, judged: _Judged) -> _Column:
    metric = Metric(transform, transform.capitalize(), "relative error", "lower")
    errors = [_error(latents.equivariance, transform) for _, latents in judged]
    return metric, _column(metric, errors, [""] * len(judged))


def _error(found: Sequence[Equivariance], name: str) -> float | None:
    return next((one.latent_error for one in found if one.transform == name), None)
