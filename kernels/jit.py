"""Triton where it is installed; importing it needs no GPU and no driver.

Kernel files take `jit` and `tl` from here, and put off the evaluation of annotations, so that they
import where there is no Triton too: its wheels are for Linux.
"""

from collections.abc import Callable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["jit", "tl"]


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the function as it is where it cannot be launched anyway."""
    return function if triton is None else triton.jit(function)
