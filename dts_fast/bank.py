"""Where adapters live at run time: pages in one arena per parameter, and slots that list them.

A *bank* belongs to one matrix of a layer, or to its experts' matrices of one shape. Its arena holds rank pages of a
fixed size (`codes.PageLayout`); a *slot* lists the pages of one adapter, each with a weight. Loading and evicting
write in place: the tensors that kernels, compiled graphs and CUDA graphs hold stay the same. A `VectorTable` does the
same for biases and norms.

Other threads may compute while one loads: what is written belongs to no slot that they use (`slots.SlotTable` sees to
that), and tensors that grow are replaced all together.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps

import torch
from torch import Tensor, nn

from .codes import Delta, DeltaSum, LowRankDelta, num_pages, terms_of
from .errors import CapacityError
from .mixture import mix
from .paging import copy_pages, takes_vector, write_any_vector, write_vectors
from .writes import Writes

# How many adapters' pages a mixture may list in a bank of fixed capacity: every entry of a list is there for all slots.
MOST_MEMBERS = 8


def _outside_inference_mode(method: Callable[..., None]) -> Callable[..., None]:
    """Whatever mode the caller is in: tensors born in it could be neither changed nor saved for backward later."""

    @wraps(method)
    def run(*args, **kwargs) -> None:
        if not torch.is_inference_mode_enabled():  # entering a mode takes longer than a small page
            return method(*args, **kwargs)
        with torch.inference_mode(False):
            return method(*args, **kwargs)

    return run


# Bytes of arenas that larger ones have replaced, since memory was last given back.
_replaced: list[int] = []
_WORTH_GIVING_BACK = 64 << 20


def give_back_memory() -> None:
    """Return what replaced arenas have left to the system, once it is worth a call: the C library keeps the holes, no
    larger arena fits into them, and many adapters loaded one by one would take several times their bytes."""
    if sum(_replaced) < _WORTH_GIVING_BACK:
        return
    _replaced.clear()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


@dataclass(frozen=True)
class Arena:
    """A fixed capacity: pages of all slots, and how many of them one matrix of an adapter may take."""

    pages: int
    per_slot: int


class Bank(nn.Module):
    """The arena and the slots of one matrix, or of ``parts`` of one shape (E experts' projections).

    To the ops a matrix of a slot is a slot: the one that has number ``slot * parts + part`` there.

    Attributes:
        pages: uint8 ``[P, page_nbytes]``.
        slot_pages: int32 ``[S * parts, L]``; -1 ends a list.
        slot_weights: float32 ``[S * parts, L]``.

    Args:
        page_nbytes: size of a page.
        num_slots: S.
        parts: matrices of a slot.
        arena: fixed capacity; None lets P and L grow when a load needs it (new tensors: recapture graphs). L is then
            fixed too, to what up to 8 loads may take, so that a mixture can list others' pages.
    """

    pages: Tensor
    slot_pages: Tensor
    slot_weights: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        page_nbytes: int,
        num_slots: int,
        *,
        parts: int = 1,
        arena: Arena | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.arena, self.parts, self.page_nbytes = arena, parts, page_nbytes
        num_pages, length = (arena.pages, arena.per_slot * min(num_slots, MOST_MEMBERS)) if arena else (0, 0)
        # Not persistent: adapters are files of their own, and the base's state dict stays the base's.
        for name, tensor in (
            ("pages", torch.zeros(num_pages, page_nbytes, dtype=torch.uint8, device=device)),
            ("slot_pages", torch.full((num_slots * parts, length), -1, dtype=torch.int32, device=device)),
            ("slot_weights", torch.zeros(num_slots * parts, length, dtype=torch.float32, device=device)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._free = list(range(num_pages))
        self._listed: dict[int, list[int]] = {}  # row -> its pages, as slot_pages has them
        self._users: dict[int, int] = {}  # page -> how many times rows list it, where that is not once

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops take, in their order."""
        buffers = self._buffers  # read once: a growing bank replaces all of them together
        return buffers["pages"], buffers["slot_pages"], buffers["slot_weights"]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def nbytes_of(self, slot: int) -> int:
        """Bytes of the pages that a slot lists; pages that slots share count for each of them."""
        return sum(len(self._listed[row]) for row in self._rows(slot)) * self.pages.shape[1]

    def _rows(self, slot: int) -> list[int]:
        """The rows of a slot that list anything."""
        rows = range(slot * self.parts, (slot + 1) * self.parts)
        return [row for row in rows if row in self._listed]

    def fits(self, counts: Collection[int], without: Collection[int] = ()) -> bool:
        """Whether a load of matrices of so many pages would succeed once these slots are empty."""
        if self.arena is None:
            return True
        if max(counts, default=0) > self.arena.per_slot:
            return False
        if sum(counts) <= len(self._free):
            return True
        emptied = {row for slot in without for row in self._rows(slot)}
        return sum(counts) <= len(self._free) + len(self._only_in(emptied))

    @_outside_inference_mode
    def load(self, slot: int, pages: Tensor, weight: float = 1.0, *, part: int = 0) -> None:
        """Write the pages of an adapter's matrix and let a slot list them.

        Raises:
            CapacityError: a bank of fixed capacity has too few pages; nothing was changed.
        """
        lists = self._take({slot * self.parts + part: pages.shape[0]})
        try:
            copy_pages([(self.pages, numbers, _staged(pages, self.pages)) for numbers in lists.values()])
            self._list(lists, weight)
        except BaseException:
            self._untake(lists)
            raise

    @_outside_inference_mode
    def load_deltas(
        self, slot: int, deltas: Mapping[int, LowRankDelta | DeltaSum], writes: Writes | None = None
    ) -> None:
        """`load` of some matrices of a slot, by part.

        Args:
            writes: what will write their pages, with those of other banks; they are written now if it is None.
        """
        if writes is not None and not writes.is_first(self, slot, deltas.values()):
            return  # tied layers share a bank
        first, own = slot * self.parts, writes or Writes()
        lists = self._take({first + part: page_count(delta) for part, delta in deltas.items()})
        try:
            for row, numbers in lists.items():
                own.add_pages(self, numbers, deltas[row - first])
            self._list(lists, 1.0, own)
            if writes is None:
                own.write()
        except BaseException:
            self._untake(lists)
            raise

    def _take(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Empty rows and take so many pages for each; those that take none are left out."""
        most, total = max(counts.values(), default=0), sum(counts.values())
        if self.arena is not None and most > self.arena.per_slot:
            raise CapacityError(f"the adapter takes {most} pages, a slot of this bank at most {self.arena.per_slot}.")
        listed = [row for row in counts if row in self._listed]
        self._make_room(most, new=total, reusable=len(self._only_in(listed)))
        if listed:
            self._empty(listed)
        lists, at = {}, 0
        for row, count in counts.items():
            if count:
                lists[row] = self._free[at : at + count]
                at += count
        del self._free[:at]  # in place, as everywhere here: a module looks at what is set on it
        return lists

    def _untake(self, lists: Mapping[int, list[int]]) -> None:
        """Give pages back that no row lists yet."""
        if not any(row in self._listed for row in lists):
            self._free[:] = sorted({*self._free, *(page for pages in lists.values() for page in pages)})

    @_outside_inference_mode
    def share(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        """Let a slot list the pages of other slots, each with that slot's weight times one of the mixture's: an exact
        sum that costs no pages. The pages stay as long as any slot lists them.

        Args:
            slot: none of the members'; it is emptied first.
            members: (slot, weight) of each.

        Raises:
            CapacityError: the list is longer than what a slot of a bank of fixed capacity may list.
        """
        self.evict(slot)
        for part in range(self.parts):
            pages, weights = [], []
            for member, weight in members:
                row = member * self.parts + part
                listed = self._listed.get(row, [])
                pages += listed
                weights.append(self.slot_weights[row, : len(listed)] * weight)
            self._make_room(len(pages), new=0)
            if pages:
                own = torch.cat(weights)
                for page in pages:
                    self._users[page] = self._users.get(page, 1) + 1
                self._list({slot * self.parts + part: pages}, own)

    @_outside_inference_mode
    def evict(self, slot: int, writes: Writes | None = None) -> None:
        """Empty a slot and free the pages that no other slot shares.

        Args:
            writes: what will empty the lists, with those of other banks; they are emptied now if it is None.
        """
        rows = self._rows(slot)
        if rows:
            self._empty(rows, writes)

    def _empty(self, rows: Sequence[int], writes: Writes | None = None) -> None:
        own = writes or Writes()
        for row in rows:
            own.add_list(self, row, [], 0.0)
        own.add_end(partial(self._release, rows))  # pages that a list still names must not become another adapter's
        if writes is None:
            own.write()

    def _release(self, rows: Sequence[int]) -> None:
        """Free the pages of rows whose lists are empty by now."""
        freed = []
        for row in rows:
            for page in self._listed.pop(row, ()):
                left = self._users.pop(page, 1) - 1
                if left:
                    self._users[page] = left
                else:
                    freed.append(page)
        self._free.extend(freed)
        self._free.sort()

    def listed(self, slot: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """The pages ``[n, page_nbytes]`` of a slot's matrix and their weights ``[n]``."""
        row = slot * self.parts + part
        numbers = self._listed.get(row, [])
        return self.pages[torch.tensor(numbers, dtype=torch.long)], self.slot_weights[row, : len(numbers)]

    def _list(self, lists: Mapping[int, list[int]], weights: Tensor | float, writes: Writes | None = None) -> None:
        """Let rows list pages, all with one weight, or a single row's with its own."""
        # First: whatever stops this half way, `evict` knows what to clear.
        self._listed.update(lists)
        own = writes or Writes()
        for row, pages in lists.items():
            own.add_list(self, row, pages, weights)
        if writes is None:
            own.write()

    def _only_in(self, rows: Collection[int]) -> list[int]:
        """The pages that these rows list and no other does."""
        if not self._users:
            return [page for row in rows for page in self._listed[row]]
        times = Counter(page for row in rows for page in self._listed[row])
        return [page for page, count in times.items() if self._users.get(page, 1) == count]

    def _make_room(self, count: int, new: int | None = None, reusable: int = 0) -> None:
        """Grow what may grow until a row can list ``count`` pages, of which ``new`` (all if None) must be free or are
        among the ``reusable`` ones about to be freed.

        Raises:
            CapacityError: what is fixed is too small.
        """
        length, free = self._buffers["slot_pages"].shape[1], len(self._free) + reusable
        if count > length and self.arena is not None:
            raise CapacityError(f"the mixture lists {count} pages, a slot of this bank at most {length}.")
        new = count if new is None else new
        if new > free and self.arena is not None:
            raise CapacityError(
                f"the adapter takes {new} pages, {free} of {self.pages.shape[0]} are free; delete an "
                "adapter first, or give the bank more pages."
            )
        if count <= length and new <= free:
            return
        more = max(count - length, 0)
        with self._calls_stream():
            grown = {
                "pages": self.pages,
                "slot_pages": nn.functional.pad(self.slot_pages, (0, more), value=-1),
                "slot_weights": nn.functional.pad(self.slot_weights, (0, more)),
            }
            if new > free:
                old = self.pages.shape[0]
                grown["pages"] = self.pages.new_zeros(old + new - free, self.pages.shape[1])
                grown["pages"][:old] = self.pages
        _replaced.append(self.pages.nbytes)
        outgrown = self._buffers
        # One assignment: a call in another thread has either all of the old tensors or all of the new ones. The old
        # ones are not written to any more.
        self._buffers = grown
        self._free.extend(range(outgrown["pages"].shape[0], grown["pages"].shape[0]))
        if self.pages.is_cuda:
            torch.cuda.synchronize(self.pages.device)  # kernels of other streams may be reading what goes with this

    @contextmanager
    def _calls_stream(self) -> Iterator[None]:
        """On a GPU, its default stream, on which calls run; what was done there is done at the end.

        Memory goes back to the stream that it was taken on. If an arena were a load's stream's, one that is outgrown
        could be another load's while a call that had read its address is yet to be launched.
        """
        if not self.pages.is_cuda:
            yield
            return
        stream = torch.cuda.default_stream(self.pages.device)
        stream.wait_stream(torch.cuda.current_stream(self.pages.device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()  # loads' streams do not wait for it

    @torch.inference_mode(False)
    def _apply(self, fn, recurse=True):
        # Moves between devices only: `.half()` of a model must not round slot weights.
        device = fn(torch.empty(0, device=self.pages.device)).device
        self._buffers = {name: tensor.to(device) for name, tensor in self._buffers.items()}
        return self


def page_count(delta: LowRankDelta | DeltaSum) -> int:
    """How many pages a delta takes."""
    if isinstance(delta, LowRankDelta):
        return num_pages(delta.rank)
    return sum(num_pages(term.rank) for term in terms_of(delta))


def _staged(values: Tensor, target: Tensor) -> Tensor:
    """Pinned where they are to be copied to a GPU, so that the copy need not be waited for."""
    return values.pin_memory() if target.is_cuda and values.device.type == "cpu" else values


class VectorTable(nn.Module):
    """A bias or norm of every slot, personalised: one row each, in the base's dtype, and the base's own at the end,
    where slot -1 finds it. Dense, because a vector is small and is then used as the base's would be.

    Attributes:
        values: ``[S + 1, n]``.

    Args:
        base: the base's parameter ``[n]``.
        num_slots: S.
        owner: the layer that has it, and its name there: where it is looked for when a state dict has been loaded.
    """

    values: Tensor

    @torch.inference_mode(False)
    def __init__(self, base: Tensor, num_slots: int, owner: tuple[nn.Module, str] | None = None) -> None:
        super().__init__()
        self.register_buffer("values", base.detach().repeat(num_slots + 1, 1), persistent=False)
        self.deltas: dict[int, Delta] = {}
        self._owner = owner

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        if self._owner is not None:  # a sibling that came before, and has its parameters by now
            layer, name = self._owner
            self._follow(layer._parameters.get(name, layer._buffers.get(name)))

    @_outside_inference_mode
    @torch.no_grad()
    def _follow(self, base: Tensor) -> None:
        """Take over another base."""
        values = self._buffers["values"]
        if values.is_meta or base.is_meta or torch.equal(values[-1], base.to(values.device)):
            return
        values.copy_(base)
        for slot, delta in self.deltas.items():
            write_any_vector(values.select(0, slot), values.select(0, -1), delta)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def nbytes_of(self, slot: int) -> int:
        """Bytes of a slot's row, and of the codes that it was made from."""
        return self.values[0].nbytes + self.deltas[slot].nbytes if slot in self.deltas else 0

    @_outside_inference_mode
    def load(self, slot: int, delta: Delta, writes: Writes | None = None) -> None:
        """Personalise a slot's row; what can be is left to ``writes``."""
        values = self._buffers["values"]
        out, base = values.select(0, slot), values.select(0, -1)
        if not takes_vector(out, base, delta) or (writes is None and not out.is_cpu):
            write_any_vector(out, base, delta)
        elif writes is None:
            write_vectors([(out, base, delta)])
        else:
            writes.add_vector(out, base, delta)
        self.deltas[slot] = delta

    def share(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        """The weighted sum of other slots' deltas."""
        mixed = mix("vector", [(weight, self.deltas.get(member)) for member, weight in members])
        if mixed is not None:
            self.load(slot, mixed)

    @_outside_inference_mode
    def evict(self, slot: int, writes: Writes | None = None) -> None:
        if slot not in self.deltas:
            return
        values, own = self._buffers["values"], writes or Writes()
        own.add_copy(values.select(0, slot), values.select(0, -1))
        own.add_end(partial(self.deltas.pop, slot, None))
        if writes is None:
            own.write()
