"""Whether latents look raw or scaled, by their spread: in every space, scaled ones have a std near 1."""

import math
from collections import defaultdict
from statistics import median

from torch import Tensor

from sdvae.config import VAEConfig
from sdvae.latents import standardise
from sdvae.reading.latent_files import FoundLatents

# Std of scaled latents: of photos 0.46 to 1.06, by five VAEs of four spaces; a diffusion model's about 1.
_USUAL_STD = 0.75
# How many times nearer to it the other reading must be. SD 3's raw and scaled latents differ by 1.53: they look alike.
_CLEARLY = 1.6


class Spread:
    """The spread of many files' latents. One flat image says little, so the median decides."""

    def __init__(self, config: VAEConfig) -> None:
        self._config = config
        # (scaling, whether the user told it) -> of each image: std as stored, scaled std as read, and if read otherwise
        self._stds: defaultdict[tuple[str, bool], list[tuple[float, float, float]]] = defaultdict(list)

    def add(self, found: FoundLatents) -> None:
        """Take in the images of a file; where its shape says what it holds, there is no doubt."""
        if self._config.latents_patch > 1:
            return
        scaled = standardise(found.raw, self._config)
        if found.scaling == "scaled":
            stored, otherwise = scaled, standardise(scaled, self._config)
        else:
            stored, otherwise = found.raw, found.raw
        stds = zip(*map(_std, (stored, scaled, otherwise)), strict=True)
        self._stds[found.scaling, found.is_told] += [each for each in stds if all(each)]

    def doubts(self) -> list[str]:
        """A sentence where latents look like what they were not read as."""
        raw_std = _USUAL_STD / self._config.latent_scaling.overall_factor
        usual = f"raw latents of this VAE have about {raw_std:.2g}, scaled ones about {_USUAL_STD:g}"
        told = []
        for (scaling, is_told), stds in self._stds.items():
            stored, as_read, otherwise = (median(values) for values in zip(*stds, strict=True)) if stds else (1, 1, 1)
            if _distance(as_read) > _distance(otherwise) + math.log(_CLEARLY):
                other = "raw" if scaling == "scaled" else "scaled"
                why = f"--latents {scaling} was given" if is_told else f"their files say {scaling}"
                told.append(f"std {stored:.2g}: these look {other}, but {why}; {usual}")
        return told


def _std(latents: Tensor) -> list[float]:  # (N, C, h, w)
    stds: list[float] = latents.flatten(1).std(1).tolist()
    return stds


def _distance(std: float) -> float:
    return abs(math.log(std / _USUAL_STD))
