"""Operations with their gradients, for Triton's interpreter (see interpret.py)."""

import torch
from interpret import find
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distill.kernels import alignment, linear_alignment


def gradients(place: str, arguments: tuple, settings: dict, upstream: list[Tensor]) -> tuple:
    """Outputs of what stands at `place`, and gradients of the arguments that want one."""
    leaves = [x for x in tree_leaves((arguments, settings)) if wants_gradient(x)]
    made = tree_leaves(find(place)(*arguments, **settings))
    outputs = [x for x in made if wants_gradient(x) and not x.is_leaf]
    found = torch.autograd.grad(outputs, leaves, upstream)
    return [x.detach() for x in outputs], list(found)


def wants_gradient(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def second_backward(place: str, arguments: tuple, settings: dict) -> str:
    """What a second backward pass over the sum of losses says."""
    leaves = [x for x in tree_leaves(arguments) if wants_gradient(x)]
    total = find(place)(*arguments, **settings).sum()
    torch.autograd.grad(total, leaves, retain_graph=True)
    try:
        torch.autograd.grad(total, leaves)
    except RuntimeError as error:
        return str(error)
    return ""


def clip_by_clip(place: str, arguments: tuple, settings: dict):
    """What is returned where a GPU's cache holds the decoded targets of one clip."""
    module = alignment if place.startswith("alignment.") else linear_alignment
    before, module.DECODED_BYTES = module.DECODED_BYTES, 1
    try:
        return find(place)(*arguments, **settings)
    finally:
        module.DECODED_BYTES = before


def scaled(gradients: Tensor, ratio: Tensor) -> Tensor:
    alignment._alignment_bwd(gradients, ratio)
    return gradients


def embedding(
    patches: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, **statistics
) -> tuple:
    """Embeddings and the gradients of weight and bias, made while autocast is on."""
    arguments = (patches, weight, bias, *statistics.values(), weight.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gradients("patch_embed._PatchEmbed.apply", arguments, {}, [upstream])
