"""Which adapters are in memory: room for loads, eviction of the least recently used, and calls that wait for neither.

A load writes to a slot that no name has, and gives it its name when all layers hold their part: a call sees an adapter
whole or not at all. An adapter that is in use, pinned, or a mixture (which no file holds) is not evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from .errors import CapacityError
from .nn import DTSModule
from .nn.module import Parameter
from .slots import BASE, SlotTable

# What a load writes: wrapper and its parameters.
Parts = list[tuple[DTSModule, Mapping[str, Parameter]]]


class Residency:
    """The adapters of a model, in slots and pages.

    Args:
        table: names and slots.
        wrappers: the model's, by path; more may come.
        evicts: whether the least recently used may go where room is needed.
    """

    def __init__(self, table: SlotTable, wrappers: Mapping[str, DTSModule], evicts: bool) -> None:
        self.table, self.wrappers, self.evicts = table, wrappers, evicts
        self._freed = False  # whether pages were freed that kernels in flight may still read

    def clear(self, slot: int) -> None:
        """Empty a slot in all layers."""
        self._freed = True
        for wrapper in list(self.wrappers.values()):
            wrapper.clear_slot(slot)

    def load(self, name: str, parts: Parts, replace: bool = False, keep: Collection[str] = ()) -> None:
        """Load an adapter.

        Args:
            replace: take the place of another one of its name, when all is loaded.
            keep: names that are not evicted for it.

        Raises:
            DTSError: the name is taken.
            CapacityError: it does not fit, whatever is evicted; or it would once running calls end, of which this
                thread's is one. Nothing is changed.
        """

        def fits(without: list[int]) -> bool:
            return all(wrapper.fits(parameters, without) for wrapper, parameters in parts)

        def write(slot: int) -> None:
            for wrapper, parameters in parts:
                wrapper.load_slot(slot, parameters)

        self._fill(name, replace, keep, fits, write)

    def mix(self, name: str, members: list[tuple[int, float]], keep: Collection[str]) -> None:
        """Load the weighted sum of slots, whose names are to be kept; it is pinned.

        Raises:
            CapacityError, DTSError: see `load` and `DTSModule.mix_slots`. Nothing is changed.
        """

        def write(slot: int) -> None:
            for wrapper in list(self.wrappers.values()):
                wrapper.mix_slots(slot, members)

        self._fill(name, False, keep, lambda without: True, write)
        self.table.pin(name)

    def lease(self, names: Iterable[str], load_again: Callable[[str, Collection[str]], None]) -> dict[str, int]:
        """The slots of names for a call (`SlotTable.lease`), after what was evicted has been loaded again.

        Args:
            load_again: loads a name, keeping others.

        Raises:
            UnknownAdapterError: an unknown name.
            CapacityError: more adapters than there is room for.
        """
        names = set(names)
        while True:
            slots = self.table.lease(names)
            if slots is not None:
                return slots
            needed = (names | set(self.table.pinned)) - {BASE}
            if len(needed) > self.table.capacity:
                raise CapacityError(
                    f"the call uses {len(names - {BASE})} adapters, with {len(needed)} to be in memory at a time "
                    f"(pinned ones among them), in {self.table.capacity} slots. Divide the batch, or construct with a "
                    "larger max_adapters."
                )
            for name in names - {BASE} - set(self.table.resident):
                load_again(name, names)

    def _fill(
        self,
        name: str,
        replace: bool,
        keep: Collection[str],
        fits: Callable[[list[int]], bool],
        write: Callable[[int], None],
    ) -> None:
        while True:
            version = self.table.version
            with self.table.loading:
                if not replace:
                    self.table.check_new(name)
                slot = self._room(name, keep, fits)
                if slot is not None:
                    try:
                        with self._copying():
                            write(slot)
                    except BaseException:  # whatever stopped it, the slot must not keep a part of the adapter
                        self.clear(slot)
                        self.table.cancel(slot)
                        raise
                    self.table.occupy(name, slot, self.clear)
                    return
            if self.table.leased_here:
                raise CapacityError(
                    "all room that could be made is in use by running calls, one of them in this thread, which cannot "
                    "wait for itself. Load between calls, or construct with a larger capacity."
                )
            self.table.wait_for_change(version)

    def _room(self, name: str, keep: Collection[str], fits: Callable[[list[int]], bool]) -> int | None:
        """A reserved slot, for which others were evicted where that is needed and allowed; None if there will be one
        when running calls have ended.

        Raises:
            CapacityError: there will not.
        """
        table = self.table
        own = [name] if name in table.resident else []  # what a new version of it replaces
        going: list[str] = []
        for more in [[], *([n] for n in (table.evictable(keep) if self.evicts else [])), own]:
            going += [n for n in more if n not in going]
            slots = [table.slot(n) for n in going]
            if table.free + len(slots) > 0 and fits(slots):
                # What a call has taken since stays, and room is looked for again.
                gone = all(table.evict(n, self.clear, pinned=n == name) for n in going)
                return table.reserve() if gone else None
        later = [table.slot(n) for n in {*(table.removable(keep) if self.evicts else []), *own}] + table.retiring
        if table.free + len(later) > 0 and fits(later):
            return None
        if table.free + len(later) == 0:
            return table.reserve()  # says what takes the slots
        raise CapacityError(
            f"adapter {name!r} does not fit in the memory for adapters"
            f"{', whatever is evicted' if self.evicts else ''}: in use are {', '.join(table.resident) or 'none'}. "
            "Delete or unpin some, or construct with a larger capacity."
        )

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Within, copies to GPUs run on streams of their own; at the end they are done."""
        tensors = (t for wrapper in self.wrappers.values() for t in wrapper.buffers())
        devices = {t.device for t in tensors if t.is_cuda} if torch.cuda.is_initialized() else ()
        with ExitStack() as stack:
            for device in devices:
                if self._freed:
                    torch.cuda.synchronize(device)  # calls have ended, but their kernels may not have
                stream = torch.cuda.Stream(device)
                stack.callback(stream.synchronize)
                stack.enter_context(torch.cuda.stream(stream))
            self._freed = False
            yield
