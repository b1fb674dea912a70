"""Training: one file per stage, over a shared loop, optimiser, checkpoints and metrics."""
