"""Training and evaluation: options, building, the step, checkpoints, resuming, reports."""
