"""Training: the only part that knows an optimiser."""
