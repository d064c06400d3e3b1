"""From a weights file to a config and tensors that fit it, and back to a folder."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae import atomic
from sdvae.config import FAMILIES, VAEConfig, read_config, read_json
from sdvae.errors import ConfigError, WeightsError
from sdvae.model import AutoencoderKL
from sdvae.tiny import AutoencoderTiny, TinyConfig
from sdvae.weights import taesd
from sdvae.weights.evidence import (
    ENCODER,
    FAMILY_KEY,
    Evidence,
    Verdict,
    claimed_space,
    judge,
    known_bytes,
    told_by_config,
    told_by_file,
    told_by_flag,
)
from sdvae.weights.files import Entry, TensorFile, open_weights
from sdvae.weights.find import CONFIG_NAME, WEIGHTS_NAMES, find_file
from sdvae.weights.identity import LATENT_SPACES, known_space
from sdvae.weights.keymap import Layout, VAEKeys, find_vae, fit_layout, fit_shape, some
from sdvae.weights.write import OutputTensor, write_safetensors

logger = logging.getLogger(__name__)

AnyModel = AutoencoderKL | AutoencoderTiny

EMBEDDED = "small"

SHAPE_FIELDS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "attention_levels",
    "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv",
)  # fmt: skip
SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# The family to assume where shapes fit several and there is no other evidence: the one with the most single files.
_COMMON = ("sd1", "flux1")


@dataclass(frozen=True)
class Weights:
    """A config, tensors (fp32) that fit it exactly, the name a user would call them by, and what their file tells."""

    config: VAEConfig
    tensors: dict[str, Tensor]
    name: str
    path: Path
    told: tuple[Evidence, ...]


@dataclass(frozen=True)
class VAEFile:
    """A weights file and the VAE in it, of which nothing is read yet; `family` where something tells it."""

    file: TensorFile
    keys: VAEKeys
    shapes: dict[str, tuple[int, ...]]  # in diffusers' layout
    config: VAEConfig
    family: str | None
    unsure: tuple[str, ...] = ()  # fields of the config that nothing tells, so that they are the most common ones
    told: tuple[Evidence, ...] = ()  # of its latent space

    @cached_property
    def verdict(self) -> Verdict:
        """Which latent space it has. Reads the file and runs the encoder once."""
        names = {key: name for key, name in self.keys.names.items() if name.startswith(ENCODER)}
        told = (*known_bytes(self.file.path), *self.told)
        return judge(self.config, self._tensors(names), told, can_run="norm_num_groups" not in self.unsure)

    def read(self) -> dict[str, Tensor]:
        """The VAE's tensors as stored, under diffusers' names and in their shapes."""
        return self._tensors(self.keys.names)

    def _tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {name: fit_layout(name, self.file.entries[key].read(), "diffusers") for key, name in names.items()}


def load_weights(spec: str | Path | None = None, family: str | None = None) -> Weights:
    """Find, read and check the weights that `spec` names.

    `spec` is None (the embedded VAE), a diffusers folder (or a pipeline's, with the VAE in `vae/`), a file with a VAE
    in it (a VAE alone or a whole checkpoint; safetensors or torch.save's; LDM's layout or diffusers'), or a hub id
    (`org/name`, `org/name/subfolder`). `family` replaces the config. Raises WeightsError or ConfigError; missing and
    unexpected keys are named.
    """
    if spec is None:
        with as_file(files("sdvae") / "assets" / f"{EMBEDDED}.safetensors") as path:
            return _read(open_vae(path, family or EMBEDDED), f"sdvae-{EMBEDDED}")
    return _read(open_vae(find_file(spec), family), str(spec))


def open_vae(path: Path, family: str | None = None, *, is_copied: bool = False) -> VAEFile:
    """The VAE in a weights file, its tensors not read yet but known to fit its config.

    The config is that of `family`, else of the config.json beside a diffusers file, else derived from the shapes.
    Where these fit families that differ only in scale, the scale is that of the latent space that the file tells or
    the probe proves, else a common one, with a warning. A VAE that is only copied (`is_copied`) needs no scale: the
    probe does not run, there is no warning, and its number of groups may be wrong.
    """
    file = open_weights(path)
    if taesd.is_taesd(file.entries):
        return _open_tiny(file, family, is_copied)
    try:
        keys = find_vae(file.entries)
    except WeightsError as error:
        raise WeightsError(f"{path} holds {error}") from None
    shapes = {name: fit_shape(name, file.entries[key].shape, "diffusers") for key, name in keys.names.items()}
    if any(len(shape) == 5 for shape in shapes.values()):
        raise WeightsError(f"{path} is a video VAE, its convolutions have three dimensions; give a VAE of images")
    if empty := [key for key, name in keys.names.items() if 0 in shapes[name]]:
        raise WeightsError(f"{path} holds empty tensors: {some(empty)}; find the whole file")
    beside = path.parent / CONFIG_NAME
    unsure: tuple[str, ...] = ()
    told = told_by_file(file)
    if family is not None:
        config, source = VAEConfig.from_family(family), f"family {family}"
        told.append(told_by_flag(family))
    elif keys.layout == "diffusers" and not keys.prefix and beside.is_file():
        config, source = read_config(beside), CONFIG_NAME
        family = _family_of(config)
        told.append(told_by_config(config, f"{CONFIG_NAME} beside it"))
    else:

        def judge_as(config: VAEConfig) -> Verdict:
            return VAEFile(file, keys, shapes, config, None, told=tuple(told)).verdict

        config, family, unsure = _derive_config(path, shapes, told, judge_as, is_copied)
        source = "shapes"
    _check(path, config, source, shapes)
    return VAEFile(file, keys, shapes, config, family, unsure, tuple(told))


def build_model(weights: Weights) -> AnyModel:
    """The reference model holding these very tensors."""
    model = empty_model(weights.config)
    model.load_state_dict(weights.tensors, assign=True)
    return model.eval()


def empty_model(config: VAEConfig) -> AnyModel:
    """The reference model of a config without memory for its weights."""
    with torch.device("meta"):
        return AutoencoderTiny(config) if isinstance(config, TinyConfig) else AutoencoderKL(config)


def save_folder(folder: Path, config: VAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a diffusers folder: config.json and one safetensors file, readable by diffusers' `from_pretrained`."""
    content = config_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    family = known_space(config) if isinstance(config, TinyConfig) else None  # no TAESD's config.json tells it
    metadata = {"format": "pt"} | ({FAMILY_KEY: family} if family else {})
    outputs = {key: OutputTensor.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS_NAMES[0], outputs, metadata)
    atomic.write_bytes(folder / CONFIG_NAME, content)


def config_json(config: VAEConfig) -> bytes:
    """The config.json of a diffusers folder; ConfigError for a network that diffusers does not have."""
    if isinstance(config, TinyConfig) and config.has_mid_pool:
        raise ConfigError("diffusers' AutoencoderTiny has no pooled blocks; a TAESD of FLUX.2 cannot be saved for it")
    return (json.dumps(config.to_diffusers(), indent=2) + "\n").encode()


def _read(vae: VAEFile, name: str) -> Weights:
    keys = vae.keys.names.items()  # one by one: what is stored in fp16 is never in memory twice
    entries = vae.file.entries
    tensors = {name: fit_layout(name, entries[key].read(), "diffusers").float() for key, name in keys}
    return Weights(vae.config, tensors, name, vae.file.path, vae.told)


def _derive_config(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    told: Sequence[Evidence],
    judge_as: Callable[[VAEConfig], Verdict],
    is_copied: bool,
) -> tuple[VAEConfig, str | None, tuple[str, ...]]:
    """The config that these shapes have, its family where something tells it, and what is in doubt."""
    found = _shape_fields(path, shapes)
    same = [name for name, family in FAMILIES.items() if _fields(family) == found]
    latents = found["latent_channels"], 2 ** (len(found["block_out_channels"]) - 1)
    akin = same or [name for name, family in FAMILIES.items() if (family.latent_channels, family.downscale) == latents]
    num_groups = math.gcd(32, *found["block_out_channels"])
    if not akin and is_copied:
        return replace(VAEConfig(), norm_num_groups=num_groups, **found), None, (*SCALE_FIELDS, "norm_num_groups")
    if not akin:
        raise ConfigError(
            f"{path} has {latents[0]} latent channels at 1/{latents[1]} of the size, which fits no family that sdvae "
            f"knows; put its {CONFIG_NAME} beside it"
        )
    if not same and num_groups < 32 and not is_copied:
        raise ConfigError(
            f"{path} has no {CONFIG_NAME} beside it, and its widths {found['block_out_channels']} do not tell the "
            "number of its groups; put the file there, or name the family of these weights, for example sd1 or sdxl"
        )

    def config_of(family: str) -> VAEConfig:
        return FAMILIES[family] if same else replace(FAMILIES[family], norm_num_groups=num_groups, **found)

    certain = _of_space(claimed_space(told), akin) or (akin[0] if len(akin) == 1 else None)
    family = certain or _most_common(akin)
    if certain is None and not is_copied:
        certain, family = _settle(path, judge_as(config_of(akin[0])), akin)
    unsure = SCALE_FIELDS if certain is None else ()
    unsure = unsure if same or num_groups == 32 else (*unsure, "norm_num_groups")
    return config_of(family), certain, unsure


def _settle(path: Path, verdict: Verdict, akin: Sequence[str], *, is_quiet: bool = False) -> tuple[str | None, str]:
    """The family of `akin` that a verdict names, and again or else the one to assume, with a warning."""
    if certain := _of_space(verdict.claimed, akin):
        return certain, certain
    near = max(verdict.correlations, key=verdict.correlations.__getitem__, default=None)
    is_near = near is not None and any(near in item.spaces for item in verdict.evidence if item.kind == "probe")
    family = (_of_space(near, akin) if is_near else None) or _most_common(akin)
    if not is_quiet:
        _warn_of_others(path, verdict, akin, family)
    return None, family


def _warn_of_others(path: Path, verdict: Verdict, akin: Sequence[str], family: str) -> None:
    logger.warning(
        "%s may be %s: these families have the same shapes and differ in the scale of their latents. Nothing proves "
        "one: %s. sdvae assumes %s; if that is wrong, give --family %s",
        path, " or ".join(akin), verdict.saw, family, next(name for name in akin if name != family),
    )  # fmt: skip


def _of_space(space: str | None, akin: Sequence[str]) -> str | None:
    """The family of a space among `akin`."""
    by_name = (name for name in akin if name == space)
    return next(by_name, None) or next((name for name in akin if space and known_space(FAMILIES[name]) == space), None)


def _most_common(akin: Sequence[str]) -> str:
    return next(name for name in (*_COMMON, *akin) if name in akin)


def _open_tiny(file: TensorFile, family: str | None, is_copied: bool) -> VAEFile:
    """A TAESD in one file, or of the pair that this file is a half of."""
    path, entries = file.path, _both_halves(file)
    config = taesd.fit_config(entries)
    if config is None or len(taesd.sides(entries)) < 2:
        places = " and ".join(sorted({str(entry.path) for entry in entries.values()}))
        raise WeightsError(
            f"{places}: not the layers of a TAESD that sdvae knows, or halves of two; is it another model?"
        )
    layout: Layout = "taesd" if taesd.is_bare(file.entries) else "diffusers"
    if layout == "diffusers" and (path.parent / CONFIG_NAME).is_file():
        config.check_diffusers(read_json(path.parent / CONFIG_NAME))
    akin = [] if config.has_mid_pool else [name for name in LATENT_SPACES if _has_latents(name, config)]
    if family is not None and not (_has_latents(family, config) and akin):
        raise WeightsError(
            f"{path} is a TAESD of {config.latent_channels} latent channels, not those of {family}; "
            f"it may be of {' or '.join(akin) or 'no family, leave --family out'}"
        )
    told = told_by_file(file) if family is None else [*told_by_file(file), told_by_flag(family)]
    shapes = {name: entry.shape for name, entry in entries.items()}
    keys = VAEKeys("", layout, {name: name for name in entries})
    found = VAEFile(replace(file, entries=entries), keys, shapes, config, family, told=tuple(told))
    certain = family
    if family is None and akin:  # else it is FLUX.2's, whose scaled latents are taken as they are
        certain, family = _settle(path, found.verdict, akin, is_quiet=is_copied)
    config = config if family is None else TinyConfig.from_family(family)
    return replace(found, config=config, family=certain, unsure=SCALE_FIELDS if akin and certain is None else ())


def _both_halves(file: TensorFile) -> dict[str, Entry]:
    """The tensors of a TAESD under diffusers' names; where the file is one half, the other is read beside it."""
    entries = taesd.by_name(file.entries)
    halves = taesd.sides(entries)
    if len(halves) > 1:
        return entries
    other = taesd.other_half(file.path)
    if other is None or not other.is_file():
        name = other.name if other else "its name with encoder for decoder"
        raise WeightsError(f"{file.path} is half a TAESD, its {halves.pop()}; put the other half beside it, as {name}")
    return entries | taesd.by_name(open_weights(other).entries)


def _has_latents(family: str, config: VAEConfig) -> bool:
    known = VAEConfig.from_family(family)
    return (known.latent_channels, known.downscale) == (config.latent_channels, config.downscale)


def _shape_fields(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a config that shapes tell."""

    def count(pattern: str) -> int:
        return next(index for index in range(len(shapes) + 1) if pattern.format(index) not in shapes)

    num_levels = count("encoder.down_blocks.{}.resnets.0.conv1.weight")
    try:
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": tuple(
                shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(num_levels)
            ),
            "layers_per_block": count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
            "attention_levels": tuple(
                level
                for level in range(num_levels)
                if f"encoder.down_blocks.{level}.attentions.0.to_q.weight" in shapes
            ),
            "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(
            f"{path} holds half a VAE: {error} is missing or has no shape; find the whole file"
        ) from None


def _fields(config: VAEConfig) -> dict[str, Any]:
    return {field: getattr(config, field) for field in SHAPE_FIELDS}


def _family_of(config: VAEConfig) -> str | None:
    same = (
        name
        for name, family in FAMILIES.items()
        if _fields(family) == _fields(config) and all(getattr(family, f) == getattr(config, f) for f in SCALE_FIELDS)
    )
    return next(same, None)


def _check(path: Path, config: VAEConfig, source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = _shape_fields(path, shapes)
    differences = [
        f"{name} {found[name]} instead of {value}" for name, value in _fields(config).items() if found[name] != value
    ]
    if differences:
        raise WeightsError(f"the weights of {path} do not fit their {source}: {', '.join(differences)}")
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in AutoencoderKL(config).state_dict().items()}
    wrong_shapes = [
        f"{key} {shapes[key]} instead of {expected[key]}"
        for key in sorted(expected.keys() & shapes.keys())
        if shapes[key] != expected[key]
    ]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": wrong_shapes,
    }
    told = [f"{len(keys)} {problem}: {some(keys)}" for problem, keys in problems.items() if keys]
    if told:
        raise WeightsError(f"the weights of {path} do not fit their {source}; keys {'; '.join(told)}")
