"""Training: optimizers and checkpoints."""
