"""Jobs of experiments that have loops of their own, and what they measure of a network."""
