"""From what a user names (a folder, a file, a hub id) to a weights file on this machine."""

from contextlib import suppress
from pathlib import Path

from sdvae.errors import WeightsError
from sdvae.weights import taesd
from sdvae.weights.files import shard_names
from sdvae.weights.keymap import some

CONFIG_NAME = "config.json"
_STEM = "diffusion_pytorch_model"
WEIGHTS_NAMES = (
    f"{_STEM}.safetensors", f"{_STEM}.fp16.safetensors", f"{_STEM}.safetensors.index.json",
    f"{_STEM}.bin", f"{_STEM}.fp16.bin", f"{_STEM}.bin.index.json",
)  # fmt: skip


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
    raise WeightsError(f"{folder} holds no {WEIGHTS_NAMES[0]}; give the folder of a diffusers VAE")


def _looks_like_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) >= 2 and all(parts) and not spec.startswith((".", "/", "~"))


def _download(spec: str) -> Path:
    """The weights that a hub id names, fetched into huggingface_hub's cache with all that belongs to them.

    `spec` is org/name, org/name/subfolder, or org/name/path of one file.
    """
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, repository, *parts = spec.split("/")
    name = parts[-1] if parts and parts[-1].endswith((*taesd.SUFFIXES, ".index.json")) else None
    place = "/".join(parts[:-1] if name else parts)
    problem: Exception | None = None
    for folder in [place] if parts else ["", "vae"]:
        for weights_name in [name] if name else WEIGHTS_NAMES:
            try:
                return _fetch(f"{owner}/{repository}", folder, weights_name)
            except EntryNotFoundError as error:  # not in this place; offline, also: not in the cache
                problem = error
            except (OSError, HFValidationError) as error:
                raise WeightsError(f"{spec} is no local path, and the hub refused it: {_first_line(error)}") from error
    raise WeightsError(f"{spec} is no local path, and the hub gave no VAE for it: {_first_line(problem)}") from problem


def _fetch(repository: str, folder: str, name: str) -> Path:
    """One weights file of the hub, and beside it in the cache its config, its shards, its other half."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(hf_hub_download(repository, name, subfolder=folder or None))
    for shard in shard_names(path):
        try:
            hf_hub_download(repository, shard, subfolder=folder or None)
        except EntryNotFoundError as error:
            raise WeightsError(
                f"{path} names the shard {shard}, and the hub gave none: {_first_line(error)}"
            ) from error
    other = taesd.other_half(path)
    for optional in [CONFIG_NAME] + ([other.name] if other else []):
        with suppress(EntryNotFoundError):  # files of LDM's layout have no config
            hf_hub_download(repository, optional, subfolder=folder or None)
    return path


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
