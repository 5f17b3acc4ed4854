"""normkit: normalization for PyTorch networks."""
