"""This project's kernels against every other way to compute the same: python -m benchmarks.kernels

Imports neither recipes nor decoders: torch, Triton and einops are all that it needs.
"""
