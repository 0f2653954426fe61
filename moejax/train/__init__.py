"""Training: the loop, optimizers, checkpoints, metrics and what makes a run durable."""
