"""Fitting a checkpoint's position tables and patch kernel to another clip size.

The interpolation is upstream's (OpenGVLab/InternVideo2, models/pos_embed.py): time first and
linear, then space and bicubic. It always runs in float32, whatever the file's dtype.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def resize_joint(table: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """[1,1+t*s*s,D] from a `grid` (time steps, side) to another; row 0, the class's, stays."""
    return torch.cat([table[:, :1].float(), resize_patches(table[:, 1:], grid=grid, to=to)], dim=1)


def resize_patches(table: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """As `resize_joint`, of a table [1,t*s*s,D] without a class row."""
    (t0, s0), (t1, s1) = grid, to
    patches = rearrange(table.float(), "1 (t s) d -> 1 t s d", t=t0)
    if t0 != t1:
        patches = _resize_time(patches, steps=t1)
    if s0 != s1:
        patches = _resize_space(patches, side=s1)
    return rearrange(patches, "1 t s d -> 1 (t s) d")


def resize_spatial(table: Tensor, *, side: int) -> Tensor:
    """A separable model's spatial table [1,s*s,D] to another side."""
    return _resize_space(table.float()[:, None], side=side)[:, 0]


def resize_temporal(table: Tensor, *, steps: int) -> Tensor:
    """A separable model's temporal table [1,t,D] to other time steps."""
    return _resize_time(table.float()[:, :, None], steps=steps)[:, :, 0]


def inflate_kernel(kernel: Tensor, *, tubelet: int) -> Tensor:
    """Spread a kernel [D,3,1,14,14] over a tubelet, so that a still clip embeds the same."""
    return repeat(kernel.float() / tubelet, "d c 1 p q -> d c u p q", u=tubelet)


def square_side(rows: int) -> int | None:
    """Side of the square grid that `rows` fill, None when they fill none."""
    side = math.isqrt(rows)
    return side if side and side * side == rows else None


def readings(rows: int, *, to: tuple[int, int]) -> list[tuple[int, int]]:
    """Which grids (time steps, side) a table of `rows` patch positions may have been made for.

    The model's own grid if it fits; otherwise those that share its side or its time steps.
    """
    steps, side = to
    if rows == steps * side * side:
        return [to]
    found = [(rows // (side * side), side)] if rows % (side * side) == 0 else []
    other = square_side(rows // steps) if rows % steps == 0 else None
    return found + ([(steps, other)] if other else [])


def _resize_time(table: Tensor, *, steps: int) -> Tensor:
    columns = rearrange(table, "1 t s d -> s d t")
    columns = F.interpolate(columns, size=steps, mode="linear", align_corners=False)
    return rearrange(columns, "s d t -> 1 t s d")


def _resize_space(table: Tensor, *, side: int) -> Tensor:
    frames = rearrange(table, "1 t (h w) d -> t d h w", h=square_side(table.shape[2]))
    frames = F.interpolate(frames, size=(side, side), mode="bicubic", align_corners=False)
    return rearrange(frames, "t d h w -> 1 t (h w) d")
