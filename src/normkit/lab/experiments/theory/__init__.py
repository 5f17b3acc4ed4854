"""The theory of weight conditioning as experiments: what its paper proves, measured, and where it fails."""
