"""Step, loop, optimiser, checkpoints, evaluation."""
