"""sdvae inside other people's libraries."""
