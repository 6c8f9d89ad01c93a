"""Adapter names, the slots they occupy, and who is using them: shared by all layers of a model, safe between threads.

A name is *resident* while it has a slot. Calls take a *lease* on the slots they use; a slot that is leased is neither
given to another adapter nor emptied, so that loading and deleting never touch what a running call reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from .errors import CapacityError, DTSError, UnknownAdapterError

BASE = "__base__"
BASE_SLOT = -1


class CacheInfo(NamedTuple):
    """What became of the adapters that calls asked for, since the model was made.

    Attributes:
        hits: adapters that a call used and found in memory, each once a call.
        misses: those that were loaded again for it.
        loads: all loads, first ones, replacements and mixtures too.
        evictions: adapters that went for others.
        maxsize, currsize: slots, and how many have an adapter.
    """

    hits: int
    misses: int
    loads: int
    evictions: int
    maxsize: int
    currsize: int


class SlotTable:
    """Names, slots, leases, pins, and the order of use.

    Attributes:
        capacity: number of slots.
        active: what rows use when nothing is routed: an adapter's name, or ``"__base__"``.
        loading: held while pages are written or freed; taken before the table's own lock, never within it.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise DTSError(f"max_adapters must be at least 1, got {capacity}.")
        self.capacity = capacity
        self.active = BASE
        self.routed_with_grad = False  # whether a route was last used where gradients are recorded
        self._slots: dict[str, int | None] = {}  # every known name; None where it was evicted
        self._recent: dict[str, None] = {}  # resident names, the least recently used first
        self._pinned: set[str] = set()
        self._leases = [0] * capacity
        self._reserved: set[int] = set()
        self._hits = self._misses = self._loads = self._evictions = 0
        # Slots that have lost their name while calls were still using them, and what empties them.
        self._retired: dict[int, Callable[[int], None]] = {}
        self._make_locks()

    def _make_locks(self) -> None:
        self.loading = threading.RLock()
        self._changed = threading.Condition()
        self._version = 0
        self._own_leases = threading.local()

    # Locks can be neither copied nor saved.
    def __getstate__(self) -> dict[str, object]:
        locks = ("loading", "_changed", "_version", "_own_leases")
        state = {name: value for name, value in self.__dict__.items() if name not in locks}
        return state | {"_leases": [0] * self.capacity, "_reserved": set(), "_retired": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_locks()

    @property
    def names(self) -> list[str]:
        """Every known name, evicted ones too, in the order of loading."""
        return list(self._slots)

    @property
    def resident(self) -> list[str]:
        """The names that have a slot, the least recently used first."""
        with self._changed:
            return list(self._recent)

    @property
    def pinned(self) -> list[str]:
        with self._changed:
            return [name for name in self._slots if name in self._pinned]

    @property
    def free(self) -> int:
        """How many slots are free."""
        with self._changed:
            return self.capacity - len(self._taken())

    @property
    def info(self) -> CacheInfo:
        with self._changed:
            counts = self._hits, self._misses, self._loads, self._evictions
            return CacheInfo(*counts, self.capacity, len(self._recent))

    @property
    def retiring(self) -> list[int]:
        """Slots that will be free when the calls that use them have ended."""
        with self._changed:
            return list(self._retired)

    def _taken(self) -> set[int]:
        return {slot for slot in self._slots.values() if slot is not None} | self._reserved | set(self._retired)

    def check(self, name: str) -> None:
        """Refuse what is neither an adapter's name nor ``"__base__"``.

        Raises:
            UnknownAdapterError: the message lists the names there are.
        """
        if not isinstance(name, str):
            raise UnknownAdapterError(f"an adapter's name is a string, got {name!r}; rows get theirs by adapter_names.")
        if name != BASE and name not in self._slots:
            known = ", ".join(map(repr, list(self._slots))) or "none"
            raise UnknownAdapterError(f"unknown adapter {name!r}; loaded: {known}, and {BASE!r}.")

    def slot(self, name: str) -> int:
        """The slot of a resident adapter, -1 for ``"__base__"``.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded; the message lists those that are.
        """
        if name == BASE:
            return BASE_SLOT
        slot = self._slots.get(name)
        if slot is None:
            self.check(name)
            raise UnknownAdapterError(f"adapter {name!r} was evicted; call its model, which loads it again.")
        return slot

    # Slots for adapters that are being loaded.

    def check_new(self, name: str) -> None:
        """Refuse a name that an adapter cannot be given.

        Raises:
            DTSError: the name is taken or reserved.
        """
        if not isinstance(name, str) or not name:
            raise DTSError(f"an adapter's name must be a non-empty string, got {name!r}.")
        if name == BASE:
            raise DTSError(f"adapter name {name!r} is reserved: it means rows without an adapter. Choose another.")
        if name in self._slots:
            raise DTSError(
                f"adapter name {name!r} is loaded already. Choose another, delete_adapter() it, or load with "
                "replace=True where that is offered."
            )

    def reserve(self) -> int:
        """A free slot, for a load that ends with `occupy` or `cancel`.

        Raises:
            CapacityError: all slots are occupied.
        """
        with self._changed:
            free = set(range(self.capacity)) - self._taken()
            if not free:
                raise CapacityError(
                    f"all {self.capacity} slots are taken ({', '.join(self._recent)}); delete or unpin an adapter "
                    "first, construct with a larger max_adapters, or with eviction='lru'."
                )
            slot = min(free)
            self._reserved.add(slot)
            return slot

    def cancel(self, slot: int) -> None:
        """Give a reserved slot back, after it was emptied."""
        with self._changed:
            self._reserved.discard(slot)
            self._notify()

    def occupy(self, name: str, slot: int, clear: Callable[[int], None] | None = None, *, pinned: bool = False) -> None:
        """Give a loaded slot its name: from now on calls find it.

        Args:
            clear: empties the slot that the name had before, at once or when the last call that uses it has ended.
            pinned: whether it is pinned from the start.
        """
        with self._changed:
            old = self._slots.get(name)
            self._reserved.discard(slot)
            self._slots[name] = slot
            self._loads += 1
            self._touch(name)
            if pinned:
                self._pinned.add(name)
            emptied = old is not None and old != slot and self._retire(old, clear)
            self._notify()
        if emptied:
            self._finish(old)

    # Names that go.

    def release(self, name: str, clear: Callable[[int], None] | None = None) -> int | None:
        """Forget a name.

        Args:
            clear: empties its slot, at once or when the last call that uses it has ended.

        Returns:
            The slot it had; None where it was evicted.

        Raises:
            UnknownAdapterError: no such adapter.
            DTSError: the name of the base.
        """
        if name == BASE:
            raise DTSError(f"{BASE!r} is the base itself and cannot be deleted.")
        with self._changed:
            self.check(name)
            slot = self._slots.pop(name)
            self._recent.pop(name, None)
            self._pinned.discard(name)
            if self.active == name:
                self.active = BASE
            emptied = slot is not None and self._retire(slot, clear)
            self._notify()
        if emptied:
            self._finish(slot)
        return slot

    def evict(self, name: str, clear: Callable[[int], None], *, pinned: bool = False) -> bool:
        """Take the slot of an adapter that no call uses and that is not pinned (or may be); its name stays known.
        Returns whether it could be taken."""
        with self._changed:
            slot = self._slots.get(name)
            if slot is None or self._leases[slot] or (name in self._pinned and not pinned):
                return False
            self._slots[name] = None
            self._evictions += 1
            self._recent.pop(name)
            self._retire(slot, clear)
            self._notify()
        self._finish(slot)
        return True

    def can_evict(self, name: str) -> bool:
        """Whether no call uses an adapter's slot now."""
        with self._changed:
            slot = self._slots.get(name)
            return slot is not None and not self._leases[slot]

    def evictable(self, keep: Collection[str] = ()) -> dict[str, int]:
        """Names that are neither in use, pinned nor in ``keep``, the least recently used first, with their slots."""
        with self._changed:
            return {name: slot for name, slot in self.removable(keep).items() if not self._leases[slot]}

    def removable(self, keep: Collection[str] = ()) -> dict[str, int]:
        """`evictable` once the calls that run now have ended."""
        with self._changed:
            return {n: self._slots[n] for n in self._recent if n not in self._pinned and n not in keep}

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter from being evicted, or allow it again.

        Raises:
            UnknownAdapterError: no such adapter.
        """
        with self._changed:
            self.check(name)
            (self._pinned.add if pinned else self._pinned.discard)(name)
            self._notify()

    # Calls that use slots.

    def lease(self, names: Iterable[str], loaded: Collection[str] = ()) -> dict[str, int] | None:
        """The slots of names, which stay theirs until `end_lease`; None (and nothing is leased) where one of them is
        not resident.

        Args:
            loaded: those that were loaded for this.

        Raises:
            UnknownAdapterError: an unknown name.
        """
        names = list(names)
        if names == [BASE]:
            return {BASE: BASE_SLOT}  # which is no one's
        with self._changed:
            slots = {}
            for name in names:
                self.check(name)
                slot = BASE_SLOT if name == BASE else self._slots[name]
                if slot is None:
                    return None
                slots[name] = slot
            for name, slot in slots.items():
                if slot >= 0:
                    self._leases[slot] += 1
                    self._touch(name)
                    self._misses += name in loaded
                    self._hits += name not in loaded
            if any(slot >= 0 for slot in slots.values()):
                self._own_leases.count = getattr(self._own_leases, "count", 0) + 1
            return slots

    def end_lease(self, slots: Iterable[int]) -> None:
        own = [slot for slot in slots if slot >= 0]
        if not own:
            return
        emptied = []
        with self._changed:
            self._own_leases.count -= 1
            for slot in own:
                self._leases[slot] -= 1
                if not self._leases[slot] and slot in self._retired:
                    emptied.append(slot)
            self._notify()
        for slot in emptied:
            self._finish(slot)

    @property
    def leased_here(self) -> bool:
        """Whether this thread is within a call that has a lease: then it must not wait for others to end."""
        return getattr(self._own_leases, "count", 0) > 0

    @property
    def version(self) -> int:
        """Changes whenever a slot may have become free."""
        return self._version

    def wait_for_change(self, version: int) -> None:
        """Wait until `version` is another one; `loading` must not be held."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version)

    def _touch(self, name: str) -> None:
        self._recent.pop(name, None)
        self._recent[name] = None

    def _retire(self, slot: int, clear: Callable[[int], None] | None) -> bool:
        """Take a slot out of use. Returns whether it is to be finished now: no call uses it."""
        self._retired[slot] = clear or (lambda slot: None)
        return not self._leases[slot]

    def _finish(self, slot: int) -> None:
        with self.loading:
            try:
                self._retired[slot](slot)
            finally:
                with self._changed:
                    del self._retired[slot]
                    self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()
