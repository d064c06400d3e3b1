"""Reading tensors from files. No file that is read here can run code."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdvae.errors import UnsafeFileError, WeightsError

# Bare pickles of protocols 2 to 5, and the zip that torch.save wraps one in.
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU.

    Raises WeightsError for a file that is not one, naming what it is instead; UnsafeFileError for a pickle.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: SafetensorError) -> WeightsError:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return WeightsError(f"{path} is a Git LFS pointer, not the weights; fetch the real file with `git lfs pull`")
    if start.startswith(_PICKLE_MAGIC):
        return UnsafeFileError(f"{path} is a pickle, which can run code; use its .safetensors version")
    if start.isascii() and start:
        return WeightsError(f"{path} is a text file, not safetensors weights; check the path")
    return WeightsError(f"{path} is not a readable safetensors file ({error}); download it again")
