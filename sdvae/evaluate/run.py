"""An evaluation: photos through every candidate, chunk by chunk, and at the end the results.

Ranks talk to nobody: each takes every n-th chunk, and whoever finds all of them noted finishes the report.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdvae.bench.peak import measure_peak
from sdvae.encoding.prepare import list_entries
from sdvae.encoding.runners import Ranks
from sdvae.errors import ReportError
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.finish import finish
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

CHUNK = 8  # photos of a line in the journal; a kill costs at most one


def evaluate(
    source: Source,
    report: Path,
    candidates: Sequence[Candidate],
    recipe: Recipe,
    *,
    batch_size: int = 1,
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
    run = _Run(source, entries, candidates, recipe, judge, notes, batch_size)
    run.chunks(ranks, progress)
    notes.read()
    if len(notes.chunks) < run.num_chunks:
        return None
    return finish(source, entries, candidates, recipe, judge, notes, run.num_chunks, progress)


class _Run:
    """The chunks of one rank."""

    def __init__(
        self,
        source: Source,
        entries: Sequence[Entry],
        candidates: Sequence[Candidate],
        recipe: Recipe,
        judge: Judge,
        notes: Notes,
        batch_size: int,
    ) -> None:
        self.source, self.entries, self.candidates = source, entries, candidates
        self.recipe, self.judge, self.notes, self.batch_size = recipe, judge, notes, batch_size
        self.num_chunks = -(-len(entries) // CHUNK)

    def chunks(self, ranks: Ranks, progress: Progress) -> None:
        """Judge and note the chunks of this rank that nobody has noted yet."""
        share = ranks.share(range(self.num_chunks))
        left = [number for number in share if number not in self.notes.chunks]
        places = [(number, self._places(number)) for number in left]
        num_all = sum(len(self._places(number)) for number in share)
        num_done = num_all - sum(len(these) for _, these in places)
        photos = read_photos(self.source, [(place, self.entries[place]) for _, these in places for place in these])
        with ExitStack() as stack:
            for candidate in self.candidates:
                if not isinstance(candidate, CodecCandidate):
                    stack.enter_context(candidate.exactly())
            for number, these in places:
                progress("judge", num_done, num_all)
                self._chunk(number, [next(photos) for _ in these])
                num_done += len(these)
                progress("judge", num_done, num_all)

    def _places(self, number: int) -> range:
        return range(number * CHUNK, min((number + 1) * CHUNK, len(self.entries)))

    def _chunk(self, number: int, photos: Sequence[Photo]) -> None:
        left_out: dict[int, str] = {}
        parts: list[dict[str, Any]] = []
        of_originals: set[str] = set()
        for place, candidate in enumerate(self.candidates):
            recipe = sized(self.recipe, candidate.identity.size_px)
            items = list(cut_all(photos, recipe, left_out))
            self._measure_peak(candidate, items, recipe)
            part, features = judge_chunk(candidate, items, recipe, self.judge, self.batch_size)
            parts.append(part.to_json())
            if self.judge.inception is not None:
                self._note_features(number, str(place), list(features.values()))
                original = original_name(recipe)
                if original not in of_originals:
                    of_originals.add(original)
                    self._note_features(number, original, [self._features(item) for item in items])
        self.notes.append(
            {"chunk": number, "left_out": {str(index): reason for index, reason in left_out.items()}, "parts": parts}
        )

    def _measure_peak(self, candidate: Candidate, items: Sequence[Item], recipe: Recipe) -> None:
        """Once a candidate and report: the memory that one image takes; it also warms the candidate up."""
        label = candidate.identity.label
        if not items or label in self.notes.peaks or isinstance(candidate, CodecCandidate):
            return
        first = items[:1]
        judge = Judge((), {}, None, ())
        _, num_bytes = measure_peak(lambda: judge_chunk(candidate, first, recipe, judge, 1), candidate.vae.device)
        self.notes.peaks[label] = num_bytes
        self.notes.append({"peak": label, "bytes": num_bytes})

    def _features(self, item: Item) -> torch.Tensor:
        levels = torch.tensor(item.image, dtype=torch.uint8, device="cpu").permute(2, 0, 1)[None]
        return self.judge.features(levels)

    def _note_features(self, chunk: int, name: str, features: Sequence[torch.Tensor]) -> None:
        rows = (
            torch.stack(list(features)) if features else torch.zeros(0, NUM_FEATURES, dtype=torch.float32, device="cpu")
        )
        self.notes.write_features(chunk, name, rows.numpy().astype(np.float32))


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
