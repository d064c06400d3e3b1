"""The images that a report shows: their pictures and scores after every candidate."""

import math
from collections.abc import Sequence
from dataclasses import replace

from sdvae.evaluate.evaluation import Evaluation
from sdvae.evaluate.gather import Gathered
from sdvae.evaluate.photos import Photo, read_photos
from sdvae.evaluate.recipes import sized
from sdvae.evaluate.results import ImageResult, Reason, View
from sdvae.evaluate.round_trip import Part, cut_all, reconstruct
from sdvae.progress import Progress


def picture(
    work: Evaluation, gathered: Gathered, chosen: Sequence[tuple[int, tuple[Reason, ...]]], progress: Progress
) -> tuple[ImageResult, ...]:
    """The chosen rows of `gathered` with their pictures; what the gallery lacks goes through its candidate again."""
    indices = [gathered.indices[row] for row, _ in chosen]
    lacking = {
        index for index in indices for place in range(len(work.candidates)) if work.gallery.find(index, place) is None
    }
    photos = read_photos(work.source, [(index, work.entries[index]) for index in indices if index in lacking])
    for number, photo in enumerate(photos):
        progress("pictures", number, len(lacking))
        _complete(work, photo)
        progress("pictures", number + 1, len(lacking))
    shown = []
    for (row, reasons), index in zip(chosen, indices, strict=True):
        views = [_scored(view, gathered, place, row) for place, view in enumerate(_views(work, index))]
        if len(views) == len(work.candidates):
            shown.append(ImageResult(work.entries[index].key, index, reasons, tuple(views)))
    work.gallery.keep_only(shown)
    return tuple(shown)


def _complete(work: Evaluation, photo: Photo) -> None:
    for place, candidate in enumerate(work.candidates):
        if work.gallery.find(photo.index, place) is None:
            recipe = sized(work.recipe, candidate.identity.size_px)
            for item in cut_all([photo], recipe, {}):
                for one in reconstruct(candidate, [item], recipe, 1, Part()):
                    work.gallery.add(place, candidate, one)


def _views(work: Evaluation, index: int) -> list[View]:
    found = (work.gallery.find(index, place) for place in range(len(work.candidates)))
    return [view for view in found if view is not None]


def _scored(view: View, gathered: Gathered, place: int, row: int) -> View:
    scores = {name: float(values[row]) for name, values in gathered.values[place].items()}
    return replace(view, scores={name: score for name, score in scores.items() if math.isfinite(score)})
