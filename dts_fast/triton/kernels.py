"""The kernels: a split-K shrink, and the base matmul with the expand behind it on the same accumulator; in two
launches, or together in one.

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
def _levels(floats, page_at, valid, LEVELS: tl.constexpr, dtype: tl.constexpr):
    """The four levels of each page over its largest, ``[PAGES]`` each, and that largest: 16-bit types hold them then,
    whatever their size."""
    level0 = tl.load(floats + page_at + LEVELS, mask=valid, other=0.0)
    level1 = tl.load(floats + page_at + LEVELS + 1, mask=valid, other=0.0)
    level2 = tl.load(floats + page_at + LEVELS + 2, mask=valid, other=0.0)
    level3 = tl.load(floats + page_at + LEVELS + 3, mask=valid, other=0.0)
    largest = tl.maximum(tl.maximum(tl.abs(level0), tl.abs(level1)), tl.maximum(tl.abs(level2), tl.abs(level3)))
    largest = tl.where(largest > 1e-37, largest, 1.0)  # below, the reciprocal is no finite number
    inverse = 1.0 / largest
    return (
        (level0 * inverse).to(dtype), (level1 * inverse).to(dtype), (level2 * inverse).to(dtype),
        (level3 * inverse).to(dtype), largest,
    )  # fmt: skip


# A factor's words come from memory before they are needed, and are widened to their 16 codes by a dimension of shifts
# when they are. V has ranks as lanes of its tiles and elements along each word; U the other way round. `at` is a
# multiple of 16; what lies beyond `size` is 0.


@triton.jit
def _load_words(
    words, page_at, valid, at, size, offset, LANES_ARE_RANKS: tl.constexpr, BLOCK: tl.constexpr,
    RANKS_LAST: tl.constexpr,
):  # fmt: skip
    """Words of elements ``at .. at + BLOCK`` of some pages: [tile, page, rank] or [page, rank, tile] where lanes are
    ranks, otherwise [element, page] or [page, element]."""
    inside = tl.arange(0, 16)
    if LANES_ARE_RANKS and RANKS_LAST:
        tiles = at // 16 + tl.arange(0, BLOCK // 16)
        where = page_at[None, :, None] + offset + tiles[:, None, None] * 16 + inside[None, None, :]
        word = tl.load(words + where, mask=(tiles * 16 < size)[:, None, None] & valid[None, :, None], other=0)
    elif LANES_ARE_RANKS:
        tiles = at // 16 + tl.arange(0, BLOCK // 16)
        where = page_at[:, None, None] + offset + tiles[None, None, :] * 16 + inside[None, :, None]
        word = tl.load(words + where, mask=(tiles * 16 < size)[None, None, :] & valid[:, None, None], other=0)
    elif RANKS_LAST:
        elements = at + tl.arange(0, BLOCK)
        where = page_at[None, :] + offset + elements[:, None]
        word = tl.load(words + where, mask=(elements < size)[:, None] & valid[None, :], other=0)
    else:
        elements = at + tl.arange(0, BLOCK)
        where = page_at[:, None] + offset + elements[None, :]
        word = tl.load(words + where, mask=(elements < size)[None, :] & valid[:, None], other=0)
    return word


@triton.jit
def _widen(
    word, l0, l1, l2, l3, LANES_ARE_RANKS: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr,
    RANKS_LAST: tl.constexpr,
):  # fmt: skip
    """The factor that words hold: ``[BLOCK, PAGES * 16]`` if RANKS_LAST, else ``[PAGES * 16, BLOCK]``."""
    inside = tl.arange(0, 16)
    if LANES_ARE_RANKS and RANKS_LAST:  # [tile, element, page, rank]
        codes = word[:, None, :, :] >> (2 * inside)[None, :, None, None]
        values = _decode(
            codes, l0[None, None, :, None], l1[None, None, :, None], l2[None, None, :, None], l3[None, None, :, None]
        )
        values = tl.reshape(values, (BLOCK, PAGES * 16))
    elif LANES_ARE_RANKS:  # [page, rank, tile, element]
        codes = word[:, :, :, None] >> (2 * inside)[None, None, None, :]
        values = _decode(
            codes, l0[:, None, None, None], l1[:, None, None, None], l2[:, None, None, None], l3[:, None, None, None]
        )
        values = tl.reshape(values, (PAGES * 16, BLOCK))
    elif RANKS_LAST:  # [element, page, rank]
        codes = word[:, :, None] >> (2 * inside)[None, None, :]
        values = _decode(codes, l0[None, :, None], l1[None, :, None], l2[None, :, None], l3[None, :, None])
        values = tl.reshape(values, (BLOCK, PAGES * 16))
    else:  # [page, rank, element]
        codes = word[:, None, :] >> (2 * inside)[None, :, None]
        values = _decode(codes, l0[:, None, None], l1[:, None, None], l2[:, None, None], l3[:, None, None])
        values = tl.reshape(values, (PAGES * 16, BLOCK))
    return values


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """``acc + a b`` in float32. WIDE: float32 products, for float32 operands, and for the interpreter, whose bfloat16
    products are wrong."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _distinct(slot_ids, rows, M, BLOCK_M: tl.constexpr):
    """(slots, the number of each row's slot in the order of its first row or -1 where it is not that first row, how
    many there are)"""
    slots = tl.load(slot_ids + rows, mask=rows < M, other=-1)
    earlier = (slots[:, None] == slots[None, :]) & (rows[None, :] < rows[:, None])
    first = ((slots >= 0) & (tl.max(earlier.to(tl.int32), axis=1) == 0)).to(tl.int32)
    return slots, tl.where(first == 1, tl.cumsum(first) - 1, -1), tl.sum(first)


@triton.jit
def _pages_of(slot_pages, slots, numbers, d, l0, L, PAGES: tl.constexpr):
    """(the d-th distinct slot, its pages l0 .. l0 + PAGES or -1)"""
    slot = tl.max(tl.where(numbers == d, slots, -1)).to(tl.int64)
    index = l0 + tl.arange(0, PAGES)
    listed = tl.where(slot >= 0, L, 0)
    return slot, tl.load(slot_pages + slot * L + index, mask=index < listed, other=-1)


@triton.jit
def _shrink_items(
    tile, program, programs, x, x_stride, words, floats, page_words, slot_pages, slot_weights, slot_ids, partial, h,
    counters, M, K, L, u_offset,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program's share of a tile's items: a distinct slot, PAGES pages, a split of K. Whoever is the last of an
    item's splits adds them up, in their order."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    slots, numbers, distinct = _distinct(slot_ids, rows, M, BLOCK_M)
    groups = tl.cdiv(L, PAGES)
    span = tl.cdiv(tl.cdiv(K, SPLITS), BLOCK_K) * BLOCK_K
    inside, column = tl.arange(0, 16), tl.arange(0, PAGES * 16)
    for item in range(program, distinct * groups * SPLITS, programs):
        split = item % SPLITS
        group = item // SPLITS % groups
        d = item // SPLITS // groups
        l0 = group * PAGES
        slot, page = _pages_of(slot_pages, slots, numbers, d, l0, L, PAGES)
        valid = page >= 0
        if tl.max(page) >= 0:
            mine = slots == slot
            page_at = page.to(tl.int64) * page_words
            u0, u1, u2, u3, largest_u = _levels(floats, page_at, valid, _U_LEVELS, x.dtype.element_ty)
            v0, v1, v2, v3, largest_v = _levels(floats, page_at, valid, _V_LEVELS, x.dtype.element_ty)
            if TRANSPOSE:
                v0, v1, v2, v3 = u0, u1, u2, u3
            weight = tl.load(slot_weights + slot * L + l0 + tl.arange(0, PAGES), mask=valid, other=0.0)
            s = tl.load(floats + page_at[:, None] + _S + inside[None, :], mask=valid[:, None], other=0.0)
            scale = tl.reshape(s * (weight * largest_u * largest_v)[:, None], (1, PAGES * 16))
            acc = tl.zeros((BLOCK_M, PAGES * 16), tl.float32)
            for k0 in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                a = tl.load(
                    x + rows[:, None].to(tl.int64) * x_stride + k[None, :],
                    mask=mine[:, None] & (k < K)[None, :],
                    other=0.0,
                )
                if TRANSPOSE:
                    word = _load_words(words, page_at, valid, k0, K, u_offset, False, BLOCK_K, True)
                    b = _widen(word, v0, v1, v2, v3, False, PAGES, BLOCK_K, True)
                else:
                    word = _load_words(words, page_at, valid, k0, K, _V, True, BLOCK_K, True)
                    b = _widen(word, v0, v1, v2, v3, True, PAGES, BLOCK_K, True)
                acc = _dot(a, b, acc, WIDE)
            acc *= scale
            filled = tl.reshape(tl.broadcast_to(valid[:, None], (PAGES, 16)), (1, PAGES * 16))
            at = rows[:, None].to(tl.int64) * (L * 16) + l0 * 16 + column[None, :]
            there = mine[:, None] & filled
            if SPLITS == 1:
                tl.store(h + at, acc.to(h.dtype.element_ty), mask=there)
            else:
                whole = M.to(tl.int64) * L * 16
                tl.store(partial + split * whole + at, acc, mask=there)
                counter = counters + (tile * BLOCK_M + d) * groups + group
                tl.debug_barrier()  # all of this program's part is stored before it counts
                arrived = tl.atomic_add(counter, 1, sem="acq_rel")
                if arrived == SPLITS - 1:
                    tl.debug_barrier()
                    total = tl.zeros((BLOCK_M, PAGES * 16), tl.float32)
                    for i in range(SPLITS):
                        total += tl.load(partial + i * whole + at, mask=there, other=0.0, cache_modifier=".cg")
                    tl.store(h + at, total.to(h.dtype.element_ty), mask=there)
                    tl.store(counter, 0)


@triton.jit(do_not_specialize=["M", "L"])
def shrink_kernel(
    x, x_stride, words, floats, page_words, slot_pages, slot_weights, slot_ids, partial, h, counters, M, K, L, u_offset,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``h[m, 16 p + r] = weight s[r] sum_k x[m, k] V[k, r]`` for page p of row m's slot; the largest levels of both
    factors are in it, too. What no page of a slot fills is not written, nor read later.

    Grid: (tiles of M, programs).

    Args:
        partial: float32 ``[SPLITS, M, 16 L]``. h: ``[M, 16 L]``, rounded to the type of x.
        counters: int32 ``[tiles, BLOCK_M, ceil(L / PAGES)]``, 0 before and after.
    """
    if PDL:
        # The next kernel may begin to read the base's weights; it waits for this one before it reads h.
        tl_cuda.gdc_launch_dependents()
    _shrink_items(
        tl.program_id(0), tl.program_id(1), tl.num_programs(1), x, x_stride, words, floats, page_words, slot_pages,
        slot_weights, slot_ids, partial, h, counters, M, K, L, u_offset, TRANSPOSE, WIDE, BLOCK_M, BLOCK_K, PAGES,
        SPLITS,
    )  # fmt: skip


@triton.jit
def _hidden(h, rows, slots, slot, page, l0, L, PAGES: tl.constexpr):
    """h of the rows with a slot, for PAGES of its pages: ``[BLOCK_M, PAGES * 16]``, zero elsewhere."""
    column = tl.arange(0, PAGES * 16)
    filled = tl.reshape(tl.broadcast_to((page >= 0)[:, None], (PAGES, 16)), (1, PAGES * 16))
    at = rows[:, None].to(tl.int64) * (L * 16) + l0 * 16 + column[None, :]
    # Not through the first-level cache, which knows nothing of what other programs have just written.
    return tl.load(h + at, mask=(slots == slot)[:, None] & filled, other=0.0, cache_modifier=".cg")


@triton.jit
def _wait_for_shrink(agreement, SHRINKERS: tl.constexpr):
    """Returns when a tile's programs that shrink have ended (`together_kernel`)."""
    done = tl.atomic_add(agreement + 1, 0, sem="acquire")
    while done < SHRINKERS:
        done = tl.atomic_add(agreement + 1, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _linear_block(
    block, blocks, tile, x, x_stride, weight, weight_stride, bias, y, words, floats, page_words, slot_pages, slot_ids,
    h, agreement, M, N, K, L, u_offset,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAGES: tl.constexpr, SHRINKERS: tl.constexpr,
):  # fmt: skip
    """One block of outputs: the base's sum, then the expand as further steps of it. The first adapter's codes are on
    their way before the base's weights, the next ones' while one is multiplied; h is waited for when the base is
    through."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = block * BLOCK_N
    columns = at + tl.arange(0, BLOCK_N)
    slots, numbers, distinct = _distinct(slot_ids, rows, M, BLOCK_M)
    groups = tl.cdiv(L, PAGES)
    slot, page = _pages_of(slot_pages, slots, numbers, 0, 0, L, PAGES)
    word = _load_words(words, page.to(tl.int64) * page_words, page >= 0, at, N, u_offset, False, BLOCK_N, False)
    k = tl.arange(0, BLOCK_K)
    a_at = x + rows[:, None].to(tl.int64) * x_stride + k[None, :]
    # Beyond the last output some weights are read twice, which needs no mask; their sums are not stored. Rows beyond
    # the last are not read: they would come from the cache as often as weights come from memory.
    b_at = weight + (columns % N)[None, :].to(tl.int64) * weight_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_at, mask=(rows < M)[:, None], other=0.0)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(rows < M)[:, None] & (k < K - k0)[None, :], other=0.0)
            b = tl.load(b_at, mask=(k < K - k0)[:, None], other=0.0)
        acc = _dot(a, b, acc, WIDE)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if PDL:
        tl_cuda.gdc_wait()
    if SHRINKERS > 0:
        _wait_for_shrink(agreement + 3 * tile, SHRINKERS)
    for step in tl.range(0, distinct * groups, num_stages=1):
        l0 = step % groups * PAGES
        next_slot, next_page = _pages_of(
            slot_pages, slots, numbers, (step + 1) // groups, (step + 1) % groups * PAGES, L, PAGES
        )
        next_word = _load_words(
            words, next_page.to(tl.int64) * page_words, next_page >= 0, at, N, u_offset, False, BLOCK_N, False
        )
        if tl.max(page) >= 0:
            hidden = _hidden(h, rows, slots, slot, page, l0, L, PAGES)
            l0_, l1_, l2_, l3_, _ = _levels(
                floats, page.to(tl.int64) * page_words, page >= 0, _U_LEVELS, x.dtype.element_ty
            )
            acc = _dot(hidden, _widen(word, l0_, l1_, l2_, l3_, False, PAGES, BLOCK_N, False), acc, WIDE)
        slot, page, word = next_slot, next_page, next_word
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    to = y + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
    if SHRINKERS > 0:  # noqa: SIM102 (known when it is compiled)
        # The last block of the tile, after which no one asks, leaves all at 0 for the next launch.
        if tl.atomic_add(agreement + 3 * tile + 2, 1, sem="acq_rel") == blocks - 1:
            tl.store(agreement + 3 * tile + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3)


@triton.jit(do_not_specialize=["M", "L"])
def linear_kernel(
    x, x_stride, weight, weight_stride, bias, y, words, floats, page_words, slot_pages, slot_ids, h, M, N, K, L,
    u_offset,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + bias + h U^T`` behind `shrink_kernel` (PDL: beside it). Grid: (blocks of N, tiles of M)."""
    _linear_block(
        tl.program_id(0), 0, tl.program_id(1), x, x_stride, weight, weight_stride, bias, y, words, floats, page_words,
        slot_pages, slot_ids, h, h, M, N, K, L, u_offset, HAS_BIAS, EVEN_K, WIDE, PDL, BLOCK_M, BLOCK_N, BLOCK_K, PAGES,
        0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "L"])
def together_kernel(
    x, x_stride, weight, weight_stride, bias, y, words, floats, page_words, slot_pages, slot_weights, slot_ids, partial,
    h, counters, agreement, M, N, K, L, u_offset,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGES: tl.constexpr, SHRINK_BLOCK_K: tl.constexpr, SHRINK_PAGES: tl.constexpr,
    SPLITS: tl.constexpr, SHRINKERS: tl.constexpr,
):  # fmt: skip
    """Both in one launch: of a tile's programs the first SHRINKERS shrink, each of the others takes a block of outputs
    and waits for them behind its base.

    Programs draw numbers when they begin, so that who shrinks is running before anyone can wait for it: no deadlock,
    whatever the order in which blocks start, and however few of them fit. Grid: (SHRINKERS + blocks of N, tiles of M).

    Args:
        agreement: int32 ``[tiles, 3]`` (numbers drawn, shrinkers that have ended, blocks that have seen it), 0 before
            and after; and one more element.
    """
    tile = tl.program_id(1)
    blocks = tl.num_programs(0) - SHRINKERS
    number = tl.atomic_add(agreement + 3 * tile, 1, sem="relaxed")
    if number < SHRINKERS:
        _shrink_items(
            tile, number, SHRINKERS, x, x_stride, words, floats, page_words, slot_pages, slot_weights, slot_ids,
            partial, h, counters, M, K, L, u_offset, False, WIDE, BLOCK_M, SHRINK_BLOCK_K, SHRINK_PAGES, SPLITS,
        )  # fmt: skip
        tl.debug_barrier()  # all of this program's h is stored before it counts
        tl.atomic_add(agreement + 3 * tile + 1, 1, sem="release")
    else:
        _linear_block(
            number - SHRINKERS, blocks, tile, x, x_stride, weight, weight_stride, bias, y, words, floats, page_words,
            slot_pages, slot_ids, h, agreement, M, N, K, L, u_offset, HAS_BIAS, EVEN_K, WIDE, False, BLOCK_M, BLOCK_N,
            BLOCK_K, PAGES, SHRINKERS,
        )  # fmt: skip


@triton.jit
def _expand(
    acc, rows, at, words, floats, page_words, slot_pages, slot_ids, h, M, N, L, u_offset,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """``acc + h U^T`` of a tile of rows, for the block of outputs that begins at ``at``."""
    slots, numbers, distinct = _distinct(slot_ids, rows, M, BLOCK_M)
    groups = tl.cdiv(L, PAGES)
    for step in tl.range(0, distinct * groups, num_stages=1):
        l0 = step % groups * PAGES
        slot, page = _pages_of(slot_pages, slots, numbers, step // groups, l0, L, PAGES)
        if tl.max(page) >= 0:
            page_at = page.to(tl.int64) * page_words
            hidden = _hidden(h, rows, slots, slot, page, l0, L, PAGES)
            if TRANSPOSE:
                word = _load_words(words, page_at, page >= 0, at, N, _V, True, BLOCK_N, False)
                l0_, l1_, l2_, l3_, _ = _levels(floats, page_at, page >= 0, _V_LEVELS, h.dtype.element_ty)
                b = _widen(word, l0_, l1_, l2_, l3_, True, PAGES, BLOCK_N, False)
            else:
                word = _load_words(words, page_at, page >= 0, at, N, u_offset, False, BLOCK_N, False)
                l0_, l1_, l2_, l3_, _ = _levels(floats, page_at, page >= 0, _U_LEVELS, h.dtype.element_ty)
                b = _widen(word, l0_, l1_, l2_, l3_, False, PAGES, BLOCK_N, False)
            acc = _dot(hidden, b, acc, WIDE)
    return acc


@triton.jit(do_not_specialize=["M", "L"])
def prefill_kernel(
    x, weight, bias, y, words, floats, page_words, slot_pages, slot_ids, h, M, N, K, L, u_offset,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGES: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + bias + h U^T`` of many rows, behind `shrink_kernel` (PDL: beside it).

    Tiles of x and W are copied by the copy engine where there is one (Hopper and newer), whose descriptors ``x`` and
    ``weight`` are; it fills up with zeros what lies outside. Grid: (tiles of M * blocks of N): those of NEIGHBOURS
    tiles of rows follow one another, so that what runs at a time shares both operands in the second-level cache.
    """
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = program // (NEIGHBOURS * blocks) * NEIGHBOURS
    together = tl.minimum(tl.cdiv(M, BLOCK_M) - first, NEIGHBOURS)
    tile = first + program % (NEIGHBOURS * blocks) % together
    at = program % (NEIGHBOURS * blocks) // together * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        acc = _dot(x.load([tile * BLOCK_M, k0]), weight.load([at, k0]).T, acc, WIDE)
    if PDL:
        tl_cuda.gdc_wait()
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), at + tl.arange(0, BLOCK_N)
    acc = _expand(
        acc, rows, at, words, floats, page_words, slot_pages, slot_ids, h, M, N, L, u_offset, False, WIDE, BLOCK_M,
        BLOCK_N, PAGES,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    to = y + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M", "L"])
def expand_kernel(
    y, y_stride, words, floats, page_words, slot_pages, slot_ids, h, M, N, L, u_offset,
    TRANSPOSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """``y += h U^T`` in place. Grid: (blocks of N, tiles of M); rows without an adapter are left as they are."""
    tile = tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(0) * BLOCK_N
    columns = at + tl.arange(0, BLOCK_N)
    if PDL:
        tl_cuda.gdc_wait()
    acc = _expand(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), rows, at, words, floats, page_words, slot_pages, slot_ids, h, M, N, L,
        u_offset, TRANSPOSE, WIDE, BLOCK_M, BLOCK_N, PAGES,
    )  # fmt: skip
    slots = tl.load(slot_ids + rows, mask=rows < M, other=-1)
    to = y + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
    mask = (slots >= 0)[:, None] & (columns < N)[None, :]
    old = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, (old + acc).to(y.dtype.element_ty), mask=mask)
