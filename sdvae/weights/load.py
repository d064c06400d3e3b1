"""From what a user names (nothing, a folder, a file, a hub id) to a config and its tensors, and back to a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sdvae import atomic
from sdvae.config import VAEConfig
from sdvae.errors import ConfigError, WeightsError
from sdvae.model import AutoencoderKL
from sdvae.weights.files import read_safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
EMBEDDED = "small"
_MOST_KEYS_LISTED = 6


@dataclass(frozen=True)
class Weights:
    """A config, tensors that fit it exactly, and the name a user would call them by."""

    config: VAEConfig
    tensors: dict[str, Tensor]
    name: str


def load_weights(spec: str | Path | None = None, family: str | None = None) -> Weights:
    """Find, read and check the weights that `spec` names.

    `spec` is None (the embedded VAE), a diffusers folder (or a pipeline's, with the VAE in `vae/`), a
    safetensors file in diffusers' layout, or a hub id (`org/name`, `org/name/subfolder`). `family`
    replaces the config. Raises WeightsError or ConfigError; missing and unexpected keys are named.
    """
    config = None if family is None else VAEConfig.from_family(family)
    if spec is None:
        with as_file(files("sdvae") / "assets" / f"{EMBEDDED}.safetensors") as path:
            return _checked(config or VAEConfig.from_family(EMBEDDED), read_safetensors(path), f"sdvae-{EMBEDDED}")
    path = Path(spec).expanduser()
    if path.is_dir():
        folder = path / "vae" if (path / "model_index.json").is_file() else path
        return _load_folder(folder, config, str(spec))
    if path.is_file():
        return _load_file(path, config, str(spec))
    if _looks_like_hub_id(str(spec)):
        return _load_folder(_download(str(spec)), config, str(spec))
    raise WeightsError(f"{spec} is no folder, file or hub id (org/name); check the path")


def build_model(weights: Weights) -> AutoencoderKL:
    """The reference model holding these tensors in fp32."""
    with torch.device("meta"):
        model = AutoencoderKL(weights.config)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.tensors.items()}, assign=True)
    return model.eval()


def save_folder(folder: Path, config: VAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a diffusers folder: config.json and one safetensors file, readable by `AutoencoderKL.from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    atomic.write_bytes(folder / WEIGHTS_NAMES[0], save(contiguous, metadata={"format": "pt"}))
    atomic.write_bytes(folder / CONFIG_NAME, (json.dumps(config.to_diffusers(), indent=2) + "\n").encode())


def _load_folder(folder: Path, config: VAEConfig | None, name: str) -> Weights:
    for weights_name in WEIGHTS_NAMES:
        if (folder / weights_name).is_file():
            return _load_file(folder / weights_name, config, name)
    raise WeightsError(f"{folder} holds no {WEIGHTS_NAMES[0]}; give the folder of a diffusers VAE")


def _load_file(path: Path, config: VAEConfig | None, name: str) -> Weights:
    tensors = read_safetensors(path)
    if config is None:
        config = _read_config(path.parent / CONFIG_NAME)
    return _checked(config, tensors, name)


def _read_config(path: Path) -> VAEConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; name the family of these weights, for example sd1 or sdxl"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; it is not the config of a VAE")
    return VAEConfig.from_diffusers(content)


def _checked(config: VAEConfig, tensors: dict[str, Tensor], name: str) -> Weights:
    with torch.device("meta"):
        expected = AutoencoderKL(config).state_dict()
    wrong_shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": wrong_shapes,
    }
    told = [f"{len(keys)} {problem}: {_some(keys)}" for problem, keys in problems.items() if keys]
    if told:
        raise WeightsError(f"the weights of {name} do not fit their config; keys {'; '.join(told)}")
    return Weights(config, tensors, name)


def _some(keys: list[str]) -> str:
    rest = len(keys) - _MOST_KEYS_LISTED
    return ", ".join(keys[:_MOST_KEYS_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _looks_like_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) >= 2 and all(parts) and not spec.startswith((".", "/", "~"))


def _download(spec: str) -> Path:
    """Fetch config and weights of a hub id into huggingface_hub's cache; the folder they lie in."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, repository, *subfolders = spec.split("/")
    problem: Exception | None = None
    for subfolder in ["/".join(subfolders)] if subfolders else [None, "vae"]:
        for weights_name in WEIGHTS_NAMES:
            try:
                config = hf_hub_download(f"{owner}/{repository}", CONFIG_NAME, subfolder=subfolder)
                hf_hub_download(f"{owner}/{repository}", weights_name, subfolder=subfolder)
                return Path(config).parent
            except EntryNotFoundError as error:  # not in this place; offline, also: not in the cache
                problem = error
            except (OSError, HFValidationError) as error:
                raise WeightsError(f"{spec} is no local path, and the hub refused it: {_first_line(error)}") from error
    raise WeightsError(f"{spec} is no local path, and the hub gave no VAE for it: {_first_line(problem)}") from problem


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
