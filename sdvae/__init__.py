"""sdvae: a KL-VAE toolkit in Stable Diffusion's format."""

__version__ = "0.1.0"
