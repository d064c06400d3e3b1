"""The published weights of networks that judge pictures: which file, where it is from, and its tensors."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from sdvae.errors import WeightsError
from sdvae.weights.files import open_weights, opened

FOLDER_VARIABLE = "SDVAE_NETWORKS"
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights as its author publishes it."""

    name: str  # of the network
    file: str
    url: str
    sha256: str  # or its first digits, where its author tells no more: torch's hub has them in the file's name
    also: tuple[str, ...] = ()  # other names that the same bytes are published under


FILES: Mapping[str, PublishedFile] = {
    file.name: file
    for file in (
        PublishedFile(
            "alexnet", "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "7be5be79",
        ),
        PublishedFile(
            "vgg16", "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"
        ),
        PublishedFile(
            "fid-inception", "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "6726825d", ("weights-inception-2015-12-05-6726825d.pth",),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """The tensors of a file, and what tells it from others."""

    tensors: Mapping[str, Tensor]
    file: str
    sha256: str


class MissingNetwork(WeightsError):  # noqa: N818 (it is an error by its base, and reads better so)
    """The weights of a network are not on this machine; the message says which file they are and where it is from."""


def read(name: str) -> Loaded:
    """The weights of a published network; MissingNetwork where they are not here, WeightsError where they are others.

    Looked for in the folder that SDVAE_NETWORKS names, then where torch's hub keeps its downloads. Nothing is fetched.
    """
    published = FILES[name]
    path = next((path for path in _places(published) if path.is_file()), None)
    if path is None:
        raise MissingNetwork(
            f"{name} needs {published.file} (sha256 {_digits(published)}), from {published.url}; put it where torch's "
            f"hub keeps its downloads (hub/checkpoints), or into the folder that {FOLDER_VARIABLE} names"
        )
    loaded = read_file(path)
    if not loaded.sha256.startswith(published.sha256):
        raise WeightsError(
            f"{path} has sha256 {loaded.sha256}, the published file's is {_digits(published)}; download it again from "
            f"{published.url}"
        )
    return loaded


def read_file(path: Path) -> Loaded:
    """The tensors of a file, read without running code, and its sha256."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    entries = open_weights(path).entries
    return Loaded({key: entry.read() for key, entry in entries.items()}, path.name, digest.hexdigest())


def read_lpips_heads(net: str) -> Loaded:  # "alex", "vgg"
    """LPIPS' linear layers, version 0.1, which torchmetrics carries; MissingNetwork where it is not installed."""
    found = find_spec("torchmetrics")
    folders = [Path(place) for place in (found.submodule_search_locations if found else None) or ()]
    path = next(
        (path for place in folders if (path := place / f"functional/image/lpips_models/{net}.pth").is_file()), None
    )
    if path is None:
        raise MissingNetwork("LPIPS needs its linear layers, which torchmetrics carries; pip install 'sdvae[metrics]'")
    return read_file(path)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], file: str) -> None:
    """Put the tensors that a network needs into it; WeightsError, with the first one, where any is missing or odd."""
    wanted = network.state_dict()
    for key, value in wanted.items():
        if key not in tensors or tensors[key].shape != value.shape:
            found = f"{tuple(tensors[key].shape)}" if key in tensors else "nothing"
            raise WeightsError(
                f"{file} has {found} for {key}, which should be {tuple(value.shape)}; it is another file"
            )
    network.load_state_dict({key: tensors[key].to(value.dtype) for key, value in wanted.items()})


def _digits(published: PublishedFile) -> str:
    return published.sha256 + ("..." if len(published.sha256) < 64 else "")


def _places(published: PublishedFile) -> list[Path]:
    return [folder / name for folder in _folders() for name in (published.file, *published.also)]


def _folders() -> list[Path]:
    from torch.hub import get_dir

    named = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(named)] if named else []), Path(get_dir()) / "checkpoints"]
