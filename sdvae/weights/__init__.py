"""Weights of a VAE: reading, writing, and knowing which one it is."""
