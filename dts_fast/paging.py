"""Deltas as a bank and its tables hold them: ops with native kernels on CPUs, as that is most of a load."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from . import native  # noqa: F401  (registers its kernels)
from .codes import CodedMatrix, CodedVector, Delta, LowRankDelta, dequantize, to_pages

_LIBRARY = torch.library.Library("dts_fast", "FRAGMENT")
_LIBRARY.define(
    "write_pages_(Tensor(a!)[] pages, Tensor[] u_codes, Tensor[] u_levels, Tensor[] s, Tensor[] v_codes, "
    "Tensor[] v_levels, int[] n, int[] k, int[] numbers) -> ()"
)
_LISTS = "Tensor(a!)[] slot_pages, Tensor(b!)[] slot_weights, int[] rows, int[] counts, int[] numbers, float[] weights"
# Each on CPUs, and to any other device.
for _name in ("copy_pages_", "send_pages_"):
    _LIBRARY.define(f"{_name}(Tensor(a!)[] pages, Tensor[] sources, int[] numbers) -> ()")
for _name in ("write_lists_", "send_lists_"):
    _LIBRARY.define(f"{_name}({_LISTS}) -> ()")
_LIBRARY.define("write_vectors_(Tensor(a!)[] out, Tensor[] base, Tensor[] codes, Tensor[] levels) -> ()")


def write_pages(writes: Sequence[tuple[Tensor, Sequence[int], LowRankDelta]]) -> None:
    """Write deltas to arenas ``[P, nbytes]`` on CPUs, each to the pages of these numbers there."""
    if not writes:
        return
    arenas, numbers, deltas = zip(*writes, strict=True)
    torch.ops.dts_fast.write_pages_(
        arenas,
        [delta.u.codes.contiguous() for delta in deltas],
        [delta.u.levels for delta in deltas],
        [delta.s for delta in deltas],
        [delta.v.codes.contiguous() for delta in deltas],
        [delta.v.levels for delta in deltas],
        [delta.u.n for delta in deltas],
        [delta.v.n for delta in deltas],
        list(chain.from_iterable(numbers)),
    )


def copy_pages(copies: Sequence[tuple[Tensor, Sequence[int], Tensor]]) -> None:
    """Copy pages ``[n, nbytes]`` to arenas ``[P, nbytes]`` on any devices, each to the n places of these numbers;
    without waiting, from pinned memory to GPUs."""
    for on_cpu in (True, False):
        some = [copy for copy in copies if (copy[0].is_cpu and copy[2].is_cpu) == on_cpu]
        if some:
            arenas, numbers, sources = zip(*some, strict=True)
            run = torch.ops.dts_fast.copy_pages_ if on_cpu else torch.ops.dts_fast.send_pages_
            run(arenas, sources, list(chain.from_iterable(numbers)))


def takes_vector(out: Tensor, base: Tensor, delta: Delta) -> bool:
    """Whether `write_vectors` takes a delta, or would were ``out`` and ``base`` on a CPU."""
    coded = isinstance(delta, CodedVector) and len(delta.shape) == 1 and delta.levels.dtype == torch.float32
    return coded and delta.codes.is_cpu and all(t.is_contiguous() for t in (out, base, delta.codes, delta.levels))


def write_vectors(vectors: Sequence[tuple[Tensor, Tensor, CodedVector]]) -> None:
    """Write ``base + delta`` to ``out``, all ``[n]`` on CPUs: sums in float32 (or wider), rounded once."""
    out, base, deltas = zip(*vectors, strict=True)
    torch.ops.dts_fast.write_vectors_(out, base, [d.codes for d in deltas], [d.levels for d in deltas])


def write_any_vector(out: Tensor, base: Tensor, delta: Delta) -> None:
    """`write_vectors` of one that `takes_vector` does not know."""
    wide = torch.promote_types(base.dtype, torch.float32)
    out.copy_(base.to(wide) + delta.dequantize(wide).to(base.device))


def write_lists(lists: Sequence[tuple[Tensor, Tensor, int, Sequence[int], Tensor | float]]) -> None:
    """Let rows of slots' lists (``slot_pages [S, L]``, ``slot_weights``, a row; all on one device) list pages and
    nothing else, with one weight for all or one for each; without waiting."""
    slot_pages, slot_weights, rows, numbers, weights = zip(*lists, strict=True)
    given = [0.0 if isinstance(weight, Tensor) else weight for weight in weights]
    run = torch.ops.dts_fast.write_lists_ if slot_pages[0].is_cpu else torch.ops.dts_fast.send_lists_
    run(slot_pages, slot_weights, rows, list(map(len, numbers)), list(chain.from_iterable(numbers)), given)
    for table, row, weight in zip(slot_weights, rows, weights, strict=True):
        if isinstance(weight, Tensor):
            table[row, : len(weight)] = weight


# In plain torch.


def _write_pages_plain(pages, u_codes, u_levels, s, v_codes, v_levels, n, k, numbers):
    sources = []
    for *factors, rows, columns in zip(u_codes, u_levels, s, v_codes, v_levels, n, k, strict=True):
        codes, levels, scales, other_codes, other_levels = factors
        u, v = CodedMatrix(codes, levels, rows), CodedMatrix(other_codes, other_levels, columns)
        sources.append(to_pages(LowRankDelta(u, scales, v, (rows, columns))))
    _copy_pages_plain(pages, sources, numbers)


def _copy_pages_plain(pages, sources, numbers):
    listed = 0
    for arena, source in zip(pages, sources, strict=True):
        own = numbers[listed : listed + len(source)]
        ends = [i for i in range(len(own)) if i + 1 == len(own) or own[i + 1] != own[i] + 1]
        for first, last in zip([0, *(end + 1 for end in ends)], ends, strict=False):  # of pages that follow each other
            arena[own[first] : own[last] + 1].copy_(source[first : last + 1], non_blocking=True)
        listed += len(source)


def _write_vectors_plain(out, base, codes, levels):
    for to, start, its_codes, its_levels in zip(out, base, codes, levels, strict=True):
        wide = torch.promote_types(start.dtype, torch.float32)
        to.copy_(start.to(wide) + dequantize(its_codes, its_levels.to(wide), start.shape[0]))


def _write_lists_plain(slot_pages, slot_weights, rows, counts, numbers, weights):
    first = 0
    for pages, its_weights, row, count, weight in zip(slot_pages, slot_weights, rows, counts, weights, strict=True):
        its_weights[row, :count] = weight
        pages[row, :count] = torch.tensor(numbers[first : first + count], dtype=torch.int32)
        pages[row, count:] = -1
        first += count


for _name, _plain in (
    ("write_pages_", _write_pages_plain),
    ("copy_pages_", _copy_pages_plain),
    ("send_pages_", _copy_pages_plain),
    ("write_vectors_", _write_vectors_plain),
    ("write_lists_", _write_lists_plain),
    ("send_lists_", _write_lists_plain),
):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dts_fast::{_name}", "CompositeExplicitAutograd"):
        _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
