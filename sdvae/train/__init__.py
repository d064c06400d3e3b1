"""Training: losses, the discriminator, typed configs, and the loop."""
