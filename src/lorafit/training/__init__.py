"""The training step, and what must be true around it."""
