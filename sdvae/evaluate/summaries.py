"""A metric over all images: its mean, its interval and its distribution, or a distance between two sets."""

import numpy as np
from numpy.typing import NDArray

from sdvae.evaluate.gather import Gathered
from sdvae.evaluate.intervals import bootstrap_interval
from sdvae.evaluate.notes import Notes
from sdvae.evaluate.recipes import Recipe, sized
from sdvae.evaluate.results import MetricColumn, Summary
from sdvae.perceptual.distances import FeatureStatistics, frechet_distance, subsets, unbiased_mmd

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_NUM_BINS = 24


def original_name(recipe: Recipe) -> str:
    """The name of the features of originals under a recipe."""
    return f"original-{recipe.size_px or 'whole'}"


def summarise(column: MetricColumn, place: int, gathered: Gathered) -> Summary | None:
    """One column of one candidate; None where no image has this score."""
    if column.scope == "set":
        return _set_summary(column.name, place, gathered)
    everything = np.concatenate([gathered.array(other, column.name) for other in range(len(gathered.parts))])
    values = gathered.array(place, column.name)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = bootstrap_interval(values) or (None, None)
    lowest, highest = float(np.nanmin(everything)), float(np.nanmax(everything))
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1.0, _NUM_BINS + 1)
    counts, _ = np.histogram(values, edges)
    quantiles = np.quantile(values, _QUANTILES)
    return Summary(
        float(values.mean()), low, high, len(values), tuple(quantiles.tolist()), tuple(edges.tolist()),
        tuple(counts.tolist()),
    )  # fmt: skip


def _set_summary(name: str, place: int, gathered: Gathered) -> Summary | None:
    """Frechet's distance from sums in fp64, the kernel's from subsets; both chunk by chunk from disk."""
    work = gathered.work
    original = original_name(sized(work.recipe, work.candidates[place].identity.size_px))
    if gathered.num_images < 2:
        return None
    if name == "rfid":
        statistics = [FeatureStatistics(), FeatureStatistics()]
        for number in range(work.num_chunks):
            for gathers, which in zip(statistics, (str(place), original), strict=True):
                features = work.notes.read_features(number, which)
                if len(features):
                    gathers.add(features)
        return Summary(frechet_distance(*statistics), None, None, statistics[0].num)
    ours, theirs = (_Rows(work.notes, work.num_chunks, which) for which in (str(place), original))
    pairs = [
        unbiased_mmd(ours.read(our_rows), theirs.read(their_rows))
        for our_rows, their_rows in subsets(ours.num, theirs.num)
    ]
    return Summary(float(np.mean(pairs)), None, None, ours.num)


class _Rows:
    """Features of all chunks, which stay on disk: a million images have more files than a process may map."""

    def __init__(self, notes: Notes, num_chunks: int, which: str) -> None:
        self.notes, self.which = notes, which
        self.starts = np.cumsum([0, *(len(notes.read_features(number, which)) for number in range(num_chunks))])
        self.num = int(self.starts[-1])

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """These rows, in this order."""
        chunks = np.searchsorted(self.starts, rows, "right") - 1
        places = zip(chunks.tolist(), (rows - self.starts[chunks]).tolist(), strict=True)
        return np.stack([np.array(self.notes.read_features(chunk, self.which)[row]) for chunk, row in places])
