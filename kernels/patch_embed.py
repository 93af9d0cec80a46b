"""Patch embedding of uint8 patches: normalise and project in one go.

For patches p uint8 [...,U] of equally many values of each channel, a weight W [D,U] and a bias
b [D], and a mean m and deviation s of the channel that a value is of:

    y = W ((p - 255 m) / (255 s)) + b

The kernel multiplies p - c, with the nearest whole number c to 255 m, which half precision holds
exactly, by W / (255 s), and adds what is left of the mean to the bias: its products are off by
the weight's rounding alone. Source: the normalisation of every ImageNet model.
"""

from __future__ import annotations  # see jit.py

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.jit import jit, operation, tl, uses_triton

BLOCK = 64  # of rows, columns and what is summed over
NUM_WARPS = 4
NUM_STAGES = 3
SPLITS = 16  # of the rows, at most, in the backward pass: few multiprocessors would be busy


def normalize_patches(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(p - 255 m) / (255 s) of uint8 patches [...,U], in float32."""
    channels = rearrange(patches.float(), "... (c u) -> c ... u", c=len(mean))
    # The statistics stay Python numbers: a tensor would be copied to the device at every step.
    scaled = [
        (channel - 255 * centre) / (255 * deviation)
        for channel, centre, deviation in zip(channels, mean, std, strict=True)
    ]
    return torch.cat(scaled, dim=-1)


def patch_embed_reference(
    patches: Tensor, weight: Tensor, bias: Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The formula above in plain torch: normalised in float32, projected in the weight's dtype."""
    return F.linear(normalize_patches(patches, mean, std).to(weight.dtype), weight, bias)


@jit
def _patch_embed_fwd_kernel(
    patches,  # uint8 [R,inner]
    weight,  # [columns,inner]
    bias,  # float32 [columns]
    centres,  # float32 [inner]
    out,  # [R,columns], written
    num_rows,
    columns,
    inner: tl.constexpr,  # so that several bytes are loaded at a time where it is a multiple
    BLOCK: tl.constexpr,
):
    program, across = tl.program_id(0), tl.cdiv(columns, BLOCK)
    row = (program // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = program % across * BLOCK + tl.arange(0, BLOCK)
    is_row, is_column = row < num_rows, column < columns
    kind = weight.dtype.element_ty
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, inner, BLOCK):
        k = start + tl.arange(0, BLOCK)
        is_k = k < inner
        mask = is_row[:, None] & is_k[None, :]
        p = tl.load(patches + row[:, None] * inner + k[None, :], mask=mask, other=0)
        centre = tl.load(centres + k, mask=is_k, other=0.0)
        p = (p.to(tl.float32) - centre[None, :]).to(kind)
        w_at = weight + column[None, :].to(tl.int64) * inner + k[:, None]
        w = tl.load(w_at, mask=is_k[:, None] & is_column[None, :], other=0.0)  # 0 behind inner
        total = tl.dot(p, w, total)
    total += tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    at = out + row[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@jit
def _patch_embed_bwd_kernel(
    patches,  # uint8 [R,inner]
    upstream,  # [R,columns]
    centres,  # float32 [inner]
    parts,  # float32 [splits,columns,inner], written
    num_rows,
    rows_per_split,
    columns,
    inner: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(2)
    is_k, is_column = k < inner, column < columns
    centre = tl.load(centres + k, mask=is_k, other=0.0)
    kind = upstream.dtype.element_ty
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    for start in tl.range(first, last, BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        is_row = row < last
        mask = is_row[:, None] & is_k[None, :]
        p = tl.load(patches + row[:, None] * inner + k[None, :], mask=mask, other=0)
        p = (p.to(tl.float32) - centre[None, :]).to(kind)
        dy_at = upstream + row[None, :] * columns + column[:, None]
        dy = tl.load(dy_at, mask=is_column[:, None] & is_row[None, :], other=0.0)  # 0 behind last
        total = tl.dot(dy, p, total)
    at = parts + (split.to(tl.int64) * columns + column[:, None]) * inner + k[None, :]
    tl.store(at, total, mask=is_column[:, None] & is_k[None, :])


@operation(
    "(Tensor patches, Tensor weight, Tensor bias, Tensor centres) -> Tensor",
    fake=lambda patches, weight, *others: weight.new_empty(len(patches), len(weight)),
)
def _patch_embed_fwd(patches: Tensor, weight: Tensor, bias: Tensor, centres: Tensor) -> Tensor:
    """(patches - centres) weight + bias, of rows [R,U]."""
    (num_rows, inner), columns = patches.shape, len(weight)
    out = weight.new_empty(num_rows, columns)
    grid = (-(-columns // BLOCK) * -(-num_rows // BLOCK),)
    with torch.cuda.device_of(patches):  # Triton launches on the current device
        _patch_embed_fwd_kernel[grid](
            patches,
            weight,
            bias,
            centres,
            out,
            num_rows,
            columns,
            inner=inner,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


@operation(
    "(Tensor patches, Tensor upstream, Tensor centres) -> Tensor",
    fake=lambda patches, upstream, centres: centres.new_empty(upstream.shape[1], patches.shape[1]),
)
def _patch_embed_bwd(patches: Tensor, upstream: Tensor, centres: Tensor) -> Tensor:
    """upstream' (patches - centres): float32 [D,U], added up in a fixed order."""
    (num_rows, inner), columns = patches.shape, upstream.shape[1]
    rows_per_split = -(-num_rows // (SPLITS * BLOCK)) * BLOCK
    splits = -(-num_rows // rows_per_split)
    parts = torch.empty(splits, columns, inner, dtype=torch.float32, device=patches.device)
    grid = (-(-inner // BLOCK), -(-columns // BLOCK), splits)
    with torch.cuda.device_of(patches):
        _patch_embed_bwd_kernel[grid](
            patches,
            upstream,
            centres,
            parts,
            num_rows,
            rows_per_split,
            columns,
            inner=inner,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return parts.sum(dim=0)


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], inner: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every value of a patch, float32 [U]: c, c - 255 m and 1 / (255 s)."""
    channel = torch.arange(inner, device=device) // (inner // len(mean))
    found = [torch.zeros(inner, device=device) for _ in range(3)]
    for index, (centre, deviation) in enumerate(zip(mean, std, strict=True)):
        whole = round(255 * centre)
        for vector, number in zip(
            found, (whole, whole - 255 * centre, 1 / (255 * deviation)), strict=True
        ):
            vector.masked_fill_(channel == index, number)
    return found[0], found[1], found[2]


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, weight, bias, mean, std, dtype):
        centres, offset, scale = _statistics(mean, std, patches.shape[1], patches.device)
        scaled = weight.float() * scale
        ctx.save_for_backward(patches, centres, offset, scale)
        ctx.dtypes = weight.dtype, bias.dtype
        shift = bias.float() + (scaled * offset).sum(dim=1)  # autocast would round a product
        return _patch_embed_fwd(patches, scaled.to(dtype).contiguous(), shift, centres)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        patches, centres, offset, scale = ctx.saved_tensors
        upstream = upstream.contiguous()
        dbias = upstream.sum(0, dtype=torch.float32)
        dweight = _patch_embed_bwd(patches, upstream, centres)
        dweight = (dweight + torch.outer(dbias, offset)) * scale
        return None, dweight.to(ctx.dtypes[0]), dbias.to(ctx.dtypes[1]), None, None, None


def patch_embed(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Embeddings [...,D] of patches uint8 [...,U], in the weight's dtype or autocast's.

    `mean` and `std` are the channels', of values between 0 and 1. Accumulates in float32.
    Raises ValueError when the shapes do not fit.
    """
    inner = patches.shape[-1]
    if patches.dtype != torch.uint8 or weight.shape[1] != inner or inner % len(mean):
        raise ValueError(
            f"expected patches uint8 [...,{weight.shape[1]}] of {len(mean)} channels, "
            f"got {patches.dtype} {list(patches.shape)}"
        )
    kind = patches.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if not uses_triton(patches) or dtype.itemsize > 2 or patches.numel() == 0:
        return patch_embed_reference(patches, weight, bias, mean=mean, std=std)
    rows = patches.reshape(-1, inner).contiguous()
    out = _PatchEmbed.apply(rows, weight, bias, mean, std, dtype)
    return out.view(*patches.shape[:-1], len(weight))
