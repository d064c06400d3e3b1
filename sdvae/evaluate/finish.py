"""The end of an evaluation: the notes of all chunks become scores.jsonl, pictures and results.json."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from sdvae import atomic
from sdvae.bench.machine import machine_card
from sdvae.errors import ReportError
from sdvae.evaluate import results
from sdvae.evaluate.candidates import VAECandidate
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.crops import cut
from sdvae.evaluate.gather import Gathered
from sdvae.evaluate.judge import Judge
from sdvae.evaluate.latents import report as latent_report
from sdvae.evaluate.notes import Notes
from sdvae.evaluate.photos import read_photos
from sdvae.evaluate.pictures import choose
from sdvae.evaluate.probes import NUM_PROBED, central_crop, decay, equivariance
from sdvae.evaluate.recipes import Recipe, sized
from sdvae.evaluate.results import Curve, MetricColumn, Results, write_results
from sdvae.evaluate.round_trip import Candidate
from sdvae.evaluate.show import picture
from sdvae.evaluate.summaries import summarise
from sdvae.progress import Progress
from sdvae.sources.entries import Entry, Source


def finish(
    source: Source,
    entries: Sequence[Entry],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    judge: Judge,
    notes: Notes,
    num_chunks: int,
    progress: Progress,
) -> Results:
    """Gather what was noted, measure what needs a few images only, write everything, and return it."""
    gathered = Gathered(notes, num_chunks, entries, judge, candidates)
    atomic.write_stream(notes.report / results.SCORES_NAME, gathered.lines())
    if not gathered.num_images:
        reasons = "; ".join(f"{number}: {reason}" for reason, number in gathered.left_out.most_common(3))
        raise ReportError(f"none of the {len(entries)} photos of {source.name} could be judged ({reasons})")
    columns = tuple(column for column in judge.columns if column.scope == "set" or gathered.has(column.name))
    with ExitStack() as stack:
        for candidate in candidates:
            if isinstance(candidate, VAECandidate):
                stack.enter_context(candidate.exactly())
        probe = _Probe(source, entries, recipe, notes, gathered)
        judged = tuple(
            _judged(place, candidate, gathered, columns, notes, probe) for place, candidate in enumerate(candidates)
        )
        ranked_by = next(column for column in columns if column.scope == "image")
        chosen = choose(gathered.ranking(ranked_by.name).tolist(), ranked_by.direction)
        images = picture(source, entries, candidates, recipe, notes, gathered, chosen, progress)
    found = Results(
        recipe=recipe,
        caption=recipe.caption(),
        source=source.name,
        machine=machine_card(),
        columns=columns,
        candidates=judged,
        images=images,
        num_images=gathered.num_images,
        left_out=dict(gathered.left_out.most_common()),
        remarks=(*judge.remarks, *gathered.remarks()),
        ranked_by=ranked_by.name,
    )
    write_results(notes.report, found)
    return found


class _Probe:
    """The few images on which equivariance and decay are measured."""

    def __init__(
        self, source: Source, entries: Sequence[Entry], recipe: Recipe, notes: Notes, gathered: Gathered
    ) -> None:
        self.notes, self.recipe = notes, recipe
        places = list(gathered.indices[:NUM_PROBED])
        self.photos = list(read_photos(source, [(place, entries[place]) for place in places]))

    def measure(self, candidate: VAECandidate) -> tuple[tuple[results.Equivariance, ...], Curve, int]:
        """Noted, so that a run that goes on need not measure again."""
        label = candidate.identity.label
        recipe = sized(self.recipe, candidate.identity.size_px)
        if label not in self.notes.probes:
            cuts = [cut(photo.image, recipe) for photo in self.photos if photo.image is not None]
            crops = [crop for image in cuts if (crop := central_crop(image, candidate.config.downscale)) is not None]
            line: dict[str, Any] = {"probe": label, "num": len(crops), "equivariance": [], "decay": {"x": [], "y": []}}
            if crops:
                line["equivariance"] = [asdict(one) for one in equivariance(candidate, crops)]
                line["decay"] = asdict(decay(candidate, crops))
            self.notes.append(line)
            self.notes.probes[label] = line
        line = self.notes.probes[label]
        follows = tuple(results.from_json(results.Equivariance, one) for one in line["equivariance"])
        return follows, results.from_json(Curve, line["decay"]), line["num"]


def _judged(
    place: int,
    candidate: Candidate,
    gathered: Gathered,
    columns: Sequence[MetricColumn],
    notes: Notes,
    probe: _Probe,
) -> results.Candidate:
    part = gathered.parts[place]
    num = part.num_images
    summaries = {column.name: summarise(column, place, gathered, notes, probe.recipe) for column in columns}
    present = {name: summary for name, summary in summaries.items() if summary is not None}
    if isinstance(candidate, CodecCandidate):
        bits = part.bits / num if num else None
        return results.Candidate(**asdict(candidate.identity), summaries=present, bits_per_pixel=bits)
    latents = None
    if part.sums.num_latents:
        latents = latent_report(part.sums, candidate.has_posterior, *probe.measure(candidate))
    return results.Candidate(
        **asdict(candidate.identity),
        summaries=present,
        encode_s=part.encode_s / num if num else None,
        decode_s=part.decode_s / num if num else None,
        peak_bytes=notes.peaks.get(candidate.identity.label),
        bits_per_pixel=latents.bits_per_pixel if latents else None,
        latents=latents,
        num_failed=part.num_failed,
    )
