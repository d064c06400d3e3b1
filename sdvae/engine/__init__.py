"""How a VAE runs: dtypes, memory plans, and the programs that run under them."""
