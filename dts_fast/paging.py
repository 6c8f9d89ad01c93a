"""Deltas as a bank and its tables hold them: ops with native kernels on CPUs, as that is most of a load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from . import native  # noqa: F401  (registers its kernel)
from .codes import (
    CodedMatrix,
    CodedVector,
    Delta,
    DeltaSum,
    LowRankDelta,
    dequantize,
    num_pages,
    to_pages,
)

_LIBRARY = torch.library.Library("dts_fast", "FRAGMENT")
_LIBRARY.define(
    "write_pages_(Tensor(a!)[] pages, Tensor[] u_codes, Tensor[] u_levels, Tensor[] s, Tensor[] v_codes, "
    "Tensor[] v_levels, int[] n, int[] k, int[] numbers) -> ()"
)
_LIBRARY.define("write_vector_(Tensor(a!) out, Tensor base, Tensor codes, Tensor levels) -> ()")

# Bytes of pages that are on their way to a GPU while the next ones are written.
_STAGED = 32 << 20


class HasPages(Protocol):
    """A bank: what it has at the time that it is asked."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """pages, slot_pages, slot_weights."""


# An arena ``[P, nbytes]``, the numbers of pages there, and the delta that they are for.
Write = tuple[Tensor, Sequence[int], LowRankDelta]


# A bank, a row of its lists, the pages that it lists there, and their weights (or one for all).
Listing = tuple[HasPages, int, Sequence[int], "Tensor | float"]


class Writes:
    """What a load writes to banks, gathered until all is written together: an op of its own takes longer than most
    matrices of an adapter."""

    def __init__(self) -> None:
        self._gathered: list[tuple[HasPages, Sequence[int], LowRankDelta]] = []
        self._lists: list[Listing] = []
        self._seen: dict[tuple[int, int], list[Delta]] = {}
        self._copies: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def is_first(self, bank: HasPages, slot: int, deltas: Iterable[Delta]) -> bool:
        """Whether these deltas were not asked about before, for this slot of this bank."""
        seen, deltas = self._seen.get((id(bank), slot)), list(deltas)
        self._seen[id(bank), slot] = deltas
        return seen is None or list(map(id, seen)) != list(map(id, deltas))

    @torch.inference_mode(False)
    def copy_of(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor that an adapter stores whole; the same one for all that ask: tied layers share it."""
        key = id(tensor), device, dtype
        if key not in self._copies:
            self._copies[key] = tensor, tensor.to(device, dtype, copy=True)
        return self._copies[key][1]

    def add_list(self, bank: HasPages, row: int, numbers: Sequence[int], weights: Tensor | float) -> None:
        """Let `write` write a list to a bank on another device."""
        self._lists.append((bank, row, numbers, weights))

    def add_pages(self, bank: HasPages, numbers: Sequence[int], delta: LowRankDelta | DeltaSum) -> None:
        """Let `write` write a delta to these pages of a bank, whose arena may be another one by then."""
        if isinstance(delta, LowRankDelta):
            self._gathered.append((bank, numbers, delta))
            return
        first = 0
        for term in delta.terms:
            count = num_pages(term.rank)
            self._gathered.append((bank, numbers[first : first + count], term))
            first += count

    def write(self) -> None:
        """Write what was gathered; to GPUs on their current streams, without waiting."""
        gathered, self._gathered = self._gathered, []
        here: list[Write] = []
        sent: dict[torch.device, list[Write]] = {}
        for bank, numbers, delta in gathered:
            arena = bank.tensors[0]
            if not delta.s.is_cpu:
                copy_pages(arena, numbers, to_pages(delta))
            elif arena.is_cpu:
                here.append((arena, numbers, delta))
            else:
                sent.setdefault(arena.device, []).append((arena, numbers, delta))
        _write(here)
        for writes in sent.values():
            send_pages(writes)
        lists, self._lists = self._lists, []
        devices = [bank.tensors[1].device for bank, *_ in lists]
        for device in dict.fromkeys(devices):  # last: until they stand, the rows are empty for whoever reads them
            send_lists([each for each, its in zip(lists, devices, strict=True) if its == device])


def send_pages(writes: Sequence[Write]) -> None:
    """Write deltas to arenas on another device: by pinned memory, so that copies run while more pages are written."""
    for some in _in_parts(writes):
        sizes = [len(numbers) * arena.shape[1] for arena, numbers, _ in some]
        # What the allocator keeps pinned is not given to others before the copies from it are done.
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=some[0][0].is_cuda)
        parts = [
            part.view(len(numbers), arena.shape[1])
            for part, (arena, numbers, _) in zip(buffer.split(sizes), some, strict=True)
        ]
        _write([(part, range(len(part)), delta) for part, (_, _, delta) in zip(parts, some, strict=True)])
        for part, (arena, numbers, _) in zip(parts, some, strict=True):
            copy_pages(arena, numbers, part)


def send_lists(lists: Sequence[Listing]) -> None:
    """Write lists to banks on another device: all numbers in one copy, and what is left is the device's own."""
    tensors = [bank.tensors for bank, *_ in lists]
    length, on_gpu = max(len(numbers) for _, _, numbers, _ in lists), tensors[0][1].is_cuda
    pages = torch.zeros(len(lists), length, dtype=torch.int32, pin_memory=on_gpu)
    weights = torch.zeros(len(lists), length, dtype=torch.float32, pin_memory=on_gpu)
    for i, (_, _, numbers, own) in enumerate(lists):
        pages.numpy()[i, : len(numbers)] = numbers
        weights.numpy()[i, : len(numbers)] = 0 if isinstance(own, Tensor) else own
    device = tensors[0][1].device
    pages, weights = (t.to(device, non_blocking=True) for t in (pages, weights))
    places, values = ([], []), ([], [])
    for i, ((_, row, numbers, own), (_, slot_pages, slot_weights)) in enumerate(zip(lists, tensors, strict=True)):
        count = len(numbers)
        for side, (table, sent) in enumerate(((slot_weights, weights), (slot_pages, pages))):
            places[side].append(table[row, :count])
            values[side].append(own if side == 0 and isinstance(own, Tensor) else sent[i, :count])
    for side in (0, 1):  # the pages after their weights
        torch._foreach_copy_(places[side], values[side])


def _in_parts(writes: Iterable[Write]) -> Iterator[list[Write]]:
    part, size = [], 0
    for write in writes:
        if size >= _STAGED:
            yield part
            part, size = [], 0
        part.append(write)
        size += len(write[1]) * write[0].shape[1]
    if part:
        yield part


def copy_pages(arena: Tensor, numbers: Sequence[int], pages: Tensor) -> None:
    """Copy pages ``[len(numbers), nbytes]`` to these places of an arena, neighbours together."""
    for first, last in runs(numbers):
        arena[numbers[first] : numbers[last] + 1].copy_(pages[first : last + 1], non_blocking=True)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (first, last) of neighbours that follow each other."""
    ends = [i for i in range(len(numbers)) if i + 1 == len(numbers) or numbers[i + 1] != numbers[i] + 1]
    return list(zip([0, *(end + 1 for end in ends)], ends, strict=False))


def _write(writes: Sequence[Write]) -> None:
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


def write_vector(out: Tensor, base: Tensor, delta: Delta) -> None:
    """Write ``base + delta`` to ``out``, all ``[n]``: the sum in float32 (or wider), rounded once."""
    native_takes = isinstance(delta, CodedVector) and len(delta.shape) == 1 and delta.levels.dtype == torch.float32
    if native_takes and all(t.is_cpu and t.is_contiguous() for t in (out, base, delta.codes, delta.levels)):
        torch.ops.dts_fast.write_vector_(out, base, delta.codes, delta.levels)
    else:
        wide = torch.promote_types(base.dtype, torch.float32)
        out.copy_(base.to(wide) + delta.dequantize(wide).to(base.device))


def _write_vector_plain(out, base, codes, levels):
    wide = torch.promote_types(base.dtype, torch.float32)
    out.copy_(base.to(wide) + dequantize(codes, levels.to(wide), base.shape[0]))


def _write_pages_plain(pages, u_codes, u_levels, s, v_codes, v_levels, n, k, numbers):
    first = 0
    for arena, *factors, rows, columns in zip(pages, u_codes, u_levels, s, v_codes, v_levels, n, k, strict=True):
        codes, levels, scales, other_codes, other_levels = factors
        u, v = CodedMatrix(codes, levels, rows), CodedMatrix(other_codes, other_levels, columns)
        own = to_pages(LowRankDelta(u, scales, v, (rows, columns)))
        copy_pages(arena, numbers[first : first + len(own)], own)
        first += len(own)


_LIBRARY.impl("write_pages_", _write_pages_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("write_vector_", _write_vector_plain, "CompositeExplicitAutograd")
