"""What a training run does beside its steps: watching, telling, stopping, finishing."""
