"""The kernels: a split-K shrink, and the base matmul with the expand behind it on the same accumulator.

Rank pages are read as they lie in the bank (`codes.PageLayout`), through an int32 view ``words`` (codes) and a float32
view ``floats`` (scales, levels) of the same bytes; offsets count 4-byte units. Codes are decoded in registers: a shift,
and a choice among the page's four levels.

Rows are cut into tiles of BLOCK_M. The distinct slots of a tile are found by the kernels themselves, so that neither
grid nor launch depends on the batch's composition (a CUDA graph replays any) and every distinct adapter's codes are
read once per tile of rows, and per block of outputs. A product with an adapter runs over all rows of the tile, those of
other adapters as zeros: the matrix units have the room at the sizes where rows differ (decoding), and a row's sums do
not depend on its neighbours.

Shape symbols: M rows, N out, K in (of the product: exchanged where the delta is transposed), L pages a slot may list;
PAGES pages of 16 ranks are taken in one step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

# Offsets within a page, in 4-byte units (codes.PageLayout); u_offset, the one that depends on the layer, is passed.
_S = tl.constexpr(0)
_U_LEVELS = tl.constexpr(16)
_V_LEVELS = tl.constexpr(20)
_V = tl.constexpr(32)


@triton.jit
def _decode(codes, level0, level1, level2, level3):
    """The level of each code; bits above the two lowest are ignored."""
    low = (codes & 1) != 0
    return tl.where((codes & 2) != 0, tl.where(low, level3, level2), tl.where(low, level1, level0))


@triton.jit
def _largest_level(floats, page_at, valid, LEVELS: tl.constexpr):
    """What a page's levels are divided by: 16-bit types then hold them whatever their size. ``[PAGES]``"""
    largest = tl.abs(tl.load(floats + page_at + LEVELS, mask=valid, other=1.0))
    for i in tl.static_range(1, 4):
        largest = tl.maximum(largest, tl.abs(tl.load(floats + page_at + LEVELS + i, mask=valid, other=1.0)))
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def _factor(
    words, floats, page_at, valid, at, size, offset, LEVELS: tl.constexpr, LANES_ARE_RANKS: tl.constexpr,
    PAGES: tl.constexpr, BLOCK: tl.constexpr, RANKS_LAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Elements ``at .. at + BLOCK`` of a factor for all ranks of some pages, over their largest level.

    V has ranks as lanes of its tiles and elements along each word; U the other way round. Words are loaded once and
    widened to their 16 codes by a dimension of shifts.

    Args:
        page_at: int64 ``[PAGES]``, where the pages begin. offset: where the factor's tiles do, within a page.
        at: multiple of 16. size: of the factor; what lies beyond is arbitrary, but finite.

    Returns:
        ``[BLOCK, PAGES * 16]`` if RANKS_LAST, else ``[PAGES * 16, BLOCK]``.
    """
    largest = _largest_level(floats, page_at, valid, LEVELS)
    level0 = tl.load(floats + page_at + LEVELS, mask=valid, other=0.0) / largest
    level1 = tl.load(floats + page_at + LEVELS + 1, mask=valid, other=0.0) / largest
    level2 = tl.load(floats + page_at + LEVELS + 2, mask=valid, other=0.0) / largest
    level3 = tl.load(floats + page_at + LEVELS + 3, mask=valid, other=0.0) / largest
    level0, level1, level2, level3 = level0.to(dtype), level1.to(dtype), level2.to(dtype), level3.to(dtype)
    inside = tl.arange(0, 16)
    if LANES_ARE_RANKS and RANKS_LAST:  # [tile, element, page, rank]
        tiles = at // 16 + tl.arange(0, BLOCK // 16)
        where = page_at[None, :, None] + offset + tiles[:, None, None] * 16 + inside[None, None, :]
        word = tl.load(words + where, mask=(tiles * 16 < size)[:, None, None] & valid[None, :, None], other=0)
        codes = word[:, None, :, :] >> (2 * inside)[None, :, None, None]
        l0, l1 = level0[None, None, :, None], level1[None, None, :, None]
        l2, l3 = level2[None, None, :, None], level3[None, None, :, None]
        values = tl.reshape(_decode(codes, l0, l1, l2, l3), (BLOCK, PAGES * 16))
    elif LANES_ARE_RANKS:  # [page, rank, tile, element]
        tiles = at // 16 + tl.arange(0, BLOCK // 16)
        where = page_at[:, None, None] + offset + tiles[None, None, :] * 16 + inside[None, :, None]
        word = tl.load(words + where, mask=(tiles * 16 < size)[None, None, :] & valid[:, None, None], other=0)
        codes = word[:, :, :, None] >> (2 * inside)[None, None, None, :]
        l0, l1 = level0[:, None, None, None], level1[:, None, None, None]
        l2, l3 = level2[:, None, None, None], level3[:, None, None, None]
        values = tl.reshape(_decode(codes, l0, l1, l2, l3), (PAGES * 16, BLOCK))
    elif RANKS_LAST:  # [element, page, rank]
        elements = at + tl.arange(0, BLOCK)
        where = page_at[None, :] + offset + elements[:, None]
        word = tl.load(words + where, mask=(elements < size)[:, None] & valid[None, :], other=0)
        codes = word[:, :, None] >> (2 * inside)[None, None, :]
        l0, l1, l2, l3 = level0[None, :, None], level1[None, :, None], level2[None, :, None], level3[None, :, None]
        values = tl.reshape(_decode(codes, l0, l1, l2, l3), (BLOCK, PAGES * 16))
    else:  # [page, rank, element]
        elements = at + tl.arange(0, BLOCK)
        where = page_at[:, None] + offset + elements[None, :]
        word = tl.load(words + where, mask=(elements < size)[None, :] & valid[:, None], other=0)
        codes = word[:, None, :] >> (2 * inside)[None, :, None]
        l0, l1, l2, l3 = level0[:, None, None], level1[:, None, None], level2[:, None, None], level3[:, None, None]
        values = tl.reshape(_decode(codes, l0, l1, l2, l3), (PAGES * 16, BLOCK))
    return values


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """``acc + a b`` in float32. WIDE: float32 products, for float32 operands, and for the interpreter, whose bfloat16
    products are wrong."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _first_of_their_slot(slots, rows, BLOCK_M: tl.constexpr):
    """Whether each row is the first of the tile with its slot. ``[BLOCK_M]``"""
    earlier = (slots[:, None] == slots[None, :]) & (rows[None, :] < rows[:, None])
    return (slots >= 0) & (tl.max(earlier.to(tl.int32), axis=1) == 0)


@triton.jit
def shrink_kernel(
    x, x_stride, words, floats, page_words, slot_pages, slot_weights, slot_ids, h, plan, M, K, L, u_offset, steps_most,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr, LEADERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``h[split, m, 16 p + r] = weight s[r] sum_k x[m, k] V[k, r]`` over the split's part of K, for page p of row m's
    slot; U's largest level is in it, too. What no page of a slot fills is not written, nor read later.

    Also the plan of each tile of rows, for the kernels that follow: the number of steps, and for each step a slot and
    the first of the PAGES of its list that the step takes.

    Grid: (tiles * LEADERS, PARTS, SPLITS). LEADERS programs share the distinct slots of a tile, PARTS the pages of a
    slot.

    Args:
        h: float32 ``[SPLITS, M, 16 L]``. plan: int32 ``[tiles, 1 + 2 steps_most]``.
    """
    tile, leader = tl.program_id(0) // LEADERS, tl.program_id(0) % LEADERS
    part, split = tl.program_id(1), tl.program_id(2)
    if PDL:
        # The next kernel may begin to read the base's weights; it waits for this one before it reads h.
        tl_cuda.gdc_launch_dependents()
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    slots = tl.load(slot_ids + rows, mask=rows < M, other=-1)
    first = _first_of_their_slot(slots, rows, BLOCK_M)
    distinct = tl.sum(first.to(tl.int32))
    number = tl.cumsum(first.to(tl.int32)) - 1  # of a first row's slot, in the order of rows
    if (leader == 0) & (part == 0) & (split == 0):
        own = plan + tile * (1 + 2 * steps_most)
        steps = tl.zeros((BLOCK_M,), tl.int32)
        for l0 in range(0, L, BLOCK_L):
            index = l0 + tl.arange(0, BLOCK_L)
            there = first[:, None] & (index < L)[None, :]
            listed = tl.load(slot_pages + slots[:, None].to(tl.int64) * L + index[None, :], mask=there, other=-1)
            steps += tl.sum((listed >= 0).to(tl.int32), axis=1)
        steps = (steps + PAGES - 1) // PAGES
        begin = tl.cumsum(steps) - steps
        tl.store(own, tl.sum(steps))
        for i in range(0, tl.max(steps)):
            to = own + 1 + 2 * (begin + i)
            tl.store(to, slots, mask=i < steps)
            tl.store(to + 1, tl.zeros_like(slots) + i * PAGES, mask=i < steps)
    inside = tl.arange(0, 16)
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    begin_k, end_k = split * span, tl.minimum((split + 1) * span, K)
    for d in range(leader, distinct, LEADERS):
        slot = tl.max(tl.where(first & (number == d), slots, -1)).to(tl.int64)
        mine = slots == slot
        for l0 in range(part * PAGES, L, PARTS * PAGES):
            index = l0 + tl.arange(0, PAGES)
            page = tl.load(slot_pages + slot * L + index, mask=index < L, other=-1)
            valid = page >= 0
            if tl.max(page) >= 0:
                page_at = page.to(tl.int64) * page_words
                acc = tl.zeros((BLOCK_M, PAGES * 16), tl.float32)
                for k0 in range(begin_k, end_k, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    a = tl.load(
                        x + rows[:, None].to(tl.int64) * x_stride + k[None, :],
                        mask=mine[:, None] & (k < K)[None, :],
                        other=0.0,
                    )
                    if TRANSPOSE:
                        b = _factor(
                            words, floats, page_at, valid, k0, K, u_offset, _U_LEVELS, False, PAGES, BLOCK_K, True,
                            a.dtype,
                        )  # fmt: skip
                    else:
                        b = _factor(
                            words, floats, page_at, valid, k0, K, _V, _V_LEVELS, True, PAGES, BLOCK_K, True, a.dtype
                        )
                    acc = _dot(a, b, acc, WIDE)
                scale = tl.load(slot_weights + slot * L + index, mask=valid, other=0.0)
                scale *= _largest_level(floats, page_at, valid, _U_LEVELS)
                scale *= _largest_level(floats, page_at, valid, _V_LEVELS)
                s = tl.load(floats + page_at[:, None] + _S + inside[None, :], mask=valid[:, None], other=0.0)
                acc *= tl.reshape(s * scale[:, None], (1, PAGES * 16))
                column = tl.arange(0, PAGES * 16)
                filled = tl.reshape(tl.broadcast_to(valid[:, None], (PAGES, 16)), (1, PAGES * 16))
                to = h + (split * M + rows[:, None]).to(tl.int64) * (L * 16) + l0 * 16 + column[None, :]
                tl.store(to, acc, mask=mine[:, None] & filled)


@triton.jit
def _expand(
    acc, tile, rows, at, words, floats, page_words, slot_pages, slot_ids, h, plan, M, N, L, u_offset, steps_most,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGES: tl.constexpr,
    SPLITS: tl.constexpr, ONE_ROW: tl.constexpr, STEP_STAGES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """``acc [BLOCK_M, BLOCK_N] += h U^T`` for the steps of a tile's plan; h is rounded to the type of x."""
    slots = tl.load(slot_ids + rows, mask=rows < M, other=-1)
    own = plan + tile * (1 + 2 * steps_most)
    column = tl.arange(0, PAGES * 16)
    for i in tl.range(0, tl.load(own), num_stages=STEP_STAGES):
        slot = tl.load(own + 1 + 2 * i)
        l0 = tl.load(own + 2 + 2 * i)
        index = l0 + tl.arange(0, PAGES)
        page = tl.load(slot_pages + slot.to(tl.int64) * L + index, mask=index < L, other=-1)
        valid = page >= 0
        page_at = page.to(tl.int64) * page_words
        filled = tl.reshape(tl.broadcast_to(valid[:, None], (PAGES, 16)), (1, PAGES * 16))
        there = (slots == slot)[:, None] & filled
        if ONE_ROW:  # the other rows of the tile are padding: the splits take their place
            where = tl.arange(0, SPLITS)[:, None] * (L * 16) + l0 * 16 + column[None, :]
            hidden = tl.sum(tl.load(h + where, mask=filled & (where >= 0), other=0.0), axis=0)[None, :]
            hidden = tl.where(there, hidden, 0.0)
        else:
            hidden = tl.zeros((BLOCK_M, PAGES * 16), tl.float32)
            for split in tl.static_range(SPLITS):
                where = (split * M + rows[:, None]).to(tl.int64) * (L * 16) + l0 * 16 + column[None, :]
                hidden += tl.load(h + where, mask=there, other=0.0)
        if TRANSPOSE:
            b = _factor(words, floats, page_at, valid, at, N, _V, _V_LEVELS, True, PAGES, BLOCK_N, False, dtype)
        else:
            b = _factor(words, floats, page_at, valid, at, N, u_offset, _U_LEVELS, False, PAGES, BLOCK_N, False, dtype)
        acc = _dot(hidden.to(dtype), b, acc, WIDE)
    return acc


@triton.jit
def linear_kernel(
    x, x_stride, weight, weight_stride, bias, y, words, floats, page_words, slot_pages, slot_ids, h, plan, M, N, K, L,
    u_offset, steps_most,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr, ONE_ROW: tl.constexpr,
    STEP_STAGES: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + bias + h U^T``: the expand is further steps of the base's sum, on the same accumulator.

    Grid: (blocks of N, tiles of M). The weights are read once each and not kept in the caches; with PDL, while the
    shrink before this kernel still runs.
    """
    tile = tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(0) * BLOCK_N
    columns = at + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the ends some row is read twice, which needs no mask; it is not stored.
    a_at = x + (rows % M)[:, None].to(tl.int64) * x_stride + k[None, :]
    b_at = weight + (columns % N)[None, :].to(tl.int64) * weight_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_at)
            b = tl.load(b_at, eviction_policy="evict_first")
        else:
            a = tl.load(a_at, mask=(k < K - k0)[None, :], other=0.0)
            b = tl.load(b_at, mask=(k < K - k0)[:, None], other=0.0, eviction_policy="evict_first")
        acc = _dot(a, b, acc, WIDE)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if PDL:
        tl_cuda.gdc_wait()
    acc = _expand(
        acc, tile, rows, at, words, floats, page_words, slot_pages, slot_ids, h, plan, M, N, L, u_offset, steps_most,
        False, WIDE, BLOCK_M, BLOCK_N, PAGES, SPLITS, ONE_ROW,
        STEP_STAGES, x.dtype.element_ty,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    to = y + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def expand_kernel(
    y, y_stride, words, floats, page_words, slot_pages, slot_ids, h, plan, M, N, L, u_offset, steps_most,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr, SPLITS: tl.constexpr, ONE_ROW: tl.constexpr, STEP_STAGES: tl.constexpr,
):  # fmt: skip
    """``y += h U^T`` in place. Grid: (blocks of N, tiles of M); tiles without an adapter leave y as it is."""
    tile = tl.program_id(1)
    if PDL:
        tl_cuda.gdc_wait()
    if tl.load(plan + tile * (1 + 2 * steps_most)) == 0:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(0) * BLOCK_N
    columns = at + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _expand(
        acc, tile, rows, at, words, floats, page_words, slot_pages, slot_ids, h, plan, M, N, L, u_offset, steps_most,
        TRANSPOSE, WIDE, BLOCK_M, BLOCK_N, PAGES, SPLITS, ONE_ROW, STEP_STAGES,
        y.dtype.element_ty,
    )  # fmt: skip
    slots = tl.load(slot_ids + rows, mask=rows < M, other=-1)
    to = y + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
    mask = (slots >= 0)[:, None] & (columns < N)[None, :]
    old = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, (old + acc).to(y.dtype.element_ty), mask=mask)
