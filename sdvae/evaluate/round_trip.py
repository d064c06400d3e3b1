"""One chunk of photos through one candidate: reconstructions, scores, sums."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.bench.timing import seconds_of
from sdvae.errors import ImageError
from sdvae.evaluate.candidates import VAECandidate, draw, padded_pixels, to_levels
from sdvae.evaluate.codecs import CodecCandidate
from sdvae.evaluate.crops import cut
from sdvae.evaluate.judge import CPU, Judge
from sdvae.evaluate.latents import LatentSums
from sdvae.evaluate.photos import Photo
from sdvae.evaluate.recipes import Recipe
from sdvae.posterior import DiagonalGaussian

Image = NDArray[np.uint8]  # (H, W, 3)
Candidate = VAECandidate | CodecCandidate

_BATCH_PIXELS = 512 * 512  # of a batch; beyond, a CPU gains nothing


@dataclass(frozen=True)
class Item:
    """An image to judge: its place and its key in the source."""

    index: int
    key: str
    image: Image


@dataclass(frozen=True)
class Reconstruction:
    """What a candidate made of an image: levels (1, 3, H, W), 0..255 in fp64, and for a VAE its scaled posterior."""

    item: Item
    levels: Tensor
    original: Tensor
    scaled: DiagonalGaussian | None = None
    bits_per_pixel: float | None = None


@dataclass
class Part:
    """What a chunk of photos gave for one candidate; all of it is JSON."""

    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # by index
    num_images: int = 0
    sums: LatentSums = field(default_factory=LatentSums)
    num_failed: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    bits: float = 0.0  # of a codec: bits per pixel, summed over images

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types."""
        return vars(self) | {
            "scores": {str(index): scores for index, scores in self.scores.items()},
            "sums": self.sums.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Part":
        """The inverse of `to_json`."""
        scores = {int(index): scores for index, scores in values["scores"].items()}
        return cls(**values | {"scores": scores, "sums": LatentSums.from_json(values["sums"])})


def cut_all(photos: Iterable[Photo], recipe: Recipe, left_out: dict[int, str]) -> Iterator[Item]:
    """The images of photos; `left_out` is told of those that cannot be cut."""
    for photo in photos:
        if photo.image is None:
            left_out[photo.index] = photo.reason
            continue
        try:
            yield Item(photo.index, photo.key, cut(photo.image, recipe))
        except ImageError as error:
            left_out[photo.index] = str(error)


def judge_chunk(
    candidate: Candidate,
    items: Sequence[Item],
    recipe: Recipe,
    judge: Judge,
    batch_size: int | None,
    show: Callable[[Reconstruction], None] | None = None,
) -> tuple[Part, dict[int, Tensor]]:
    """The scores of these images, and the features of their reconstructions where the judge compares sets.

    `show` is called with each reconstruction that is finite.
    """
    part, features = Part(), {}
    sums: dict[int, LatentSums] = {}
    for one in reconstruct(candidate, items, recipe, batch_size, part):
        index = one.item.index
        if not bool(one.levels.isfinite().all()):
            part.num_failed += 1
            continue
        part.num_images += 1
        part.scores[index] = judge.score(one.levels, one.original)
        part.bits += one.bits_per_pixel or 0.0
        if show is not None:
            show(one)
        if judge.inception is not None:
            features[index] = judge.features(one.levels)
        if one.scaled is not None:
            sums[index] = LatentSums()
            sums[index].add_posterior(one.scaled, one.original)
            sums[index].add_levels(one.original, one.levels)
    for index in sorted(sums):  # in one order, whatever the batches were
        part.sums.merge(sums[index])
    part.scores = dict(sorted(part.scores.items()))
    return part, features


def reconstruct(
    candidate: Candidate, items: Sequence[Item], recipe: Recipe, batch_size: int | None, part: Part
) -> Iterator[Reconstruction]:
    """Each image through the candidate, those of one size together; `part` is told the seconds.

    Without a `batch_size`, small images share a batch.
    """
    if isinstance(candidate, CodecCandidate):
        for item in items:
            image, bits = candidate.reconstruct(item.image)
            yield Reconstruction(item, _levels(image, CPU), _levels(item.image, CPU), None, bits)
        return
    by_size: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        by_size.setdefault(item.image.shape, []).append(item)
    for same in by_size.values():
        height, width = same[0].image.shape[:2]
        together = batch_size or max(1, _BATCH_PIXELS // (height * width))
        for start in range(0, len(same), together):
            yield from _run(candidate, same[start : start + together], recipe, part)


def _run(candidate: VAECandidate, items: Sequence[Item], recipe: Recipe, part: Part) -> Iterator[Reconstruction]:
    device = candidate.vae.device
    pixels = padded_pixels([item.image for item in items], candidate.config.downscale)
    posterior, part_s = _timed(lambda: candidate.encode(pixels), device)
    part.encode_s += part_s
    latents = draw(posterior, recipe.latents, recipe.seed, [item.key for item in items])
    decoded, part_s = _timed(lambda: candidate.decode(latents), device)
    part.decode_s += part_s
    place = device if device.type == "cuda" else CPU  # fp64 is not everywhere
    scaled = candidate.scaled(posterior)
    for row, item in enumerate(items):
        height, width = item.image.shape[:2]
        levels = to_levels(decoded[row : row + 1, :, :height, :width].to(place), recipe.rounding)
        one = DiagonalGaussian(scaled.mean[row : row + 1], scaled.logvar[row : row + 1])
        yield Reconstruction(item, levels, _levels(item.image, place), one)


def _timed(run: Any, device: torch.device) -> tuple[Any, float]:
    results: list[Any] = []
    seconds = seconds_of(lambda: results.append(run()), device)
    return results[0], seconds


def _levels(image: Image, device: torch.device) -> Tensor:
    return torch.tensor(image, dtype=torch.float64, device=device).permute(2, 0, 1)[None]
