"""The images that a report shows go through every candidate once more, one at a time."""

import math
from collections.abc import Sequence

import numpy as np

from sdvae.evaluate.candidates import VAECandidate
from sdvae.evaluate.gather import Gathered
from sdvae.evaluate.notes import Notes
from sdvae.evaluate.photos import read_photos
from sdvae.evaluate.pictures import ERROR_FULL_SCALE, PictureFolder
from sdvae.evaluate.recipes import Recipe, sized
from sdvae.evaluate.results import ImageResult, Picture, Reason, View
from sdvae.evaluate.round_trip import Candidate, Part, Reconstruction, cut_all, reconstruct
from sdvae.progress import Progress
from sdvae.sources.entries import Entry, Source


def picture(
    source: Source,
    entries: Sequence[Entry],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    notes: Notes,
    gathered: Gathered,
    chosen: Sequence[tuple[int, tuple[Reason, ...]]],
    progress: Progress,
) -> tuple[ImageResult, ...]:
    """Make the pictures of the chosen rows of `gathered`."""
    folder = PictureFolder(notes.report)
    indices = [gathered.indices[row] for row, _ in chosen]
    shown = []
    for number, photo in enumerate(read_photos(source, [(index, entries[index]) for index in indices])):
        progress("pictures", number, len(indices))
        row, reasons = chosen[number]
        views = []
        originals: dict[int | None, Picture] = {}
        for place, candidate in enumerate(candidates):
            size = candidate.identity.size_px
            sized_recipe = sized(recipe, size)
            for item in cut_all([photo], sized_recipe, {}):
                if size not in originals:
                    name = f"{item.index:07}-original" + (f"-{size}" if size else "")
                    originals[size] = folder.view(name, item.image)
                one = next(iter(reconstruct(candidate, [item], sized_recipe, 1, Part())))
                scores = {name: float(values[row]) for name, values in gathered.values[place].items()}
                present = {name: score for name, score in scores.items() if math.isfinite(score)}
                views.append(_view(folder, place, candidate, one, originals[size], present))
        if len(views) == len(candidates):
            shown.append(ImageResult(photo.key, photo.index, reasons, tuple(views)))
        progress("pictures", number + 1, len(indices))
    return tuple(shown)


def _view(
    folder: PictureFolder,
    place: int,
    candidate: Candidate,
    one: Reconstruction,
    original: Picture,
    scores: dict[str, float],
) -> View:
    item, stem = one.item, f"{one.item.index:07}-{place}"
    image = one.levels[0].nan_to_num(0.0).round().permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    channels = std = None
    ranges: tuple[tuple[float, float], ...] = ()
    std_range = None
    if one.scaled is not None:
        channels, ranges = folder.grey(f"{stem}-channels", one.scaled.mean[0], 0.01, 0.99)
        if isinstance(candidate, VAECandidate) and candidate.has_posterior:
            std, (std_range,) = folder.grey(f"{stem}-std", one.scaled.std[0].mean(0, keepdim=True), 0.0, 1.0)
    return View(
        scores,
        original,
        folder.view(f"{stem}-reconstruction", image),
        folder.error(f"{stem}-error", item.image, image),
        ERROR_FULL_SCALE,
        folder.worst(f"{stem}-worst", item.image, image, f"{stem}-worst-original"),
        channels,
        len(ranges),
        ranges,
        std,
        std_range,
    )
