"""From what a user names (a folder, a file, a hub id) to a weights file on this machine."""

import re
from contextlib import suppress
from pathlib import Path
from typing import cast

from sdvae.errors import WeightsError
from sdvae.weights import taesd
from sdvae.weights.files import is_index, shard_names
from sdvae.weights.keymap import some

CONFIG_NAME = "config.json"
_STEM = "diffusion_pytorch_model"
WEIGHTS_NAMES = (
    f"{_STEM}.safetensors", f"{_STEM}.fp16.safetensors", f"{_STEM}.safetensors.index.json",
    f"{_STEM}.bin", f"{_STEM}.fp16.bin", f"{_STEM}.bin.index.json",
)  # fmt: skip
_VARIANTS = tuple(
    f"{_STEM}.{name}" for variant in ("fp16", "bf16", "ema")
    for name in (f"{variant}.safetensors", f"safetensors.index.{variant}.json", f"{variant}.bin")
)  # fmt: skip
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")


def find_file(spec: str | Path) -> Path:
    """The weights file that `spec` names: itself, the one in a folder, or the one of a hub id, in the hub's cache."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if _looks_like_hub_id(str(spec)):
            return _download(str(spec))
        raise WeightsError(f"{spec} is not a folder, file or hub id (org/name); check the path")
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    pairs = taesd.find_pairs(folder)
    if len(pairs) == 1:
        return pairs[0]
    if pairs:
        raise WeightsError(
            f"{folder} holds several TAESDs; name the file of one: {some([str(pair) for pair in pairs])}"
        )
    return _only_weights(folder)


def _only_weights(folder: Path) -> Path:
    """The one file of weights in a folder, whatever its name; WeightsError where there is none, or several."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not _SHARD.fullmatch(path.name))
    found = [name for name in names if name.endswith(taesd.SUFFIXES) or is_index(name)]
    safe = [name for name in found if ".safetensors" in name]
    for names in (safe, found):
        if len(names) == 1:
            return folder / names[0]
        if names:
            raise WeightsError(f"{folder} holds several files of weights ({some(names)}); name the one that is meant")
    raise WeightsError(f"{folder} holds no {WEIGHTS_NAMES[0]}; give the folder of a diffusers VAE")


def _looks_like_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) >= 2 and all(parts) and not spec.startswith((".", "/", "~"))


def _download(spec: str) -> Path:
    """The weights that a hub id names, fetched into huggingface_hub's cache with all that belongs to them.

    `spec` is org/name, org/name/subfolder, or org/name/path of one file. Where the hub cannot be reached, the cache
    alone is asked.
    """
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, name, *parts = spec.split("/")
    repository = f"{owner}/{name}"
    file = parts[-1] if parts and parts[-1].endswith((*taesd.SUFFIXES, ".index.json")) else None
    place = "/".join(parts[:-1] if file else parts)
    problem: Exception | None = None
    try:
        why_offline = _why_offline(repository)
        for folder in [place] if parts else ["", "vae"]:
            for weights_name in [file] if file else [*WEIGHTS_NAMES, *_VARIANTS]:
                try:
                    return _fetch(repository, folder, weights_name, is_offline=why_offline is not None)
                except EntryNotFoundError as error:
                    problem = error
    except (OSError, HFValidationError) as error:
        raise WeightsError(f"{spec} is no local path, and the hub refused it: {_first_line(error)}") from error
    why = _first_line(problem)
    if why_offline:
        why = f"it cannot be reached ({why_offline}), and no such file is in the local cache"
    raise WeightsError(f"{spec} is no local path, and the hub gave no VAE for it: {why}") from problem


def _why_offline(repository: str) -> str | None:
    """Why the hub cannot be reached, asked once: `hf_hub_download` would try for minutes. None where it can."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    network_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # of httpx, whichever version the hub uses
    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG_NAME))
    except HfHubHTTPError:  # an answer
        return None
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (OSError, network_error) as error:
        return _first_line(error) or type(error).__name__
    return None


def _fetch(repository: str, folder: str, name: str, *, is_offline: bool) -> Path:
    """One weights file of the hub, and beside it in the cache its config, its shards, its other half."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, subfolder=folder or None, local_files_only=is_offline))

    path = fetch(name)
    for shard in shard_names(path):
        try:
            fetch(shard)
        except EntryNotFoundError as error:
            raise WeightsError(
                f"{path} names the shard {shard}, and the hub gave none: {_first_line(error)}"
            ) from error
    other = taesd.other_half(path)
    for optional in [CONFIG_NAME] + ([other.name] if other else []):
        with suppress(EntryNotFoundError):  # files of LDM's layout have no config
            fetch(optional)
    return path


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
