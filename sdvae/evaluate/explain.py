"""Why another's number differs: the same photos under each rival convention, one at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sdvae.amounts import count
from sdvae.encoding.prepare import list_entries
from sdvae.errors import ReportError
from sdvae.evaluate.judge import Judge, appoint
from sdvae.evaluate.photos import read_photos
from sdvae.evaluate.recipes import Recipe, rivals
from sdvae.evaluate.round_trip import Candidate, Part, cut_all, reconstruct
from sdvae.metrics import METRICS
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source


@dataclass(frozen=True)
class Explanation:
    """Means under the recipe, and under each rival convention; a metric that has no value is absent."""

    recipe: Recipe
    num_images: int
    means: dict[str, float]
    rivals: dict[str, dict[str, float]]  # convention -> metric -> mean


def explain(
    source: Source, candidate: Candidate, recipe: Recipe, device: torch.device, progress: Progress = silent
) -> Explanation:
    """Judge every photo under the recipe and its rivals; metrics of images only.

    A reconstruction is made once for all conventions that differ only in how it is compared.
    """
    named = tuple(name for name in recipe.metrics if name not in METRICS or METRICS[name].scope == "image")
    recipe = replace(recipe, metrics=tuple(appoint(replace(recipe, metrics=named), device).scores))
    conventions = {"": recipe, **rivals(recipe)}
    judges = {name: appoint(convention, device) for name, convention in conventions.items()}
    entries = list_entries(source, recipe.max_images)
    gathered: dict[str, list[dict[str, float]]] = {name: [] for name in conventions}
    for number, photo in enumerate(read_photos(source, list(enumerate(entries)))):
        progress("explain", number, len(entries))
        for names in _by_pixels(conventions):
            made = replace(conventions[names[0]], rounding="float")
            for item in cut_all([photo], made, {}):
                one = next(iter(reconstruct(candidate, [item], made, 1, Part())))
                for name in names:
                    levels = one.levels.round() if conventions[name].rounding == "8-bit" else one.levels
                    gathered[name].append(judges[name].score(levels, one.original))
        progress("explain", number + 1, len(entries))
    if not gathered[""]:
        raise ReportError(f"none of the photos of {source.name} can be judged")
    means = {name: _means(scores, judges[name]) for name, scores in gathered.items()}
    ours = means.pop("")
    return Explanation(recipe, len(gathered[""]), ours, means)


def explained(explanation: Explanation) -> Iterator[str]:
    """The lines of a table: what each convention moves, and by how much."""
    names = list(explanation.means)
    yield explanation.recipe.caption()
    num = count(explanation.num_images, "image")
    yield f"{num}; below the recipe's means, what each other convention moves them by"
    yield ""
    yield " " * 32 + "".join(f"{METRICS[name].label:>16}" for name in names)
    yield f"{explanation.recipe.name:<32}" + "".join(f"{explanation.means[name]:>16.4f}" for name in names)
    for convention, means in explanation.rivals.items():
        moved = (f"{means[name] - explanation.means[name]:>+16.4f}" if name in means else " " * 16 for name in names)
        yield f"{convention:<32}" + "".join(moved)


def _by_pixels(conventions: dict[str, Recipe]) -> list[list[str]]:
    """Conventions together that have the same reconstructions."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, one in conventions.items():
        key = (one.size_px, one.crop, one.resample, one.is_antialiased, one.latents, one.seed)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _means(scores: Sequence[dict[str, float]], judge: Judge) -> dict[str, float]:
    found = {name: [one[name] for one in scores if math.isfinite(one.get(name, math.nan))] for name in judge.scores}
    return {name: float(np.mean(values)) for name, values in found.items() if values}
