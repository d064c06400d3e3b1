"""The config that lies beside a weights file: diffusers' config.json, or the .yaml that LDM trains and runs with."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdvae.config import VAEConfig, read_json
from sdvae.errors import ConfigError
from sdvae.weights.keymap import VAEKeys, some

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
_MAX_YAML_BYTES = 1 << 16  # LDM's have 3 kB; the parser is slow
_MAX_DEPTH = 30
# Fields of LDM's ddconfig that are read, and those that change no result of a trained network.
_READ = {"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels", "in_channels", "out_ch"}
_SAME_RESULT = {"dropout", "double_z", "attn_type", "use_checkpoint", "resamp_with_conv"}


@dataclass(frozen=True)
class Beside:
    """What the file called `name` says; LDM's config of a VAE alone does not tell the scale of its latents."""

    name: str
    config: VAEConfig
    tells_scale: bool


def config_names(path: Path) -> list[str]:
    """The files that may hold the config of a weights file, in the order in which they are asked."""
    if path.name.startswith("diffusion_pytorch_model."):
        return [CONFIG_NAME]
    return [f"{path.stem}.yaml", f"{path.stem}.yml", CONFIG_NAME, "config.yaml", "config.yml"]


def read_beside(path: Path, keys: VAEKeys, shape_fields: Mapping[str, Any]) -> Beside | None:
    """The config of the VAE in a weights file, if one lies beside it.

    A diffusers file without a prefix has its config.json, whatever that says. Beside any other file lies `NAME.yaml`,
    or a config.json or config.yaml that fits the `shape_fields` of its tensors: in a folder of many files it may be
    another's, and then a warning says that it is not used. Raises ConfigError.
    """
    is_diffusers = keys.layout == "diffusers" and not keys.prefix
    names = config_names(path)
    for name in sorted(names, key=lambda name: name != CONFIG_NAME) if is_diffusers else names:
        place = path.with_name(name)
        if not place.is_file():
            continue
        found = _read(place, shape_fields, is_certain=is_diffusers and name == CONFIG_NAME)
        if found is None:
            continue
        fits = all(getattr(found.config, field, value) == value for field, value in shape_fields.items())
        if fits or place.stem == path.stem or (is_diffusers and name == CONFIG_NAME):
            return found
        logger.warning("%s describes another VAE than the one in %s beside it, and is not used", place, path.name)
    return None


def _read(place: Path, shape_fields: Mapping[str, Any], *, is_certain: bool) -> Beside | None:
    """A config of diffusers or LDM; None for a file that describes no KL-VAE."""
    content = read_json(place) if place.suffix == ".json" else _read_yaml(place)
    told = content.get("_class_name", "AutoencoderKL" if "block_out_channels" in content else "")
    if is_certain or str(told).endswith(("AutoencoderKL", "AutoencoderKLFlux2")):
        return Beside(place.name, VAEConfig.from_diffusers(content), True)
    found = list(_chains(content, (), set()))
    if not found:
        return None
    if any(chain[-1] != found[0][-1] for chain in found):
        raise ConfigError(f"{place} has several ddconfig; leave the one of these weights in it")
    try:
        return _from_ldm(place.name, found[0], shape_fields)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _read_yaml(place: Path) -> dict[str, Any]:
    import yaml

    try:
        with place.open("rb") as file:
            text = file.read(_MAX_YAML_BYTES + 1)
        if len(text) > _MAX_YAML_BYTES:
            raise ConfigError(f"{place} has more than {_MAX_YAML_BYTES:,} bytes; it is not the config of a VAE")
        is_anchored: list[bool] = []  # of each collection that is open
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                is_anchored.append(event.anchor is not None)
                if len(is_anchored) > _MAX_DEPTH:  # the parser's time is quadratic in it
                    raise ConfigError(f"{place} is nested too deeply; it is not the config of a VAE")
            elif isinstance(event, yaml.CollectionEndEvent):
                is_anchored.pop()
            elif isinstance(event, yaml.AliasEvent) and any(is_anchored):  # which could double at each level
                raise ConfigError(f"{place} has YAML aliases inside of aliases; write the values out")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:99]
        raise ConfigError(f"{place} cannot be read as YAML: {why}; repair the file or move it away") from error
    return content if isinstance(content, dict) else {}


def _chains(value: Any, above: tuple[dict[str, Any], ...], seen: set[int]) -> Iterator[tuple[dict[str, Any], ...]]:
    """The mappings from the outermost in to each ddconfig, which is the last."""
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, list):
        for item in value:
            yield from _chains(item, above, seen)
        return
    for key, item in value.items():
        if key == "ddconfig" and isinstance(item, dict):
            yield (*above, value, item)
        else:
            yield from _chains(item, (*above, value), seen)


def _from_ldm(name: str, chain: tuple[dict[str, Any], ...], shape_fields: Mapping[str, Any]) -> Beside:
    """The config that a ddconfig describes, in diffusers' fields; what LDM does not write there, the shapes tell."""
    *above, dd = chain
    if above[-1].get("n_embed"):
        raise ConfigError("its ddconfig is of a VQ-VAE (n_embed); sdvae reads KL-VAEs")
    unknown = [key for key in dd if key not in _READ | _SAME_RESULT and dd[key] not in (None, False)]
    odd = unknown + [key for key in ("double_z", "resamp_with_conv") if dd.get(key, True) is not True]
    if odd:
        told = some([f"{key!s:.40}={dd[key]!r:.40}" for key in odd])
        raise ConfigError(f"its ddconfig asks for what sdvae does not implement: {told}")
    width, resolution = _whole(dd, "ch"), _whole(dd, "resolution", 256)
    factors, attended = dd.get("ch_mult"), dd.get("attn_resolutions") or []
    if not isinstance(factors, list) or not isinstance(attended, list) or any(type(one) is not int for one in factors):
        raise ConfigError(f"ch_mult or attn_resolutions of its ddconfig is no list of whole numbers: {dd!r:.99}")
    latent_channels = _nearest(above, "embed_dim") or dd.get("z_channels")
    if dd.get("z_channels") != latent_channels:
        numbers = f"embed_dim {latent_channels!r:.40} and z_channels {dd.get('z_channels')!r:.40}"
        raise ConfigError(f"{numbers} differ; sdvae reads KL-VAEs in which they are equal")
    scaling_factor = _nearest(above, "scale_factor")
    values = dict(shape_fields) | {
        "in_channels": dd.get("in_channels", 3),
        "out_channels": dd.get("out_ch", 3),
        "latent_channels": latent_channels,
        "block_out_channels": tuple(width * factor for factor in factors),
        "layers_per_block": dd.get("num_res_blocks"),
        "attention_levels": tuple(level for level in range(len(factors)) if resolution // 2**level in attended),
        "sample_size": resolution,
        "scaling_factor": 1.0 if scaling_factor is None else scaling_factor,  # as LDM's own default
    }
    return Beside(name, VAEConfig(**values), scaling_factor is not None)


def _whole(dd: dict[str, Any], key: str, default: int | None = None) -> int:
    value = dd.get(key, default)
    if type(value) is not int:
        raise ConfigError(f"{key} of its ddconfig is {value!r:.40}, not a whole number")
    return value


def _nearest(above: list[dict[str, Any]], key: str) -> Any:
    return next((mapping[key] for mapping in reversed(above) if mapping.get(key) is not None), None)
