"""One self-contained HTML page of a comparison of VAEs, or of a latent store."""
