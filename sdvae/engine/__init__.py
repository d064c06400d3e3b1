"""How a VAE runs: dtypes now, compiled programs and memory plans as they land."""
