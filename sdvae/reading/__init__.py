"""What is done with a latent store: training, statistics, decoding, export."""
