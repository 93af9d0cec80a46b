"""What lies between two branches of a transformer block: add one, normalise for the next.

For rows x [B,...,D], a branch y of their shape, its gains gamma [D] (LayerScale), a factor keep [B]
(drop path) and the norm's gains w [D]:

    h = x + keep * gamma * y
    out = h / sqrt(mean over D of h^2 + eps) * w

Backward, with dn = w * d_out and r the reciprocal root: dh = d_h + r (dn - h r^2 mean(dn h)),
dy = keep gamma dh, d_gamma = sum over rows of keep y dh and d_w that of r h d_out. Sums over rows
have an order of their own, so equal input gives equal bits. Source: the blocks of InternVideo2's
single-modality models (single_modality/models/internvideo2.py), LayerScale in float32.
"""

from __future__ import annotations  # see jit.py

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.kernels.jit import jit, operation, tl, uses_triton

EPS = 1e-6
VALUES = 1024  # of a program at a time, on WARPS warps, and as many more as a row is wider
WARPS = 4
WIDEST = 4096  # rows of the kernels
BWD_PARTS = 640  # of the rows, each of which sums its own gradient of the gains


def rmsnorm_reference(
    x: Tensor,
    weight: Tensor | None,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The formula above in plain torch: h and out, which is None without the norm's gains."""
    h = x
    if branch is not None:
        scaled = (branch.float() * gamma.float()).to(branch.dtype)
        if keep is not None:
            scaled = scaled * keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        h = x + scaled
    if weight is None:
        return h, None
    out = F.rms_norm(h, weight.shape, weight, EPS)
    return h, out if dtype is None else out.to(dtype)


@jit
def _rmsnorm_fwd_kernel(
    x,  # [R,width] by its stride
    branch,  # [R,width], or anything without ADDS
    gamma,  # [width], or anything without ADDS
    keep,  # float32 [R/rows_per_clip], or anything without DROPS
    weight,  # [width], or anything without NORMS
    h,  # [R,width], written where it ADDS
    out,  # [R,width], written where it NORMS
    rstd,  # float32 [R], written where it NORMS
    num_rows,
    width,
    x_stride,
    rows_per_clip,
    eps,
    ADDS: tl.constexpr,
    DROPS: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [r]
    column = tl.arange(0, BLOCK)  # [c]
    is_row = row < num_rows
    is_column = column < width
    is_inside = is_row[:, None] & is_column[None, :]
    at = row[:, None] * width + column[None, :]
    x_at = row[:, None] * x_stride + column[None, :]
    value = tl.load(x + x_at, mask=is_inside, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(branch + at, mask=is_inside, other=0.0).to(tl.float32)
        y *= tl.load(gamma + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if DROPS:
            y *= tl.load(keep + row // rows_per_clip, mask=is_row, other=0.0)[:, None]
        value = (value + y).to(h.dtype.element_ty)
        tl.store(h + at, value, mask=is_inside)
        value = value.to(tl.float32)  # what the backward finds
    if NORMS:
        r = 1 / tl.sqrt(tl.sum(value * value, 1) / width + eps)
        tl.store(rstd + row, r, mask=is_row)
        w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
        found = value * r[:, None] * w[None, :]
        tl.store(out + at, found.to(out.dtype.element_ty), mask=is_inside)


@jit
def _rmsnorm_bwd_kernel(
    d_h,  # [R,width], or anything where it does not add
    d_out,  # [R,width], or anything without NORMS
    h,  # [R,width], or anything without NORMS
    rstd,  # float32 [R], or anything without NORMS
    branch,  # [R,width], or anything without ADDS
    gamma,  # [width], or anything without ADDS
    keep,  # float32 [R/rows_per_clip], or anything without DROPS
    weight,  # [width], or anything without NORMS
    d_x,  # [R,width], written where it NORMS
    d_branch,  # [R,width], written where it ADDS
    d_gamma,  # float32 [parts,width], written where it ADDS
    d_weight,  # float32 [parts,width], written where it NORMS
    num_rows,
    width,
    rows_per_clip,
    span,
    ADDS: tl.constexpr,
    DROPS: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [c]
    is_column = column < width
    of_gamma = tl.zeros([ROWS, BLOCK], tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if ADDS:
        scale = tl.load(gamma + column, mask=is_column, other=0.0).to(tl.float32)
    if NORMS:
        w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * span, num_rows)
    for past in tl.range(0, span, ROWS):
        row = part * span + past + tl.arange(0, ROWS)  # [r]
        is_row = row < end
        is_inside = is_row[:, None] & is_column[None, :]
        at = row[:, None] * width + column[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        if ADDS:
            total += tl.load(d_h + at, mask=is_inside, other=0.0).to(tl.float32)
        if NORMS:
            r = tl.load(rstd + row, mask=is_row, other=0.0)[:, None]
            d = tl.load(d_out + at, mask=is_inside, other=0.0).to(tl.float32)
            n = tl.load(h + at, mask=is_inside, other=0.0).to(tl.float32) * r
            of_weight += d * n
            d *= w[None, :]
            total += r * (d - n * (tl.sum(d * n, 1) / width)[:, None])
            tl.store(d_x + at, total.to(d_x.dtype.element_ty), mask=is_inside)
        if ADDS:
            if DROPS:
                total *= tl.load(keep + row // rows_per_clip, mask=is_row, other=0.0)[:, None]
            y = tl.load(branch + at, mask=is_inside, other=0.0).to(tl.float32)
            of_gamma += total * y
            total *= scale[None, :]
            tl.store(d_branch + at, total.to(d_branch.dtype.element_ty), mask=is_inside)
    at = part * width + column
    if ADDS:
        tl.store(d_gamma + at, tl.sum(of_gamma, 0), mask=is_column)
    if NORMS:
        tl.store(d_weight + at, tl.sum(of_weight, 0), mask=is_column)


def _launch(x: Tensor, *, branch: Tensor | None, keep: Tensor | None, weight: Tensor | None):
    """Rows, rows of a clip and constants of a launch."""
    num_rows = x.numel() // x.shape[-1]
    block = 1 << (x.shape[-1] - 1).bit_length()
    constants = {
        "ADDS": branch is not None,
        "DROPS": branch is not None and keep is not None,
        "NORMS": weight is not None,
        "ROWS": max(1, VALUES // block),
        "BLOCK": block,
        "num_warps": WARPS * max(1, block // VALUES),
    }
    return num_rows, max(1, num_rows // max(1, x.shape[0])), constants


def _made_fwd(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    made = []
    if branch is not None:
        made.append(torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype)))
    if weight is not None:
        num_rows = x.numel() // x.shape[-1]
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        made += [out, x.new_empty(num_rows, dtype=torch.float32)]
    return made


@operation(
    "(Tensor x, Tensor? branch, Tensor? gamma, Tensor? keep, Tensor? weight, *, ScalarType dtype) "
    "-> Tensor[]",
    fake=_made_fwd,
)
def _rmsnorm_fwd(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    """h where there is a branch, then out and rstd where there are gains."""
    num_rows, rows_per_clip, constants = _launch(x, branch=branch, keep=keep, weight=weight)
    made = _made_fwd(x, branch, gamma, keep, weight, dtype=dtype)
    h = made[0] if branch is not None else x
    out, rstd = made[-2:] if weight is not None else (x, x)
    tensors = [x if z is None else z for z in (x, branch, gamma, keep, weight, h, out, rstd)]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rmsnorm_fwd_kernel[(-(-num_rows // constants["ROWS"]),)](
            *tensors,
            num_rows,
            x.shape[-1],
            x.stride(0) if x.ndim == 2 else x.shape[-1],
            rows_per_clip,
            EPS,
            **constants,
        )
    return made


def _made_bwd(
    d_h: Tensor | None,
    d_out: Tensor | None,
    h: Tensor,
    rstd: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    made = [] if branch is None else [torch.empty_like(branch), torch.empty_like(gamma)]
    if weight is not None:
        made += [torch.empty_like(h, dtype=dtype), torch.empty_like(weight)]
    return made


@operation(
    "(Tensor? d_h, Tensor? d_out, Tensor h, Tensor? rstd, Tensor? branch, Tensor? gamma, "
    "Tensor? keep, Tensor? weight, *, ScalarType dtype) -> Tensor[]",
    fake=_made_bwd,
)
def _rmsnorm_bwd(
    d_h: Tensor | None,
    d_out: Tensor | None,
    h: Tensor,
    rstd: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of branch and gamma where there is one, then of x, in `dtype`, and of weight."""
    num_rows, rows_per_clip, constants = _launch(h, branch=branch, keep=keep, weight=weight)
    rows, width = constants["ROWS"], h.shape[-1]
    span = rows * max(1, -(-num_rows // (rows * BWD_PARTS)))
    parts = -(-num_rows // span)
    d_x = d_branch = d_gamma = d_weight = None
    if branch is not None:
        d_branch = torch.empty_like(branch)
        d_gamma = h.new_empty(parts, width, dtype=torch.float32)
    if weight is not None:
        d_x = torch.empty_like(h, dtype=dtype)
        d_weight = h.new_empty(parts, width, dtype=torch.float32)
    tensors = (d_h, d_out, h, rstd, branch, gamma, keep, weight, d_x, d_branch, d_gamma, d_weight)
    with torch.cuda.device_of(h):
        _rmsnorm_bwd_kernel[(parts,)](
            *[h if z is None else z for z in tensors],
            *(num_rows, width, rows_per_clip, span),
            **constants,
        )
    made = [] if branch is None else [d_branch, d_gamma.sum(0).to(gamma.dtype)]
    if weight is not None:
        made += [d_x, d_weight.sum(0).to(weight.dtype)]
    return made


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gamma, keep, weight, dtype):
        h, out, rstd = x, None, None
        made = _rmsnorm_fwd(x, branch, gamma, keep, weight, dtype=dtype)
        if branch is not None:
            h, *made = made
        if weight is not None:
            out, rstd = made
        ctx.save_for_backward(h, rstd, branch, gamma, keep, weight)
        ctx.dtype = x.dtype
        return None if branch is None else h, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_h, d_out):
        d_h, d_out = (None if d is None else d.contiguous() for d in (d_h, d_out))
        h, rstd, branch, gamma, keep, weight = ctx.saved_tensors
        made = _rmsnorm_bwd(d_h, d_out, *ctx.saved_tensors, dtype=ctx.dtype)
        d_branch = d_gamma = d_weight = None
        if branch is not None:
            d_branch, d_gamma, *made = made
        d_x, d_weight = made if weight is not None else (d_h.to(ctx.dtype), None)
        return d_x, d_branch, d_gamma, None, d_weight, None


def rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum h [B,...,D] and, with gains `weight` [D], its normalised rows in `dtype`.

    `branch` is as x and comes with `gamma` [D] and, in training, `keep` [B], a constant; h is x
    without it and otherwise in the wider of both dtypes. `dtype` None is that of h. By
    kernels where they are chosen, with sums in float32, save for float64. Raises ValueError for
    what does not fit.
    """
    width = x.shape[-1]
    for name, gains in (("weight", weight), ("gamma", gamma)):
        if gains is not None and gains.shape != (width,):
            raise ValueError(f"expected {name} [{width}] as rows, got {list(gains.shape)}")
    if (branch is None) != (gamma is None) or (branch is None and keep is not None):
        raise ValueError("a branch needs its gains gamma, and they and keep need a branch")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"expected a branch {list(x.shape)} as x, got {list(branch.shape)}")
    if keep is not None and keep.shape != x.shape[:1]:
        raise ValueError(f"expected keep [{x.shape[0]}] for x, got {list(keep.shape)}")
    if branch is None and weight is None:
        return x, None
    if not uses_triton(x) or x.dtype == torch.float64 or width > WIDEST:
        return rmsnorm_reference(x, weight, branch=branch, gamma=gamma, keep=keep, dtype=dtype)
    factors = None if keep is None else keep.float().contiguous()
    # Where nothing is kept for a backward, rows may be parts of longer ones.
    is_part = branch is None and x.ndim == 2 and x.stride(1) == 1 and not torch.is_grad_enabled()
    rows = [x if is_part else x.contiguous()]
    rows += [None if z is None else z.contiguous() for z in (branch, gamma)]
    if dtype is None:
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    h, out = _RMSNorm.apply(*rows, factors, weight, dtype)
    return x if h is None else h, out
