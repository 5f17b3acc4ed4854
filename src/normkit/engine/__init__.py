"""Run a rule: the reference that defines it, and faster forms that must equal it."""
