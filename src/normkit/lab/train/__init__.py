"""Training: one run of a comparison, steps of experiments with loops of their own, several processes, what a step costs."""
