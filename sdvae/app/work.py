"""What the playground computes: photos through VAEs, ways between photos, samples of the prior. One call at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdvae.encoding.resize import apply
from sdvae.engine.precision import choose_dtype
from sdvae.errors import ConfigError
from sdvae.evaluate.candidates import VAECandidate, padded_pixels
from sdvae.evaluate.probes import TRIPS
from sdvae.images.read import read_image
from sdvae.metrics import psnr
from sdvae.pixels import to_images
from sdvae.report import pictures
from sdvae.report.plots import Axis, Line, lines
from sdvae.report.text import number
from sdvae.report.view import Latents, Metric, Photo, Picture, Plot, Version
from sdvae.store.geometry import Preprocess, plan_geometry
from sdvae.vae import VAE

Image = NDArray[np.uint8]  # (H, W, 3)
Frames = list[tuple[Picture, str]]  # each with its caption

MAX_PIXELS = 2**26  # of an upload, before it is shrunk
SIZES = (256, 512, 768, 1024)
DTYPES = ("auto", "fp32", "bf16", "fp16")
TILINGS = ("none", "diffusers")
_TILE_PX = 256
_STEPS = 9
_NUM_SAMPLES = 4
METRICS = (Metric("psnr", "PSNR", "dB", "higher"), Metric("encode", "Encode, s"), Metric("decode", "Decode, s"))


@dataclass(frozen=True)
class Choice:
    """What the page asks for."""

    vaes: tuple[int, ...] = (0,)
    dtype: str = "auto"
    tiling: Literal["none", "diffusers"] = "none"
    size_px: int = 512  # of the shorter side, of larger photos
    trips: int = 1
    seed: int = 0

    @classmethod
    def of_query(cls, query: Sequence[tuple[str, str]], num_vaes: int) -> "Choice":
        """The choice that a request's query spells; ConfigError for a value that the page does not offer."""
        named = dict(query)
        places = tuple(dict.fromkeys(int(value) for name, value in query if name == "vae" and value.isdecimal()))
        choice = cls(
            places,
            named.get("dtype", "auto"),
            "diffusers" if named.get("tiling") == "diffusers" else "none",
            _whole(named.get("size", "512")),
            _whole(named.get("trips", "1")),
            _whole(named.get("seed", "0")),
        )
        if not places or max(places) >= num_vaes:
            raise ConfigError("choose at least one of the VAEs")
        if choice.dtype not in DTYPES or choice.size_px not in SIZES or choice.trips not in TRIPS:
            raise ConfigError("the page does not offer this dtype, size or number of round trips; load it again")
        return choice


@dataclass(frozen=True)
class Judged:
    """A photo, what the VAEs made of it, and how it drifts over round trips."""

    photo: Photo
    names: list[str]
    reels: list[tuple[str, Frames]]
    decay: Plot | None


class Playground:
    """VAEs on one device, in every dtype that is asked for; their weights are held once."""

    def __init__(self, vaes: Sequence[VAE]) -> None:
        """The first VAE is chosen when the page opens."""
        self._vaes = list(vaes)
        self.names = _short([vae.name for vae in vaes])
        self._candidates: dict[tuple[int, str, str], VAECandidate] = {}

    def judge(self, data: bytes, name: str, choice: Choice) -> Judged:
        """A photo through the chosen VAEs and back."""
        image = _shrunk(_read(data), choice.size_px)
        height, width = image.shape[:2]
        names = [self.names[place] for place in choice.vaes]
        versions: list[Version] = []
        reels: list[tuple[str, Frames]] = []
        curves: list[Line] = []
        for place, vae_name in zip(choice.vaes, names, strict=True):
            candidate = self._candidate(place, choice)
            version, first = _version(candidate, image, f"{name} by {vae_name}")
            frames, values = _drift(candidate, image, first, choice.trips, f"{name} by {vae_name}")
            versions.append(version)
            if choice.trips > 1:
                reels.append((vae_name, frames))
                trips, decibels = zip(*values, strict=True)
                curves.append(Line(vae_name, trips, decibels, len(curves)))
        photo = Photo(name, f"{width} × {height}", pictures.quick(image, f"{name}, original"), versions)
        return Judged(photo, names, reels, _decay(curves))

    def between(self, first: bytes, second: bytes, choice: Choice) -> list[tuple[str, Frames]]:
        """The way from one photo to another through each chosen VAE's latent space; both are cropped to squares."""
        start, end = (_read(data) for data in (first, second))
        side = min(choice.size_px, *start.shape[:2], *end.shape[:2])
        start, end = _square(start, side), _square(end, side)
        return [(self.names[place], self._way(self._vae(place, choice), start, end)) for place in choice.vaes]

    def sample(self, choice: Choice) -> list[tuple[str, Frames]]:
        """Images decoded from the prior of each chosen VAE."""
        made = []
        for place in choice.vaes:
            vae = self._vae(place, choice)
            side = SIZES[0] // vae.config.downscale * vae.config.downscale
            images = vae.sample(_NUM_SAMPLES, side, side, choice.seed)
            frames = [
                (pictures.quick(np.asarray(image), f"Sample {number} of {vae.name}"), "")
                for number, image in enumerate(images, 1)
            ]
            made.append((self.names[place], frames))
        return made

    def _way(self, vae: VAE, start: Image, end: Image) -> Frames:
        images = vae.interpolate(start, end, _STEPS)
        return [
            (pictures.quick(np.asarray(image), f"Step {step} of {_STEPS - 1}"), f"{step / (_STEPS - 1):.0%} of the way")
            for step, image in enumerate(images)
        ]

    def _vae(self, place: int, choice: Choice) -> VAE:
        return self._candidate(place, replace(choice, tiling="none")).vae

    def _candidate(self, place: int, choice: Choice) -> VAECandidate:
        vae = self._vaes[place]
        dtype = vae.dtype if choice.dtype == "auto" else choose_dtype(choice.dtype, vae.device).dtype
        key = place, str(dtype), choice.tiling
        if key not in self._candidates:
            chosen = vae if dtype == vae.dtype else VAE(vae.model, vae.device, dtype, vae.name)
            tile_px = _TILE_PX if choice.tiling == "diffusers" else None
            self._candidates[key] = VAECandidate(chosen, tile_px=tile_px)
        return self._candidates[key]


def _short(names: Sequence[str]) -> list[str]:
    """The end of each path or hub id, as long as it takes to tell them apart; numbered where nothing does."""
    for num_parts in (1, 2):
        short = ["/".join(name.split("/")[-num_parts:]) for name in names]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({place})" for place, name in enumerate(short, 1)]


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"{text[:20]!r} is not a whole number")
    return int(text)


def _read(data: bytes) -> Image:
    return read_image(data, max_pixels=MAX_PIXELS)


def _shrunk(image: Image, size_px: int) -> Image:
    height, width = image.shape[:2]
    if min(height, width) <= size_px:
        return image
    return apply(image, plan_geometry(height, width, Preprocess(size_px, "none"), downscale=1))


def _square(image: Image, side: int) -> Image:
    height, width = image.shape[:2]
    return apply(image, plan_geometry(height, width, Preprocess(side, "center"), downscale=1))


def _roundtrip(candidate: VAECandidate, image: Image) -> Image:
    height, width = image.shape[:2]
    latents = candidate.encode(padded_pixels([image], candidate.config.downscale)).mode()
    return to_images(candidate.decode(latents))[0, :height, :width]


def _version(candidate: VAECandidate, image: Image, of: str) -> tuple[Version, Image]:
    height, width = image.shape[:2]
    pixels = padded_pixels([image], candidate.config.downscale)
    begun = time.perf_counter()
    posterior = candidate.encode(pixels)
    encoded = time.perf_counter()
    after = to_images(candidate.decode(posterior.mode()))[0, :height, :width]
    decoded = time.perf_counter()
    scaled = candidate.scaled(posterior)
    std = pictures.std_map((scaled.logvar[0] / 2).exp().cpu().numpy(), of) if candidate.has_posterior else None
    version = Version(
        whole=pictures.quick(after, of),
        error=pictures.error_map(image, after, f"Error map of {of}"),
        latents=Latents(pictures.channels(scaled.mean[0].cpu().numpy(), of), std=std),
        values=[psnr(after, image), encoded - begun, decoded - encoded],
    )
    return version, after


def _drift(
    candidate: VAECandidate, image: Image, first: Image, num_trips: int, of: str
) -> tuple[Frames, list[tuple[float, float]]]:
    """The photo after each of TRIPS up to `num_trips`, and its PSNR there."""
    frames: Frames = [(pictures.quick(image, f"{of}, original"), "Original")]
    values = []
    after = first
    for trip in range(1, num_trips + 1):
        after = first if trip == 1 else _roundtrip(candidate, after)
        if trip in TRIPS:
            value = psnr(after, image)
            trips = f"{trip} round trip{'s' * (trip != 1)}"
            frames.append((pictures.quick(after, f"{of}, after {trips}"), f"After {trips}: {number(value, 2)} dB"))
            values.append((float(trip), value))
    return frames, values


def _decay(curves: Sequence[Line]) -> Plot | None:
    if not curves:
        return None
    trips = curves[0].xs
    x = Axis("round trips", trips[0], trips[-1], is_log=True, ticks=trips)
    y = Axis.around("PSNR, dB", [value for line in curves for value in line.ys])
    return Plot("Decay over round trips", lines(curves, x, y, "PSNR after repeated round trips"), "")
