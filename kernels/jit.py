"""Triton where it is installed, and whether it is to be used; importing it needs no GPU.

Kernel files take `jit` and `tl` from here, and put off the evaluation of annotations, so that they
import where there is no Triton too: its wheels are for Linux. Their public functions ask
`uses_triton` and take the reference where it says no.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["Kernels", "choose", "chosen", "jit", "operation", "tl", "uses_triton"]

Kernels = Literal["torch", "triton"]
# Of the process, since a backward pass may run in another thread; None where no run has chosen.
_chosen: Kernels | None = None
_library = torch.library.Library("distill", "FRAGMENT")


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the function as it is where it cannot be launched anyway."""
    return function if triton is None else triton.jit(function)


def operation(schema: str, *, fake: Callable) -> Callable[[Callable], Callable]:
    """Make a function that launches kernels one step, `distill::NAME`, of a compiled graph.

    `torch.compile` asks `fake` for outputs of the right shapes and strides, and looks into neither
    of them. Outside of it the function is called as it is: PyTorch's dispatcher would take several
    times as long as a launch.
    """

    def wrap(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        _library.define(name + schema, tags=(torch.Tag.needs_exact_strides,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"distill::{name}", fake, lib=_library)
        compiled = getattr(torch.ops.distill, name).default

        @functools.wraps(function)
        def call(*arguments, **settings):
            step = compiled if torch.compiler.is_compiling() else function
            return step(*arguments, **settings)

        return call

    return wrap


def choose(kernels: Kernels | None) -> Kernels | None:
    """What operations on a GPU run from here on in this process, and what it was before.

    None is torch, as before any choice; on a CPU it is always torch.
    """
    global _chosen
    if kernels is not None and kernels not in get_args(Kernels):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Kernels))}, got {kernels!r}")
    before, _chosen = _chosen, kernels
    return before


def chosen() -> Kernels | None:
    """What `choose` was told last, None where nothing has been chosen."""
    return _chosen


def uses_triton(tensor: Tensor) -> bool:
    """Whether kernels are chosen and `tensor` is where they can run."""
    return _chosen == "triton" and tensor.is_cuda
