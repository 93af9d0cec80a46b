"""Attention with q and k normalised over the full width: every stock path beside our kernels.

All take packed qkv [T,3D] in bf16 and gains in float32 and return [T,D] and the gradients of all
three. Stock paths normalise in bf16 (eager) or by a compiled kernel with the layout changes fused
in, and leave attention to the backend named. Where sequences differ in length, dense paths pad
them, and only useful work counts.
"""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.case import (
    BOTH,
    FORWARD,
    Case,
    Contender,
    Goal,
    Inputs,
    by_torch,
    by_triton,
    compiled,
)
from benchmarks.kernels.measure import Work
from distill.kernels.attention import EPS, attention, attention_reference, pack, pack_evenly

STOCK = ("compile", "stock")
GOALS = (
    Goal("time", STOCK, 1.2, 1.4),
    Goal("time", ("flex",), 1.5, 2.0),
    Goal("time", ("eager",), 1.8, 2.5),
)
CHUNK = 2**27  # scores held in float64 at a time


class Shape(NamedTuple):
    lengths: tuple[int, ...]
    heads: int
    d: int

    @property
    def width(self) -> int:
        return self.heads * self.d

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1


def attention_work(shape: Shape) -> dict[str, Work]:
    """Two products forward and five backward of [m,m,D]; qkv, out and gradients once."""
    squares = sum(m * m for m in shape.lengths)
    forward = 4 * squares * shape.width
    row = 2 * shape.width  # bytes of one of q, k, v or out
    return {
        FORWARD: Work(forward, shape.tokens * row * 4),
        BOTH: Work(3.5 * forward, shape.tokens * row * (4 + 1 + 4 + 3)),
    }


def formula(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, heads: int) -> Tensor:
    """[B,M,D] of [B,M,3D], one operation at a time, as its definition says."""
    q, k, v = qkv.chunk(3, dim=-1)
    q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt() * q_gain
    k = k * (k.square().mean(-1, keepdim=True) + EPS).rsqrt() * k_gain
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def exact(shape: Shape, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients by the formula in float64, some sequences at a time."""
    qkv, *gains = inputs.arguments
    gains = [gain.detach().double().requires_grad_() for gain in gains]
    outs, d_qkvs = [], []
    d_gains = [torch.zeros_like(gain) for gain in gains]
    start = 0
    groups: list[list[int]] = []
    for m in shape.lengths:  # neighbours of one length together, as many as memory is meant for
        fits = groups and groups[-1][0] == m
        if fits and (len(groups[-1]) + 1) * m * m * shape.heads <= CHUNK:
            groups[-1].append(m)
        else:
            groups.append([m])
    for group in groups:
        rows = slice(start, start + sum(group))
        start = rows.stop
        x = qkv.detach()[rows].double().unflatten(0, (len(group), -1)).requires_grad_()
        out = formula(x, *gains, shape.heads)
        d_out = inputs.upstream[0][rows].double().unflatten(0, (len(group), -1))
        d_x, *d_parts = torch.autograd.grad(out, [x, *gains], d_out)
        outs.append(out.detach().flatten(0, 1).float())
        d_qkvs.append(d_x.flatten(0, 1).float())
        for total, part in zip(d_gains, d_parts, strict=True):
            total += part
    names = ("out", "d_qkv", "d_gq", "d_gk")
    return dict(zip(names, (torch.cat(outs), torch.cat(d_qkvs), *d_gains), strict=True))


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    stream = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=stream, device=device)

    qkv = draw(shape.tokens, 3 * shape.width).to(dtype).requires_grad_()
    gains = [(1 + 0.3 * draw(shape.width)).requires_grad_() for _ in range(2)]
    arguments = (qkv, *gains)
    return Inputs(arguments, arguments, (draw(shape.tokens, shape.width).to(dtype),))


@contextmanager
def only(backend: SDPBackend | None):
    """Scaled dot product attention by one backend, or by whichever torch takes."""
    if backend is None:
        yield
        return
    with sdpa_kernel([backend]):
        yield


def within(backend: SDPBackend | None, call: Callable) -> Callable:
    def run(*arguments):
        with only(backend):
            return call(*arguments)

    return run


def normed(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    width = q_gain.shape
    q = F.rms_norm(q, width, q_gain.to(q.dtype), EPS)
    k = F.rms_norm(k, width, k_gain.to(k.dtype), EPS)
    return q, k, v


def dense(shape: Shape, attend: Callable) -> Callable:
    """`attend` on [B,H,M,d], for sequences of one length."""
    clips = len(shape.lengths)

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        q, k, v = normed(qkv.unflatten(0, (clips, -1)), q_gain, k_gain)
        q, k, v = (x.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)

    return call


def padded(shape: Shape, device: torch.device) -> Callable:
    """Dense attention of sequences that are filled up to the longest, with the filling masked."""
    clips, longest = len(shape.lengths), max(shape.lengths)
    lengths = torch.tensor(shape.lengths, device=device)
    is_there = torch.arange(longest, device=device) < lengths[:, None]  # [B,M]
    place = is_there.flatten().nonzero()[:, 0]
    mask = is_there[:, None, None]  # of keys

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        rows = qkv.new_zeros(clips * longest, qkv.shape[1]).index_copy(0, place, qkv)
        q, k, v = normed(rows.unflatten(0, (clips, -1)), q_gain, k_gain)
        q, k, v = (x.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)[place]

    return call


def ends_of(shape: Shape, device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(shape.lengths)], dtype=torch.int32, device=device)


def one_by_one(shape: Shape) -> Callable:
    """Norms of all tokens together, then attention of a sequence at a time."""

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        found = []
        groups = (x.split(shape.lengths) for x in normed(qkv, q_gain, k_gain))
        for parts in zip(*groups, strict=True):
            q, k, v = (x.unflatten(-1, (shape.heads, -1)).transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(q, k, v)  # [1,H,m,d]
            found.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(found)

    return call


def varlen(shape: Shape, device: torch.device) -> Callable:
    from torch.nn.attention.varlen import varlen_attn  # torch before 2.10 has none

    ends = ends_of(shape, device)
    longest = max(shape.lengths)

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (shape.heads, -1)) for x in normed(qkv, q_gain, k_gain))
        return varlen_attn(q, k, v, ends, ends, longest, longest).flatten(1)

    return call


def flex(shape: Shape, device: torch.device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape.is_even:
        return dense(shape, flex_attention)
    index = torch.arange(len(shape.lengths), device=device)
    sequence = index.repeat_interleave(torch.tensor(shape.lengths, device=device))

    def is_same(b, h, i, j):
        return sequence[i] == sequence[j]

    size = shape.tokens
    mask = create_block_mask(is_same, None, None, size, size, device=device)

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (shape.heads, -1)) for x in normed(qkv, q_gain, k_gain))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1,H,T,d]
        out = flex_attention(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1).flatten(1)

    return call


def contenders(shape: Shape, device: torch.device, backend: str) -> list[Contender]:
    """`backend` is torch.compile's."""
    if shape.is_even:
        packing = pack_evenly(len(shape.lengths), shape.lengths[0])
    else:
        packing = pack(ends_of(shape, device), device=device)

    def ours(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        return attention(qkv, q_gain, k_gain, packing, heads=shape.heads)

    def reference(qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        return attention_reference(qkv, q_gain, k_gain, packing, heads=shape.heads)

    def by_compile(call: Callable, chosen: SDPBackend | None = None) -> Callable:
        return within(chosen, compiled(call, backend=backend))

    sdpa = dense(shape, F.scaled_dot_product_attention)
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    efficient = SDPBackend.EFFICIENT_ATTENTION
    found = [Contender("kernels", "ours", lambda: by_triton(ours))]
    if shape.is_even:
        eager = Contender("eager, bf16 norms, SDPA as torch chooses", "eager", lambda: sdpa)
        found = [
            eager,
            *found,
            Contender("compiled norms, SDPA Flash", "stock", lambda: by_compile(sdpa, flash)),
            Contender("compiled norms, SDPA cuDNN", "stock", lambda: by_compile(sdpa, cudnn)),
        ]
    else:
        loop = Contender("eager, a sequence at a time", "eager", lambda: one_by_one(shape))
        pad = padded(shape, device)
        found = [
            loop,
            *found,
            Contender("compiled norms, padded SDPA", "stock", lambda: by_compile(pad, efficient)),
        ]
    found += [
        Contender(
            "compiled norms, varlen_attn", "stock", lambda: by_compile(varlen(shape, device))
        ),
        Contender("compiled norms, FlexAttention", "flex", lambda: by_compile(flex(shape, device))),
        Contender("eager norms, varlen_attn", "stock", lambda: varlen(shape, device)),
    ]
    if shape.is_even:
        found += [
            Contender("eager norms, SDPA Flash", "stock", lambda: within(flash, sdpa)),
            Contender("eager norms, SDPA cuDNN", "stock", lambda: within(cudnn, sdpa)),
            Contender(
                "eager norms, SDPA memory-efficient", "stock", lambda: within(efficient, sdpa)
            ),
            Contender("eager, norms in float32", "eager", lambda: by_torch(reference)),
            Contender("torch.compile, SDPA as it chooses", "compile", lambda: by_compile(sdpa)),
        ]
    return found


def attention_case(
    name: str, title: str, shape: Shape, device: torch.device, *, backend: str, goals=GOALS
) -> Case:
    dtype = torch.bfloat16
    lengths = f"{len(shape.lengths)} x {shape.lengths[0]}"
    if not shape.is_even:
        lengths = (
            f"{len(shape.lengths)} sequences of {min(shape.lengths)} to {max(shape.lengths)}, "
            f"together {shape.tokens}"
        )
    return Case(
        name=name,
        title=title,
        shape=f"{lengths} tokens, {shape.heads} heads of {shape.d}",
        make_inputs=lambda seed: make_inputs(shape, device, dtype, seed),
        work=attention_work(shape),
        contenders=contenders(shape, device, backend),
        exact=lambda inputs: exact(shape, inputs),
        results=("out", "d_qkv", "d_gq", "d_gk"),
        goals=goals,
        note="FLOPs: 4 m^2 D of a sequence forward and 10 m^2 D backward, none for the norms.",
    )
