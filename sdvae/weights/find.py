"""From what a user names (a folder, a file, a hub id) to a weights file on this machine."""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import cast

from sdvae.config import read_json
from sdvae.errors import WeightsError
from sdvae.weights import taesd
from sdvae.weights.beside import CONFIG_NAME, config_names
from sdvae.weights.files import is_index, shard_names
from sdvae.weights.keymap import some

_STEM = "diffusion_pytorch_model"
# What diffusers' `save_pretrained` writes without a variant, in the order in which its `from_pretrained` prefers them.
WEIGHTS_NAMES = (
    f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json", f"{_STEM}.bin", f"{_STEM}.bin.index.json",
)  # fmt: skip
_PIPELINES = ("model_index.json", "modular_model_index.json")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}(\.[\w-]+)+")
# Variants that are the same weights in another precision; any other variant ("ema", "non_ema") is other weights.
_PRECISION = re.compile(r"(fp|bf)\d+\w*")
_PRECISIONS = ("", "fp64", "fp32", "fp16", "bf16")  # no word first, then the more digits the better
# Formats that hold a network but are not read: such a file is chosen only to be called what it is.
_OTHER_FORMATS = (".msgpack", ".gguf", ".onnx", ".engine", ".plan", ".trt", ".h5", ".tflite")


def find_file(spec: str | Path) -> Path:
    """The weights file that `spec` names: itself, the one in a folder, or the one of a hub id, in the hub's cache."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    if _looks_like_hub_id(str(spec)):
        return _download(str(spec))
    raise WeightsError(f"{spec} is not a folder, file or hub id (org/name); check the path")


def choose(names: Collection[str]) -> str | None:
    """The weights among the files of one folder; None where there are none.

    As diffusers does: safetensors before pickles, and what has no variant before any variant. Of variants that differ
    in precision only, the most precise. WeightsError where several files are left, which hold different weights.
    """
    plain = next((name for name in WEIGHTS_NAMES if name in names), None)
    if plain is not None:
        return plain
    found = [name for name in sorted(names) if _is_weights(name) and not _SHARD.fullmatch(name)]
    safe = [name for name in found if ".safetensors" in name]
    diffusers = [name for name in found if name.startswith(f"{_STEM}.")]
    found = [name for name in safe if name in diffusers] or diffusers or safe or found
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault(_which(name), []).append(name)
    if len(groups) > 1 and _STEM not in groups:
        raise WeightsError(f"holds several files of weights ({some(found)}); name the one that is meant")
    least = groups.get(_STEM) or next(iter(groups.values()), None)
    return min(least, key=_preference) if least else None


def _is_weights(name: str) -> bool:
    return name.endswith(taesd.SUFFIXES) or is_index(name)


def _which(name: str) -> str:
    """The name without its format and the words of its precision: equal for files that hold the same weights."""
    parts = re.sub(r"\.(safetensors|bin|pth|pt|ckpt|index|json)(?=\.|$)", "", name).split(".")
    return ".".join(part for part in parts if not _PRECISION.fullmatch(part))


def _preference(name: str) -> tuple[int, bool]:
    words = [part for part in name.split(".") if _PRECISION.fullmatch(part)]
    known = [_PRECISIONS.index(word) if word in _PRECISIONS else len(_PRECISIONS) for word in words or [""]]
    return max(known), is_index(name)


def _in_folder(folder: Path) -> Path:
    names = {path.name for path in folder.iterdir() if path.is_file()}
    inside = folder / "vae"
    if pipeline := next((name for name in _PIPELINES if name in names), None):
        if inside.is_dir():
            return _in_folder(inside)
        raise WeightsError(f"{folder} is a pipeline without a VAE beside it; {_vae_elsewhere(folder / pipeline)}")
    plain = next((name for name in WEIGHTS_NAMES if name in names), None)
    pairs = [] if plain else taesd.find_pairs(names)
    if len(pairs) > 1:
        raise WeightsError(f"{folder} holds several TAESDs; name the file of one: {some(pairs)}")
    found = None
    try:
        found = plain or next(iter(pairs), None) or choose(names)
    except WeightsError as error:
        if not inside.is_dir():
            raise WeightsError(f"{folder} {error}") from None
    if found is not None:
        return folder / found
    if inside.is_dir():
        return _in_folder(inside)
    if other := next((name for name in sorted(names) if name.endswith(_OTHER_FORMATS)), None):
        return folder / other
    if shard := next((name for name in sorted(names) if _SHARD.fullmatch(name)), None):
        raise WeightsError(f"{folder} holds shards ({shard}) without their index, a .index.json; download it, too")
    raise WeightsError(f"{folder} holds no {WEIGHTS_NAMES[0]}; give the folder of a diffusers VAE")


def _vae_elsewhere(index: Path) -> str:
    """Where the index of a modular pipeline says that its VAE lies."""
    entry = read_json(index).get("vae")
    told = entry[-1] if isinstance(entry, list) and entry and isinstance(entry[-1], dict) else {}
    repository = told.get("pretrained_model_name_or_path") or told.get("repo")
    if not isinstance(repository, str):
        return "give the folder or hub id of its VAE"
    subfolder = told.get("subfolder")
    return f"its index says {repository[:99]}{f'/{subfolder[:99]}' if isinstance(subfolder, str) else ''}, give that"


def _looks_like_hub_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) >= 2 and all(parts) and not spec.startswith((".", "/", "~"))


def _download(spec: str) -> Path:
    """The weights that a hub id names, fetched into huggingface_hub's cache with all that belongs to them.

    `spec` is org/name, org/name/subfolder, or org/name/path of one file. Where the hub cannot be reached, the cache
    alone is asked.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, name, *parts = spec.split("/")
    repository = f"{owner}/{name}"
    file = parts[-1] if parts and _is_weights(parts[-1]) else None
    place = "/".join(parts[:-1] if file else parts)
    why_offline = None
    try:
        why_offline = _why_offline(repository)
        if why_offline is None:
            return _fetch(repository, *_in_repository(repository, place, file))
        if file is None:
            return _in_folder(Path(snapshot_download(repository, local_files_only=True)) / place)
        return _fetch(repository, place, file, None)
    except EntryNotFoundError as error:
        why = _first_line(error)
        if why_offline:
            why = f"it cannot be reached ({why_offline}), and no such file is in the local cache"
        raise WeightsError(f"{spec} is no local path, and the hub gave no VAE for it: {why}") from error
    except (OSError, HFValidationError) as error:
        raise WeightsError(f"{spec} is no local path, and the hub refused it: {_first_line(error)}") from error


def _in_repository(repository: str, place: str, file: str | None) -> tuple[str, str, set[str]]:
    """The folder and name of the weights in a folder of a repository, and all names there.

    As in a folder of this machine, `vae` below it may hold them. Raises huggingface_hub's EntryNotFoundError for a
    folder that is not there, WeightsError for one without weights.
    """
    from huggingface_hub import list_repo_tree

    listed = list(list_repo_tree(repository, place or None))
    names = {item.path.rpartition("/")[2] for item in listed if hasattr(item, "size")}  # folders have none
    if file is not None:
        return place, file, names
    inside = f"{place}/vae" if place else "vae"
    has_inside = any(item.path == inside for item in listed)
    try:
        if not names & set(_PIPELINES) and (found := choose(names)):
            return place, found, names
    except WeightsError as error:
        if not has_inside:
            raise WeightsError(f"{repository} {error}") from None
    if has_inside:
        return _in_repository(repository, inside, None)
    raise WeightsError(f"{repository} holds no weights in {place or inside}; name the file: {repository}/FILE")


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


def _fetch(repository: str, folder: str, name: str, there: Collection[str] | None) -> Path:
    """One weights file of the hub, and beside it in the cache its config, its shards, its other half.

    `there` are the names in that folder of the repository; None where the cache alone is asked.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, subfolder=folder or None, local_files_only=there is None))

    path = fetch(name)
    for shard in shard_names(path):
        try:
            fetch(shard)
        except EntryNotFoundError as error:
            raise WeightsError(
                f"{path} names the shard {shard}, and the hub gave none: {_first_line(error)}"
            ) from error
    other = taesd.other_half(path)
    for optional in [*config_names(path), *([other.name] if other else [])]:
        if there is None or optional in there:
            with suppress(EntryNotFoundError):  # of a cache that holds only a part
                fetch(optional)
    return path


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0]
