"""Surgery: change the norms and weights of an existing model, in place, and say what was changed."""
