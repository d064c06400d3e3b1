"""The latent store: its files, and what they hold. No torch."""
