"""Feature alignment: how far a student's projections point away from a frozen teacher's.

For each of K layers, with raw projections x [B,M,E], gain g and bias b [E] of that layer and
teacher vectors t [B,M,E] that are close to unit length:

    z = LayerNorm(x; g, b, eps 1e-5)
    loss = mean over B and M of 2 - 2 <z / |z|, t>

This equals |z / |z| - t|^2 where t is of unit length, and stays linear in t where it is a code.
Gradients are made with the losses, while x and t are in registers: each is read once, and what is
left for the backward pass is to scale them, by 1 where it was known beforehand. Coded targets are
decoded a few clips at a time (see `coded_targets.py`), as many as a GPU's cache holds.
Source: InternVideo2's distillation loss (single_modality/engines/engine_for_distill.py).
"""

from __future__ import annotations  # see jit.py

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.coded_targets import CodedTargets, decode_targets, decode_targets_reference
from distill.kernels.jit import jit, operation, tl, uses_triton

EPS = 1e-5  # of the decoders' LayerNorm
TINY = 1e-12  # the least length that is divided by, as in F.normalize
TILE = 4096  # elements of the rows that a program holds at a time
MOST_ROWS = 64  # of them, where rows are short
WIDEST = 8192  # a row has to fit into registers; there is no wider teacher
NUM_STAGES = 2  # of loads under way
PROGRAMS = 2  # for each multiprocessor
MAX_REGISTERS = 128  # of a thread: two programs of 256 threads fit
DECODED_BYTES = 32 * 2**20  # of targets at a time: an H100's cache of 50 MB holds them
SCALE_BLOCK = 4096


def alignment_reference(
    raw: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Tensor | CodedTargets,
) -> Tensor:
    """The formula above in plain torch, one layer after another: [K] in at least float32."""
    losses = []
    for layer, (x, gain, shift) in enumerate(zip(raw, weight, bias, strict=True)):
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(targets, CodedTargets):
            target = decode_targets_reference(targets.layer(layer), dtype)[:, 0]
        else:
            target = targets[layer].to(dtype)
        x, gain, shift = x.to(dtype), gain.to(dtype), shift.to(dtype)
        student = F.normalize(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), dim=-1)
        losses.append(2 - 2 * (student * target).sum(dim=-1).mean())
    return torch.stack(losses)


@jit
def _alignment_fwd_kernel(
    raw,  # K pointers, [R,width] each
    gains,  # K pointers, [width] each
    biases,  # K pointers, [width] each
    targets,  # [K,B,M,width] by its strides
    gradients,  # [K,R,width] by its stride, written
    gain_parts,  # float32 [K,programs,width], added to
    bias_parts,  # float32 [K,programs,width], added to
    cosines,  # float32 [K,programs], added to
    num_rows,
    rows_per_clip,
    width,
    layer_stride,  # of targets
    clip_stride,
    row_stride,
    gradient_stride,  # of layers
    factor,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    LAYERS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, layer = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    x_of, gain_of, bias_of = raw[0], gains[0], biases[0]
    for other in tl.static_range(1, LAYERS):
        if layer == other:
            x_of, gain_of, bias_of = raw[other], gains[other], biases[other]
    targets += layer.to(tl.int64) * layer_stride

    column = tl.arange(0, BLOCK)
    is_column = column < width
    gain = tl.load(gain_of + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_of + column, mask=is_column, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    cosine_sum = tl.zeros([ROWS], tl.float32)
    for start in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & is_column[None, :]  # [r,e]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_of + at, mask=mask, other=0.0).to(tl.float32)
        target_at = (row // rows_per_clip).to(tl.int64) * clip_stride
        target_at += (row % rows_per_clip).to(tl.int64) * row_stride
        t = tl.load(targets + target_at[:, None] + column[None, :], mask=mask, other=0.0)
        t = t.to(tl.float32)

        mean = tl.sum(x, axis=1) / width
        centred = tl.where(is_column[None, :], x - mean[:, None], 0.0)
        rate = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + EPS)
        unit = centred * rate[:, None]
        z = unit * gain[None, :] + bias[None, :]
        inverse = 1 / tl.maximum(tl.sqrt(tl.sum(z * z, axis=1)), TINY)
        cosine = tl.sum(z * t, axis=1) * inverse
        cosine_sum += cosine  # rows that are not there have t = 0
        if GRADIENT:
            dz = (t - (cosine * inverse)[:, None] * z) * (factor * inverse)[:, None]
            gain_sum += tl.sum(dz * unit, axis=0)
            bias_sum += tl.sum(dz, axis=0)
            dunit = dz * gain[None, :]
            shift = tl.sum(dunit, axis=1) / width
            along = tl.sum(dunit * unit, axis=1) / width
            dx = (dunit - shift[:, None] - along[:, None] * unit) * rate[:, None]
            written = gradients + layer.to(tl.int64) * gradient_stride + at
            tl.store(written, dx.to(gradients.dtype.element_ty), mask=mask)

    part = layer * programs + program
    tl.store(cosines + part, tl.load(cosines + part) + tl.sum(cosine_sum, axis=0))
    if GRADIENT:
        part_at = part.to(tl.int64) * width + column
        before = tl.load(gain_parts + part_at, mask=is_column, other=0.0)
        tl.store(gain_parts + part_at, before + gain_sum, mask=is_column)
        before = tl.load(bias_parts + part_at, mask=is_column, other=0.0)
        tl.store(bias_parts + part_at, before + bias_sum, mask=is_column)


@jit
def _alignment_bwd_kernel(
    gradients,  # [K,size], scaled in place
    ratio,  # float32 [K]
    size,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    by = tl.load(ratio + layer)
    if by != 1.0:  # else nothing is read or written
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        value = tl.load(gradients + layer * size + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(gradients + layer * size + at, (value * by).to(gradients.dtype.element_ty), mask)


def num_warps(block: int) -> int:
    """Of a program for rows of at most `block` elements."""
    return 8 if block < TILE else 16


def _made_fwd(raw: Sequence[Tensor], *others, upstream: float | None, **settings) -> list[Tensor]:
    losses = raw[0].new_empty(len(raw), dtype=torch.float32)
    if upstream is None:
        return [losses]
    gradients = raw[0].new_empty(len(raw), *raw[0].shape)
    vectors = [losses.new_empty(len(raw), raw[0].shape[-1]) for _ in range(2)]
    return [losses, gradients, *vectors]


@operation(
    "(Tensor[] raw, Tensor[] weight, Tensor[] bias, Tensor[] targets, *, float? upstream, "
    "int? programs=None) -> Tensor[]",
    fake=_made_fwd,
)
def _alignment_fwd(
    raw: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    upstream: float | None,
    programs: int | None = None,
) -> list[Tensor]:
    """Losses [K] and, for an upstream gradient, gradients [K,B,M,E], [K,E] and [K,E].

    `targets` are the fields of coded targets, which are decoded to float16 for projections in half
    precision, or one tensor.
    """
    targets = CodedTargets(*targets) if len(targets) > 1 else targets[0]
    layers, (clips, tokens, width) = len(raw), raw[0].shape
    on = {"device": raw[0].device, "dtype": torch.float32}
    if programs is None:
        processors = torch.cuda.get_device_properties(raw[0].device).multi_processor_count
        programs = PROGRAMS * processors
    block = 1 << (width - 1).bit_length()
    rows = min(MOST_ROWS, max(1, TILE // block))
    num_parts = max(1, min(programs // layers, -(-clips * tokens // rows)))
    cosines = torch.zeros(layers, num_parts, **on)
    gradients = gain_parts = bias_parts = None
    if upstream is not None:
        gradients = torch.empty(layers, *raw[0].shape, dtype=raw[0].dtype, device=raw[0].device)
        gain_parts = torch.zeros(layers, num_parts, width, **on)
        bias_parts = torch.zeros(layers, num_parts, width, **on)
    raw, weight, bias = ([x.contiguous() for x in group] for group in (raw, weight, bias))
    is_coded = isinstance(targets, CodedTargets)
    dtype = torch.float32 if raw[0].dtype == torch.float32 else torch.float16
    clip_bytes = layers * tokens * width * dtype.itemsize
    step = max(1, DECODED_BYTES // clip_bytes) if is_coded else clips
    for start in range(0, clips, step):
        part = slice(start, min(start + step, clips))
        if is_coded:
            found = rearrange(decode_targets(targets.clips(part), dtype), "b k m e -> k b m e")
        else:
            found = targets if targets.stride(3) == 1 else targets.contiguous()
        written = None if gradients is None else gradients[:, part]
        with torch.cuda.device_of(raw[0]):  # Triton launches on the current device
            _alignment_fwd_kernel[(num_parts, layers)](
                tuple(x[part] for x in raw),
                tuple(weight),
                tuple(bias),
                found,
                written,
                gain_parts,
                bias_parts,
                cosines,
                (part.stop - start) * tokens,
                tokens,
                width,
                *found.stride()[:3],
                clips * tokens * width,
                0.0 if upstream is None else -2 * upstream / (clips * tokens),
                EPS=EPS,
                TINY=TINY,
                LAYERS=layers,
                GRADIENT=upstream is not None,
                ROWS=rows,
                BLOCK=block,
                STAGES=NUM_STAGES,
                num_warps=num_warps(block),
                maxnreg=MAX_REGISTERS,
            )
    losses = 2 - 2 * cosines.sum(dim=1) / (clips * tokens)
    if upstream is None:
        return [losses]
    return [losses, gradients, gain_parts.sum(dim=1), bias_parts.sum(dim=1)]


@operation("(Tensor(a!) gradients, Tensor ratio) -> ()", fake=lambda gradients, ratio: None)
def _alignment_bwd(gradients: Tensor, ratio: Tensor) -> None:
    """Scale each layer's gradients in place, by a ratio that may be 1."""
    size = gradients[0].numel()
    with torch.cuda.device_of(gradients):
        _alignment_bwd_kernel[(-(-size // SCALE_BLOCK), len(gradients))](
            gradients, ratio, size, BLOCK=SCALE_BLOCK
        )


def upstream_ratio(upstream: Tensor, expected: float) -> Tensor:
    """By what gradients [K] made for `expected` are scaled: 1 where only rounding is between."""
    ratio = upstream / expected
    return torch.where((ratio - 1).abs() < 4 * torch.finfo(ratio.dtype).eps, 1.0, ratio)


def fields(targets: Tensor | CodedTargets) -> list[Tensor]:
    """Targets as operations take them."""
    return list(targets) if isinstance(targets, CodedTargets) else [targets]


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, upstream, layers, *parameters):
        groups = [parameters[i * layers : (i + 1) * layers] for i in range(3)]
        losses, *gradients = _alignment_fwd(*groups, fields(targets), upstream=upstream)
        ctx.upstream, ctx.is_scaled = upstream, False
        ctx.dtypes = [x.dtype for x in parameters[layers:]]
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.is_scaled:
            raise RuntimeError("alignment: its gradients are handed out once; run forward again")
        ctx.is_scaled = True
        gradients, gain, bias = ctx.saved_tensors
        ratio = upstream_ratio(upstream, ctx.upstream)
        _alignment_bwd(gradients, ratio)
        vectors = [*(gain * ratio[:, None]), *(bias * ratio[:, None])]
        cast = [x.to(dtype) for x, dtype in zip(vectors, ctx.dtypes, strict=True)]
        return None, None, None, *gradients, *cast


def alignment(
    raw: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    targets: Tensor | CodedTargets,
    *,
    upstream: float = 1.0,
) -> Tensor:
    """Loss of every layer, [K]: `raw` is K tensors [B,M,E], `targets` is [K,B,M,E] or codes.

    `weight` and `bias` are K vectors [E]. Accumulates in float32, or in float64 for float64
    input. `upstream` is what the losses' gradient is expected to be: the kernels make it with
    the losses, and another one costs a pass over the gradients, which are handed out once.
    Raises ValueError when the shapes do not fit.
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
        if x.dtype != raw[0].dtype:
            raise ValueError(f"layer {layer}: expected {raw[0].dtype} as layer 0, got {x.dtype}")
    x = raw[0]
    if not uses_triton(x) or x.dtype == torch.float64 or x.shape[-1] > WIDEST or x.numel() == 0:
        return alignment_reference(raw, weight, bias, targets)
    leaves = (*raw, *weight, *bias)
    if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        return _alignment_fwd(raw, weight, bias, fields(targets), upstream=None)[0]
    if x.dtype == torch.float16:  # where a mean's gradients are smaller than any number
        upstream = float(x.shape[0] * x.shape[1])
    return _Alignment.apply(targets, upstream or 1.0, len(raw), *leaves)
