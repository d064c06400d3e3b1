"""`sdvae anomaly`: photos ranked by how badly the VAE explains them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.amounts import count
from sdvae.cli.grouped import Grouped
from sdvae.cli.pictures import METADATA, check_output, fit_square, grid, require_place, write_picture
from sdvae.cli.shared import BATCH_SIZE, BUDGET, PATH, Console, tell_left_out, with_console, with_crop, with_vae
from sdvae.sealed import canonical_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdvae.explore.anomaly import By, Ranking
    from sdvae.sources.entries import Source
    from sdvae.store.geometry import Preprocess
    from sdvae.vae import VAE

_MOST_LISTED = 20
_MOST_PICTURED = 12
_LEAST_CELL_PX, _MOST_CELL_PX = 128, 256
_UNITS = {"error": "mean squared error", "elbo": "-ELBO, nats/value", "likelihood": "-log p(x), nats/value"}


@click.command(
    cls=Grouped,
    short_help="Rank photos by how badly the VAE explains them.",
    groups={
        "What is scored": ("by", "samples", "seed", "clean", "quantile"),
        "How a photo is prepared": ("size", "crop"),
    },
    examples=(
        "sdvae anomaly photos --vae RUN",
        "sdvae anomaly new-photos --clean good-photos --vae RUN -o worst.png",
        "sdvae anomaly photos --by elbo --vae RUN --scores scores.jsonl",
    ),
)
@click.argument("source", metavar="SRC")
@click.option("--clean", metavar="CLEAN", help="Photos that are as they should be: they set the threshold.")
@click.option(
    "--by",
    type=click.Choice(["error", "elbo", "likelihood"]),
    default="error",
    show_default=True,
    help="Reconstruction error, negative ELBO, or negative log-likelihood by importance sampling.",
)
@click.option(
    "--quantile",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    metavar="Q",
    default=0.99,
    show_default=True,
    help="Of the scores of CLEAN: photos above it are anomalies.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="K",
    default=8,
    show_default=True,
    help="Latents drawn for each photo, by elbo and likelihood.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Seed of those latents."
)
@with_crop
@click.option("-o", "--output", type=PATH, metavar="FILE", help="An image file for the worst photos, before and after.")
@click.option("--scores", type=PATH, metavar="FILE", help="A JSON lines file for all scores, the worst first.")
@METADATA
@BATCH_SIZE
@BUDGET
@with_vae
@with_console
def anomaly(
    source: str,
    clean: str | None,
    by: "By",
    quantile: float,
    samples: int,
    seed: int,
    preprocess: "Preprocess",
    output: Path | None,
    scores: Path | None,
    no_metadata: bool,
    batch_size: int | None,
    budget: int | None,
    load_vae: "Callable[[], VAE]",
    console: Console,
) -> None:
    """Rank the photos in SRC by how badly the VAE explains them; what it never saw in training, it explains badly.

    Scores are means over the values of an image: squared error in [-1, 1], or nats. With CLEAN, photos above the
    quantile of its scores are anomalies. Photos that cannot be read are left out; the exit code is then 3.
    """
    if output is not None:
        check_output(output)
    if scores is not None:
        require_place(scores)
    from sdvae import atomic
    from sdvae.explore.anomaly import rank_anomalies
    from sdvae.sources.open import open_source

    photos, reference = open_source(source), None if clean is None else open_source(clean)
    vae = load_vae()
    with console.progress() as show:
        ranking = rank_anomalies(
            photos, vae, reference, by=by, quantile=quantile, num_samples=samples, preprocess=preprocess, seed=seed,
            batch_size=batch_size, budget=budget, progress=show,
        )  # fmt: skip
    if scores is not None:
        atomic.write_stream(scores, map(canonical_json, _records(ranking)))
    if output is not None:
        sheet = _sheet(vae, photos, ranking, preprocess, budget)
        write_picture(output, sheet, vae, has_metadata=not no_metadata)
    console.result(
        "\n".join(_table(ranking)),
        by=by, threshold=ranking.threshold, noise_std=ranking.noise_std, num_scored=len(ranking.scores),
        num_anomalies=None if ranking.threshold is None else len(ranking.anomalies),
        worst=_records(ranking)[:_MOST_LISTED], output=output and str(output), scores=scores and str(scores),
        left_out=ranking.left_out, clean_left_out=ranking.clean_left_out,
    )  # fmt: skip
    of_clean = {f"{key} of {clean}": reason for key, reason in ranking.clean_left_out.items()}
    tell_left_out(console, of_clean | ranking.left_out)


def _records(ranking: "Ranking") -> list[dict[str, Any]]:
    limit = ranking.threshold
    return [
        {"key": key, "score": score, "is_anomaly": None if limit is None else score > limit}
        for key, score in ranking.scores
    ]


def _table(ranking: "Ranking") -> list[str]:
    lines = [f"{'':>7}  {_UNITS[ranking.by]:>24}  photo"]
    for place, (key, score) in enumerate(ranking.scores[:_MOST_LISTED], 1):
        is_anomaly = ranking.threshold is not None and score > ranking.threshold
        lines.append(f"{place:>7}  {score:>24.6f}  {key}{', an anomaly' if is_anomaly else ''}")
    if len(ranking.scores) > _MOST_LISTED:
        lines.append(f"{len(ranking.scores) - _MOST_LISTED:>7,} more")
    scored = count(len(ranking.scores), "photo")
    if ranking.threshold is None:
        return [*lines, f"{scored} scored; give --clean for a threshold"]
    num_anomalies = len(ranking.anomalies)
    return [*lines, f"{num_anomalies:,} of {scored} above the threshold of {ranking.threshold:.6f}"]


def _sheet(
    vae: "VAE", photos: "Source", ranking: "Ranking", preprocess: "Preprocess", budget: int | None
) -> "NDArray[np.uint8]":
    from sdvae.explore.anomaly import reconstruct_worst

    worst = reconstruct_worst(photos, vae, ranking, _MOST_PICTURED, preprocess, budget)
    cell_px = min(_MOST_CELL_PX, max(_LEAST_CELL_PX, *(side for _, _, before, _ in worst for side in before.shape)))
    cells, captions = [], []
    for key, score, before, after in worst:
        cells += [fit_square(before, cell_px), fit_square(after, cell_px)]
        captions += [Path(key).name, f"after: {score:.4g}"]
    return grid(cells, 4, captions)
