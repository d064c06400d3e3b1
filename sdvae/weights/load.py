"""From a weights file to a config and tensors that fit it, and back to a folder."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdvae import atomic
from sdvae.config import FAMILIES, Padding, VAEConfig, read_json
from sdvae.errors import ConfigError, WeightsError
from sdvae.model import AutoencoderKL
from sdvae.tiny import TINY_FAMILIES, AutoencoderTiny, TinyConfig
from sdvae.weights import taesd
from sdvae.weights.beside import CONFIG_NAME, read_beside
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
from sdvae.weights.find import WEIGHTS_NAMES, find_file
from sdvae.weights.identity import known_space
from sdvae.weights.keymap import STATISTICS, Layout, VAEKeys, find_vae, fit_layout, fit_shape, some
from sdvae.weights.shapes import COUNTER, check_shapes, family_of, fields_of, shape_fields
from sdvae.weights.write import OutputTensor, write_safetensors

logger = logging.getLogger(__name__)

AnyModel = AutoencoderKL | AutoencoderTiny

EMBEDDED = "small"
PADDING_KEY = "sdvae.padding"  # in the metadata of files that sdvae wrote, where it is not zeros

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

    @property
    def left_out(self) -> dict[str, int]:
        """How many tensors of the file are no part of the VAE, by the first part of their names: {"loss.*": 130}."""
        others = (key.partition(".") for key in self.file.entries if key not in self.keys.names)
        return dict(Counter(f"{first}.*" if rest else first for first, _, rest in others).most_common())

    def read(self) -> dict[str, Tensor]:
        """The VAE's tensors as stored, under diffusers' names and in their shapes."""
        return self._tensors(self.keys.names)

    def _tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {name: fit_layout(name, self.file.entries[key].read(), "diffusers") for key, name in names.items()}


def load_weights(spec: str | Path | None = None, family: str | None = None, padding: Padding | None = None) -> Weights:
    """Find, read and check the weights that `spec` names.

    `spec` is None (the embedded VAE), a diffusers folder (or a pipeline's, with the VAE in `vae/`), a file with a VAE
    in it (a VAE alone or a whole checkpoint; safetensors or torch.save's; LDM's layout or diffusers'), or a hub id
    (`org/name`, `org/name/subfolder`). `family` replaces the config, then `padding` what it says of that. Raises
    WeightsError or ConfigError; missing and unexpected keys are named.
    """
    if spec is None:
        with as_file(files("sdvae") / "assets" / f"{EMBEDDED}.safetensors") as path:
            weights = _read(open_vae(path, family or EMBEDDED), f"sdvae-{EMBEDDED}")
    else:
        weights = _read(open_vae(find_file(spec), family), str(spec))
    return weights if padding is None else replace(weights, config=replace(weights.config, padding=padding))


def open_vae(path: Path, family: str | None = None, *, is_copied: bool = False) -> VAEFile:
    """The VAE in a weights file, its tensors not read yet but known to fit its config.

    The config is that of `family`, else of the config.json or LDM's .yaml beside the file, else derived from the
    shapes. Where these fit families that differ only in scale, the scale is that of the latent space that the file
    tells or the probe proves, else a common one, with a warning. A VAE that is only copied (`is_copied`) needs no
    scale: the probe does not run, there is no warning, and its number of groups may be wrong.
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
    beside = read_beside(path, keys, shape_fields(path, shapes)) if family is None else None
    unsure: tuple[str, ...] = ()
    told = told_by_file(file)
    is_told = beside is not None and beside.tells_scale
    if family is not None:
        config, source = VAEConfig.from_family(family), f"family {family}"
        told.append(told_by_flag(family))
    elif is_told:
        assert beside is not None
        config, source = beside.config, beside.name
    else:

        def judge_as(config: VAEConfig) -> Verdict:
            return VAEFile(file, keys, shapes, config, None, told=tuple(told)).verdict

        structure = beside.config if beside else None
        config, family, unsure = _derive_config(path, shapes, told, judge_as, structure, is_copied)
        source = beside.name if beside else "shapes"
    if not is_told:
        padding: Any = file.metadata.get(PADDING_KEY, config.padding)  # refused where it is none that is known
        config = replace(config, padding=padding)
    check_shapes(path, config, source, shapes)
    config = _with_statistics(config, file, keys)
    if is_told or config.latents_patch > 1:
        told.append(told_by_config(config, f"{source} beside it"))
    if is_told:
        family = family_of(config)
    elif known_space(config) is None and config.latents_patch > 1:  # its statistics are its own
        family = None
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
    metadata = {"format": "pt"} | ({FAMILY_KEY: family} if family else {}) | padding_metadata(config)
    outputs = {key: OutputTensor.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS_NAMES[0], outputs, metadata)
    atomic.write_bytes(folder / CONFIG_NAME, content)


def padding_metadata(config: VAEConfig) -> dict[str, str]:
    """What the metadata of a file tell of its padding, which no tensor tells."""
    return {} if config.padding == "zeros" else {PADDING_KEY: config.padding}


def config_json(config: VAEConfig) -> bytes:
    """The config.json of a diffusers folder, with what another program had in it.

    ConfigError for a network that diffusers does not have.
    """
    if config.to_diffusers()["_class_name"] == "AsymmetricAutoencoderKL":
        raise ConfigError(
            "diffusers' AsymmetricAutoencoderKL has a mask encoder, which sdvae leaves out; keep its original folder"
        )
    if isinstance(config, TinyConfig) and config.has_mid_pool:
        raise ConfigError("diffusers' AutoencoderTiny has no pooled blocks; a TAESD of FLUX.2 cannot be saved for it")
    return (json.dumps({**config.unused, **config.to_diffusers()}, indent=2) + "\n").encode()


def _read(vae: VAEFile, name: str) -> Weights:
    keys = vae.keys.names.items()  # one by one: what is stored in fp16 is never in memory twice
    entries = vae.file.entries
    tensors = {name: fit_layout(name, entries[key].read(), "diffusers").float() for key, name in keys}
    if vae.config.latents_patch > 1 and not isinstance(vae.config, TinyConfig):
        tensors[COUNTER] = tensors.get(COUNTER, torch.zeros((), dtype=torch.float32, device="cpu")).long()
    return Weights(vae.config, tensors, name, vae.file.path, vae.told)


def _with_statistics(config: VAEConfig, file: TensorFile, keys: VAEKeys) -> VAEConfig:
    """The config with the scale that FLUX.2's file holds among its weights; any other as it is."""
    if config.latents_patch == 1:
        return config
    stored = {name: key for key, name in keys.names.items()}
    mean, variance = (file.entries[stored[name]].read().double().tolist() for name in STATISTICS)
    return config.with_batch_norm(mean, variance)


def _derive_config(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    told: Sequence[Evidence],
    judge_as: Callable[[VAEConfig], Verdict],
    structure: VAEConfig | None,
    is_copied: bool,
) -> tuple[VAEConfig, str | None, tuple[str, ...]]:
    """The config that these shapes have, its family where something tells it, and what is in doubt.

    `structure` is LDM's config of a VAE alone: all but the scale of its latents.
    """
    found = shape_fields(path, shapes)
    same = [name for name, family in FAMILIES.items() if fields_of(family) == found]
    latents = found["latent_channels"], 2 ** (len(found["block_out_channels"]) - 1), found["latents_patch"]
    akin = same or [name for name, family in FAMILIES.items() if _latents(family) == latents]
    num_groups = math.gcd(32, *found["block_out_channels"], *(found["decoder_block_out_channels"] or ()))
    if not akin and structure is not None:
        logger.warning("%s does not tell the scale of its latents (scale_factor); sdvae takes LDM's default, 1.0", path)
        return structure, None, SCALE_FIELDS
    if not akin and is_copied:
        return replace(VAEConfig(), norm_num_groups=num_groups, **found), None, (*SCALE_FIELDS, "norm_num_groups")
    if not akin:
        raise ConfigError(
            f"{path} has {latents[0]} latent channels at 1/{latents[1]} of the size, which fits no family that sdvae "
            f"knows; put its {CONFIG_NAME} beside it, or its LDM config as {path.stem}.yaml"
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
    told = read_json(beside) if layout == "diffusers" and (beside := path.with_name(CONFIG_NAME)).is_file() else {}
    config.check_diffusers(told)
    akin = [name for name in TINY_FAMILIES if _fits(name, config)]
    if not akin:
        raise WeightsError(f"{path} is a TAESD of {config.latent_channels} latent channels, of no family sdvae knows")
    if family is not None and family not in akin:
        raise WeightsError(
            f"{path} is a TAESD of {config.latent_channels} latent channels, not those of {family}; "
            f"it may be of {' or '.join(akin)}"
        )
    evidence = told_by_file(file) if family is None else [*told_by_file(file), told_by_flag(family)]
    shapes = {name: entry.shape for name, entry in entries.items()}
    keys = VAEKeys("", layout, {name: name for name in entries})
    found = VAEFile(replace(file, entries=entries), keys, shapes, config, family, told=tuple(evidence))
    certain = family or (akin[0] if len(akin) == 1 else None)
    family = certain
    if family is None:
        certain, family = _settle(path, found.verdict, akin, is_quiet=is_copied)
    config = TinyConfig.from_family(family)
    config = replace(config, unused={key: told[key] for key in told if key not in config.to_diffusers()})
    return replace(found, config=config, family=certain, unsure=SCALE_FIELDS if certain is None else ())


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


def _latents(config: VAEConfig) -> tuple[int, int, int]:
    return config.latent_channels, config.downscale, config.latents_patch


def _fits(family: str, config: TinyConfig) -> bool:
    known = TinyConfig.from_family(family)
    return (known.latent_channels, known.has_mid_pool) == (config.latent_channels, config.has_mid_pool)
