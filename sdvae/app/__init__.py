"""The playground: one VAE call at a time, for a browser on this machine."""
