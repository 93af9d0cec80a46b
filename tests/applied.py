"""Autograd functions as on a GPU, for Triton's interpreter (see interpret_kernels.py)."""

import torch
from torch import Tensor

from distill.kernels import alignment, linear_alignment, patch_embed


def gradients(kind: str, groups: list, targets, upstream: Tensor, expected: float) -> tuple:
    """Losses, gradients of `groups` made for `expected`, and what a second backward pass says."""
    for module in (alignment, linear_alignment):
        module._num_programs = lambda x: 6  # there is no device to count multiprocessors of
    function = {"alignment": alignment._Alignment, "linear": linear_alignment._LinearAlignment}
    leaves = [x.detach().requires_grad_() for group in groups for x in group]
    losses = function[kind].apply(targets, expected, len(groups[0]), *leaves)
    total = (losses * upstream).sum()
    found = torch.autograd.grad(total, leaves, retain_graph=True)
    try:
        torch.autograd.grad(total, leaves)
    except RuntimeError as error:
        return losses.detach(), found, str(error)
    return losses.detach(), found, ""


def embedding(
    patches: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, **statistics
) -> tuple:
    """Embeddings and the gradients of weight and bias, made while autocast is on."""
    leaves = [x.detach().requires_grad_() for x in (weight, bias)]
    arguments = (statistics["mean"], statistics["std"], weight.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = patch_embed._PatchEmbed.apply(patches, *leaves, *arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)
