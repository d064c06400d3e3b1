"""The plots of an evaluation."""

from collections.abc import Sequence

from sdvae.amounts import count
from sdvae.evaluate.results import Candidate, MetricColumn, Results
from sdvae.report.plots import Axis, Histogram, Line, Point, distribution, lines, scatter
from sdvae.report.view import Plot


def plots(results: Results) -> list[Plot]:
    """Rate against distortion, decay and spectrum where they were measured, and the distribution of each metric."""
    candidates = list(enumerate(results.candidates))
    made = [_rate(results, candidates), _decay(results, candidates), _spectrum(candidates)]
    made += [_distribution(column, results.candidates) for column in results.columns]
    return [plot for plot in made if plot is not None]


def _rate(results: Results, candidates: Sequence[tuple[int, Candidate]]) -> Plot | None:
    points = [
        Point(one.label, one.bits_per_pixel, psnr.mean, _interval(psnr.low, psnr.high), place)
        for place, one in candidates
        if one.bits_per_pixel and (psnr := one.summaries.get("psnr"))
    ]
    if not points:
        return None
    ends = [value for point in points for value in (*(point.interval or ()), point.y)]
    x = Axis.around("bits per pixel", [point.x for point in points], is_log=True, margin=0.35)
    svg = scatter(points, x, Axis.around("PSNR, dB", ends), _said("PSNR against bits per pixel", points))
    caption = "Higher and further left is better. Lines are 95% intervals of the mean."
    return Plot("Rate against distortion", svg, caption)


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _decay(results: Results, candidates: Sequence[tuple[int, Candidate]]) -> Plot | None:
    judged = [(place, one.label, one.latents) for place, one in candidates if one.latents and one.latents.decay.x]
    if not judged:
        return None
    series = [Line(label, latents.decay.x, latents.decay.y, place) for place, label, latents in judged]
    trips = sorted({trip for line in series for trip in line.xs})
    x = Axis("round trips", trips[0], max(trips[-1], trips[0] + 1), is_log=True, ticks=trips)
    y = Axis.around("PSNR, dB", [value for line in series for value in line.ys])
    num, side = judged[0][2].num_decayed, results.recipe.probe_px
    caption = f"A photo encoded and decoded again and again: the mean of {count(num, 'crop')} of {side} px."
    svg = lines(series, x, y, "PSNR to the original after repeated round trips, a line for each VAE")
    return Plot("Decay over round trips", svg, caption)


def _spectrum(candidates: Sequence[tuple[int, Candidate]]) -> Plot | None:
    judged = [(place, one.label, one.latents) for place, one in candidates if one.latents and one.latents.spectrum.x]
    if not judged:
        return None
    series = [Line(label, latents.spectrum.x, latents.spectrum.y, place) for place, label, latents in judged]
    photos = judged[0][2].photo_spectrum
    series += [Line("photos", photos.x, photos.y)] if photos.x else []
    ends = min(line.xs[0] for line in series), max(line.xs[-1] for line in series)
    series.append(Line("white noise", ends, (1.0, 1.0)))
    x = Axis("cycles per latent", *ends, is_log=ends[0] > 0)
    y = Axis.around("power", [value for line in series for value in line.ys if value > 0], is_log=True)
    caption = "Power of the scaled latents by frequency. A diffusion model starts from the dotted white noise."
    return Plot("Spectrum of the latents", lines(series, x, y, "Radial power spectrum of the latents"), caption)


def _distribution(column: MetricColumn, candidates: Sequence[Candidate]) -> Plot | None:
    rows = []
    for place, one in enumerate(candidates):
        summary = one.summaries.get(column.name)
        if summary and summary.histogram_counts:
            quantiles = summary.quantiles
            middle = quantiles[len(quantiles) // 2] if quantiles else summary.mean
            rows.append(Histogram(one.label, summary.histogram_edges, summary.histogram_counts, middle, place))
    if not rows:
        return None
    edges = [edge for row in rows for edge in row.edges]
    title = f"{column.label}, {column.unit}" if column.unit else column.label
    svg = distribution(rows, Axis(title, min(edges), max(edges)), f"Distribution of {column.label} over the photos")
    return Plot(f"{column.label} of the photos", svg, "How many photos have which value. The line is the median.")


def _said(what: str, points: Sequence[Point]) -> str:
    return f"{what}: " + "; ".join(f"{point.name} {point.y:.2f} at {point.x:.2f}" for point in points)
