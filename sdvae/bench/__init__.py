"""Measurements: speed and memory of sdvae, beside diffusers."""
