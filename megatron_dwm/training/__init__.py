"""Step, loop, optimizer, checkpoints, evaluation."""
