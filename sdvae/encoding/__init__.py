"""Photos into a latent store."""
