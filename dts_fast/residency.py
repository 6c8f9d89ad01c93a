"""Which adapters are in memory: room for loads, eviction of the least recently used, and calls that wait for neither.

A load writes to a slot that no name has, and gives it its name when all layers hold their part: a call sees an adapter
whole or not at all. An adapter that is in use, pinned, or a mixture (which no file holds) is not evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .bank import Bank, VectorTable, give_back_memory
from .codes import LowRankDelta, terms_of
from .errors import CapacityError
from .host_cache import HostCache, Parts, Ready
from .nn import DTSModule
from .nn.module import Parameter
from .prepack import PackedLinear
from .slots import BASE, SlotTable
from .writes import Kept, NotKeptError, Writes


class Residency:
    """The adapters of a model, in slots and pages.

    Args:
        table: names and slots.
        wrappers: the model's, by path; more may come.
        evicts: whether the least recently used may go where room is needed.
        has_file: whether an adapter can be loaded again.
        host_bytes: of host memory for copies of what was loaded.
    """

    def __init__(
        self,
        table: SlotTable,
        wrappers: Mapping[str, DTSModule],
        evicts: bool,
        has_file: Callable[[str], bool],
        host_bytes: int = 0,
    ) -> None:
        self.table, self.wrappers, self.evicts, self.has_file = table, wrappers, evicts, has_file
        self.host = HostCache(host_bytes)
        self._unclean: set[int] = set()  # free slots whose `clear` has not ended well

    def clear(self, slot: int) -> None:
        """Empty a slot in all layers."""
        self._unclean.add(slot)
        gpus = self._gpus()
        for device in gpus:
            torch.cuda.synchronize(device)  # calls that used it have ended, but their kernels may not have
        with ExitStack() as stack:  # all of them, whatever one raises
            for device in gpus:  # last: loads run on streams that do not wait for this one
                stack.callback(torch.cuda.current_stream(device).synchronize)
            writes = Writes()
            stack.callback(writes.write)
            for wrapper in list(self.wrappers.values()):
                stack.callback(wrapper.clear_slot, slot, writes)
        self._unclean.discard(slot)

    def load(
        self,
        name: str,
        parts: Parts,
        publish: Callable[[], None],
        *,
        replace: bool = False,
        keep: Collection[str] = (),
        wanted: Callable[[], bool] = lambda: True,
        kept: Kept | None = None,
    ) -> None:
        """Load an adapter.

        Args:
            publish: called when all is loaded, before calls can find the name.
            replace: take the place of another one of its name.
            keep: names that are not evicted for it.
            wanted: asked when nothing can change any more: whether it is still to be loaded.
            kept: its pages, of an earlier load.

        Raises:
            DTSError: the name is taken.
            NotKeptError: the pages that were kept do not fit any more.
            CapacityError: it does not fit, whatever is evicted; or it would once running calls end, of which this
                thread's is one. Nothing is changed.
        """

        ready: list[Ready] = []

        def fits(without: list[int]) -> bool:
            return all(wrapper.fits(parameters, without) for wrapper, parameters in parts)

        def write(slot: int) -> None:
            if kept is not None and not self._has_all(wrapper for wrapper, _ in parts):
                raise NotKeptError  # a layer was unwrapped, and perhaps wrapped anew
            keeping = Kept(self.host.most) if self.host.most and kept is None else None
            writes = Writes(keeping, kept)
            for wrapper, parameters in parts:
                wrapper.load_slot(slot, parameters, writes)
                if kept is not None and slot in wrapper.stored and not _has_numbers(wrapper.stored[slot]):
                    raise NotKeptError
            writes.write()
            if keeping is not None:
                ready.append(Ready.of(slot, parts, keeping))
                self.host.drop(name)  # what is published next is another version
            publish()

        def occupied() -> None:
            for each in ready:
                self.host.put(name, each)

        def where() -> str:
            """The first layer that has too little room for it alone."""
            every = list(range(self.table.capacity))
            tight = next((wrapper for wrapper, parameters in parts if not wrapper.fits(parameters, every)), None)
            return next((path for path, wrapper in self.wrappers.items() if wrapper is tight), "some layer")

        self._fill(name, write, fits, where=where, replace=replace, keep=keep, wanted=wanted, occupied=occupied)

    def load_ready(self, name: str, keep: Collection[str], wanted: Callable[[], bool]) -> bool:
        """`load` of an adapter that was evicted, from host memory; False where it is not there."""
        with self.table.loading:
            ready = self.host.get(name)
        if ready is None:
            return False
        try:
            self.load(name, ready.parts, lambda: None, replace=True, keep=keep, wanted=wanted, kept=ready.kept)
        except NotKeptError:
            with self.table.loading:
                self.host.drop(name)
            return False
        return True

    def mix(self, name: str, weights: Mapping[str, float], publish: Callable[[], None]) -> bool:
        """Load the weighted sum of resident adapters; it is pinned. Returns False where one of them was evicted.

        Raises:
            CapacityError, DTSError: see `load` and `DTSModule.mix_slots`. Nothing is changed.
        """
        complete = True

        def write(slot: int) -> None:
            nonlocal complete
            slots = self.table.lease(weights)
            if slots is None:
                complete = False
                return
            try:
                members = [(slots[member], weight) for member, weight in weights.items() if slots[member] >= 0]
                for wrapper in list(self.wrappers.values()):
                    wrapper.mix_slots(slot, members)
            finally:
                self.table.end_lease(slots.values())
            publish()

        def written() -> bool:
            return complete

        self._fill(name, write, lambda without: True, keep=weights, pinned=True, written=written)
        return complete

    def lease(self, names: Iterable[str], load_again: Callable[[str, Collection[str]], None]) -> dict[str, int]:
        """The slots of names for a call (`SlotTable.lease`), after what was evicted has been loaded again.

        Args:
            load_again: loads a name, keeping others.

        Raises:
            UnknownAdapterError: an unknown name.
            CapacityError: more adapters than there is room for.
        """
        names, loaded = set(names), set()
        while True:
            slots = self.table.lease(names, loaded)
            if slots is not None:
                return slots
            needed = (names | set(self.table.pinned)) - {BASE}
            if len(needed) > self.table.capacity:
                raise CapacityError(
                    f"the call uses {len(names - {BASE})} adapters, which with those that are pinned makes "
                    f"{len(needed)} at a time; there are {self.table.capacity} slots. Divide the batch, or "
                    "construct with a larger max_adapters."
                )
            for name in names - {BASE} - set(self.table.resident):
                load_again(name, names)
                loaded.add(name)

    def memory_of(self, model: nn.Module) -> dict[str, object]:
        """See `DTSModel.memory_report`."""
        wrappers = list(self.wrappers.values())
        tables = {id(m): m for w in wrappers for m in w.modules() if isinstance(m, (Bank, VectorTable))}.values()
        # Tied layers hold the same tensors.
        stored = {id(p): p.nbytes for w in wrappers for held in w.stored.values() for p in held.values()}
        # Tied ones share these, and so do mixtures.
        added = {id(t): t.nbytes for w in wrappers for held in getattr(w, "added", {}).values() for t in held.values()}
        own = {id(t): t.nbytes for t in model.parameters()}
        # Packed weights are buffers, and no bank's.
        own |= {id(m.packed): m.packed.nbytes for m in model.modules() if isinstance(m, PackedLinear)}
        slots = {name: self.table.slot(name) for name in self.table.resident}

        def used(slot: int) -> int:
            whole = {id(p): p.nbytes for w in wrappers for p in w.stored.get(slot, {}).values()}
            whole |= {id(t): t.nbytes for w in wrappers for t in getattr(w, "added", {}).get(slot, {}).values()}
            return sum(whole.values()) + sum(table.nbytes_of(slot) for table in tables)

        return {
            "base": sum(own.values()),
            "adapters": {name: used(slots[name]) if name in slots else 0 for name in self.table.names},
            "reserved": sum(table.nbytes for table in tables) + sum(stored.values()) + sum(added.values()),
            "host": self.host.nbytes,
        }

    def _fill(
        self,
        name: str,
        write: Callable[[int], None],
        fits: Callable[[list[int]], bool],
        *,
        where: Callable[[], str] = lambda: "some layer",
        replace: bool = False,
        keep: Collection[str] = (),
        pinned: bool = False,
        wanted: Callable[[], bool] = lambda: True,
        written: Callable[[], bool] = lambda: True,
        occupied: Callable[[], None] = lambda: None,
    ) -> None:
        while True:
            version = self.table.version
            with self.table.loading:
                if not wanted():
                    return
                if not replace:
                    self.table.check_new(name)
                for unclean in sorted(self._unclean):  # layers that this adapter does not change would keep the old one
                    self.clear(unclean)
                slot = self._room(name, keep, fits, where)
                if slot is not None:
                    done = False
                    try:
                        with self._copying():
                            write(slot)
                        done = written()
                    finally:  # whatever stopped it, the slot must not keep a part of the adapter
                        if not done:
                            try:
                                self.clear(slot)
                            finally:
                                self.table.cancel(slot)
                    if done:
                        self.table.occupy(name, slot, self.clear, pinned=pinned)
                        occupied()
                        give_back_memory()
                    return
            if self.table.leased_here:
                raise CapacityError(
                    "all room that could be made is in use by running calls, one of them in this thread, which cannot "
                    "wait for itself. Load between calls, or construct with a larger capacity."
                )
            self.table.wait_for_change(version)

    def _room(
        self, name: str, keep: Collection[str], fits: Callable[[list[int]], bool], where: Callable[[], str]
    ) -> int | None:
        """A reserved slot, for which others were evicted where that is needed and allowed; None if there will be one
        when running calls have ended.

        Raises:
            CapacityError: there will not.
        """
        table = self.table
        removable = table.removable(keep) if self.evicts else {}
        evictable = table.evictable(keep) if self.evicts else {}
        # What a new version replaces may go for it, if it can come back where that fails.
        own = {name: table.slot(name)} if name in table.resident and self.has_file(name) else {}
        going: dict[str, int] = {}
        free = own if all(table.can_evict(n) for n in own) else {}
        for more in ({}, *({n: slot} for n, slot in evictable.items()), free):
            going |= more
            slots = list(going.values())
            if table.free + len(slots) > 0 and fits(slots):
                # What a call has taken since stays, and room is looked for again.
                gone = all(table.evict(n, self.clear, pinned=n == name) for n in going)
                return table.reserve() if gone else self._room(name, keep, fits, where)
        later = list(dict.fromkeys([*removable.values(), *own.values(), *table.retiring]))
        if table.free + len(later) > 0 and fits(later):
            return None
        if table.free + len(later) == 0:
            return table.reserve()  # says what takes the slots
        if not fits(list(range(table.capacity))):
            raise CapacityError(
                f"adapter {name!r} would not fit if it were alone: in {where()} it takes more pages of 16 ranks than "
                "max_rank or max_bytes leaves one adapter. Construct with a larger one."
            )
        raise CapacityError(
            f"adapter {name!r} does not fit in the memory for adapters"
            f"{', whatever is evicted' if self.evicts else ''}: in use are {', '.join(table.resident) or 'none'}. "
            "Delete or unpin some, or construct with a larger capacity."
        )

    def _has_all(self, wrappers: Iterable[DTSModule]) -> bool:
        own = set(map(id, self.wrappers.values()))
        return all(id(wrapper) in own for wrapper in wrappers)

    def _gpus(self) -> set[torch.device]:
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return set()
        return {device for w in list(self.wrappers.values()) for device in _devices(w) if device.type == "cuda"}

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Within, copies to GPUs run on streams of their own; at the end they are done."""
        with ExitStack() as stack:
            for device in self._gpus():
                stream = torch.cuda.Stream(device)
                stream.wait_stream(torch.cuda.current_stream(device))  # arenas may just have been made there
                stack.callback(stream.synchronize)
                stack.enter_context(torch.cuda.stream(stream))
            yield


def _devices(wrapper: DTSModule) -> Iterable[torch.device]:
    """Where a layer's tensors are. There are hundreds of layers, and a load takes milliseconds: one without parts is
    where its first parameter is."""
    layer = wrapper.base_layer
    if not layer._modules:
        for parameter in layer._parameters.values():
            if parameter is not None:
                return (parameter.device,)
    return {t.device for t in (*wrapper.parameters(), *wrapper.buffers())}


def _has_numbers(parameters: Mapping[str, Parameter]) -> bool:
    """Whether none of a layer's parameters is sizes alone."""
    terms = (term for p in parameters.values() if not isinstance(p, Tensor) for term in terms_of(p))
    return not any(isinstance(term, LowRankDelta) and term.s.is_meta for term in terms)
