"""The audit: one forward and one backward pass that find normalization mistakes."""
