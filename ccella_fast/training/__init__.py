"""Training of the diffusion model and of the autoencoder."""
