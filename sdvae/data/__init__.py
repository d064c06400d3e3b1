"""Datasets of images, and the stores of their latents."""
