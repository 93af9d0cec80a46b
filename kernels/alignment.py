"""Feature alignment: how far a student's projections point away from a frozen teacher's.

For each of K layers, with raw projections x [B,M,E], gain g and bias b [E] of that layer and
teacher vectors t [B,M,E] that are close to unit length:

    s = LayerNorm(x; g, b, eps 1e-5) / |LayerNorm(x; g, b, eps 1e-5)|
    loss = mean over B and M of 2 - 2 <s, t>

This equals |s - t|^2 where t is of unit length, and stays linear in t where it is a code.
Source: InternVideo2's distillation loss (single_modality/engines/engine_for_distill.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the decoders' LayerNorm


def alignment_reference(
    raw: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], targets: Tensor
) -> Tensor:
    """The formula above in plain torch, one layer after another: [K] in at least float32."""
    losses = []
    for x, gain, shift, target in zip(raw, weight, bias, targets, strict=True):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, gain, shift = x.to(dtype), gain.to(dtype), shift.to(dtype)
        student = F.normalize(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), dim=-1)
        losses.append(2 - 2 * (student * target.to(dtype)).sum(dim=-1).mean())
    return torch.stack(losses)


def alignment(
    raw: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Tensor,
) -> Tensor:
    """Loss of every layer, [K]: `raw` is K tensors [B,M,E], `targets` is [K,B,M,E].

    `weight` and `bias` are K vectors [E]. Accumulates in float32, or in float64 for float64
    input. Raises ValueError when the shapes do not fit.
    """
    if not len(raw) == len(weight) == len(bias) == targets.shape[0]:
        raise ValueError(
            f"expected as many layers in all arguments, got {len(raw)} projections, {len(weight)} "
            f"gains, {len(bias)} biases and {targets.shape[0]} layers of targets"
        )
    for layer, x in enumerate(raw):
        if x.shape != targets.shape[1:]:
            raise ValueError(
                f"layer {layer}: expected projections {list(targets.shape[1:])} as the targets, "
                f"got {list(x.shape)}"
            )
    return alignment_reference(raw, weight, bias, targets)
