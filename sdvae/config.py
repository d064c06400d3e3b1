"""VAEConfig: the shape of a KL-VAE and the scale of its latents, in diffusers' field names."""

import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sdvae import flux2
from sdvae.diffusers_classes import CLASSES, as_class
from sdvae.errors import ConfigError

logger = logging.getLogger(__name__)

# What lies beyond the borders of a picture: torch's `padding_mode`, and a torus that is open in one direction.
Padding = Literal["zeros", "reflect", "circular", "circular-x", "circular-y"]
PADDINGS: tuple[Padding, ...] = get_args(Padding)

# What diffusers' AutoencoderKL assumes for a field its config.json leaves out (0.42). They differ
# from the defaults of VAEConfig, which are Stable Diffusion's.
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "sample_size": 32,
}
_IMPLIED_FIELDS = {"act_fn", "down_block_types", "up_block_types", "double_z"}  # LDM's configs say double_z: true
_OURS = {"attention_levels", "unused"}  # fields that a config.json does not have
# What programs write into a config.json without any effect on the network, beside what is null or false there.
_NO_EFFECT = {
    "architectures", "dtype", "gradient_checkpointing", "latent_magnitude", "latent_shift", "library_name",
    "model_type", "torch_dtype", "transformers_version", "use_slicing", "use_tiling",
}  # fmt: skip
_MAX_BYTES = 1 << 20  # of a config.json; diffusers' have 1 kB
_PLAIN, _ATTENTION = "DownEncoderBlock2D UpDecoderBlock2D", "AttnDownEncoderBlock2D AttnUpDecoderBlock2D"


@dataclass(frozen=True)
class LatentScaling:
    """What turns raw latents into scaled ones: `(latents - shift_factor) * scaling_factor`, whitened per channel."""

    scaling_factor: float
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    latents_patch: int = 1  # side of the patches of raw latents that are one scaled latent each (FLUX.2: 2)

    @property
    def overall_factor(self) -> float:
        """The one factor that scales about as much as all channels are scaled."""
        stds = self.latents_std if self.latents_mean and self.latents_std else (1.0,)
        return self.scaling_factor / math.hypot(*stds) * math.sqrt(len(stds))

    def is_close(self, other: "LatentScaling") -> bool:
        """Whether both scale the same latents alike, up to the rounding of statistics to bf16 or to four digits."""
        ours, theirs = (
            (scaling.scaling_factor, scaling.shift_factor or 0.0, scaling.latents_patch) for scaling in (self, other)
        )
        pairs = [(self.latents_mean, other.latents_mean), (self.latents_std, other.latents_std)]
        return ours == theirs and all(map(_are_close, *zip(*pairs, strict=True)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LatentScaling":
        """The inverse of `to_json`."""
        plain: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types, for a manifest."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        if self.latents_patch == 1:
            del values["latents_patch"]  # as stores have it that were written before FLUX.2
        return values


@dataclass(frozen=True)
class VAEConfig:
    """One KL-VAE of the Stable Diffusion kind; the defaults are SD 1's.

    Fields that diffusers spells otherwise: `attention_levels`, the levels (0 is full resolution) whose blocks are
    `AttnDownEncoderBlock2D` and `AttnUpDecoderBlock2D` there; `latents_patch`, one side of its `patch_size`; and
    `decoder_layers_per_block`, its `layers_per_up_block`. Those of the decoder are the encoder's where they are None.
    `padding`, that of all 3x3 convolutions but the downsamplers', is a field that diffusers does not have: there users
    set `padding_mode` of each layer. `unused` are fields of a config.json that change nothing here: they are kept where
    it is saved.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    attention_levels: tuple[int, ...] = ()
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    padding: Padding = "zeros"
    decoder_block_out_channels: tuple[int, ...] | None = None
    decoder_layers_per_block: int | None = None
    latents_patch: int = 1
    batch_norm_eps: float = 1e-4
    unused: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._require_sound()
        for name in ("block_out_channels", "decoder_block_out_channels"):
            if any(width % self.norm_num_groups for width in getattr(self, name) or ()):
                raise ConfigError(
                    f"{name} {getattr(self, name)} cannot be split into "
                    f"norm_num_groups={self.norm_num_groups} groups; each width must be a multiple of it"
                )
        if len(self.decoder_widths) != len(self.block_out_channels):
            raise ConfigError(
                f"its decoder has {len(self.decoder_widths)} levels and its encoder {len(self.block_out_channels)}; "
                "sdvae runs VAEs whose images come back in the size they had"
            )
        outside = [level for level in self.attention_levels if level not in range(len(self.block_out_channels))]
        if outside:
            raise ConfigError(
                f"attention_levels {outside} do not exist: levels are 0..{len(self.block_out_channels) - 1}"
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.scaled_channels:
                raise ConfigError(
                    f"{name} has {len(values)} values for {self.scaled_channels} channels of scaled latents"
                )
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ConfigError(f"latents_std has {min(self.latents_std)}; a standard deviation is above 0")

    def _require_sound(self) -> None:
        """Raise ConfigError for a field of another type, or out of the bounds of any published KL-VAE."""
        counts = {"in_channels": 64, "out_channels": 64, "latent_channels": 1024, "layers_per_block": 8}
        counts |= {"norm_num_groups": 4096, "sample_size": 1 << 20}
        for name, most in counts.items():
            value = getattr(self, name)
            _require(name, value, type(value) is int and 1 <= value <= most)
        _require("block_out_channels", self.block_out_channels, _are_widths(self.block_out_channels))
        widths, layers = self.decoder_block_out_channels, self.decoder_layers_per_block
        _require("decoder_block_out_channels", widths, widths is None or _are_widths(widths))
        _require("decoder_layers_per_block", layers, layers is None or (type(layers) is int and 1 <= layers <= 8))
        _require("latents_patch", self.latents_patch, type(self.latents_patch) is int and 1 <= self.latents_patch <= 8)
        _require("batch_norm_eps", self.batch_norm_eps, _is_number(self.batch_norm_eps) and self.batch_norm_eps >= 0)
        for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "force_upcast"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), bool))
        factor, shift = self.scaling_factor, self.shift_factor
        if factor is None:
            raise ConfigError(
                "scaling_factor is null, so nothing tells the scale of the latents; write the number into config.json "
                "(SD 1 has 0.18215, SDXL 0.13025), or name a --family"
            )
        _require("scaling_factor", factor, _is_number(factor) and factor != 0)
        _require("shift_factor", shift, shift is None or _is_number(shift))
        for name in ("latents_mean", "latents_std"):
            _require(name, getattr(self, name), getattr(self, name) is None or _are_numbers(getattr(self, name)))
        if self.padding not in PADDINGS:
            raise ConfigError(f"padding is {self.padding!r:.60}; choose one of {', '.join(PADDINGS)}")

    @property
    def downscale(self) -> int:
        """Pixels of the image per latent, along one side (8 for Stable Diffusion)."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def scaled_downscale(self) -> int:
        """Pixels of the image per scaled latent, along one side (16 for FLUX.2)."""
        return self.downscale * self.latents_patch

    @property
    def scaled_channels(self) -> int:
        """Channels of scaled latents (128 for FLUX.2)."""
        return self.latent_channels * self.latents_patch**2

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The widths of the decoder's levels, full resolution first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def decoder_layers(self) -> int:
        """The decoder's layers in a block, in diffusers' count: it has one resnet more."""
        return self.decoder_layers_per_block or self.layers_per_block

    def with_batch_norm(self, mean: Sequence[float], variance: Sequence[float]) -> "VAEConfig":
        """This config with the statistics of FLUX.2's BatchNorm, which lie among the weights."""
        if not all(value >= 0 for value in variance):
            raise ConfigError("bn.running_var holds a variance that is not 0 or above; the weights are damaged")
        std = tuple(math.sqrt(value + self.batch_norm_eps) for value in variance)
        return replace(self, latents_mean=tuple(mean), latents_std=std)

    @property
    def latent_scaling(self) -> LatentScaling:
        """What makes scaled latents of this VAE's raw ones."""
        return LatentScaling(
            self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std, self.latents_patch
        )

    @classmethod
    def from_family(cls, name: str) -> "VAEConfig":
        """The configuration of a named family; an unknown name raises ConfigError with the close ones."""
        if name in FAMILIES:
            return FAMILIES[name]
        close = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.3) or sorted(FAMILIES)
        raise ConfigError(f"unknown VAE family {name!r}; did you mean {', '.join(close)}?")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read the mapping of a diffusers `config.json`; what it leaves out gets diffusers' default.

        That of an AutoencoderKLFlux2 does not tell the scale of its latents: `with_batch_norm` adds it.
        Raises ConfigError for another class, another activation, another block type, or unknown keys.
        """
        name = config.get("_class_name", "AutoencoderKL")
        if not isinstance(name, str) or name not in CLASSES:
            raise ConfigError(f"the config describes a {name!s:.60}; sdvae reads {', '.join(sorted(CLASSES))}")
        known = {field.name for field in fields(cls)} - _OURS
        given = CLASSES[name]({key: value for key, value in config.items() if not key.startswith("_")})
        unknown = sorted(given.keys() - known - _IMPLIED_FIELDS)
        unused = [key for key in unknown if given[key] is None or given[key] is False or _has_no_effect(key)]
        if unused:
            logger.warning("the config has fields that sdvae does not know, unused: %s", ", ".join(unused))
        if used := sorted(set(unknown) - set(unused)):
            told = ", ".join(f"{key}={given[key]!r:.40}" for key in used[:6])
            raise ConfigError(
                f"the config has fields that AutoencoderKL does not know: {told}; if the weights do not depend on "
                "them, remove them from config.json"
            )
        if given.get("act_fn", "silu") not in ("silu", "swish"):
            raise ConfigError(f"act_fn is {given['act_fn']!r:.40}; sdvae implements silu")
        if given.get("double_z", True) is not True:
            raise ConfigError(f"double_z is {given['double_z']!r:.40}; sdvae implements true, an encoder of moments")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in (_DIFFUSERS_DEFAULTS | given).items()
            if key in known
        }
        if values["sample_size"] is None:  # it changes no number
            values["sample_size"] = _DIFFUSERS_DEFAULTS["sample_size"]
        if isinstance(values["sample_size"], tuple) and values["sample_size"]:
            values["sample_size"] = values["sample_size"][0]
        _require("block_out_channels", values["block_out_channels"], _are_widths(values["block_out_channels"]))
        levels = _attention_levels(given, num_levels=len(values["block_out_channels"]))
        kept = {key: config[key] for key in config if key in unused or (key.startswith("_") and key != "_class_name")}
        return cls(**values, attention_levels=levels, unused=kept)

    def to_diffusers(self) -> dict[str, Any]:
        """The mapping that the `from_config` of diffusers' class reads, and that `config.json` holds.

        `padding` is in it where it is not zeros: diffusers warns that it ignores the field, which is true.
        """
        down: list[str] = []
        up: list[str] = []
        for level in range(len(self.block_out_channels)):
            down_type, up_type = (_ATTENTION if level in self.attention_levels else _PLAIN).split()
            down.append(down_type)
            up.insert(0, up_type)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OURS}
        values |= {"act_fn": "silu", "down_block_types": down, "up_block_types": up}
        if self.padding == "zeros":
            del values["padding"]
        name, values = as_class(values)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"_class_name": name} | dict(sorted(plain.items()))


def read_config(path: Path) -> VAEConfig:
    """The config in a diffusers `config.json`; ConfigError where there is none to be read."""
    return VAEConfig.from_diffusers(read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a config file; ConfigError for anything else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; it is not the config of a VAE")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; repair the file or move it away") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; it is not the config of a VAE")
    return content


def _has_no_effect(key: str) -> bool:
    return key in _NO_EFFECT or key.startswith("tile_")  # diffusers' tiles are no part of the network


def _require(name: str, value: Any, is_sound: bool) -> None:
    if not is_sound:
        raise ConfigError(f"{name} is {value!r:.60}, which no KL-VAE has; correct config.json, or name a --family")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


def _are_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(map(_is_number, values))


def _are_close(ours: tuple[float, ...] | None, theirs: tuple[float, ...] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return len(ours) == len(theirs) and all(
        abs(a - b) <= 0.01 * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)
    )


def _are_widths(values: Any) -> bool:
    is_few = isinstance(values, tuple) and 1 <= len(values) <= 8
    return is_few and all(type(width) is int and 1 <= width <= 8192 for width in values)


def _attention_levels(given: Mapping[str, Any], num_levels: int) -> tuple[int, ...]:
    plain_down, plain_up = _PLAIN.split()
    down = _block_types(given.get("down_block_types"), [plain_down] * num_levels)
    up = _block_types(given.get("up_block_types"), [plain_up] * num_levels)[::-1]
    pairs = list(zip(down, up, strict=False))
    known = {tuple(_PLAIN.split()): False, tuple(_ATTENTION.split()): True}
    if len(down) != num_levels or len(up) != num_levels or any(pair not in known for pair in pairs):
        raise ConfigError(f"block types {down[:8]} and {up[:-9:-1]} are not those of a KL-VAE with {num_levels} levels")
    return tuple(level for level, pair in enumerate(pairs) if known[pair])


def _block_types(told: Any, default: list[str]) -> list[str]:
    if told is None:
        return default
    return [str(name)[:40] for name in told] if isinstance(told, list | tuple) else [str(told)[:40]]


_SD1 = VAEConfig()
_SD3 = replace(
    _SD1, latent_channels=16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
    use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip

FAMILIES: dict[str, VAEConfig] = {
    "sd1": _SD1,  # also SD 2 and the ft-ema and ft-mse decoders
    "sdxl": replace(_SD1, sample_size=1024, scaling_factor=0.13025),
    "sd3": _SD3,
    "flux1": replace(_SD3, scaling_factor=0.3611, shift_factor=0.1159),
    "flux2": replace(
        _SD1, latent_channels=32, sample_size=1024, scaling_factor=1.0, latents_mean=flux2.MEAN,
        latents_std=flux2.STD, latents_patch=2,
    ),
    # block_out_channels and layers: huggingface/diffusers, scripts/convert_cogview4_to_diffusers.py
    "cogview4": replace(
        _SD3, block_out_channels=(128, 512, 1024, 1024), layers_per_block=3, scaling_factor=1.0, shift_factor=None,
        mid_block_add_attention=False,
    ),
    # as in ComfyUI's latent format for Playground 2.5
    "playground": replace(
        _SD1, sample_size=1024, scaling_factor=0.5, latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
    # CompVis trained with scale_by_std: the factor belongs to each diffusion run, the weights carry none.
    "kl-f4": replace(_SD1, latent_channels=3, block_out_channels=(128, 256, 512), sample_size=256, scaling_factor=1.0),
    "kl-f16": replace(
        _SD1, latent_channels=16, block_out_channels=(128, 128, 256, 256, 512), sample_size=256,
        scaling_factor=1.0, attention_levels=(4,),
    ),
    "x4-upscaler": replace(_SD1, block_out_channels=(128, 256, 512), sample_size=256, scaling_factor=0.08333),
    # The embedded default: SD 1's latent space in 5.0 million parameters.
    "small": replace(
        _SD1, block_out_channels=(32, 64, 128, 160), layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
    ),
}  # fmt: skip
