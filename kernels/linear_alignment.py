"""Alignment (see `alignment.py`) of linear projections that are never kept.

For each of K layers, with states h [B,M,D], a linear layer W [E,D], b [E], gain g and bias c [E]
and teacher vectors t [B,M,E]:

    loss = alignment(W h + b; g, c, t)

Where D is small, by Gram matrices. With W and b centred over E, V = g W and v = g b:

    E variance = h' G h + 2 h' W' b + b'b            G = W' W
    |z|^2 = r^2 (h' Q h + 2 h' V' v + v'v) + 2 r (h' V' c + v'c) + c'c
    <z, t> = r (h' V' t + v't) + c't                 Q = V' V,  r = (variance + 1e-5)^-1/2

so that targets are projected to D + 2 numbers and nothing is E wide but they. Coded targets
t = mean + scale R' q go into the products as q: R turns V, v and c, once for all rows. Elsewhere
by chunks: some rows are projected, aligned and taken back through W, before the next ones are.
Either way gradients are made with the losses. Source: arithmetic; checked in float64 against
automatic differentiation.

Which of them, by multiplications of R rows: chunks take 3 R E D, as the linear layer alone does,
and Gram matrices 2 R E D, of the targets with V and with the rows, and 4 R D D. At E = 1408 that is
1.0 times the chunks' for D = 384 (S/14), where nothing E wide is written for it, 1.4 for 768 (B/14)
and 1.6 for 1024 (L/14): Gram matrices up to WIDEST_GRAM. float16, whose range the squares leave, is
by chunks at any width.
"""

from __future__ import annotations  # see jit.py

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.alignment import (
    DECODED_BYTES,
    EPS,
    TINY,
    WIDEST,
    _alignment_bwd,
    _alignment_fwd,
    alignment,
    alignment_reference,
    fields,
    upstream_ratio,
)
from distill.kernels.coded_targets import CodedTargets
from distill.kernels.codes import decode_codes
from distill.kernels.jit import jit, operation, tl, uses_triton

WIDEST_GRAM = 512  # of D
PAD = 8  # columns beside D: a product's rows stay multiples of 16 bytes
TILE = 2048  # elements of [rows,D] that a program holds of each of its inputs
NUM_WARPS = 8


def linear_alignment_reference(
    states: Sequence[Tensor],
    linear_weight: Sequence[Tensor],
    linear_bias: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Tensor | CodedTargets,
) -> Tensor:
    """The formula above in plain torch, with projections [B,M,E]: [K] in at least float32."""
    linears = zip(states, linear_weight, linear_bias, strict=True)
    return alignment_reference([F.linear(*x) for x in linears], weight, bias, targets)


@jit
def _linear_alignment_fwd_kernel(
    states,  # [R,width]
    products,  # [R,width+PAD]: V't, v't, c't of q
    squares,  # [R,2*width]: G h, Q h
    scales,  # float32 [R], of q
    vectors,  # float32 [5,width]: W'b, V'v, V'c, V'mean, nothing
    numbers,  # float32 [6]: b'b, v'v, v'c, c'c, v'mean, c'mean
    gradients,  # [R,width], written
    weighted,  # [R,width+PAD], written: a r scale h, a r scale, a scale
    curved,  # [R,2*width+PAD], written: e r^2 h, f h / E, a r, e r^2, e r, f / E
    sums,  # float32 [R,8], written: loss, a r, a, e r^2, e r, e, f / E
    num_rows,
    width,
    out_width,
    factor,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_row, is_column = row < num_rows, column < width
    mask = is_row[:, None] & is_column[None, :]
    h = tl.load(states + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    h = h.to(tl.float32)
    product_at = row * (width + PAD)
    scale = tl.load(scales + row, mask=is_row, other=0.0)
    p = tl.load(products + product_at[:, None] + column[None, :], mask=mask, other=0.0)
    mean_product = tl.load(vectors + 3 * width + column, mask=is_column, other=0.0)
    p = p.to(tl.float32) * scale[:, None] + mean_product[None, :]
    p_bias = tl.load(products + product_at + width, mask=is_row, other=0.0).to(tl.float32)
    p_shift = tl.load(products + product_at + width + 1, mask=is_row, other=0.0).to(tl.float32)
    square_at = squares + 2 * row[:, None] * width + column[None, :]
    g = tl.load(square_at, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(square_at + width, mask=mask, other=0.0).to(tl.float32)
    g_bias = tl.load(vectors + column, mask=is_column, other=0.0)
    q_bias = tl.load(vectors + width + column, mask=is_column, other=0.0)
    shift = tl.load(vectors + 2 * width + column, mask=is_column, other=0.0)

    variance = tl.sum(h * (g + 2 * g_bias[None, :]), axis=1) + tl.load(numbers)
    r = 1 / tl.sqrt(tl.maximum(variance / out_width, 0.0) + EPS)
    squared = tl.sum(h * (q + 2 * q_bias[None, :]), axis=1) + tl.load(numbers + 1)
    along = tl.sum(h * shift[None, :], axis=1) + tl.load(numbers + 2)
    length = r * r * squared + 2 * r * along + tl.load(numbers + 3)
    inverse = 1 / tl.maximum(tl.sqrt(tl.maximum(length, 0.0)), TINY)
    u = tl.sum(h * p, axis=1) + p_bias * scale + tl.load(numbers + 4)
    cosine = (r * u + p_shift * scale + tl.load(numbers + 5)) * inverse

    a, e = -2 * inverse, cosine * inverse * inverse
    dr = a * u + 2 * e * (r * squared + along)
    f = -r * r * r * dr / 2 / out_width
    ar, er, err = a * r, e * r, e * r * r
    dh = ar[:, None] * p + 2 * err[:, None] * (q + q_bias[None, :])
    dh += 2 * er[:, None] * shift[None, :] + 2 * f[:, None] * (g + g_bias[None, :])
    gradient_at = gradients + row[:, None] * width + column[None, :]
    tl.store(gradient_at, (factor * dh).to(gradients.dtype.element_ty), mask=mask)

    kind = weighted.dtype.element_ty
    weighted_at = weighted + product_at[:, None] + column[None, :]
    tl.store(weighted_at, ((ar * scale)[:, None] * h).to(kind), mask=mask)
    pad = tl.arange(0, PAD)[None, :]
    beside = tl.where(pad == 0, (ar * scale)[:, None], 0.0)
    beside = tl.where(pad == 1, (a * scale)[:, None], beside)
    beside_at = weighted + product_at[:, None] + width + pad
    tl.store(beside_at, beside.to(kind), mask=is_row[:, None])

    kind = curved.dtype.element_ty
    curved_row = row * (2 * width + PAD)
    curved_at = curved + curved_row[:, None] + column[None, :]
    tl.store(curved_at, (err[:, None] * h).to(kind), mask=mask)
    tl.store(curved_at + width, (f[:, None] * h).to(kind), mask=mask)
    beside = tl.where(pad == 0, ar[:, None], 0.0)
    beside = tl.where(pad == 1, err[:, None], beside)
    beside = tl.where(pad == 2, er[:, None], beside)
    beside = tl.where(pad == 3, f[:, None], beside)
    beside_at = curved + curved_row[:, None] + 2 * width + pad
    tl.store(beside_at, beside.to(kind), mask=is_row[:, None])

    part = tl.where(pad == 0, (2 - 2 * cosine)[:, None], 0.0)
    part = tl.where(pad == 1, ar[:, None], part)
    part = tl.where(pad == 2, a[:, None], part)
    part = tl.where(pad == 3, err[:, None], part)
    part = tl.where(pad == 4, er[:, None], part)
    part = tl.where(pad == 5, e[:, None], part)
    part = tl.where(pad == 6, f[:, None], part)
    tl.store(sums + row[:, None] * PAD + pad, part, mask=is_row[:, None])


def _rows_in_triton(h, products, squares, scales, vectors, numbers, *, out_width, factor):
    num_rows, width = h.shape
    block = 1 << (width - 1).bit_length()
    rows = max(1, TILE // block)
    dh = torch.empty_like(h)
    weighted, curved = torch.empty_like(products), h.new_empty(num_rows, 2 * width + PAD)
    sums = torch.empty(num_rows, PAD, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        _linear_alignment_fwd_kernel[(-(-num_rows // rows),)](
            h,
            products,
            squares,
            scales,
            vectors,
            numbers,
            dh,
            weighted,
            curved,
            sums,
            num_rows,
            width,
            out_width,
            factor,
            EPS=EPS,
            TINY=TINY,
            PAD=PAD,
            ROWS=rows,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return dh, weighted, curved, sums


def _parts(
    h: Tensor, targets: Tensor | CodedTargets, *, clip_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor | CodedTargets]]:
    """Some clips at a time: which, their states [R,D], and their targets of the one layer.

    As many as a GPU's cache holds of `clip_bytes` each.
    """
    step = max(1, DECODED_BYTES // clip_bytes)
    for start in range(0, len(h), step):
        part = slice(start, min(start + step, len(h)))
        found = targets.clips(part) if isinstance(targets, CodedTargets) else targets[:, part]
        yield part, h[part].flatten(0, 1).contiguous(), found


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in the accumulators' `dtype`."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _mix(rows: Tensor, targets: CodedTargets) -> Tensor:
    """left x right of rows [E,...]: what turns codes into vectors, but for the flips."""
    parts = rearrange(rows, "(p q) d -> p q d", q=len(targets.right))
    left, right = targets.left.to(rows.dtype), targets.right.to(rows.dtype)
    return torch.einsum("ip,jq,pqd->ijd", left, right, parts).flatten(0, 1)


def _gram(
    h: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    targets: Tensor | CodedTargets,
    *,
    upstream: float,
    rows_part=_rows_in_triton,
) -> tuple[Tensor, ...]:
    """Loss of one layer, and gradients of the first five arguments; targets have that layer alone.

    Either form takes states [B,M,D], and targets [1,B,M,E] or codes.
    """
    clips, tokens, width = h.shape
    exact = torch.promote_types(h.dtype, torch.float32)
    # Half precision: of the two kinds the one in which codes' levels are rounded less.
    operand = torch.float16 if h.dtype == torch.bfloat16 else h.dtype
    w, b, gain, shift = (x.to(exact) for x in (linear_weight, linear_bias, gain, shift))
    w, b = w - w.mean(0), b - b.mean()
    out_width = len(b)
    v, vb = gain[:, None] * w, gain * b
    nothing = torch.zeros(out_width, PAD - 2, dtype=exact, device=h.device)
    projector = torch.cat([v, vb[:, None], shift[:, None], nothing], dim=1)  # [E,D+PAD]
    is_coded = isinstance(targets, CodedTargets)
    if is_coded:
        mean, flips = targets.means[0].to(exact), targets.flips.to(exact)[:, None]
        turned = _mix(flips * projector, targets)
    else:
        mean, turned = torch.zeros_like(b), projector
    turned = turned.to(operand)
    vectors = torch.stack([b @ w, vb @ v, shift @ v, mean @ v])
    numbers = torch.stack([b @ b, vb @ vb, vb @ shift, shift @ shift, vb @ mean, shift @ mean])
    grams = torch.cat([w.T @ w, v.T @ v], dim=1).to(h.dtype)  # [D,2D]

    rows = clips * tokens
    factor = upstream / rows
    gradient = torch.empty_like(h, memory_format=torch.contiguous_format)
    aimed = curvature = total = 0.0
    for part, x, found in _parts(h, targets, clip_bytes=tokens * out_width * operand.itemsize):
        if is_coded:
            scales = found.scales.flatten().to(exact)  # [R]
            ones = torch.ones_like(found.scales)
            q = decode_codes(found.codes, ones, found.levels, width=out_width, dtype=operand)
        else:
            scales = torch.ones(len(x), dtype=exact, device=h.device)
            q = found.to(operand)
        q = q.flatten(0, 2)  # [R,E]
        dh, weighted, curved, sums = rows_part(
            x,
            q @ turned,
            x @ grams,
            scales,
            vectors,
            numbers,
            out_width=out_width,
            factor=factor,
        )
        gradient[part] = dh.view(gradient[part].shape)
        aimed = aimed + _product(q.T, weighted, exact)  # [E,D+PAD]
        curvature = curvature + _product(x.T, curved, exact)  # [D,2D+PAD]
        total = total + sums.sum(0)

    loss, ar, a, err, er, e, f = total[:7]
    s1, s2 = curvature[:, :width], curvature[:, width : 2 * width]
    ar_h, err_h, er_h, f_h = curvature[:, 2 * width : 2 * width + 4].T
    if is_coded:
        aimed = flips * _mix(aimed, targets)
    aimed_v = aimed[:, :width] + torch.outer(mean, ar_h)
    aimed_b, aimed_shift = aimed[:, width] + mean * ar, aimed[:, width + 1] + mean * a
    dv = aimed_v + 2 * (v @ s1 + torch.outer(vb, err_h) + torch.outer(shift, er_h))
    dvb = aimed_b + 2 * (v @ err_h + vb * err + shift * er)
    dshift = aimed_shift + 2 * (v @ er_h + vb * er + shift * e)
    dgain = (dv * w).sum(1) + dvb * b
    dw = gain[:, None] * dv + 2 * (w @ s2 + torch.outer(b, f_h))
    db = gain * dvb + 2 * (w @ f_h + b * f)
    dw, db = dw - dw.mean(0), db - db.mean()
    return loss / rows, gradient, *(factor * x for x in (dw, db, dgain, dshift))


def _chunks(
    h: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    targets: Tensor | CodedTargets,
    *,
    upstream: float,
) -> tuple[Tensor, ...]:
    """As `_gram`, by some rows' projections at a time."""
    tokens = h.shape[1]
    exact = torch.promote_types(h.dtype, torch.float32)
    w, b = linear_weight.to(h.dtype), linear_bias.to(h.dtype)
    gradient = torch.empty_like(h, memory_format=torch.contiguous_format)
    loss = dw = db = dgain = dshift = 0.0
    # Projections, their gradients and what is decoded of targets share the cache.
    for part, x, found in _parts(h, targets, clip_bytes=3 * tokens * len(b) * h.element_size()):
        share = (part.stop - part.start) / len(h)
        y = F.linear(x, w, b).unflatten(0, (-1, tokens))  # [B,M,E]
        one, dy, part_dgain, part_dshift = _alignment_fwd(
            [y], [gain], [shift], fields(found), upstream=upstream * share
        )
        dy = dy.flatten(0, 2)
        gradient[part] = (dy @ w).view(gradient[part].shape)
        dw = dw + _product(dy.T, x, exact)
        db = db + dy.sum(0, dtype=exact)
        loss, dgain = loss + one[0] * share, dgain + part_dgain[0]
        dshift = dshift + part_dshift[0]
    return loss, gradient, dw, db, dgain, dshift


def _of_layer(targets: Tensor | CodedTargets, layer: int) -> Tensor | CodedTargets:
    return targets.layer(layer) if isinstance(targets, CodedTargets) else targets[layer : layer + 1]


def _made_fwd(states: Sequence[Tensor], *groups_and_targets, upstream: float) -> list[Tensor]:
    exact = torch.promote_types(states[0].dtype, torch.float32)
    groups = groups_and_targets[:-1]
    empty = [torch.empty_like(h, memory_format=torch.contiguous_format) for h in states]
    empty += [x.new_empty(x.shape, dtype=exact) for group in groups for x in group]
    return [states[0].new_empty(len(states), dtype=exact), *empty]


@operation(
    "(Tensor[] states, Tensor[] linear_weight, Tensor[] linear_bias, Tensor[] weight, "
    "Tensor[] bias, Tensor[] targets, *, float upstream) -> Tensor[]",
    fake=_made_fwd,
)
def _linear_alignment_fwd(*groups_and_targets: Sequence[Tensor], upstream: float) -> list[Tensor]:
    """Losses [K], then gradients of every group, layer by layer; `targets` as in `alignment.py`."""
    *groups, targets = groups_and_targets
    targets = CodedTargets(*targets) if len(targets) > 1 else targets[0]
    found = []
    for layer, arguments in enumerate(zip(*groups, strict=True)):
        h = arguments[0]
        form = _gram if h.shape[-1] <= WIDEST_GRAM and h.dtype != torch.float16 else _chunks
        found.append(form(*arguments, _of_layer(targets, layer), upstream=upstream))
    losses, *gradients = zip(*found, strict=True)
    return [torch.stack(losses), *(x for group in gradients for x in group)]


class _LinearAlignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, upstream, layers, *parameters):
        groups = [parameters[i * layers : (i + 1) * layers] for i in range(5)]
        losses, *gradients = _linear_alignment_fwd(*groups, fields(targets), upstream=upstream)
        ctx.upstream, ctx.is_scaled, ctx.layers = upstream, False, layers
        ctx.dtypes = [x.dtype for x in parameters]
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.is_scaled:
            raise RuntimeError("linear alignment: gradients are handed out once; run forward again")
        ctx.is_scaled = True
        ratio = upstream_ratio(upstream, ctx.upstream)
        gradients = []
        for index, x in enumerate(ctx.saved_tensors):
            by = ratio[index % ctx.layers]
            if index < ctx.layers:  # the states'
                _alignment_bwd(x[None], by[None])
            else:
                x = x * by
            gradients.append(x.to(ctx.dtypes[index]))
        return None, None, None, *gradients


def linear_alignment(
    states: Sequence[Tensor],
    linear_weight: Sequence[Tensor],
    linear_bias: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Tensor | CodedTargets,
    *,
    upstream: float = 1.0,
) -> Tensor:
    """Loss of every layer, [K]: `states` is K tensors [B,M,D], `targets` is [K,B,M,E] or codes.

    The others are K tensors each, [E,D], [E], [E] and [E]. Under autocast states are taken in its
    dtype, as by a linear layer. Accumulates in float32, or in float64 for float64 input;
    `upstream` as in `alignment`. Raises ValueError when the shapes do not fit.
    """
    groups = (states, linear_weight, linear_bias, weight, bias)
    layers, *shape = targets.shape
    if any(len(group) != layers for group in groups):
        raise ValueError(
            f"expected {layers} layers in all arguments as the targets, "
            f"got {', '.join(str(len(group)) for group in groups)}"
        )
    for layer, (h, matrix) in enumerate(zip(states, linear_weight, strict=True)):
        expected = [shape[-1], h.shape[-1]]
        if list(h.shape[:-1]) != shape[:-1] or list(matrix.shape) != expected:
            raise ValueError(
                f"layer {layer}: expected states {shape[:-1]} and weights {expected} as the "
                f"targets, got {list(h.shape)} and {list(matrix.shape)}"
            )
    h = states[0]
    if not uses_triton(h) or h.dtype == torch.float64 or h.numel() == 0 or shape[-1] > WIDEST:
        return linear_alignment_reference(*groups, targets)
    leaves = [x for group in groups for x in group]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in leaves)):
        losses = [
            alignment([F.linear(*linear)], [gain], [shift], _of_layer(targets, layer))
            for layer, (*linear, gain, shift) in enumerate(zip(*groups, strict=True))
        ]
        return torch.cat(losses)
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    if dtype == torch.float16:  # where a mean's gradients are smaller than any number
        upstream = float(h.shape[0] * h.shape[1])
    with torch.autocast(kind, enabled=False):
        states = [x.to(dtype) for x in states]
        return _LinearAlignment.apply(targets, upstream or 1.0, layers, *states, *leaves[layers:])
