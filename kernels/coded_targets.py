"""Teacher vectors from the codes that a cache keeps of them, out of their rotated frame.

For codes q of b bits (8, 4, 3 or 2) of clip n, layer k and token m, with a scale each, 2^b levels,
the layers' means and the inverse of the rotation that the codes were made in:

    t[n, k, m] = means[k] + scales[n, k, m] * flips * (left x right) levels[q[n, k, m]]

where left [P,P] times (Kronecker) right [Q,Q] is [E,E], both are symmetric, and flips is a factor
for every channel. Source: `distill/cache/codes.py`; the codes' bytes as in `codes.py`.

The kernel turns rows by tl.dot on the two factors, in half precision (levels and what is mixed are
of the size of 1), and is used where the vectors are wanted in half precision too. It is a step
of its own and no part of the loss: with both in one kernel a row's columns have to change hands
between matrix layout and memory order, and it compiles to over 200 registers for each of 256
threads, one block per multiprocessor, which waits for its own barriers.
"""

from __future__ import annotations  # see jit.py

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from distill.kernels.codes import BITS_OF, decode_codes, decode_codes_reference
from distill.kernels.jit import jit, operation, tl, uses_triton

SMALLEST_DOT = 16  # Triton's, of every axis
LARGEST_LEFT, LARGEST_RIGHT = 128, 32  # that rows are turned by in registers
TILE = 4096  # elements of the rows that are turned together, padded ones included
NUM_WARPS = 8
PROGRAMS = 2  # for each multiprocessor: each loads `left` once
MAX_REGISTERS = 128  # of a thread: two programs of 256 threads fit


class CodedTargets(NamedTuple):
    """The arguments of the formula."""

    codes: Tensor  # uint8 [B,K,M,ceil(E*b/8)]
    scales: Tensor  # float16 [B,K,M]
    levels: Tensor  # float32 [2^b]
    means: Tensor  # float32 [K,E]
    flips: Tensor  # float32 [E]
    left: Tensor  # float32 [P,P]
    right: Tensor  # float32 [Q,Q]

    @property
    def shape(self) -> tuple[int, ...]:
        """[K,B,M,E], as that of plain targets."""
        clips, layers, tokens = self.scales.shape
        return layers, clips, tokens, len(self.flips)

    def clips(self, part: slice) -> CodedTargets:
        """The same of some clips."""
        return self._replace(codes=self.codes[part], scales=self.scales[part])

    def rows(self, part: slice) -> CodedTargets:
        """The same of some tokens."""
        return self._replace(
            codes=self.codes[:, :, part].contiguous(), scales=self.scales[:, :, part].contiguous()
        )

    def layer(self, index: int) -> CodedTargets:
        """The same of one layer."""
        one = slice(index, index + 1)
        return self._replace(
            codes=self.codes[:, one], scales=self.scales[:, one], means=self.means[one]
        )


def decode_targets_reference(targets: CodedTargets, dtype: torch.dtype) -> Tensor:
    """The formula above in plain torch: [B,K,M,E], mixed in at least float32."""
    mixed = torch.promote_types(dtype, torch.float32)
    decode = decode_codes if uses_triton(targets.codes) else decode_codes_reference
    width = len(targets.flips)
    rows = decode(*targets[:3], width=width, dtype=torch.float32).to(mixed)
    rows = rearrange(rows, "b k m (p q) -> b k m p q", q=len(targets.right))
    with torch.autocast(rows.device.type, enabled=False):  # the loss is computed within it
        rows = targets.left.to(mixed) @ rows @ targets.right.to(mixed)
    rows = rearrange(rows, "b k m p q -> b k m (p q)") * targets.flips.to(mixed)
    return (rows + targets.means[:, None].to(mixed)).to(dtype)


@jit
def _decode_targets_fwd_kernel(
    codes,  # uint8 [R,row_bytes]
    scales,  # float16 [R]
    levels,  # float32 [2**BITS]
    means,  # float32 [K,width]
    flips,  # float32 [width]
    left,  # float32 [LEFT,LEFT]
    right,  # float32 [RIGHT,RIGHT]
    rows,  # [R,width], written
    num_rows,
    rows_per_clip,  # of one layer
    num_layers,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PADDED: tl.constexpr,  # RIGHT, up to what tl.dot takes
):
    # Sizes are constants, or every element's offsets would take registers for themselves.
    width: tl.constexpr = LEFT * RIGHT
    row_bytes: tl.constexpr = (width * BITS + 7) // 8
    i, j = tl.arange(0, LEFT), tl.arange(0, PADDED)
    mix_i = tl.load(left + i[:, None] * LEFT + i[None, :]).to(tl.float16)
    is_j = j < RIGHT
    at_j = right + j[:, None] * RIGHT + j[None, :]
    mix_j = tl.load(at_j, mask=is_j[:, None] & is_j[None, :], other=0.0).to(tl.float16)
    column = i[:, None] * RIGHT + j[None, :]  # [i,j]
    step = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, step):
        row = start + tl.arange(0, ROWS)
        is_row = row < num_rows
        mask = is_row[:, None, None] & is_j[None, None, :]  # [r,1,j]
        bit = column * BITS
        at = row.to(tl.int64)[:, None, None] * row_bytes + (bit // 8)[None, :, :]
        word = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
        if BITS == 3:  # the only codes that lie across two bytes
            goes_on = mask & (bit % 8 > 5)[None, :, :]
            word |= tl.load(codes + at + 1, mask=goes_on, other=0).to(tl.int32) << 8
        value = (word >> (bit % 8)[None, :, :]) & ((1 << BITS) - 1)
        q = tl.load(levels + value, mask=mask, other=0.0).to(tl.float16)  # [r,i,j]
        q = tl.reshape(q, [ROWS * LEFT, PADDED])
        q = tl.dot(q, mix_j).to(tl.float16)
        q = tl.permute(tl.reshape(q, [ROWS, LEFT, PADDED]), [0, 2, 1])
        q = tl.dot(tl.reshape(q, [ROWS * PADDED, LEFT]), mix_i)
        q = tl.permute(tl.reshape(q, [ROWS, PADDED, LEFT]), [0, 2, 1])
        scale = tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
        flip = tl.load(flips + column, mask=is_j[None, :], other=0.0)
        layer = row // rows_per_clip % num_layers
        mean_at = means + layer[:, None, None] * width + column[None, :, :]
        mean = tl.load(mean_at, mask=mask, other=0.0)
        found = mean + scale[:, None, None] * (flip[None, :, :] * q)
        out = rows + row.to(tl.int64)[:, None, None] * width + column[None, :, :]
        tl.store(out, found.to(rows.dtype.element_ty), mask=mask)


def _made_fwd(targets: Sequence[Tensor], *, dtype: torch.dtype, programs: int | None = None):
    layers, clips, tokens, width = CodedTargets(*targets).shape
    return targets[0].new_empty(clips, layers, tokens, width, dtype=dtype)


@operation("(Tensor[] targets, *, ScalarType dtype, int? programs=None) -> Tensor", fake=_made_fwd)
def _decode_targets_fwd(
    targets: Sequence[Tensor], *, dtype: torch.dtype, programs: int | None = None
) -> Tensor:
    """Vectors [B,K,M,E] of the fields of coded targets."""
    rows = _made_fwd(targets, dtype=dtype)
    codes, scales, levels, means, flips, left, right = (x.contiguous() for x in targets)
    _, layers, tokens, _ = rows.shape
    if programs is None:
        processors = torch.cuda.get_device_properties(codes.device).multi_processor_count
        programs = PROGRAMS * processors
    padded = max(SMALLEST_DOT, 1 << (len(right) - 1).bit_length())
    block_rows = max(1, TILE // (len(left) * padded))
    num_rows = scales.numel()
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _decode_targets_fwd_kernel[(max(1, min(programs, -(-num_rows // block_rows))),)](
            codes,
            scales,
            levels,
            means,
            flips,
            left,
            right,
            rows,
            num_rows,
            tokens,
            layers,
            BITS=BITS_OF[len(levels)],
            ROWS=block_rows,
            LEFT=len(left),
            RIGHT=len(right),
            PADDED=padded,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
            num_stages=1,  # more would keep codes in shared memory, and only one block at a time
        )
    return rows


def decode_targets(targets: CodedTargets, dtype: torch.dtype) -> Tensor:
    """Vectors [B,K,M,E] in `dtype`. Raises ValueError when the arguments do not fit each other."""
    left, right, width = len(targets.left), len(targets.right), len(targets.flips)
    if left * right != width:
        raise ValueError(f"expected factors of width {width}, got {left} and {right}")
    expected = (targets.codes.shape[1], width)
    if targets.means.shape != expected:
        raise ValueError(f"expected means {list(expected)}, got {list(targets.means.shape)}")
    is_power = left & (left - 1) == 0
    is_fit = is_power and SMALLEST_DOT <= left <= LARGEST_LEFT and right <= LARGEST_RIGHT
    if not uses_triton(targets.codes) or not is_fit or dtype.itemsize > 2:
        return decode_targets_reference(targets, dtype)
    return _decode_targets_fwd(list(targets), dtype=dtype)
