"""Decoding: packed codes of rows, with a scale each, to the rows that they stand for.

For codes q of b bits (8, 4, 3 or 2), a scale s a row and 2^b levels:

    rows[..., k, m, e] = s[..., k, m] * levels[q[..., k, m, e]]

A row of E codes is ceil(E * b / 8) bytes: a string of bits from the lowest of its first byte on,
the lowest of a code first, so that eight codes fill b bytes; bits behind the last code are zero.
The product is a float32 one, rounded once to the rows' dtype, hence the same on every device.
Codes are constants, so there is no backward. Source: `distill/cache/codes.py`, whose levels are in
a rotated frame: so are the rows.
"""

from __future__ import annotations  # see jit.py

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distill.kernels.jit import jit, operation, tl, uses_triton

GROUP = 8  # codes that fill whole bytes
BITS_OF = {256: 8, 16: 4, 8: 3, 4: 2}  # by the number of levels
BLOCK_ROWS = 8
BLOCK_GROUPS = 32  # fewer for narrow rows
NUM_WARPS = 4


def decode_codes_reference(
    codes: Tensor, scales: Tensor, levels: Tensor, *, width: int, dtype: torch.dtype
) -> Tensor:
    """The formula above in plain torch, one layer after another: [...,K,M,E] in `dtype`."""
    bits = BITS_OF[len(levels)]
    rows = torch.empty((*codes.shape[:-1], width), dtype=dtype, device=codes.device)
    for layer in range(codes.shape[-3]):  # all at once would take many times the rows
        values = unpack(codes[..., layer, :, :], bits=bits, width=width)
        # On a CPU in a seventh of the time of levels[values].
        found = levels.index_select(0, values.flatten()).reshape(values.shape)
        rows[..., layer, :, :] = found * scales[..., layer, :, None].float()
    return rows


def unpack(packed: Tensor, *, bits: int, width: int) -> Tensor:
    """Codes int32 [...,E] of rows' bytes [...,ceil(E*bits/8)]."""
    if bits == 8:
        return packed.int()
    padded = F.pad(packed, (0, -packed.shape[-1] % bits))
    parts = rearrange(padded, "... (g b) -> ... g b", b=bits).int()
    shifts = torch.arange(GROUP, device=packed.device, dtype=torch.int32)
    # Disjoint bits, so that the sum cannot overflow; the sign bit is masked off below.
    words = (parts << 8 * shifts[:bits]).sum(dim=-1, dtype=torch.int32)
    values = (words[..., None] >> bits * shifts) & (2**bits - 1)
    return rearrange(values, "... g c -> ... (g c)")[..., :width]


@jit
def _decode_codes_fwd_kernel(
    codes,  # uint8 [R,row_bytes]
    scales,  # float16 [R]
    levels,  # float32 [2**BITS]
    rows,  # [R,width], written
    num_rows,
    width,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [r]
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)  # [g]
    place = tl.arange(0, 8)
    column = group[:, None] * 8 + place[None, :]  # [g,8]
    is_row = row < num_rows
    is_inside = is_row[:, None, None] & (column < width)[None, :, :]  # [r,g,8]
    if BITS == 8:
        at = row[:, None, None] * row_bytes + column[None, :, :]
        values = tl.load(codes + at, mask=is_inside, other=0).to(tl.int32)
    else:
        words = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS], tl.int32)
        for part in tl.static_range(BITS):
            byte = group * BITS + part
            at = row[:, None] * row_bytes + byte[None, :]
            is_byte = is_row[:, None] & (byte < row_bytes)[None, :]
            words |= tl.load(codes + at, mask=is_byte, other=0).to(tl.int32) << (8 * part)
        values = (words[:, :, None] >> (place * BITS)[None, None, :]) & ((1 << BITS) - 1)
    scale = tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
    level = tl.load(levels + values, mask=is_inside, other=0.0)
    found = (level * scale[:, None, None]).to(rows.dtype.element_ty)
    tl.store(rows + row[:, None, None] * width + column[None, :, :], found, mask=is_inside)


def _made_fwd(
    codes: Tensor, scales: Tensor, levels: Tensor, *, width: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], width, dtype=dtype)


@operation(
    "(Tensor codes, Tensor scales, Tensor levels, *, int width, ScalarType dtype) -> Tensor",
    fake=_made_fwd,
)
def _decode_codes_fwd(
    codes: Tensor, scales: Tensor, levels: Tensor, *, width: int, dtype: torch.dtype
) -> Tensor:
    rows = _made_fwd(codes, scales, levels, width=width, dtype=dtype)
    num_rows, num_groups = scales.numel(), -(-width // GROUP)
    block_groups = min(BLOCK_GROUPS, 1 << (num_groups - 1).bit_length())
    grid = (-(-num_rows // BLOCK_ROWS), -(-num_groups // block_groups))
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _decode_codes_fwd_kernel[grid](
            codes.contiguous(),
            scales.contiguous(),
            levels.contiguous(),
            rows,
            num_rows,
            width,
            codes.shape[-1],
            BITS=BITS_OF[len(levels)],
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_GROUPS=block_groups,
            num_warps=NUM_WARPS,
        )
    return rows


def decode_codes(
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    *,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [...,K,M,E] of codes uint8 [...,K,M,ceil(E*b/8)], scales [...,K,M] in half precision
    and float32 levels [2^b], in `dtype`. Raises ValueError when they do not fit each other.
    """
    bits = BITS_OF.get(len(levels))
    if bits is None or levels.dtype != torch.float32:
        raise ValueError(
            f"expected float32 levels, {', '.join(map(str, BITS_OF))} of them, "
            f"got {len(levels)} in {levels.dtype}"
        )
    expected = -(-width * bits // 8)
    if codes.dtype != torch.uint8 or codes.ndim < 3 or codes.shape[-1] != expected:
        raise ValueError(
            f"expected codes uint8 [...,K,M,{expected}] for {bits} bits and width {width}, "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    if scales.dtype != torch.float16 or scales.shape != codes.shape[:-1]:
        raise ValueError(
            f"expected scales float16 {list(codes.shape[:-1])} as the codes, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    decode = _decode_codes_fwd if uses_triton(codes) else decode_codes_reference
    return decode(codes, scales, levels, width=width, dtype=dtype)
