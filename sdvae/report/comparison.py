"""What an evaluation found, as a page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdvae import atomic
from sdvae.evaluate.results import ImageResult, MetricColumn, Results, View, read_results
from sdvae.report import curves, files
from sdvae.report.render import render
from sdvae.report.tables import latents_tables, metric_of, summary
from sdvae.report.text import listed, number
from sdvae.report.view import Comparison, Fact, Latents, Photo, Version

REPORT_NAME = "report.html"
MOST_BYTES = 14 * 10**6  # of the pictures of a page


def write_report(folder: Path) -> Path:
    """Make the page of the report in `folder` from its results.json, as report.html beside it."""
    path = folder / REPORT_NAME
    atomic.write_bytes(path, render(comparison(folder, read_results(folder))).encode())
    return path


def comparison(folder: Path, results: Results) -> Comparison:
    """The page of the report in `folder`; ReportError where a picture is missing or damaged."""
    labels = [candidate.label for candidate in results.candidates]
    columns = [column for column in results.columns if any(column.name in view.scores for view in _views(results))]
    columns.sort(key=lambda column: column.name != results.ranked_by)
    return Comparison(
        title=_title(results),
        caption=results.caption,
        findings=_findings(results),
        vaes=labels,
        summary=summary(results),
        metrics=[metric_of(column) for column in columns],
        photos=_photos(folder, results, labels, columns),
        num_photos=results.num_images,
        plots=curves.plots(results),
        tables=latents_tables(results),
        remarks=results.remarks,
        facts=_facts(results),
        heat_note=_heat_note(results),
        footer="This page is one file and sends no request.",
    )


def _views(results: Results) -> list[View]:
    return [view for image in results.images for view in image.views]


def _title(results: Results) -> str:
    vaes = [candidate for candidate in results.candidates if candidate.kind == "vae"]
    num_vaes, num_codecs = len({vae.fingerprint or vae.label for vae in vaes}), len(results.candidates) - len(vaes)
    who = [f"{count} {what}{'s' * (count != 1)}" for count, what in ((num_vaes, "VAE"), (num_codecs, "codec")) if count]
    if num_vaes < len(vaes):
        who[0] += f" in {len(vaes)} ways"
    photos = f"{results.num_images:,} photo{'s' * (results.num_images != 1)}"
    return f"{listed(who)} on {photos}"


def _findings(results: Results) -> str:
    """Who is best at what, in sentences; who reads the same as another is not."""
    best: dict[str, list[str]] = {}
    for column in results.columns:
        means = {
            one.label: one.summaries[column.name].mean for one in results.candidates if column.name in one.summaries
        }
        if len(means) > 1:
            winner = (max if column.direction == "higher" else min)(means, key=lambda label: means[label])
            texts = [number(mean, metric_of(column).digits) for mean in means.values()]
            if texts.count(number(means[winner], metric_of(column).digits)) == 1:
                best.setdefault(winner, []).append(column.label)
    sentences = [f"{label} is best by {listed(names)}." for label, names in best.items()]
    times = {one.label: one.decode_s for one in results.candidates if one.kind == "vae" and one.decode_s}
    if len(times) > 1:
        sentences.append(f"{min(times, key=lambda label: times[label])} decodes fastest.")
    return " ".join(sentences)


def _photos(folder: Path, results: Results, labels: Sequence[str], columns: Sequence[MetricColumn]) -> list[Photo]:
    """As many photos as the page has room for, the first of each reason before the second of any."""
    seen: Counter[str] = Counter()
    turns = []
    for place, image in enumerate(results.images):
        reason = image.reasons[0] if image.reasons else ""
        turns.append((seen[reason], place))
        seen[reason] += 1
    photos: dict[int, Photo] = {}
    room = MOST_BYTES
    for _, place in sorted(turns):
        photo = _photo(folder, results.images[place], labels, columns)
        room -= sum(len(picture.src) for picture in photo.pictures())
        if room < 0 and photos:
            break
        photos[place] = photo
    return [photos[place] for place in sorted(photos)]


def _photo(folder: Path, image: ImageResult, labels: Sequence[str], columns: Sequence[MetricColumn]) -> Photo:
    first = image.views[0].original
    return Photo(
        name=image.key,
        size=f"{first.width} × {first.height}",
        whole=files.embed(folder, first, f"{image.key}, original"),
        versions=[
            _version(folder, view, f"{image.key} by {label}", columns)
            for view, label in zip(image.views, labels, strict=True)
        ],
        tag=", ".join(image.reasons).capitalize() if image.reasons != ("first",) else "",
    )


def _version(folder: Path, view: View, of: str, columns: Sequence[MetricColumn]) -> Version:
    worst = view.worst
    return Version(
        whole=files.embed(folder, view.reconstruction, of),
        error=files.embed_heat(folder, view.error, f"Error map of {of}"),
        detail=(
            files.embed(folder, worst.original, f"Original of the worst detail of {of}"),
            files.embed(folder, worst.reconstruction, f"Worst detail of {of}"),
        ),
        detail_note=f"Where it is worst: {worst.size_px} px at {worst.left}, {worst.top}. Lossless.",
        latents=_latents(folder, view, of),
        values=[view.scores.get(column.name) for column in columns],
    )


def _latents(folder: Path, view: View, of: str) -> Latents | None:
    if view.channels is None:
        return None
    ranges = [f"{number(low, 1)} to {number(high, 1)}" for low, high in view.channel_ranges]
    std = view.posterior_std
    span = view.posterior_std_range
    return Latents(
        files.embed_squares(folder, view.channels, view.num_channels, of),
        ranges,
        files.embed_heat(folder, std, f"Posterior std of {of}") if std else None,
        f"{span[0]:.2g} to {span[1]:.2g}" if span else "",
    )


def _heat_note(results: Results) -> str:
    scales = {view.error_full_scale for view in _views(results)}
    if len(scales) != 1:
        return "The error map shows the mean difference of the colours, black where there is none."
    (scale,) = scales
    return f"The error map shows the mean difference of the colours: black is none, white is {scale:g} of 255 or more."


def _facts(results: Results) -> list[Fact]:
    facts = [Fact("Source", results.source), Fact("Recipe", results.recipe.name)]
    facts += [Fact(name.replace("_", " "), str(value)) for name, value in _scalars(results.machine)]
    networks = {network.name: network for column in results.columns for network in column.networks}
    facts += [Fact(network.name, f"{network.file}, sha256 {network.sha256}") for network in networks.values()]
    facts += [Fact(one.label, f"fingerprint {one.fingerprint}") for one in results.candidates if one.fingerprint]
    return facts + [Fact("Left out", f"{count}: {reason}") for reason, count in results.left_out.items()]


def _scalars(machine: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(name, value) for name, value in machine.items() if isinstance(value, str | int | float) and value != ""]
