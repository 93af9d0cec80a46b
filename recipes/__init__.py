"""Shipped recipes (package data; this file makes the folder importable)."""
