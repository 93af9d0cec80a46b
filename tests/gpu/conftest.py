"""Tests here run this project's kernels, and those of whole steps what a recipe takes, too."""

import pytest

from distill.kernels import jit


@pytest.fixture(autouse=True)
def kernels(request):
    """What is chosen: triton, or the value that a test is parametrised with."""
    chosen = getattr(request, "param", "triton")
    before = jit.choose(chosen)
    yield chosen
    jit.choose(before)
