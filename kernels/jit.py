"""Triton where it is installed, and whether it is to be used; importing it needs no GPU.

Kernel files take `jit` and `tl` from here, and put off the evaluation of annotations, so that they
import where there is no Triton too: its wheels are for Linux. Their public functions ask
`uses_triton` and take the reference where it says no.
"""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["Kernels", "choose", "jit", "tl", "uses_triton"]

Kernels = Literal["torch", "triton"]
_chosen: Kernels = "torch"  # of the process: a backward pass may run in another thread


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the function as it is where it cannot be launched anyway."""
    return function if triton is None else triton.jit(function)


def choose(kernels: Kernels) -> None:
    """What operations on a GPU run from here on in this process; on a CPU it is always torch."""
    global _chosen
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Kernels))}, got {kernels!r}")
    _chosen = kernels


def uses_triton(tensor: Tensor) -> bool:
    """Whether kernels are chosen and `tensor` is where they can run."""
    return _chosen == "triton" and tensor.is_cuda
