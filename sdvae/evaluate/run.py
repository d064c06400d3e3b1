"""An evaluation: photos through every candidate, chunk by chunk, and at the end the results.

Ranks talk to nobody: each takes every n-th chunk, and whoever finds all of them noted finishes the report.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdvae.bench.peak import measure_peak
from sdvae.encoding.prepare import list_entries
from sdvae.encoding.runners import Ranks
from sdvae.errors import ReportError
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.evaluation import Evaluation
from sdvae.evaluate.finish import finish
from sdvae.evaluate.gallery import Gallery
from sdvae.evaluate.judge import CPU, Judge, appoint
from sdvae.evaluate.notes import Notes
from sdvae.evaluate.photos import Photo, read_photos
from sdvae.evaluate.recipes import Recipe, sized
from sdvae.evaluate.results import SCHEMA, Results, to_json
from sdvae.evaluate.round_trip import Candidate, Item, cut_all, judge_chunk
from sdvae.evaluate.summaries import original_name
from sdvae.perceptual.inception import NUM_FEATURES
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Entry, Source

SHOWN_AT_ONCE = 24  # of so many photos or fewer, pictures are made of all while they are judged: half may be shown


def evaluate(
    source: Source,
    report: Path,
    candidates: Sequence[Candidate],
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    ranks: Ranks | None = None,
    must_have_all: bool = False,
    progress: Progress = silent,
) -> Results | None:
    """Judge `candidates` by `recipe` on the photos of `source`; results.json and pictures go to the folder `report`.

    A run that was interrupted goes on, and comes to the same numbers, as does any batch size and any number of ranks.
    None where chunks of other ranks are still missing. Raises SourceError without photos, ReportError for a folder
    that holds something else, and with `must_have_all` MissingNetwork for a metric whose network is not here.
    """
    ranks = ranks or Ranks()
    _require_distinct(candidates)
    entries = list_entries(source, recipe.max_images)
    if source.root is not None:
        _require_apart(source.root.resolve(), report.resolve())
    judge = appoint(recipe, _place(candidates), must_have_all=must_have_all)
    notes = Notes(report, _plan(recipe, candidates, judge, entries), ranks.rank)
    work = Evaluation(source, entries, candidates, recipe, judge, notes, Gallery(report))
    _Run(work, batch_size).chunks(ranks, progress)
    notes.read()
    return finish(work, progress) if len(notes.chunks) == work.num_chunks else None


class _Run:
    """The chunks of one rank."""

    def __init__(self, work: Evaluation, batch_size: int | None) -> None:
        self.work, self.batch_size = work, batch_size
        self.shows_all = len(work.entries) <= SHOWN_AT_ONCE

    def chunks(self, ranks: Ranks, progress: Progress) -> None:
        """Judge and note the chunks of this rank that nobody has noted yet."""
        work = self.work
        share = ranks.share(range(work.num_chunks))
        places = [(number, work.places(number)) for number in share if number not in work.notes.chunks]
        num_all = sum(len(work.places(number)) for number in share)
        num_done = num_all - sum(len(these) for _, these in places)
        photos = read_photos(work.source, [(place, work.entries[place]) for _, these in places for place in these])
        with ExitStack() as stack:
            for candidate in work.candidates:
                if not isinstance(candidate, CodecCandidate):
                    stack.enter_context(candidate.exactly())
            for number, these in places:
                progress("judge", num_done, num_all)
                self._chunk(number, [next(photos) for _ in these])
                num_done += len(these)
                progress("judge", num_done, num_all)

    def _chunk(self, number: int, photos: Sequence[Photo]) -> None:
        work = self.work
        left_out: dict[int, str] = {}
        parts: list[dict[str, Any]] = []
        of_originals: set[str] = set()
        for place, candidate in enumerate(work.candidates):
            recipe = sized(work.recipe, candidate.identity.size_px)
            items = list(cut_all(photos, recipe, left_out))
            self._measure_peak(candidate, items, recipe)
            show = partial(work.gallery.add, place, candidate) if self.shows_all else None
            part, features = judge_chunk(candidate, items, recipe, work.judge, self.batch_size, show)
            parts.append(part.to_json())
            if work.judge.inception is not None:
                self._note_features(number, str(place), list(features.values()))
                original = original_name(recipe)
                if original not in of_originals:
                    of_originals.add(original)
                    self._note_features(number, original, [self._features(item) for item in items])
        work.notes.append(
            {"chunk": number, "left_out": {str(index): reason for index, reason in left_out.items()}, "parts": parts}
        )

    def _measure_peak(self, candidate: Candidate, items: Sequence[Item], recipe: Recipe) -> None:
        """Once a candidate and report: the memory that one image takes; it also warms the candidate up."""
        label, notes = candidate.identity.label, self.work.notes
        if not items or label in notes.peaks or isinstance(candidate, CodecCandidate):
            return
        first = items[:1]
        judge = Judge((), {}, None, ())
        _, num_bytes = measure_peak(lambda: judge_chunk(candidate, first, recipe, judge, 1), candidate.vae.device)
        notes.peaks[label] = num_bytes
        notes.append({"peak": label, "bytes": num_bytes})

    def _features(self, item: Item) -> torch.Tensor:
        levels = torch.tensor(item.image, dtype=torch.uint8, device="cpu").permute(2, 0, 1)[None]
        return self.work.judge.features(levels)

    def _note_features(self, chunk: int, name: str, features: Sequence[torch.Tensor]) -> None:
        rows = (
            torch.stack(list(features)) if features else torch.zeros(0, NUM_FEATURES, dtype=torch.float32, device="cpu")
        )
        self.work.notes.write_features(chunk, name, rows.numpy().astype(np.float32))


def _place(candidates: Sequence[Candidate]) -> torch.device:
    """Where scores are computed: on the GPU of the first VAE, else on the CPU, since fp64 is not everywhere."""
    devices = [candidate.vae.device for candidate in candidates if not isinstance(candidate, CodecCandidate)]
    return devices[0] if devices and devices[0].type == "cuda" else CPU


def _plan(recipe: Recipe, candidates: Sequence[Candidate], judge: Judge, entries: Sequence[Entry]) -> dict[str, Any]:
    """What decides about the numbers; a report continues only under the same."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr((entry.key, entry.num_bytes, entry.mtime_ns, entry.reason)).encode())
    return {
        "schema": SCHEMA,
        "recipe": to_json(recipe),
        "candidates": [to_json(candidate.identity) for candidate in candidates],
        "metrics": [to_json(column) for column in judge.columns],
        "photos": digest.hexdigest(),
    }


def _require_distinct(candidates: Sequence[Candidate]) -> None:
    labels = [candidate.identity.label for candidate in candidates]
    double = sorted({label for label in labels if labels.count(label) > 1})
    if double:
        raise ReportError(f"two candidates are both called {double[0]}; name each VAE once")


def _require_apart(source: Path, report: Path) -> None:
    if report == source or report.is_relative_to(source) or source.is_relative_to(report):
        raise ReportError(f"{report} and the photos of {source} would mix; give the report a folder of its own")
