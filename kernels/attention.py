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
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.attention_kernels import (
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_norm_kernel,
    _attention_fwd_kernel,
    _rstd_kernel,
)
from distill.kernels.jit import operation, uses_triton
from distill.kernels.rmsnorm import rmsnorm

EPS = 1e-6  # of both norms
WIDEST_HEAD = 128  # of the kernels
LOG2E = math.log2(math.e)
HIDDEN = -1e30  # a score that counts for nothing, yet makes no NaN of a row without a scale
MAX_INDEX = 2**31 - 1


class Config(NamedTuple):
    """A program keeps `tile` rows and passes over all that they meet, `step` at a time.

    `max_registers` of a thread, where the assembler's own choice spills for some GPU.
    """

    tile: int
    step: int
    warps: int
    stages: int
    max_registers: int | None = None


LONG = 1024  # tokens of the longest sequence from which on large tiles fill up well enough
# By kernel, by the head's width in registers, and for "long" sequences or others. Chosen by padded
# work (at 411 tokens, tiles of 128 are a quarter more) and by what they compile to without spills;
# no GPU has timed them yet.
CONFIGS = {
    ("fwd", 64, "short"): Config(tile=64, step=64, warps=4, stages=3),
    ("fwd", 64, "long"): Config(tile=128, step=64, warps=8, stages=3),
    ("fwd", 128, "any"): Config(tile=64, step=32, warps=4, stages=2),
    ("dq", 64, "short"): Config(tile=64, step=32, warps=4, stages=2, max_registers=168),
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


class Packing(NamedTuple):
    """How sequences share the tokens of a batch, one behind the other.

    Sequence b is the tokens `cumulative[b]` up to `cumulative[b + 1]`, int32 on the device of the
    tokens; without it each of the `num_clips` has `longest` tokens. `num_tokens` None is unknown.
    """

    cumulative: Tensor | None
    num_clips: int
    longest: int
    num_tokens: int | None


def pack(cumulative: Tensor, *, device: torch.device, longest: int | None = None) -> Packing:
    """The packing of cumulative lengths int32 [B+1] from 0 on; a sequence may be empty.

    Without `longest` their values are read and checked, which waits for those on a GPU. With it
    no value is looked at: none may be beyond the tokens, and no sequence longer than it.
    Raises ValueError for what cannot be lengths.
    """
    if cumulative.dtype != torch.int32 or cumulative.ndim != 1 or not len(cumulative):
        raise ValueError(
            f"expected cumulative lengths int32 [B+1], got {cumulative.dtype} "
            f"{list(cumulative.shape)}"
        )
    on_device, num_clips = cumulative.to(device), len(cumulative) - 1
    if longest is not None:
        return Packing(on_device, num_clips, longest, None)
    ends = cumulative.tolist()
    if ends[0] or any(begin > end for begin, end in pairwise(ends)):
        raise ValueError(f"expected cumulative lengths that start at 0 and do not fall, got {ends}")
    longest = max((end - begin for begin, end in pairwise(ends)), default=0)
    return Packing(on_device, num_clips, longest, ends[-1])


def pack_evenly(num_clips: int, num_tokens: int) -> Packing:
    """The packing of `num_clips` sequences of `num_tokens` each."""
    if num_clips * num_tokens > MAX_INDEX:
        raise ValueError(f"{num_clips} clips of {num_tokens} tokens are more than {MAX_INDEX}")
    return Packing(None, num_clips, num_tokens, num_clips * num_tokens)


def attention_reference(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, packing: Packing, *, heads: int
) -> Tensor:
    """The formula above in plain torch: [T,D] in the dtype of qkv [T,3D].

    Reads the cumulative lengths where there are any, and so waits for a GPU.
    """
    if packing.cumulative is None:
        clips = rearrange(qkv, "(b m) c -> b m c", b=packing.num_clips, m=packing.longest)
        out = _attend(clips, q_gain, k_gain, heads=heads)
        return rearrange(out, "b m d -> (b m) d")
    lengths = packing.cumulative.diff().tolist() or [0]
    parts = [_attend(part[None], q_gain, k_gain, heads=heads)[0] for part in qkv.split(lengths)]
    return torch.cat(parts)


def _attend(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, *, heads: int) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    full = q_gain.dtype  # under autocast q and k are narrower than the gains
    q = F.rms_norm(q.to(full), q_gain.shape, q_gain, EPS).to(v.dtype)
    k = F.rms_norm(k.to(full), k_gain.shape, k_gain, EPS).to(v.dtype)
    q, k, v = (rearrange(z, "b m (h d) -> b h m d", h=heads) for z in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h m d -> b m (h d)")


def stock_attention(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, packing: Packing, *, heads: int
) -> Tensor:
    """`attention_reference` of an even packing with its norms by their kernel, where chosen.

    What a frozen model takes, with whichever of torch's attentions is the fastest for it.
    """
    if not uses_triton(qkv):
        return attention_reference(qkv, q_gain, k_gain, packing, heads=heads)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (rmsnorm(z, gain, dtype=v.dtype)[1] for z, gain in ((q, q_gain), (k, k_gain)))
    sizes = {"b": packing.num_clips, "h": heads}
    q, k, v = (rearrange(z, "(b m) (h d) -> b h m d", **sizes) for z in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h m d -> (b m) (h d)")


def _block(heads: int, width: int) -> int:
    """The head's width in registers; matrix instructions want 16 at least."""
    return max(16, 1 << (width // heads - 1).bit_length())


def _config(kernel: str, *, block: int, longest: int) -> Config:
    if block > 64:
        return CONFIGS[kernel, 128, "any"]
    return CONFIGS[kernel, 64, "long" if longest >= LONG else "short"]


def _launch(
    kernel: str, cumulative: Tensor | None, *, heads: int, width: int, clips: int, longest: int
) -> tuple[tuple[int, int], dict]:
    """Grid and constants of a launch by its row of CONFIGS."""
    block = _block(heads, width)
    config = _config(kernel, block=block, longest=longest)
    constants = {
        "EVEN": cumulative is None,
        "HEAD": width // heads,
        "BLOCK": block,
        "TILE": config.tile,
        "STEP": config.step,
        "LOG2E": LOG2E,
        "HIDDEN": HIDDEN,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }
    return (clips * -(-longest // config.tile), heads), constants


def _made_fwd(qkv: Tensor, q_gain: Tensor, *others, heads: int, **sizes) -> tuple[Tensor, ...]:
    num_tokens, width = len(qkv), len(q_gain)
    out = qkv.new_empty(num_tokens, width)
    lse = qkv.new_empty(heads, num_tokens, dtype=torch.float32)
    return out, lse, qkv.new_empty(2, num_tokens, dtype=torch.float32)


@operation(
    "(Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor? cumulative, *, int heads, SymInt clips, "
    "SymInt longest) -> (Tensor, Tensor, Tensor)",
    fake=_made_fwd,
)
def _attention_fwd(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cumulative: Tensor | None,
    *,
    heads: int,
    clips: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and lse and rstd as the kernels have them."""
    out, lse, rstd = _made_fwd(qkv, q_gain, heads=heads)
    num_tokens, width = out.shape
    block = 1 << (width - 1).bit_length()
    rows = max(1, RSTD_VALUES // block)
    scale = (width // heads) ** -0.5
    sizes = {"heads": heads, "width": width, "clips": clips, "longest": longest}
    grid, constants = _launch("fwd", cumulative, **sizes)
    ends = rstd if cumulative is None else cumulative
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        _rstd_kernel[(-(-num_tokens // rows), 2)](
            qkv, rstd, num_tokens, width, EPS, ROWS=rows, BLOCK=block, num_warps=RSTD_WARPS
        )
        inputs = (qkv, q_gain, k_gain, rstd, ends, out, lse)
        _attention_fwd_kernel[grid](*inputs, num_tokens, longest, width, scale, **constants)
    return out, lse, rstd


def _made_bwd(d_out: Tensor, qkv: Tensor, *gains_and_others: Tensor, **sizes) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (qkv, *gains_and_others[:2]))


@operation(
    "(Tensor d_out, Tensor qkv, Tensor q_gain, Tensor k_gain, Tensor out, Tensor lse, Tensor rstd, "
    "Tensor? cumulative, *, int heads, SymInt clips, SymInt longest) -> (Tensor, Tensor, Tensor)",
    fake=_made_bwd,
)
def _attention_bwd(
    d_out: Tensor,
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    out: Tensor,
    lse: Tensor,
    rstd: Tensor,
    cumulative: Tensor | None,
    *,
    heads: int,
    clips: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and the gains."""
    num_tokens, width = out.shape
    scale = (width // heads) ** -0.5
    d_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    sums = lse.new_empty(2, heads, num_tokens)
    span = max(NORM_ROWS, -(-num_tokens // NORM_PARTS))
    parts = -(-num_tokens // span)
    d_gain = lse.new_empty(2, parts, width)
    gains = (q_gain, k_gain)
    ends = rstd if cumulative is None else cumulative
    shape = {"heads": heads, "width": width, "clips": clips, "longest": longest}
    sizes = (num_tokens, longest, width)
    with torch.cuda.device_of(qkv):
        grid, constants = _launch("dq", cumulative, **shape)
        inputs = (qkv, *gains, rstd, ends, out, d_out, lse, delta, sums, d_qkv)
        _attention_bwd_dq_kernel[grid](*inputs, *sizes, scale, **constants)
        grid, constants = _launch("dkv", cumulative, **shape)
        inputs = (qkv, *gains, rstd, ends, d_out, lse, delta, sums, d_qkv)
        _attention_bwd_dkv_kernel[grid](*inputs, *sizes, heads, scale, **constants)
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
    def forward(ctx, qkv, q_gain, k_gain, cumulative, heads, clips, longest):
        ctx.sizes = {"heads": heads, "clips": clips, "longest": longest}
        out, lse, rstd = _attention_fwd(qkv, q_gain, k_gain, cumulative, **ctx.sizes)
        ctx.save_for_backward(qkv, q_gain, k_gain, out, lse, rstd, cumulative)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        gradients = _attention_bwd(d_out.contiguous(), *ctx.saved_tensors, **ctx.sizes)
        return *gradients, None, None, None, None


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
    num_tokens = len(qkv) if packing.num_tokens is None else packing.num_tokens
    if qkv.shape != (num_tokens, 3 * width):
        raise ValueError(
            f"expected qkv [{num_tokens},{3 * width}] as the packing and the gains, "
            f"got {list(qkv.shape)}"
        )
    is_half = qkv.dtype in (torch.bfloat16, torch.float16)
    if not (uses_triton(qkv) and is_half and width // heads <= WIDEST_HEAD):
        return attention_reference(qkv, q_gain, k_gain, packing, heads=heads)
    ends = packing.cumulative
    if ends is not None and ends.device != qkv.device:
        raise ValueError(f"the packing is on {ends.device}, qkv on {qkv.device}")
    if 3 * width * packing.longest > MAX_INDEX:
        raise ValueError(f"a sequence of {packing.longest} tokens is too long for width {width}")
    rows = [x.contiguous() for x in (qkv, q_gain, k_gain)]
    return _Attention.apply(*rows, ends, heads, packing.num_clips, packing.longest)
