"""Knowledge distillation for video foundation models."""
