"""sdvae: a KL-VAE toolkit in Stable Diffusion's format.

The public names load on first use (PEP 562), so that `import sdvae` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdvae.config import VAEConfig
    from sdvae.encoding.attach import attach
    from sdvae.encoding.encode import encode_dataset
    from sdvae.encoding.manifest import EncodeSettings
    from sdvae.errors import SdvaeError
    from sdvae.explore.anomaly import rank_anomalies
    from sdvae.explore.arithmetic import attribute_vector
    from sdvae.explore.augment import augment_dataset
    from sdvae.explore.fit import fit_latents
    from sdvae.integrations.diffusers import install, uninstall
    from sdvae.model import AutoencoderKL
    from sdvae.posterior import DiagonalGaussian
    from sdvae.reading.dataset import LatentDataset
    from sdvae.reading.decode import DecodeSettings, decode_dataset
    from sdvae.reading.export import export
    from sdvae.reading.samplers import BucketBatchSampler
    from sdvae.store.geometry import Preprocess
    from sdvae.store.verify import verify
    from sdvae.vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "AutoencoderKL",
    "BucketBatchSampler",
    "DecodeSettings",
    "DiagonalGaussian",
    "EncodeSettings",
    "LatentDataset",
    "Preprocess",
    "SdvaeError",
    "VAEConfig",
    "attach",
    "attribute_vector",
    "augment_dataset",
    "decode_dataset",
    "encode_dataset",
    "export",
    "fit_latents",
    "install",
    "rank_anomalies",
    "uninstall",
    "verify",
]

_MODULES = {
    "VAE": "sdvae.vae",
    "AutoencoderKL": "sdvae.model",
    "BucketBatchSampler": "sdvae.reading.samplers",
    "DecodeSettings": "sdvae.reading.decode",
    "DiagonalGaussian": "sdvae.posterior",
    "EncodeSettings": "sdvae.encoding.manifest",
    "LatentDataset": "sdvae.reading.dataset",
    "Preprocess": "sdvae.store.geometry",
    "SdvaeError": "sdvae.errors",
    "VAEConfig": "sdvae.config",
    "attach": "sdvae.encoding.attach",
    "attribute_vector": "sdvae.explore.arithmetic",
    "augment_dataset": "sdvae.explore.augment",
    "decode_dataset": "sdvae.reading.decode",
    "encode_dataset": "sdvae.encoding.encode",
    "export": "sdvae.reading.export",
    "fit_latents": "sdvae.explore.fit",
    "install": "sdvae.integrations.diffusers",
    "rank_anomalies": "sdvae.explore.anomaly",
    "uninstall": "sdvae.integrations.diffusers",
    "verify": "sdvae.store.verify",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'sdvae' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
