"""sdvae: a KL-VAE toolkit in Stable Diffusion's format.

The public names load on first use (PEP 562), so that `import sdvae` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdvae.config import VAEConfig
    from sdvae.data.dataset import LatentDataset
    from sdvae.errors import SdvaeError
    from sdvae.integrations.diffusers import install, uninstall
    from sdvae.model import AutoencoderKL
    from sdvae.posterior import DiagonalGaussian
    from sdvae.vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "AutoencoderKL",
    "DiagonalGaussian",
    "LatentDataset",
    "SdvaeError",
    "VAEConfig",
    "install",
    "uninstall",
]

_MODULES = {
    "VAE": "sdvae.vae",
    "AutoencoderKL": "sdvae.model",
    "DiagonalGaussian": "sdvae.posterior",
    "LatentDataset": "sdvae.data.dataset",
    "SdvaeError": "sdvae.errors",
    "VAEConfig": "sdvae.config",
    "install": "sdvae.integrations.diffusers",
    "uninstall": "sdvae.integrations.diffusers",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sdvae' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
