"""What a training step holds in memory, and where it goes."""
