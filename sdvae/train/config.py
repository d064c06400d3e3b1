"""The typed config of a training run, read from TOML; every key has a type, and an unknown one is refused."""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from sdvae.config import VAEConfig
from sdvae.errors import ConfigError

_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelConfig:
    """The network: new, of a family, or begun from weights."""

    family: str | None = None  # of a new network; beside `start`, the family of those weights
    start: str | None = None  # a folder, a file, a hub id; "embedded" for the embedded VAE
    freeze: Literal["nothing", "encoder", "decoder"] = "nothing"
    sample: bool = (
        True  # whether the decoder sees samples of the posterior; its mean, as in a plain autoencoder, if not
    )
    gradient_checkpointing: bool = False  # activations are computed again instead of kept

    def __post_init__(self) -> None:
        if self.family is None and self.start is None:
            raise ConfigError(
                "model.family and model.start are both missing; name the network, or weights to start from"
            )
        if self.family is not None:
            VAEConfig.from_family(self.family)


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder of sizes: from `first_step` on, crops of `size_px`, `batch_size` of them a step."""

    size_px: int
    batch_size: int  # images of one step: of all ranks, all micro-batches
    first_step: int = 0


@dataclass(frozen=True)
class DataConfig:
    """The photos, and what is cut from them."""

    source: str | None = None  # what `sdvae encode` takes
    ladder: tuple[Rung, ...] = (Rung(256, 16),)
    max_shrink: float | None = None  # half of the crops are cut up to so much larger, and shrunk; None: photos are
    # resized to cover a crop, as `encode` does
    flip: bool = True  # mirror half of the crops, left to right
    held_out: int = 16  # photos for validation, never trained on
    micro_batches: int = 1  # a batch goes through the network in so many parts
    workers: int | None = None  # processes that decode photos; None: chosen for the machine

    def __post_init__(self) -> None:
        firsts = [rung.first_step for rung in self.ladder]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ConfigError(f"data.ladder begins at steps {firsts}; they begin at 0 and rise")
        for rung in self.ladder:
            if rung.size_px < 1 or rung.batch_size < 1 or rung.batch_size % max(1, self.micro_batches):
                raise ConfigError(
                    f"data.ladder has {rung.batch_size} images of {rung.size_px} px; a batch is at least 1 image of "
                    f"1 px, and splits into {self.micro_batches} equal parts"
                )
        if self.micro_batches < 1:
            raise ConfigError("data.micro_batches is 0; it is 1 or more")
        if self.max_shrink is not None and not self.max_shrink >= 1.0:
            raise ConfigError(f"data.max_shrink is {self.max_shrink}; it is 1.0 or more")


@dataclass(frozen=True)
class LossConfig:
    """The weights of the terms. `squared` and `absolute` are those of sums over an image, so that they are nats."""

    squared: float = 0.0  # 1 / (2 variance) of a Gaussian
    absolute: float = 0.0  # 1 / scale of a Laplace
    perceptual: float = 0.0  # LPIPS, times the number of values of an image
    gradient: float = 0.0  # the multi-scale gradient loss, times the number of values
    learn_scale: bool = False  # latent-diffusion's logvar: the scale of all terms above is learned
    kl: float = 0.0  # beta: 1.0 with a likelihood makes the ELBO
    kl_warmup_steps: int = 0
    free_bits: float = 0.0  # nats of each latent number that cost nothing less
    capacity: float | None = None  # nats of an image's latents that the KL is held at
    capacity_steps: int = 0  # over which the capacity grows from 0
    noise: float = 0.0  # standard deviation of the noise that the encoder sees, in pixels of [-1, 1]
    mask: float = 0.0  # share of patches that the encoder does not see
    mask_px: int = 16
    equivariance: float = 0.0  # weight of reconstructing scaled and turned images from scaled and turned latents

    def __post_init__(self) -> None:
        if not self.squared + self.absolute + self.perceptual > 0.0:
            raise ConfigError("loss has no reconstruction term; give squared, absolute or perceptual a weight")


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen VAE whose latent space the new one is to share; off without `start`."""

    start: str | None = None
    family: str | None = None
    pull: float = 0.0  # our mean to its latents
    decode: bool = False  # half of each batch decodes its latents instead of ours
    crossing: float = 0.0  # its decoder on our mean
    crossing_every: int = 1  # steps


@dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator and its term; off with weight 0."""

    weight: float = 0.0
    kind: Literal["hinge", "nonsaturating"] = "hinge"
    start_step: int = 0
    adaptive: bool = True  # the weight is multiplied by the ratio of gradients at the last layer
    r1: float = 0.0
    r1_every: int = 16  # steps; the penalty counts as many times as much
    width: int = 64
    num_layers: int = 3
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and the average of the weights that is kept."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    final_share: float = 0.0  # of the learning rate, where the cosine ends
    clip: float = 1.0  # of the gradient's norm; the loss is in nats per value
    ema: float = 0.999


@dataclass(frozen=True)
class OutputConfig:
    """How often something is written, in steps."""

    log_every: int = 10
    save_every: int = 500
    validate_every: int = 500
    pictures: int = 4  # held-out photos in the strip
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"output.{name} is {getattr(self, name)}; it is 1 step or more")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides about a run."""

    steps: int
    model: ModelConfig
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: mixed, weights and losses stay fp32
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(absolute=1.0))
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        teacher, freeze = self.teacher, self.model.freeze
        if not (teacher.crossing_every and self.adversary.r1_every and self.steps):
            raise ConfigError("steps, teacher.crossing_every and adversary.r1_every are numbers of steps; 0 is none")
        if teacher.start is None and (teacher.pull or teacher.decode or teacher.crossing):
            raise ConfigError("teacher has terms but no start; name the VAE that teaches")
        if freeze == "decoder" and self.adversary.weight:
            raise ConfigError("the adversary teaches the decoder, which is frozen; set adversary.weight to 0")
        if freeze == "encoder" and (teacher.pull or teacher.crossing):
            raise ConfigError("teacher.pull and teacher.crossing teach the encoder, which is frozen; set them to 0")
        for rung in self.data.ladder:
            if teacher.decode and rung.batch_size % (2 * self.data.micro_batches):
                raise ConfigError(
                    f"teacher.decode halves the batch; {rung.batch_size} images in {self.data.micro_batches} parts "
                    "have no halves"
                )


# --- From TOML ---


def load_config(spec: str | Path, settings: Iterable[str] = ()) -> TrainConfig:
    """The config in a TOML file, or a ready one by its name, changed by `settings` such as "data.source=PHOTOS".

    Raises ConfigError for a file that is not there, TOML that is none, unknown keys and values of the wrong type.
    """
    name, text = _find(spec)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name} is no TOML: {error}") from error
    for setting in settings:
        _change(table, setting)
    return read_table(TrainConfig, table, "")


def ready_configs() -> list[str]:
    """The names of the configs that come with the package."""
    folder = files("sdvae.train") / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _find(spec: str | Path) -> tuple[str, str]:
    path = Path(spec)
    ready = path.name.removesuffix(".toml")
    try:
        if path.is_file():
            return str(spec), path.read_text(encoding="utf-8")
        if len(path.parts) == 1 and ready in ready_configs():
            return ready, (files("sdvae.train") / "configs" / f"{ready}.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{spec} cannot be read: {error}") from error
    raise ConfigError(f"there is no config {spec}; give a TOML file, or a ready one: {', '.join(ready_configs())}")


def _change(table: dict[str, Any], setting: str) -> None:
    """Set one key; its value is TOML, or else a text."""
    name, equals, text = setting.partition("=")
    *parents, key = name.strip().split(".")
    if not equals or not all([*parents, key]):
        raise ConfigError(f"{setting!r} sets nothing; write --set name.key=value, as in --set data.source=PHOTOS")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{setting!r} sets a key of {parent!r}, which has no keys")
    table[key] = value


def read_table(kind: type[_T], table: Mapping[str, Any], place: str) -> _T:
    """A TOML table as a dataclass; ConfigError names each key by its path."""
    types = get_type_hints(kind)
    known = {one.name: types[one.name] for one in fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise ConfigError(f"unknown key {place}{key}; did you mean {', '.join(place + name for name in close)}?")
    values = {key: _value(known[key], value, f"{place}{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s: ").replace("'", "")
        raise ConfigError(f"the config lacks {place}{missing}") from error


def _value(kind: Any, value: Any, place: str) -> Any:
    if get_origin(kind) is UnionType:
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{place} is {value!r:.60}; it is a table of keys")
        return read_table(kind, value, f"{place}.")  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{place} is {value!r:.60}; it is one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        return _sequence(get_args(kind), value, place)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{place} is {value!r:.60}; it is a {_WORDS[kind]}")
    if kind in (int, float) and value < 0:
        raise ConfigError(f"{place} is {value}; it is not below 0")
    return value


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def _sequence(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value) if isinstance(value, list) else kinds
    if not isinstance(value, list) or len(value) != len(kinds):
        raise ConfigError(f"{place} is {value!r:.60}; it is a list of {len(kinds)} values")
    return tuple(
        _value(kind, item, f"{place}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


# --- To TOML ---


def to_toml(config: TrainConfig) -> str:
    """The config as the TOML that `load_config` reads; keys that are None are left out."""
    tables = {one.name: getattr(config, one.name) for one in fields(config)}
    plain = {name: value for name, value in tables.items() if not is_dataclass(value)}
    lines = _assignments(plain)
    for name, value in tables.items():
        if is_dataclass(value):
            lines += ["", f"[{name}]", *_assignments({one.name: getattr(value, one.name) for one in fields(value)})]
    return "\n".join(lines) + "\n"


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]


def _toml(value: Any) -> str:
    if is_dataclass(value):
        inner = ", ".join(_assignments({one.name: getattr(value, one.name) for one in fields(value)}))
        return f"{{ {inner} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's texts are TOML's, but for DEL
    return repr(value)
