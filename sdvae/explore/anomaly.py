"""Which photos do not belong: ranked by how badly a VAE explains them, with a threshold from photos that do."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdvae.encoding.prepare import list_entries
from sdvae.engine.run import Budget
from sdvae.errors import ConfigError, SourceError
from sdvae.explore.photos import Item, cut_photos, decode, encode, in_batches
from sdvae.pixels import to_images, to_pixels
from sdvae.posterior import DiagonalGaussian
from sdvae.progress import Progress, silent
from sdvae.sources.entries import Source
from sdvae.sources.open import open_source
from sdvae.store.geometry import Preprocess
from sdvae.train.data import seed_of
from sdvae.train.losses import gaussian_nll, log_evidence, log_importance_weights, squared_error
from sdvae.vae import VAE

Image = NDArray[np.uint8]  # (H, W, 3)
By = Literal["error", "elbo", "likelihood"]

_LEAST_STD = 1.0 / 255.0  # half a level of 8-bit pixels in [-1, 1]: no decoder is right beyond their rounding


@dataclass(frozen=True)
class Ranking:
    """Every photo of a source with its score, the worst first.

    A score is a mean over the values of an image, so that sizes compare: squared error in [-1, 1], or nats. A photo is
    an anomaly where it is above the threshold.
    """

    by: By
    scores: list[tuple[str, float]]  # (key, score)
    threshold: float | None  # None without clean photos
    noise_std: float | None  # of the decoder's Gaussian, in [-1, 1]; None where errors are ranked
    left_out: dict[str, str]  # key -> why it could not be read
    clean_left_out: dict[str, str]

    @property
    def anomalies(self) -> list[tuple[str, float]]:
        """Those above the threshold."""
        threshold = math.inf if self.threshold is None else self.threshold
        return [(key, score) for key, score in self.scores if score > threshold]


@dataclass(frozen=True)
class Scorer:
    """How badly a VAE explains images of one size.

    `error`: mean squared error of the reconstruction. `elbo`: the negative evidence lower bound. `likelihood`: the
    negative log-likelihood, by importance sampling. Both assume a Gaussian of `noise_std` around each decoded value,
    draw `num_samples` latents of each posterior, and are in nats per value.
    """

    vae: VAE
    by: By = "error"
    noise_std: float = 1.0
    num_samples: int = 8
    seed: int = 0
    budget: Budget = None

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """A score for each; noise depends on seed and key, so batches change no score but for rounding."""
        pixels = to_pixels(np.stack([item.image for item in items])).double()
        posterior = encode(self.vae, items, self.budget)
        if self.by == "error":
            lost = squared_error(self._decode(posterior.mode(), items), pixels)
        else:
            lost = torch.stack([self._nats(posterior, pixels, items, row) for row in range(len(items))])
        scores: list[float] = (lost / pixels[0].numel()).tolist()
        return scores

    def _nats(self, posterior: DiagonalGaussian, pixels: Tensor, items: Sequence[Item], row: int) -> Tensor:
        mean, logvar = (values[row].cpu().double() for values in (posterior.mean, posterior.logvar))
        one = DiagonalGaussian(mean[None], logvar[None])
        copies = DiagonalGaussian(*(values.expand(self.num_samples, *values.shape) for values in (mean, logvar)))
        generator = torch.Generator().manual_seed(seed_of(self.seed, items[row].entry.key))
        noise_logvar = torch.tensor(2.0 * math.log(self.noise_std), dtype=torch.float64, device="cpu")

        def log_likelihood(latents: Tensor) -> Tensor:
            return -gaussian_nll(
                self._decode(latents, items), pixels[row].expand(self.num_samples, -1, -1, -1), noise_logvar
            )

        if self.by == "elbo":
            return one.kl()[0] - log_likelihood(copies.sample(generator)).mean()
        return -log_evidence(log_importance_weights(log_likelihood, copies, 1, generator).T)[0]

    def _decode(self, latents: Tensor, items: Sequence[Item]) -> Tensor:
        return decode(self.vae, latents.float(), items, self.budget).cpu().double()


def rank_anomalies(
    source: str | Path | Source | Iterable[Any],
    vae: VAE,
    clean: str | Path | Source | Iterable[Any] | None = None,
    *,
    by: By = "error",
    quantile: float = 0.99,
    num_samples: int = 8,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget = None,
    progress: Progress = silent,
) -> Ranking:
    """Rank the photos of `source` by how badly `vae` explains them; see `Scorer` for the scores.

    The threshold is a quantile of the scores of `clean`: no more than 1 - quantile of those photos lie above it. The
    decoder's `noise_std` is the root of the mean squared error over `clean`, or over `source` without it. Images are
    read one batch at a time. ConfigError for settings that mean nothing, SourceError where no photo can be read.
    """
    if by not in ("error", "elbo", "likelihood"):
        raise ConfigError(f"unknown score {by!r}; it is error, elbo or likelihood")
    if not 0.0 < quantile <= 1.0:
        raise ConfigError(f"a quantile of {quantile} is none; give one above 0 and up to 1, such as 0.99")
    if num_samples < 1:
        raise ConfigError(f"{num_samples} samples estimate nothing; give at least 1")
    preprocess = preprocess or Preprocess()
    photos, reference = open_source(source), None if clean is None else open_source(clean)

    def score(which: Source, scorer: Scorer, phase: str) -> tuple[list[tuple[str, float]], dict[str, str]]:
        return _score(which, scorer, preprocess, batch_size, phase, progress)

    noise_std = None
    if by != "error":
        errors, _ = score(reference or photos, Scorer(vae, budget=budget), "measure the error")
        noise_std = max(_LEAST_STD, math.sqrt(math.fsum(error for _, error in errors) / len(errors)))
    scorer = Scorer(vae, by, noise_std or 1.0, num_samples, seed, budget)
    threshold: float | None = None
    clean_left_out: dict[str, str] = {}
    if reference is not None:
        found, clean_left_out = score(reference, scorer, "score clean photos")
        # A clean photo's own score, not one in between: then the share above it is exact.
        threshold = float(np.quantile([value for _, value in found], quantile, method="inverted_cdf"))
    scores, left_out = score(photos, scorer, "score")
    scores.sort(key=lambda scored: (-scored[1], scored[0]))
    return Ranking(by, scores, threshold, noise_std, left_out, clean_left_out)


def reconstruct_worst(
    source: Source, vae: VAE, ranking: Ranking, most: int, preprocess: Preprocess, budget: Budget = None
) -> list[tuple[str, float, Image, Image]]:
    """Key, score, image and reconstruction of the worst photos, which are read again."""
    scores = dict(ranking.scores[:most])
    entries = [entry for entry in source.entries() if entry.key in scores]
    found = {}
    for item in cut_photos(source, entries, preprocess, {}):
        latents = encode(vae, [item], budget).mode()
        found[item.entry.key] = item.image, to_images(decode(vae, latents, [item], budget))[0]
    return [(key, score, *found[key]) for key, score in scores.items() if key in found]


def _score(
    source: Source, scorer: Scorer, preprocess: Preprocess, batch_size: int | None, phase: str, progress: Progress
) -> tuple[list[tuple[str, float]], dict[str, str]]:
    """Key and score of each photo, and which could not be read; SourceError where that is every one."""
    entries = list_entries(source)
    scores: list[tuple[str, float]] = []
    left_out: dict[str, str] = {}
    progress(phase, 0, len(entries))
    for batch in in_batches(cut_photos(source, entries, preprocess, left_out), batch_size):
        for item, value in zip(batch, scorer(batch), strict=True):
            if math.isfinite(value):
                scores.append((item.entry.key, value))
            else:
                left_out[item.entry.key] = "its reconstruction is not finite"
        progress(phase, len(scores) + len(left_out), len(entries))
    if not scores:
        raise SourceError(f"no photo of {source.name} can be scored: {next(iter(left_out.values()))}")
    return scores, left_out
