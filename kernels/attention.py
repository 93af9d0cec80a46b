"""Self-attention of packed sequences whose q and k are RMS-normalised over the full width.

For tokens i, j of one sequence, heads of d channels out of D, and gains gq and gk [D]:

    q^ = q / sqrt(mean over D of q^2 + eps) * gq, and k^ likewise with gk
    S_ij = <q^_i, k^_j> / sqrt(d) in each head, out_i = sum over j of softmax_j(S_ij) v_j

q, k and v are the thirds of a row of qkv [T,3D]; sequences lie one behind the other. Source: the
attention of InternVideo2's single-modality models (single_modality/models/internvideo2.py).

The norms span all heads, so a light pass takes r_q and r_k, the reciprocal roots above, of every
token. With them and the gains the scores are those of q and k as they lie in qkv,

    S_ij = r_q(i) r_k(j) <gq gk q_i, k_j> / sqrt(d),

and no normalised copy is ever written. Backward, with u_i the gradient at q^_i, the norm asks for
c_i = <u_i, q^_i> over the full width. That is the sum over heads and j of dS_ij S_ij, all of which
the kernel sees anyway: dq_i = r_q(i) gq u_i - q_i r_q(i)^2 c_i / D, and dk_j from the sums over i.
Every sum is taken in an order of its own and nothing is added atomically: equal input, equal bits.
"""

from __future__ import annotations  # see jit.py

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.jit import jit, tl, uses_triton

EPS = 1e-6  # of both norms
WIDEST_HEAD = 128  # of the kernels
LOG2E = math.log2(math.e)
HIDDEN = -1e30  # a score that counts for nothing, yet makes no NaN of a row without a scale
MAX_INDEX = 2**31 - 1


class Config(NamedTuple):
    """A program keeps `tile` rows and passes over all that they meet, `step` at a time."""

    tile: int
    step: int
    warps: int
    stages: int


TILES = (64, 128)  # sizes that a packing lists
LONG = 1024  # tokens of the longest sequence from which on large tiles fill up well enough
# By kernel, by the head's width in registers, and for "long" sequences or others. Chosen by padded
# work (at 411 tokens, tiles of 128 are a quarter more) and by what they compile to without spills;
# no GPU has timed them yet.
CONFIGS = {
    ("fwd", 64, "short"): Config(tile=64, step=64, warps=4, stages=3),
    ("fwd", 64, "long"): Config(tile=128, step=64, warps=8, stages=3),
    ("fwd", 128, "any"): Config(tile=64, step=32, warps=4, stages=2),
    ("dq", 64, "short"): Config(tile=64, step=32, warps=4, stages=2),
    ("dq", 64, "long"): Config(tile=128, step=32, warps=8, stages=2),
    ("dq", 128, "any"): Config(tile=64, step=32, warps=8, stages=2),
    ("dkv", 64, "short"): Config(tile=64, step=32, warps=4, stages=2),
    ("dkv", 64, "long"): Config(tile=128, step=32, warps=8, stages=2),
    ("dkv", 128, "any"): Config(tile=64, step=32, warps=8, stages=2),
}
RSTD_VALUES = 4096  # of a program
RSTD_WARPS = 4
NORM_ROWS, NORM_COLUMNS, NORM_WARPS = 16, 128, 4
NORM_PARTS = 256  # of the tokens, each of which sums its own gradient of the gains


@dataclass(frozen=True)
class Packing:
    """How sequences share the tokens of a batch: made once, used by every layer.

    Sequence b is the tokens `ends[b]` up to `ends[b + 1]`. `tiles` int32 [*,3] on the device, one
    for each size of TILES, names the first token of every tile and the ends of its sequence.
    """

    ends: tuple[int, ...]
    lengths: tuple[int, ...]
    tiles: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return self.ends[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


def pack(cumulative: Tensor, *, device: torch.device) -> Packing:
    """The packing of cumulative lengths int32 [B+1] from 0 on; a sequence may be empty.

    Lengths that are on a GPU are waited for. Raises ValueError for what cannot be lengths.
    """
    if cumulative.dtype != torch.int32 or cumulative.ndim != 1 or not len(cumulative):
        raise ValueError(
            f"expected cumulative lengths int32 [B+1], got {cumulative.dtype} "
            f"{list(cumulative.shape)}"
        )
    ends = tuple(cumulative.tolist())
    if ends[0] or any(begin > end for begin, end in pairwise(ends)):
        raise ValueError(
            f"expected cumulative lengths that start at 0 and do not fall, got {list(ends)}"
        )
    return _packing(ends, device=device)


@lru_cache(maxsize=64)
def pack_evenly(num_clips: int, num_tokens: int, *, device: torch.device) -> Packing:
    """The packing of `num_clips` sequences of `num_tokens` each, made at the first call only."""
    if num_clips * num_tokens > MAX_INDEX:
        raise ValueError(f"{num_clips} clips of {num_tokens} tokens are more than {MAX_INDEX}")
    return _packing(tuple(clip * num_tokens for clip in range(num_clips + 1)), device=device)


def _packing(ends: tuple[int, ...], *, device: torch.device) -> Packing:
    lists = [
        [(first, begin, end) for begin, end in pairwise(ends) for first in range(begin, end, size)]
        for size in TILES
    ]
    with torch.inference_mode(False):  # a training step may reuse them
        tiles = tuple(
            torch.tensor(rows, dtype=torch.int32).view(-1, 3).to(device) for rows in lists
        )
    return Packing(ends, tuple(end - begin for begin, end in pairwise(ends)), tiles)


def attention_reference(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, packing: Packing, *, heads: int
) -> Tensor:
    """The formula above in plain torch: [T,D] in the dtype of qkv [T,3D]."""
    lengths = packing.lengths or (0,)
    if len(set(lengths)) == 1:
        clips = rearrange(qkv, "(b m) c -> b m c", b=len(lengths))
        out = _attend(clips, q_gain, k_gain, heads=heads)
        return rearrange(out, "b m d -> (b m) d")
    parts = [_attend(part[None], q_gain, k_gain, heads=heads)[0] for part in qkv.split(lengths)]
    return torch.cat(parts)


def _attend(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, *, heads: int) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    full = q_gain.dtype  # under autocast q and k are narrower than the gains
    q = F.rms_norm(q.to(full), q_gain.shape, q_gain, EPS).to(v.dtype)
    k = F.rms_norm(k.to(full), k_gain.shape, k_gain, EPS).to(v.dtype)
    q, k, v = (rearrange(z, "b m (h d) -> b h m d", h=heads) for z in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h m d -> b m (h d)")


@jit
def _rstd_kernel(
    qkv,  # [T,3*width]
    rstd,  # float32 [2,T], written: of q, of k
    num_tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [r]
    column = tl.arange(0, BLOCK)  # [c]
    is_row = row < num_tokens
    at = row[:, None] * (3 * width) + (part * width + column)[None, :]
    is_inside = is_row[:, None] & (column < width)[None, :]
    x = tl.load(qkv + at, mask=is_inside, other=0.0).to(tl.float32)
    found = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(rstd + part.to(tl.int64) * num_tokens + row, found, mask=is_row)


@jit
def _attention_fwd_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    tiles,  # int32 [*,3]: first token, begin and end of its sequence
    out,  # [T,width], written
    lse,  # float32 [heads,T], written: log2 of the sum of exp(S_ij) over j
    num_tokens,
    width,
    scale,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    length = end - begin
    head = tl.program_id(1)
    place = tl.arange(0, BLOCK)  # [d]
    is_place = place < HEAD
    column = head * HEAD + place
    row = first.to(tl.int64) + tl.arange(0, TILE)  # [m]
    is_row = row < end
    ahead = tl.arange(0, STEP)  # [n]
    at_ahead = ahead[:, None] * (3 * width) + column[None, :]

    gain = tl.load(q_gain + column, mask=is_place, other=0.0).to(tl.float32)
    gain *= tl.load(k_gain + column, mask=is_place, other=0.0).to(tl.float32)
    at = row[:, None] * (3 * width) + column[None, :]
    is_inside = is_row[:, None] & is_place[None, :]
    q = tl.load(qkv + at, mask=is_inside, other=0.0)
    q = (q.to(tl.float32) * gain[None, :]).to(q.dtype)
    # Powers of two from here on. It is positive, so it may wait until after the maximum.
    rise = tl.load(rstd + row, mask=is_row, other=0.0) * (scale * LOG2E)

    top = tl.full([TILE], HIDDEN, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        is_key = ahead < length - past
        is_pair = is_key[:, None] & is_place[None, :]
        start = begin.to(tl.int64) + past
        base = qkv + start * (3 * width) + width
        k = tl.load(base + at_ahead, mask=is_pair, other=0.0)
        v = tl.load(base + width + at_ahead, mask=is_pair, other=0.0)
        reach = tl.load(rstd + num_tokens + start + ahead, mask=is_key, other=0.0)
        hide = tl.where(is_key, 0.0, HIDDEN)  # finite: no NaN where a row is not one
        s = tl.dot(q, tl.trans(k))
        s = s * reach[None, :] + hide[None, :]  # [m,n]
        peak = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s * rise[:, None] - (peak * rise)[:, None])
        fade = tl.exp2((top - peak) * rise)
        total = total * fade + tl.sum(p, 1)
        mixed = mixed * fade[:, None]
        mixed = tl.dot(p.to(v.dtype), v, acc=mixed)
        top = peak

    mixed = mixed / total[:, None]
    at = row[:, None] * width + column[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=is_inside)
    at = head.to(tl.int64) * num_tokens + row
    tl.store(lse + at, top * rise + tl.log2(total), mask=is_row)


@jit
def _attention_bwd_dq_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    tiles,  # int32 [*,3]
    out,  # [T,width]
    d_out,  # [T,width]
    lse,  # float32 [heads,T]
    delta,  # float32 [heads,T], written: <d_out_i, out_i> of the head
    sums,  # float32 [2,heads,T], the first half written: sum over j of dS_ij S_ij
    d_qkv,  # [T,3*width], the first third written: r_q g_i / gk, for the last kernel to finish
    num_tokens,
    width,
    scale,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    length = end - begin
    head = tl.program_id(1)
    place = tl.arange(0, BLOCK)  # [d]
    is_place = place < HEAD
    column = head * HEAD + place
    row = first.to(tl.int64) + tl.arange(0, TILE)  # [m]
    is_row = row < end
    ahead = tl.arange(0, STEP)  # [n]
    at_ahead = ahead[:, None] * (3 * width) + column[None, :]
    at_head = head.to(tl.int64) * num_tokens + row

    gain = tl.load(q_gain + column, mask=is_place, other=0.0).to(tl.float32)
    gain *= tl.load(k_gain + column, mask=is_place, other=0.0).to(tl.float32)
    is_inside = is_row[:, None] & is_place[None, :]
    at = row[:, None] * width + column[None, :]
    do = tl.load(d_out + at, mask=is_inside, other=0.0)
    o = tl.load(out + at, mask=is_inside, other=0.0)
    dot = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at_head, dot, mask=is_row)
    at = row[:, None] * (3 * width) + column[None, :]
    q = tl.load(qkv + at, mask=is_inside, other=0.0)
    q = (q.to(tl.float32) * gain[None, :]).to(q.dtype)
    steep = tl.load(rstd + row, mask=is_row, other=0.0) * scale
    rise = steep * LOG2E
    level = tl.load(lse + at_head, mask=is_row, other=0.0)

    along = tl.zeros([TILE], tl.float32)
    dq = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        is_key = ahead < length - past
        is_pair = is_key[:, None] & is_place[None, :]
        start = begin.to(tl.int64) + past
        base = qkv + start * (3 * width) + width
        k = tl.load(base + at_ahead, mask=is_pair, other=0.0)
        v = tl.load(base + width + at_ahead, mask=is_pair, other=0.0)
        reach = tl.load(rstd + num_tokens + start + ahead, mask=is_key, other=0.0)
        hide = tl.where(is_key, 0.0, HIDDEN)
        s = tl.dot(q, tl.trans(k))
        s = s * reach[None, :] + hide[None, :]  # [m,n]
        p = tl.exp2(s * rise[:, None] - level[:, None])
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - dot[:, None])
        along += tl.sum(ds * s, 1)
        dq = tl.dot((ds * reach[None, :]).to(k.dtype), k, acc=dq)

    tl.store(sums + at_head, along * steep, mask=is_row)
    dq = dq * steep[:, None]
    tl.store(d_qkv + at, dq.to(d_qkv.dtype.element_ty), mask=is_inside)


@jit
def _attention_bwd_dkv_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    tiles,  # int32 [*,3]
    d_out,  # [T,width]
    lse,  # float32 [heads,T]
    delta,  # float32 [heads,T]
    sums,  # float32 [2,heads,T], the second half written: sum over i of dS_ij S_ij
    d_qkv,  # [T,3*width], last third written, and the second as the first by the kernel before
    num_tokens,
    width,
    heads,
    scale,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    length = end - begin
    head = tl.program_id(1)
    place = tl.arange(0, BLOCK)  # [d]
    is_place = place < HEAD
    column = head * HEAD + place
    row = first.to(tl.int64) + tl.arange(0, TILE)  # [n], of keys
    is_row = row < end
    ahead = tl.arange(0, STEP)  # [m]
    at_ahead = ahead[:, None] * (3 * width) + column[None, :]
    at_ahead_out = ahead[:, None] * width + column[None, :]

    gain = tl.load(q_gain + column, mask=is_place, other=0.0).to(tl.float32)
    gain *= tl.load(k_gain + column, mask=is_place, other=0.0).to(tl.float32)
    is_inside = is_row[:, None] & is_place[None, :]
    at = row[:, None] * (3 * width) + (width + column)[None, :]
    k = tl.load(qkv + at, mask=is_inside, other=0.0)
    v = tl.load(qkv + at + width, mask=is_inside, other=0.0)
    k = (k.to(tl.float32) * gain[None, :]).to(k.dtype)
    reach = tl.load(rstd + num_tokens + row, mask=is_row, other=0.0)
    rise = reach * LOG2E

    along = tl.zeros([TILE], tl.float32)
    dk = tl.zeros([TILE, BLOCK], tl.float32)
    dv = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        is_query = ahead < length - past
        is_pair = is_query[:, None] & is_place[None, :]
        start = begin.to(tl.int64) + past
        base = start * width
        q = tl.load(qkv + 3 * base + at_ahead, mask=is_pair, other=0.0)
        do = tl.load(d_out + base + at_ahead_out, mask=is_pair, other=0.0)
        base = head.to(tl.int64) * num_tokens + start
        level = tl.load(lse + base + ahead, mask=is_query, other=0.0)
        dot = tl.load(delta + base + ahead, mask=is_query, other=0.0)
        steep = tl.load(rstd + start + ahead, mask=is_query, other=0.0) * scale
        s = tl.dot(k, tl.trans(q)) * steep[None, :]  # [n,m]
        p = tl.exp2(s * rise[:, None] - level[None, :])
        dv = tl.dot(p.to(do.dtype), do, acc=dv)  # behind the end p is 1, but do and ds are 0
        dp = tl.dot(v, tl.trans(do))
        ds = p * (dp - dot[None, :])
        along += tl.sum(ds * s, 1)
        dk = tl.dot((ds * steep[None, :]).to(q.dtype), q, acc=dk)

    at_head = (heads + head).to(tl.int64) * num_tokens + row
    tl.store(sums + at_head, along * reach, mask=is_row)
    dk = dk * reach[:, None]
    tl.store(d_qkv + at, dk.to(d_qkv.dtype.element_ty), mask=is_inside)
    tl.store(d_qkv + at + width, dv.to(d_qkv.dtype.element_ty), mask=is_inside)


@jit
def _attention_bwd_norm_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    sums,  # float32 [2,heads,T]
    d_qkv,  # [T,3*width], its first two thirds finished in place
    d_gain,  # float32 [2,parts,width], written: of gq but for the factor gk, of gk but for gq
    num_tokens,
    width,
    heads,
    span,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, third = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [c]
    is_column = column < width
    gain = tl.load(q_gain + column, mask=is_column, other=0.0).to(tl.float32)
    gain *= tl.load(k_gain + column, mask=is_column, other=0.0).to(tl.float32)
    head = tl.arange(0, HEADS)  # [h]
    is_head = head < heads
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, num_tokens)
    found = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)  # [r]
        is_row = row < end
        at = (third * heads + head)[:, None] * num_tokens + row[None, :]
        along = tl.load(sums + at, mask=is_head[:, None] & is_row[None, :], other=0.0)  # [h,r]
        r = tl.load(rstd + third * num_tokens + row, mask=is_row, other=0.0)
        pull = r * r * tl.sum(along, 0) / width
        at = row[:, None] * (3 * width) + (third * width + column)[None, :]
        is_inside = is_row[:, None] & is_column[None, :]
        x = tl.load(qkv + at, mask=is_inside, other=0.0).to(tl.float32)
        d = tl.load(d_qkv + at, mask=is_inside, other=0.0).to(tl.float32)
        found += tl.sum(d * x, 0)
        d = d * gain[None, :] - x * pull[:, None]
        tl.store(d_qkv + at, d.to(d_qkv.dtype.element_ty), mask=is_inside)
    at = (third * tl.num_programs(0) + part) * width + column
    tl.store(d_gain + at, found, mask=is_column)


def _block(heads: int, width: int) -> int:
    """The head's width in registers; matrix instructions want 16 at least."""
    return max(16, 1 << (width // heads - 1).bit_length())


def _config(kernel: str, *, block: int, longest: int) -> Config:
    if block > 64:
        return CONFIGS[kernel, 128, "any"]
    return CONFIGS[kernel, 64, "long" if longest >= LONG else "short"]


def _launch(
    kernel: str, tiles: Sequence[Tensor], *, heads: int, width: int, longest: int
) -> tuple[tuple[int, int], Tensor, dict]:
    """Grid, tiles and constants of a launch by its row of CONFIGS."""
    block = _block(heads, width)
    config = _config(kernel, block=block, longest=longest)
    chosen = tiles[TILES.index(config.tile)]
    constants = {
        "HEAD": width // heads,
        "BLOCK": block,
        "TILE": config.tile,
        "STEP": config.step,
        "LOG2E": LOG2E,
        "HIDDEN": HIDDEN,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    return (len(chosen), heads), chosen, constants


def _attention_fwd(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    tiles: Sequence[Tensor],
    *,
    heads: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, width = len(qkv), len(q_gain)
    out = qkv.new_empty(num_tokens, width)
    lse = qkv.new_empty(heads, num_tokens, dtype=torch.float32)
    rstd = qkv.new_empty(2, num_tokens, dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    rows = max(1, RSTD_VALUES // block)
    grid, chosen, constants = _launch("fwd", tiles, heads=heads, width=width, longest=longest)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        _rstd_kernel[(-(-num_tokens // rows), 2)](
            qkv, rstd, num_tokens, width, EPS, ROWS=rows, BLOCK=block, num_warps=RSTD_WARPS
        )
        scale = (width // heads) ** -0.5
        _attention_fwd_kernel[grid](
            qkv, q_gain, k_gain, rstd, chosen, out, lse, num_tokens, width, scale, **constants
        )
    return out, lse, rstd


def _attention_bwd(
    d_out: Tensor,
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    out: Tensor,
    lse: Tensor,
    rstd: Tensor,
    tiles: Sequence[Tensor],
    *,
    heads: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, width = out.shape
    scale = (width // heads) ** -0.5
    d_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    sums = lse.new_empty(2, heads, num_tokens)
    span = max(NORM_ROWS, -(-num_tokens // NORM_PARTS))
    parts = -(-num_tokens // span)
    d_gain = lse.new_empty(2, parts, width)
    gains = (q_gain, k_gain)
    with torch.cuda.device_of(qkv):
        grid, chosen, constants = _launch("dq", tiles, heads=heads, width=width, longest=longest)
        inputs = (qkv, *gains, rstd, chosen, out, d_out, lse, delta, sums, d_qkv)
        _attention_bwd_dq_kernel[grid](*inputs, num_tokens, width, scale, **constants)
        grid, chosen, constants = _launch("dkv", tiles, heads=heads, width=width, longest=longest)
        inputs = (qkv, *gains, rstd, chosen, d_out, lse, delta, sums, d_qkv)
        _attention_bwd_dkv_kernel[grid](*inputs, num_tokens, width, heads, scale, **constants)
        _attention_bwd_norm_kernel[(parts, -(-width // NORM_COLUMNS), 2)](
            *(qkv, *gains, rstd, sums, d_qkv, d_gain, num_tokens, width, heads, span),
            HEADS=1 << (heads - 1).bit_length(),
            ROWS=NORM_ROWS,
            COLUMNS=NORM_COLUMNS,
            num_warps=NORM_WARPS,
        )
    of_q, of_k = d_gain.sum(1)
    return d_qkv, (of_q * k_gain).to(q_gain.dtype), (of_k * q_gain).to(k_gain.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_gain, k_gain, tiles, heads, longest):
        out, lse, rstd = _attention_fwd(qkv, q_gain, k_gain, tiles, heads=heads, longest=longest)
        ctx.save_for_backward(qkv, q_gain, k_gain, out, lse, rstd)
        ctx.tiles, ctx.heads, ctx.longest = tiles, heads, longest
        return out

    @staticmethod
    def backward(ctx, d_out):
        d_qkv, d_q_gain, d_k_gain = _attention_bwd(
            d_out.contiguous(), *ctx.saved_tensors, ctx.tiles, heads=ctx.heads, longest=ctx.longest
        )
        return d_qkv, d_q_gain, d_k_gain, None, None, None


def attention(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, packing: Packing, *, heads: int
) -> Tensor:
    """Attention [T,D] of packed qkv [T,3D], normalised with gains [D], in the dtype of qkv.

    By kernels, where they are chosen, in bfloat16 and float16, with sums, norms and softmax in
    float32; wider types and heads of more than WIDEST_HEAD channels take the reference there too.
    Raises ValueError when the arguments do not fit each other.
    """
    width = len(q_gain)
    if q_gain.shape != (width,) or k_gain.shape != (width,) or not heads or width % heads:
        raise ValueError(
            f"expected gains [D] with a D that {heads} heads divide, got {list(q_gain.shape)} and "
            f"{list(k_gain.shape)}"
        )
    if qkv.shape != (packing.num_tokens, 3 * width):
        raise ValueError(
            f"expected qkv [{packing.num_tokens},{3 * width}] as the packing and the gains, "
            f"got {list(qkv.shape)}"
        )
    is_half = qkv.dtype in (torch.bfloat16, torch.float16)
    if not (uses_triton(qkv) and is_half and width // heads <= WIDEST_HEAD):
        return attention_reference(qkv, q_gain, k_gain, packing, heads=heads)
    if packing.tiles[0].device != qkv.device:
        raise ValueError(f"the packing is on {packing.tiles[0].device}, qkv on {qkv.device}")
    if 3 * width * packing.longest > MAX_INDEX:
        raise ValueError(f"a sequence of {packing.longest} tokens is too long for width {width}")
    return _Attention.apply(
        qkv.contiguous(),
        q_gain.contiguous(),
        k_gain.contiguous(),
        packing.tiles,
        heads,
        packing.longest,
    )
