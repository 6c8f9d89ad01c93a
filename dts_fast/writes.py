"""What a load writes to banks and tables, gathered until all is written together: an op of its own takes longer than
most matrices of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .codes import CodedVector, Delta, DeltaSum, LowRankDelta, num_pages, terms_of, to_pages
from .paging import copy_pages, write_lists, write_pages, write_vectors

# Bytes of pages that are on their way to a GPU while the next ones are written: at most, and at least where there are
# as many.
_STAGED, _LEAST_STAGED = 32 << 20, 1 << 20


class HasPages(Protocol):
    """A bank: what it has at the time that it is asked."""

    page_nbytes: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """pages, slot_pages, slot_weights."""


class NotKeptError(Exception):
    """Pages that were kept do not fit the load any more; the file has them."""


class Kept:
    """An adapter's pages in host memory, pinned where they are for a GPU, by their place in a load: what comes back is
    copied, and neither read from its file nor rearranged.

    Args:
        most: bytes; of an adapter with more, nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self._most, self.nbytes = most, 0
        self._blocks: dict[int, tuple[HasPages, Tensor]] = {}

    @property
    def is_whole(self) -> bool:
        return self.nbytes <= self._most

    def put(self, buffer: Tensor, pages: Iterable[tuple[int, HasPages, Tensor]]) -> None:
        """Keep a buffer with what is in it: place, bank and pages."""
        # Pinned memory is given out in powers of two.
        self.nbytes += 1 << (buffer.nbytes - 1).bit_length() if buffer.is_pinned() else buffer.nbytes
        if self.is_whole:
            self._blocks.update((place, (bank, own)) for place, bank, own in pages)
        else:
            self._blocks.clear()

    def give_up(self) -> None:
        self.nbytes, self._most = 1, 0
        self._blocks.clear()

    def take(self, place: int, bank: HasPages, count: int) -> Tensor:
        """The pages that were put there.

        Raises:
            NotKeptError: they were for another bank: layers were untied since.
        """
        owner, pages = self._blocks.get(place, (None, None))
        if owner is not bank or pages.shape[0] != count:
            raise NotKeptError
        return pages


class _Pages(NamedTuple):
    """Pages to be written: those of a delta, or as they are."""

    bank: HasPages
    numbers: Sequence[int]
    source: LowRankDelta | Tensor
    place: int  # among all of the load

    @property
    def arena(self) -> Tensor:
        return self.bank.tensors[0]

    @property
    def nbytes(self) -> int:
        return len(self.numbers) * self.bank.page_nbytes


class _Vector(NamedTuple):
    """A row ``out [n]`` that is to become ``base + delta``."""

    out: Tensor
    base: Tensor
    delta: CodedVector


# A bank, a row of its lists, the pages that it lists there, and their weights (or one for all).
Listing = tuple[HasPages, int, Sequence[int], "Tensor | float"]


class Writes:
    """What one load writes.

    Args:
        keeping: gets all pages.
        kept: where they come from, for an adapter that was loaded before; its deltas need no codes then.
    """

    def __init__(self, keeping: Kept | None = None, kept: Kept | None = None) -> None:
        self._keeping, self._kept = keeping, kept
        self._pages: list[_Pages] = []
        self._waiting = self._count = 0  # bytes of these; how many there were of all
        self._vectors: list[_Vector] = []
        self._row_copies: tuple[list[Tensor], list[Tensor]] = [], []
        self._lists: list[Listing] = []
        self._ends: list[Callable[[], object]] = []
        self._seen: dict[tuple[int, int], list[Delta]] = {}
        self._copies: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def is_first(self, bank: HasPages, slot: int, deltas: Iterable[Delta]) -> bool:
        """Whether these deltas were not asked about before, for this slot of this bank."""
        key, now = (id(bank), slot), list(deltas)  # kept: what is no more may share its id with what comes
        before, self._seen[key] = self._seen.get(key), now
        return before is None or list(map(id, before)) != list(map(id, now))

    @torch.inference_mode(False)
    def copy_of(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor that an adapter stores whole; the same one for all that ask: tied layers share it."""
        key = id(tensor), device, dtype
        if key not in self._copies:
            self._copies[key] = tensor, tensor.to(device, dtype, copy=True)
        return self._copies[key][1]

    def add_pages(self, bank: HasPages, numbers: Sequence[int], delta: LowRankDelta | DeltaSum) -> None:
        """Let `write` write a delta to these pages of a bank, whose arena may be another one by then."""
        first = 0
        for term in terms_of(delta):
            count = num_pages(term.rank)
            source = term if self._kept is None else self._kept.take(self._count, bank, count)
            self._pages.append(_Pages(bank, numbers[first : first + count], source, self._count))
            self._count += 1
            first += count
        self._waiting += first * bank.page_nbytes
        if self._waiting >= _STAGED and not bank.tensors[0].is_cpu:
            self._write_pages()  # they are copied while the next ones are gathered

    def add_vector(self, out: Tensor, base: Tensor, delta: CodedVector) -> None:
        """Let `write` write ``base + delta`` to ``out``, all ``[n]``."""
        self._vectors.append(_Vector(out, base, delta))

    def add_copy(self, out: Tensor, source: Tensor) -> None:
        """Let `write` copy a row ``[n]`` to another one on the same device."""
        self._row_copies[0].append(out)
        self._row_copies[1].append(source)

    def add_list(self, bank: HasPages, row: int, numbers: Sequence[int], weights: Tensor | float) -> None:
        """Let `write` write a list to a bank; -1 ends it."""
        self._lists.append((bank, row, numbers, weights))

    def add_end(self, end: Callable[[], object]) -> None:
        """Let `write` call something when all is written, and not where that fails."""
        self._ends.append(end)

    def write(self) -> None:
        """Write what was gathered; to GPUs on their current streams, without waiting."""
        self._write_pages()
        vectors, self._vectors = self._vectors, []
        for some in _by_device(vectors, [vector.out.device for vector in vectors]):
            (write_vectors if some[0].out.is_cpu else send_vectors)(some)
        (outs, sources), self._row_copies = self._row_copies, ([], [])
        if outs:
            torch._foreach_copy_(outs, sources)
        lists, self._lists = self._lists, []
        # Last: until they stand, the rows are empty for whoever reads them.
        for some in _by_device(lists, [bank.tensors[1].device for bank, *_ in lists]):
            write_lists([(*bank.tensors[1:], row, numbers, weights) for bank, row, numbers, weights in some])
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def _write_pages(self) -> None:
        gathered, self._pages, self._waiting = self._pages, [], 0
        ready = [each for each in gathered if isinstance(each.source, Tensor)]
        copy_pages([(each.arena, each.numbers, each.source) for each in ready])
        deltas = [each for each in gathered if not isinstance(each.source, Tensor)]
        for each in (each for each in deltas if not each.source.s.is_cpu):
            copy_pages([(each.arena, each.numbers, to_pages(each.source))])
            if self._keeping is not None:
                self._keeping.give_up()
        deltas = [each for each in deltas if each.source.s.is_cpu]
        for some in _by_device(deltas, [each.arena.device for each in deltas]):
            if some[0].arena.is_cpu and self._keeping is None:
                write_pages([(each.arena, each.numbers, each.source) for each in some])
            else:
                send_pages(some, self._keeping)


def _by_device(entries: Sequence, devices: Sequence[torch.device]) -> list[list]:
    groups: dict[torch.device, list] = {}
    for entry, device in zip(entries, devices, strict=True):
        groups.setdefault(device, []).append(entry)
    return list(groups.values())


def send_pages(writes: Sequence[_Pages], keeping: Kept | None = None) -> None:
    """Write deltas to arenas of one device through host memory: pinned, so that copies run while more are written."""
    for some in _in_parts(writes):
        sizes = [each.nbytes for each in some]
        # What the allocator has pinned is not given to others before the copies from it are done.
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=some[0].arena.is_cuda)
        parts = [
            part.view(len(each.numbers), each.arena.shape[1])
            for part, each in zip(buffer.split(sizes), some, strict=True)
        ]
        write_pages([(part, range(len(part)), each.source) for part, each in zip(parts, some, strict=True)])
        copy_pages([(each.arena, each.numbers, part) for part, each in zip(parts, some, strict=True)])
        if keeping is not None:
            keeping.put(buffer, [(each.place, each.bank, part) for part, each in zip(parts, some, strict=True)])


def _in_parts(writes: Sequence[_Pages]) -> Iterator[list[_Pages]]:
    """Parts of which each is just below a power of two: in such sizes pinned memory is given out."""
    left = sum(write.nbytes for write in writes)
    part, size = [], 0
    for write in writes:
        limit = min(_STAGED, max(_LEAST_STAGED, 1 << max(left.bit_length() - 1, 0)))
        if part and size + write.nbytes > limit:
            yield part
            left -= size
            part, size = [], 0
        part.append(write)
        size += write.nbytes
    if part:
        yield part


def send_vectors(vectors: Sequence[_Vector]) -> None:
    """`write_vectors` to another device: all deltas in one copy, and their sums there."""
    sizes, device = [vector.out.shape[0] for vector in vectors], vectors[0].out.device
    deltas = torch.zeros(sum(sizes), pin_memory=device.type == "cuda")
    parts = deltas.split(sizes)
    write_vectors([_Vector(part, part, vector.delta) for part, vector in zip(parts, vectors, strict=True)])
    sent = deltas.to(device, non_blocking=True).split(sizes)
    wide = [v.base.to(torch.promote_types(v.base.dtype, torch.float32)) for v in vectors]
    torch._foreach_copy_([vector.out for vector in vectors], torch._foreach_add(wide, sent))
