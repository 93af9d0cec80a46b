"""The kernels of `attention.py`, whose formulas and names these are.

A program has one tile of a sequence's tokens and one head, and passes over all tokens of the
sequence: over keys and values for the output and the gradient at q, over queries for the others.
"""

from __future__ import annotations  # see jit.py

from distill.kernels.jit import jit, tl


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
def _tile(cumulative, num_tokens, longest, EVEN: tl.constexpr, TILE: tl.constexpr):
    """Where the program's sequence begins and how long it is, and the rows of its tile.

    There are as many tiles for each sequence as the longest has: behind an end, none is a row.
    """
    across = tl.cdiv(longest, TILE)
    sequence = tl.program_id(0) // across
    if EVEN:
        begin = sequence * longest
        end = begin + longest
    else:
        begin = tl.load(cumulative + sequence)
        end = tl.minimum(tl.load(cumulative + sequence + 1), num_tokens)
    first = begin + tl.program_id(0) % across * TILE
    length = tl.where(first < end, end - begin, 0)
    row = first.to(tl.int64) + tl.arange(0, TILE)
    return begin.to(tl.int64), length, row, row < end


@jit
def _channels(q_gain, k_gain, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of the program's head, which of the block there are, and gq gk of them."""
    place = tl.arange(0, BLOCK)
    is_place = place < HEAD
    column = tl.program_id(1) * HEAD + place
    gain = tl.load(q_gain + column, mask=is_place, other=0.0).to(tl.float32)
    gain *= tl.load(k_gain + column, mask=is_place, other=0.0).to(tl.float32)
    return column, is_place, gain


@jit
def _rows(base, row, is_row, stride, column, is_place):
    """[rows,BLOCK] of a matrix, with zeros for what is not there."""
    at = row[:, None] * stride + column[None, :]
    return tl.load(base + at, mask=is_row[:, None] & is_place[None, :], other=0.0)


@jit
def _gained(x, gain):
    return (x.to(tl.float32) * gain[None, :]).to(x.dtype)


@jit
def _write(base, value, row, is_row, stride, column, is_place):
    """[rows,BLOCK] of a matrix, in its dtype."""
    at = row[:, None] * stride + column[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + at, value, mask=is_row[:, None] & is_place[None, :])


@jit
def _keys(
    qkv,
    rstd,
    start,
    left,
    num_tokens,
    width,
    column,
    is_place,
    STEP: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """k, v, r_k and what hides a score, of the keys from `start` on, of which `left` are there."""
    ahead = tl.arange(0, STEP)
    is_key = ahead < left
    base = qkv + start * (3 * width) + width
    k = _rows(base, ahead, is_key, 3 * width, column, is_place)
    v = _rows(base + width, ahead, is_key, 3 * width, column, is_place)
    reach = tl.load(rstd + num_tokens + start + ahead, mask=is_key, other=0.0)
    return k, v, reach, tl.where(is_key, 0.0, HIDDEN)  # finite: no NaN where a row is not one


@jit
def _attention_fwd_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    cumulative,  # int32 [clips+1], or anything where EVEN
    out,  # [T,width], written
    lse,  # float32 [heads,T], written: log2 of the sum of exp(S_ij) over j
    num_tokens,
    longest,
    width,
    scale,
    EVEN: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    begin, length, row, is_row = _tile(cumulative, num_tokens, longest, EVEN, TILE)  # [m]
    column, is_place, gain = _channels(q_gain, k_gain, HEAD, BLOCK)  # [d]
    at_head = tl.program_id(1).to(tl.int64) * num_tokens + row

    q = _gained(_rows(qkv, row, is_row, 3 * width, column, is_place), gain)
    # Powers of two from here on. It is positive, so it may wait until after the maximum.
    rise = tl.load(rstd + row, mask=is_row, other=0.0) * (scale * LOG2E)

    top = tl.full([TILE], HIDDEN, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        k, v, reach, hide = _keys(
            qkv,
            rstd,
            begin + past,
            length - past,
            num_tokens,
            width,
            column,
            is_place,
            STEP,
            HIDDEN,
        )
        s = tl.dot(q, tl.trans(k))
        s = s * reach[None, :] + hide[None, :]  # [m,n]
        peak = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s * rise[:, None] - (peak * rise)[:, None])
        fade = tl.exp2((top - peak) * rise)
        total = total * fade + tl.sum(p, 1)
        mixed = mixed * fade[:, None]
        mixed = tl.dot(p.to(v.dtype), v, acc=mixed)
        top = peak

    _write(out, mixed / total[:, None], row, is_row, width, column, is_place)
    tl.store(lse + at_head, top * rise + tl.log2(total), mask=is_row)


@jit
def _attention_bwd_dq_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    cumulative,  # int32 [clips+1], or anything where EVEN
    out,  # [T,width]
    d_out,  # [T,width]
    lse,  # float32 [heads,T]
    delta,  # float32 [heads,T], written: <d_out_i, out_i> of the head
    sums,  # float32 [2,heads,T], the first half written: sum over j of dS_ij S_ij
    d_qkv,  # [T,3*width], the first third written: r_q g_i / gk, for the last kernel to finish
    num_tokens,
    longest,
    width,
    scale,
    EVEN: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    begin, length, row, is_row = _tile(cumulative, num_tokens, longest, EVEN, TILE)  # [m]
    column, is_place, gain = _channels(q_gain, k_gain, HEAD, BLOCK)  # [d]
    at_head = tl.program_id(1).to(tl.int64) * num_tokens + row

    do = _rows(d_out, row, is_row, width, column, is_place)
    o = _rows(out, row, is_row, width, column, is_place)
    dot = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + at_head, dot, mask=is_row)
    q = _gained(_rows(qkv, row, is_row, 3 * width, column, is_place), gain)
    steep = tl.load(rstd + row, mask=is_row, other=0.0) * scale
    rise = steep * LOG2E
    level = tl.load(lse + at_head, mask=is_row, other=0.0)

    along = tl.zeros([TILE], tl.float32)
    dq = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        k, v, reach, hide = _keys(
            qkv,
            rstd,
            begin + past,
            length - past,
            num_tokens,
            width,
            column,
            is_place,
            STEP,
            HIDDEN,
        )
        s = tl.dot(q, tl.trans(k))
        s = s * reach[None, :] + hide[None, :]  # [m,n]
        p = tl.exp2(s * rise[:, None] - level[:, None])
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - dot[:, None])
        along += tl.sum(ds * s, 1)
        dq = tl.dot((ds * reach[None, :]).to(k.dtype), k, acc=dq)

    tl.store(sums + at_head, along * steep, mask=is_row)
    _write(d_qkv, dq * steep[:, None], row, is_row, 3 * width, column, is_place)


@jit
def _attention_bwd_dkv_kernel(
    qkv,  # [T,3*width]
    q_gain,  # [width]
    k_gain,  # [width]
    rstd,  # float32 [2,T]
    cumulative,  # int32 [clips+1], or anything where EVEN
    d_out,  # [T,width]
    lse,  # float32 [heads,T]
    delta,  # float32 [heads,T]
    sums,  # float32 [2,heads,T], the second half written: sum over i of dS_ij S_ij
    d_qkv,  # [T,3*width], last third written, and the second as the first by the kernel before
    num_tokens,
    longest,
    width,
    heads,
    scale,
    EVEN: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    begin, length, row, is_row = _tile(cumulative, num_tokens, longest, EVEN, TILE)  # [n], of keys
    column, is_place, gain = _channels(q_gain, k_gain, HEAD, BLOCK)  # [d]
    head = tl.program_id(1)

    third = qkv + width
    k = _gained(_rows(third, row, is_row, 3 * width, column, is_place), gain)
    v = _rows(third + width, row, is_row, 3 * width, column, is_place)
    reach = tl.load(rstd + num_tokens + row, mask=is_row, other=0.0)
    rise = reach * LOG2E
    ahead = tl.arange(0, STEP)  # [m]

    along = tl.zeros([TILE], tl.float32)
    dk = tl.zeros([TILE, BLOCK], tl.float32)
    dv = tl.zeros([TILE, BLOCK], tl.float32)
    for past in tl.range(0, length, STEP):
        is_query = ahead < length - past
        start = begin + past
        q = _rows(qkv + start * (3 * width), ahead, is_query, 3 * width, column, is_place)
        do = _rows(d_out + start * width, ahead, is_query, width, column, is_place)
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
    third = d_qkv + width
    _write(third, dk * reach[:, None], row, is_row, 3 * width, column, is_place)
    _write(third + width, dv, row, is_row, 3 * width, column, is_place)


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
