"""What an evaluation found: the contents of REPORT/results.json, typed, and the pictures beside it."""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sdvae import sealed
from sdvae.errors import ReportError, StoreError, VerifyError
from sdvae.evaluate.recipes import Recipe

SCHEMA = 1  # of results.json; a reader ignores fields that it does not know
RESULTS_NAME = "results.json"
SCORES_NAME = "scores.jsonl"  # the scores of every image, a line each
PICTURES_NAME = "pictures"  # the folder of what the page shows

T = TypeVar("T")


# --- Numbers ---


@dataclass(frozen=True)
class Network:
    """The weights of a network that a metric needs, so that others can see whether they have the same."""

    name: str
    file: str  # the name of the file, without its folder
    sha256: str


@dataclass(frozen=True)
class MetricColumn:
    """One column of the table."""

    name: str  # the key in `Candidate.summaries` and `View.scores`
    label: str  # for people: "PSNR"
    unit: str  # "dB"; empty for plain numbers
    direction: Literal["higher", "lower"]  # which is better
    scope: Literal["image", "set"]  # whether an image has a score, or only the set of all images
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A metric over all images; `low` and `high` bound the 95% interval of the mean, None where there is none.

    An interval needs two images; a set metric has none. The histogram has the same edges for every candidate.
    """

    mean: float
    low: float | None
    high: float | None
    num_images: int
    quantiles: tuple[float, ...] = ()  # at 0, 5, 25, 50, 75, 95 and 100%
    histogram_edges: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()


# --- The latents ---


@dataclass(frozen=True)
class Curve:
    """A line to plot."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Channel:
    """One latent channel, of scaled latents."""

    mean: float
    std: float  # of the posteriors' means
    posterior_std: float  # root of the mean variance of the posteriors
    snr_db: float | None  # variance of the means over the mean variance of the posteriors; None without a posterior
    kl_bits: float | None  # of one latent of this channel, mean; None without a posterior (TAESD)
    is_dead: bool  # the means hardly vary: what the channel says does not depend on the photo


@dataclass(frozen=True)
class Equivariance:
    """Whether the latents follow a transform of the image: 0 where they do."""

    transform: str  # "half size", "quarter turn"
    latent_error: float  # |E(T x) - T E(x)| / |E(T x) - mean|
    psnr_db: float  # of D(T E(x)) against T x
    num_images: int


@dataclass(frozen=True)
class LatentReport:
    """What a diffusion model will feel, and what an artist will see."""

    channels: tuple[Channel, ...]
    correlation: tuple[tuple[float, ...], ...]  # (C, C), of the means
    dead_share: float  # of the channels, 0..1
    bits_per_pixel: float | None  # of the posterior: KL to N(0, 1) of the scaled latents, in bits per photo pixel
    spectrum: Curve  # power of scaled latents by frequency in cycles per latent, white noise of unit variance is 1
    photo_spectrum: Curve  # the same of the photos, shrunk to the latents' size and standardised
    equivariance: tuple[Equivariance, ...]
    colour_shift: tuple[float, ...]  # mean of reconstruction minus original in levels: red, green, blue
    contrast_gain: tuple[float, ...]  # slope of reconstruction over original: 1 keeps the contrast; red, green, blue
    decay: Curve  # PSNR to the original in dB after x round trips (1, 2, 4, 8, 16)
    num_decayed: int  # images that the decay is the mean of


# --- Who is judged ---


@dataclass(frozen=True)
class Identity:
    """Who is judged: a VAE in one dtype, tiling and size, or a codec as a floor; one identity, one set of numbers."""

    label: str  # unique, short, for people
    kind: Literal["vae", "codec"]
    name: str = ""  # of the VAE
    fingerprint: str | None = None
    latent_space: str | None = None
    latent_channels: int | None = None
    downscale: int | None = None
    num_parameters: int | None = None
    device: str = "cpu"
    dtype: str | None = None  # "fp32", "bf16", "fp16"
    tiling: str = "none"  # or whose tiles: "diffusers 512 px"
    size_px: int | None = None  # where it is not the recipe's


@dataclass(frozen=True)
class Candidate(Identity):
    """One row of the comparison."""

    summaries: Mapping[str, Summary] = field(default_factory=dict)  # by metric; one without a value is absent
    encode_s: float | None = None  # per image
    decode_s: float | None = None
    peak_bytes: int | None = None  # of memory beside the weights, for one image
    bits_per_pixel: float | None = None  # the rate of rate against distortion: a VAE's KL, a codec's file
    latents: LatentReport | None = None  # None for a codec
    num_failed: int = 0  # images that it could not reconstruct


# --- Pictures ---


@dataclass(frozen=True)
class Picture:
    """An image file of the report; `file` is its path relative to the report's folder."""

    file: str
    width: int
    height: int
    is_lossless: bool


@dataclass(frozen=True)
class WorstRegion:
    """The square where a reconstruction is furthest from its original, as lossless crops."""

    top: int
    left: int
    size_px: int
    original: Picture
    reconstruction: Picture


@dataclass(frozen=True)
class View:
    """One image through one candidate."""

    scores: Mapping[str, float]
    original: Picture  # as the candidate got it; one file for all candidates of a size
    reconstruction: Picture
    error: Picture  # greyscale: mean |difference| of blocks of pixels, white at `error_full_scale` levels or more
    error_full_scale: float
    worst: WorstRegion
    channels: Picture | None = None  # greyscale, `num_channels` squares side by side, each from its own low to high
    num_channels: int = 0
    channel_ranges: tuple[tuple[float, float], ...] = ()  # scaled latents at black and at white
    posterior_std: Picture | None = None  # greyscale, mean over the channels, scaled
    posterior_std_range: tuple[float, float] | None = None

    def pictures(self) -> tuple[Picture, ...]:
        """Every file that it shows."""
        found = (
            self.original, self.reconstruction, self.error, self.worst.original, self.worst.reconstruction,
            self.channels, self.posterior_std,
        )  # fmt: skip
        return tuple(picture for picture in found if picture is not None)


Reason = Literal["worst", "median", "best", "first"]


@dataclass(frozen=True)
class ImageResult:
    """An image that the page shows, and why."""

    key: str  # of the photo in its source; anything a file may be called
    index: int  # its place in the source
    reasons: tuple[Reason, ...]
    views: tuple[View, ...]  # in the order of `Results.candidates`


# --- All of it ---


@dataclass(frozen=True)
class Results:
    """Everything that results.json holds."""

    recipe: Recipe
    caption: str  # `recipe.caption()`, as the table prints it
    source: str  # what messages call the source of the photos
    machine: Mapping[str, Any]  # the card of the machine, as `sdvae bench` writes it
    columns: tuple[MetricColumn, ...]
    candidates: tuple[Candidate, ...]
    images: tuple[ImageResult, ...]  # those that are pictured, worst first
    num_images: int  # that were judged
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> photos that were not
    remarks: tuple[str, ...] = ()  # sentences: metrics without their network, one image without an interval
    ranked_by: str = "psnr"  # the metric that says which image is worst
    schema: int = SCHEMA


def write_results(folder: Path, results: Results) -> None:
    """Write `results` as the results.json of the report `folder`."""
    sealed.write_json(folder / RESULTS_NAME, to_json(results))


def read_results(folder: Path) -> Results:
    """Read what `write_results` wrote; ReportError where there is none or another sdvae's, VerifyError for damage."""
    path = folder / RESULTS_NAME
    try:
        value = sealed.read_json(path)
    except VerifyError:
        raise
    except StoreError as error:
        raise ReportError(f"{folder} holds no report that can be read: {error}; run sdvae eval first") from error
    if value.get("schema") != SCHEMA:
        raise ReportError(
            f"{path} has schema {value.get('schema')}, this sdvae reads {SCHEMA}; use the sdvae that wrote it"
        )
    try:
        return from_json(Results, value)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} lacks what a report has: {error}; run sdvae eval again") from error


def to_json(value: Any) -> Any:
    """A dataclass as JSON's own types."""
    if dataclasses.is_dataclass(value):
        return {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


def from_json(kind: type[T], value: Any) -> T:
    """The dataclass `kind` that `to_json` wrote; unknown fields are ignored, those with a default may be missing.

    Raises KeyError, TypeError or ValueError for anything else.
    """
    hints = get_type_hints(kind)
    given = {item.name: _parse(hints[item.name], value[item.name]) for item in _present(kind, value)}
    return kind(**given)


def _present(kind: Any, value: Mapping[str, Any]) -> list["dataclasses.Field[Any]"]:
    missing = dataclasses.MISSING
    return [
        item
        for item in dataclasses.fields(kind)
        if item.name in value or (item.default is missing and item.default_factory is missing)
    ]


def _parse(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _parse(next(one for one in inner if one is not type(None)), value)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_parse(inner[0], item) for item in value)
        return tuple(_parse(one, item) for one, item in zip(inner, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _parse(inner[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_json(cast(type[Any], kind), value)
    if kind is float:
        return float(value)
    return _checked(kind, inner, value)


def _checked(kind: Any, choices: tuple[Any, ...], value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {choices}")
    elif kind is not Any and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
