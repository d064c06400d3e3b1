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
from sdvae.evaluate.evaluation import Evaluation
from sdvae.evaluate.gather import Gathered
from sdvae.evaluate.latents import report as latent_report
from sdvae.evaluate.photos import read_photos
from sdvae.evaluate.pictures import choose
from sdvae.evaluate.probes import central_crop, probe, spread
from sdvae.evaluate.recipes import sized
from sdvae.evaluate.results import Curve, MetricColumn, Results, write_results
from sdvae.evaluate.round_trip import Candidate
from sdvae.evaluate.show import picture
from sdvae.evaluate.summaries import summarise
from sdvae.progress import Progress


def finish(work: Evaluation, progress: Progress) -> Results:
    """Gather what was noted, measure what needs a few images only, write everything, and return it."""
    gathered = Gathered(work)
    report = work.notes.report
    atomic.write_stream(report / results.SCORES_NAME, gathered.lines())
    if not gathered.num_images:
        reasons = "; ".join(f"{number}: {reason}" for reason, number in gathered.left_out.most_common(3))
        raise ReportError(f"none of the {len(work.entries)} photos of {work.source.name} could be judged ({reasons})")
    columns = tuple(column for column in work.judge.columns if column.scope == "set" or gathered.has(column.name))
    with ExitStack() as stack:
        for candidate in work.candidates:
            if isinstance(candidate, VAECandidate):
                stack.enter_context(candidate.exactly())
        probes = _Probes(work, gathered)
        judged = []
        for place, candidate in enumerate(work.candidates):
            progress("probes", place, len(work.candidates))
            judged.append(_judged(place, candidate, gathered, columns, probes))
        progress("probes", len(work.candidates), len(work.candidates))
        ranked_by = next(column for column in columns if column.scope == "image")
        chosen = choose(gathered.ranking(ranked_by.name).tolist(), ranked_by.direction)
        images = picture(work, gathered, chosen, progress)
    found = Results(
        recipe=work.recipe,
        caption=work.recipe.caption(),
        source=work.source.name,
        machine=machine_card(),
        columns=columns,
        candidates=tuple(judged),
        images=images,
        num_images=gathered.num_images,
        left_out=dict(gathered.left_out.most_common()),
        remarks=(*work.judge.remarks, *gathered.remarks()),
        ranked_by=ranked_by.name,
    )
    write_results(report, found)
    return found


class _Probes:
    """The few photos on which equivariance and decay are measured."""

    def __init__(self, work: Evaluation, gathered: Gathered) -> None:
        self.work = work
        rows = spread(gathered.num_images, work.recipe.num_probed, work.recipe.seed)
        indices = [gathered.indices[row] for row in rows]
        self.photos = list(read_photos(work.source, [(index, work.entries[index]) for index in indices]))

    def measure(self, candidate: VAECandidate) -> tuple[tuple[results.Equivariance, ...], Curve, int]:
        """Noted, so that a run that goes on need not measure again."""
        label, notes = candidate.identity.label, self.work.notes
        if label not in notes.probes:
            recipe = sized(self.work.recipe, candidate.identity.size_px)
            cuts = [cut(photo.image, recipe) for photo in self.photos if photo.image is not None]
            crops = [central_crop(image, candidate.config.downscale, recipe.probe_px) for image in cuts]
            images = [crop for crop in crops if crop is not None]
            line: dict[str, Any] = {"probe": label, "num": len(images), "equivariance": [], "decay": {"x": [], "y": []}}
            if images:
                equivariance, decay = probe(candidate, images)
                line |= {"equivariance": [asdict(one) for one in equivariance], "decay": asdict(decay)}
            notes.append(line)
            notes.probes[label] = line
        line = notes.probes[label]
        follows = tuple(results.from_json(results.Equivariance, one) for one in line["equivariance"])
        return follows, results.from_json(Curve, line["decay"]), line["num"]


def _judged(
    place: int, candidate: Candidate, gathered: Gathered, columns: Sequence[MetricColumn], probes: _Probes
) -> results.Candidate:
    part = gathered.parts[place]
    num = part.num_images
    summaries = {column.name: summarise(column, place, gathered) for column in columns}
    present = {name: summary for name, summary in summaries.items() if summary is not None}
    if isinstance(candidate, CodecCandidate):
        bits = part.bits / num if num else None
        return results.Candidate(**asdict(candidate.identity), summaries=present, bits_per_pixel=bits)
    latents = None
    if part.sums.num_latents:
        latents = latent_report(part.sums, candidate.has_posterior, *probes.measure(candidate))
    return results.Candidate(
        **asdict(candidate.identity),
        summaries=present,
        encode_s=part.encode_s / num if num else None,
        decode_s=part.decode_s / num if num else None,
        peak_bytes=gathered.work.notes.peaks.get(candidate.identity.label),
        bits_per_pixel=latents.bits_per_pixel if latents else None,
        latents=latents,
        num_failed=part.num_failed,
    )
