"""Which patch tokens a student sees: drawn per clip, view and seed, whatever batch it is in."""

import torch
from torch import Tensor

from distill import draw
from distill.recipe import Mask

_VIEW_STEP = -4658895280553007687  # odd, so that every view of a clip gets a key of its own


def num_visible(grid: tuple[int, int, int], mask: Mask) -> int:
    """How many of the patches of a token grid (t, h, w) stay visible.

    The product with the ratio is truncated as a binary double, per frame for tube masks
    (OpenGVLab/InternVideo2, single_modality/datasets/masking_generator.py), so at least one
    patch stays.
    """
    t, h, w = grid
    if mask.kind == "tube":
        return t * (h * w - int(h * w * mask.ratio))
    return t * h * w - int(t * h * w * mask.ratio)


def draw_tokens(
    mask: Mask,
    *,
    clip_ids: Tensor,
    view: Tensor | int,
    seed: int,
    grid: tuple[int, int, int],
    attention: Tensor | None = None,
) -> Tensor:
    """Visible patch indices int64 [B,M-1], ascending, without replacement.

    Attention masks draw in proportion to `attention` [B,N], random ones uniformly, tubes
    uniformly over the places of a frame and alike in all frames. Drawing without replacement
    is taking the largest of log-weight plus Gumbel noise, here in float32 (Gumbel top-k; Kool
    et al., 2019, arXiv:1903.06059, section 2). A clip's draw depends on its int64 id, its view
    and the seed, and on nothing else of the batch. Raises ValueError when an attention mask
    gets no attention of the right shape.
    """
    t, h, w = grid
    visible = num_visible(grid, mask)
    keys = clip_ids + torch.as_tensor(view, device=clip_ids.device) * _VIEW_STEP  # wraps
    if mask.kind == "tube":
        places = _largest(draw.gumbel(keys, "mask", seed, count=h * w), visible // t)  # [B,m]
        start = torch.arange(t, device=keys.device) * (h * w)
        return (start[:, None] + places[:, None]).flatten(1)  # [B,t*m]
    scores = draw.gumbel(keys, "mask", seed, count=t * h * w)  # [B,N]
    if mask.kind == "attention":
        if attention is None or attention.shape != scores.shape:
            found = "none" if attention is None else list(attention.shape)
            raise ValueError(f"an attention mask needs attention {list(scores.shape)}, got {found}")
        # Weights that have underflowed are taken last, not never.
        scores = scores + attention.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return _largest(scores, visible)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the largest scores; the earlier one wins a tie, on every device."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values
