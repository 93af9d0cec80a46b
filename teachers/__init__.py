"""Frozen teachers."""
