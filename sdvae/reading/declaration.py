"""What an export says of itself: `sdvae-export.json`, for people, and for `sdvae decode`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdvae import atomic
from sdvae.errors import LatentsError

Scaling = Literal["raw", "scaled"]

DECLARATION = "sdvae-export.json"


@dataclass(frozen=True)
class LatentFiles:
    """Which files of an export hold latents, and how."""

    pattern: str  # of their paths below the folder of the export
    scaling: Scaling
    has_std: bool = False  # behind the mean, in as many channels


def write_declaration(folder: Path, declared: dict[str, Any], files: LatentFiles) -> None:
    """Write it, last of all files: an export without it was interrupted."""
    text = json.dumps(declared | {"latent_files": asdict(files)}, indent=2, ensure_ascii=False)
    atomic.write_bytes(folder / DECLARATION, text.encode() + b"\n")


def declared_files(folder: Path) -> LatentFiles | None:
    """The latent files of the export in `folder`; None where none is, or one that does not say it."""
    path = folder / DECLARATION
    if not path.is_file():
        return None
    try:
        declared = json.loads(path.read_bytes())["latent_files"]
        files = LatentFiles(str(declared["pattern"]), declared["scaling"], bool(declared["has_std"]))
    except KeyError:  # an export of before this was declared
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LatentsError(f"{path} is damaged ({error}); export the store again") from error
    if files.scaling not in ("raw", "scaled") or ".." in Path(files.pattern).parts or Path(files.pattern).is_absolute():
        raise LatentsError(f"{path} is damaged: it declares {declared}; export the store again")
    return files
