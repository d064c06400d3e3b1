"""What a latent space is good for: samples, arithmetic, anomalies, augmentation."""
