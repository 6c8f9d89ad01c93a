"""Where adapters live at run time: pages in one arena per layer, and slots that list them.

A *bank* belongs to one parameter of a layer. Its arena holds pages of a fixed size (`codes.PageLayout` for
matrices, `codes.VectorPageLayout` for biases); a *slot* lists the pages of one adapter, each with a weight. Loading
and evicting write in place: the tensors that kernels, compiled graphs and CUDA graphs hold stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import CapacityError, DTSError, UnknownAdapterError

BASE = "__base__"
BASE_SLOT = -1


class SlotTable:
    """Adapter names and the slots they occupy; shared by all layers of a model.

    Attributes:
        capacity: number of slots.
        active: what rows use when nothing is routed: an adapter's name, or ``"__base__"``.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise DTSError(f"max_adapters must be at least 1, got {capacity}.")
        self.capacity = capacity
        self.active = BASE
        self.routed_with_grad = False  # whether a route was last used where gradients are recorded
        self._slots: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    def slot(self, name: str) -> int:
        """The slot of a loaded adapter, -1 for ``"__base__"``.

        Raises:
            UnknownAdapterError: no adapter of that name is loaded; the message lists those that are.
        """
        if name == BASE:
            return BASE_SLOT
        try:
            return self._slots[name]
        except KeyError:
            known = ", ".join(map(repr, self._slots)) or "none"
            raise UnknownAdapterError(f"unknown adapter {name!r}; loaded: {known}, and {BASE!r}.") from None

    def free_slot(self, name: str) -> int:
        """The slot that a new adapter would take.

        Raises:
            DTSError: the name is taken or reserved.
            CapacityError: all slots are occupied.
        """
        if not isinstance(name, str) or not name:
            raise DTSError(f"an adapter's name must be a non-empty string, got {name!r}.")
        if name == BASE or name in self._slots:
            raise DTSError(f"adapter name {name!r} is {'reserved' if name == BASE else 'loaded already'}.")
        free = set(range(self.capacity)) - set(self._slots.values())
        if not free:
            raise CapacityError(
                f"all {self.capacity} slots are taken ({', '.join(self._slots)}); delete an adapter first, or "
                "construct with a larger max_adapters."
            )
        return min(free)

    def occupy(self, name: str, slot: int) -> None:
        self._slots[name] = slot

    def release(self, name: str) -> int:
        """Forget a name; returns the slot it had.

        Raises:
            UnknownAdapterError: no such adapter.
            DTSError: the name of the base.
        """
        if name == BASE:
            raise DTSError(f"{BASE!r} is the base itself and cannot be deleted.")
        slot = self.slot(name)
        del self._slots[name]
        if self.active == name:
            self.active = BASE
        return slot


class Bank(nn.Module):
    """The arena and the slots of one parameter.

    Attributes:
        pages: uint8 ``[P, page_nbytes]``.
        slot_pages: int32 ``[S, L]``; -1 ends a slot's list.
        slot_weights: float32 ``[S, L]``.

    Args:
        page_nbytes: size of a page.
        num_slots: S.
        num_pages: fixed capacity P; None lets the arena grow when a load needs it (new tensors: recapture graphs).
        pages_per_slot: how many pages a load may take. Fixes L to as many of each slot, so that a slot can list all
            others'; None lets L grow likewise.
    """

    pages: Tensor
    slot_pages: Tensor
    slot_weights: Tensor

    def __init__(
        self,
        page_nbytes: int,
        num_slots: int,
        *,
        num_pages: int | None = None,
        pages_per_slot: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.fixed_pages, self.pages_per_slot = num_pages is not None, pages_per_slot
        length = (pages_per_slot or 0) * num_slots
        # Not persistent: adapters are files of their own, and the base's state dict stays the base's.
        for name, tensor in (
            ("pages", torch.zeros(num_pages or 0, page_nbytes, dtype=torch.uint8, device=device)),
            ("slot_pages", torch.full((num_slots, length), -1, dtype=torch.int32, device=device)),
            ("slot_weights", torch.zeros(num_slots, length, dtype=torch.float32, device=device)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._free = list(range(num_pages or 0))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the ops take, in their order."""
        return self.pages, self.slot_pages, self.slot_weights

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def nbytes_of(self, slot: int) -> int:
        """Bytes of the pages that a slot lists; pages that slots share count for each of them."""
        return int((self.slot_pages[slot] >= 0).sum()) * self.pages.shape[1]

    # Outside inference mode, whatever the caller is in: tensors born in it could be neither changed nor saved for
    # backward later.
    @torch.inference_mode(False)
    def load(self, slot: int, pages: Tensor, weight: float = 1.0) -> None:
        """Write the pages of an adapter and let a slot list them.

        Raises:
            CapacityError: a bank of fixed capacity has too few pages; nothing was changed.
        """
        count = pages.shape[0]
        if self.pages_per_slot is not None and count > self.pages_per_slot:
            raise CapacityError(f"the adapter takes {count} pages, a slot of this bank at most {self.pages_per_slot}.")
        self._make_room(count, reusable=len(self._only_in(slot)))
        self.evict(slot)
        taken = [self._free.pop(0) for _ in range(count)]
        if count:
            self.pages[taken] = pages.to(self.pages.device)
            self.slot_weights[slot, :count] = weight
            # The list last: until it stands, the slot is empty for whoever reads it.
            self.slot_pages[slot, :count] = torch.tensor(taken, dtype=torch.int32)

    @torch.inference_mode(False)
    def share(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        """Let a slot list the pages of other slots, each with that slot's weight times one of the mixture's: an exact
        sum that costs no pages. The pages stay as long as any slot lists them.

        Args:
            slot: an empty slot.
            members: (slot, weight) of each.

        Raises:
            CapacityError: the list is longer than what a slot of a bank of fixed capacity may list.
        """
        pages, weights = [], []
        for member, weight in members:
            listed = self.slot_pages[member]
            pages.append(listed[listed >= 0])
            weights.append(self.slot_weights[member][listed >= 0] * weight)
        pages, weights = torch.cat(pages), torch.cat(weights)
        self._make_room(len(pages), new=0)
        self.slot_weights[slot, : len(pages)] = weights
        self.slot_pages[slot, : len(pages)] = pages

    @torch.inference_mode(False)
    def evict(self, slot: int) -> None:
        """Empty a slot and free the pages that no other slot shares."""
        freed = self._only_in(slot)
        self.slot_pages[slot] = -1
        self._free = sorted(self._free + freed)

    def _only_in(self, slot: int) -> list[int]:
        """The pages that this slot lists and no other does."""
        others = torch.cat([self.slot_pages[:slot], self.slot_pages[slot + 1 :]])
        return sorted({page for page in self.slot_pages[slot].tolist() if page >= 0} - set(others.flatten().tolist()))

    def _make_room(self, count: int, new: int | None = None, reusable: int = 0) -> None:
        """Grow what may grow until a slot can list ``count`` pages, of which ``new`` (all if None) must be free or are
        among the ``reusable`` ones about to be freed.

        Raises:
            CapacityError: what is fixed is too small.
        """
        length, free = self.slot_pages.shape[1], len(self._free) + reusable
        if count > length and self.pages_per_slot is not None:
            raise CapacityError(f"the mixture lists {count} pages, a slot of this bank at most {length}.")
        new = count if new is None else new
        if new > free and self.fixed_pages:
            raise CapacityError(
                f"the adapter takes {new} pages, {free} of {self.pages.shape[0]} are free; delete an "
                "adapter first, or give the bank more pages."
            )
        if count > length:
            self.slot_pages = nn.functional.pad(self.slot_pages, (0, count - length), value=-1)
            self.slot_weights = nn.functional.pad(self.slot_weights, (0, count - length))
        if new > free:
            old = self.pages.shape[0]
            grown = self.pages.new_zeros(old + new - free, self.pages.shape[1])
            grown[:old] = self.pages
            self._free += range(old, grown.shape[0])
            self.pages = grown

    def _apply(self, fn, recurse=True):
        # Moves between devices only: `.half()` of a model must not round slot weights.
        device = fn(torch.empty(0, device=self.pages.device)).device
        for name in ("pages", "slot_pages", "slot_weights"):
            setattr(self, name, getattr(self, name).to(device))
        return self
