"""Language models between autoregression and masked diffusion: train, evaluate, sample."""
