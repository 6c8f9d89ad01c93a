"""What layers with one large weight share: its deltas lie in a bank of rank pages, those of its bias in a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from ..bank import Arena, Bank, VectorTable, page_count
from ..codes import PageLayout, as_matrix, from_pages, is_matrix, num_pages
from ..growth import added_rows_of, grown_parameter
from ..mixture import mix
from ..routing import Slots, distinct
from ..slots import SlotTable
from ..writes import Writes
from .module import DTSModule, Parameter


class BankedModule(DTSModule):
    """A layer whose ``weight`` deltas lie in a bank of rank pages, and whose ``bias`` is a row of a table.

    Attributes:
        can_grow: whether `forward_fast` knows of rows that a slot adds (``added``).

    Args:
        shape: ``[N, K]``, the weight as the bank's pages have it.
        max_adapters, max_rank, arena, slots: see `DTSLinear`.
    """

    can_grow = False

    def __init__(
        self,
        base_layer: nn.Module,
        shape: tuple[int, int],
        max_adapters: int,
        slots: SlotTable | None,
        max_rank: int | None,
        arena: Arena | None,
    ) -> None:
        super().__init__(base_layer, max_adapters, slots=slots)
        self.layout = PageLayout(*shape)
        if max_rank is not None:
            arena = Arena(num_pages(min(max_rank, *shape)) * self.slots.capacity, num_pages(min(max_rank, *shape)))
        device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), None)
        self.bank = Bank(self.layout.nbytes, self.slots.capacity, arena=arena, device=device)
        # From the start, as compiled graphs and calls in other threads go through it.
        bias = base_layer._parameters.get("bias", base_layer._buffers.get("bias"))  # a quantised layer's is a buffer
        bias = bias if bias is not None and bias.is_floating_point() else None
        self.biases = None if bias is None else VectorTable(bias, self.slots.capacity, (base_layer, "bias"))
        # slot -> the rows that it adds to a parameter, by that parameter's name (`growth`)
        self.added: dict[int, dict[str, Tensor]] = {}
        # Which parameters each slot changes; a slot that is not here costs the layer nothing.
        self.loaded: dict[int, frozenset[str]] = {}

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter], writes: Writes | None = None) -> None:
        given, (parameters, added) = parameters, _divided(parameters)
        if not _are_deltas(parameters) or (added and not self.can_grow):
            return super().load_slot(slot, given, writes)
        if added:
            kind, own = self.base_kind("weight"), writes or Writes()
            self.added[slot] = {name: own.copy_of(rows, *kind) for name, rows in added.items()}
        if "weight" in parameters:
            self._modules["bank"].load_deltas(slot, {0: self._for_pages(parameters["weight"])}, writes)
        if "bias" in parameters:
            self.biases.load(slot, parameters["bias"], writes)
        self.loaded[slot] = frozenset(given)
        return None

    def fits(self, parameters: Mapping[str, Parameter], without: Collection[int] = ()) -> bool:
        bank = self._modules["bank"]  # attributes of modules are looked for in several places
        if bank.arena is None or "weight" not in parameters:
            return True
        parameters, added = _divided(parameters)
        if not _are_deltas(parameters) or (added and not self.can_grow):
            return True
        return bank.fits([page_count(parameters["weight"])], without)

    def has_fast_path(self, parameters: Mapping[str, Parameter]) -> bool:
        parameters, added = _divided(parameters)
        return _are_deltas(parameters) and (self.can_grow or not added)

    def changes(self, slot: int, name: str) -> bool:
        loaded = self.loaded.get(slot, ())
        return name in loaded or (slot in self.added and name in self.added[slot]) or super().changes(slot, name)

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        found = dict(super().parameters_of(slot))
        for name, rows in self.added.get(slot, {}).items():
            found[added_rows_of(name)] = rows
        for name in self.loaded.get(slot, ()):
            if grown_parameter(name) is not None:
                continue
            if name == "bias":
                found[name] = self.biases.deltas[slot]
                continue
            pages, weights = self.bank.listed(slot)
            if len(pages):
                found[name] = self._from_pages(from_pages(self.layout, pages, weights))
        return found

    def mix_slots(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        if any(member in self.stored for member, _ in members):
            return super().mix_slots(slot, members)
        present = [(member, weight) for member, weight in members if member in self.loaded and weight != 0]
        if present:
            self._mix_added(slot, present)
            self.bank.share(slot, present)
            if self.biases is not None:
                self.biases.share(slot, present)
            self.loaded[slot] = frozenset().union(*(self.loaded[member] for member, _ in present))
        return None

    def _mix_added(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        parts = [(weight, self.added.get(member, {})) for member, weight in members]
        names = dict.fromkeys(name for _, rows in parts for name in rows)
        mixed = {name: mix(added_rows_of(name), [(weight, rows.get(name)) for weight, rows in parts]) for name in names}
        if mixed:
            self.added[slot] = mixed

    def _apply(self, fn, recurse=True):
        # Moves between devices only, as the bank's.
        for rows in self.added.values():
            rows |= {name: t.to(fn(t.new_empty(0)).device) for name, t in rows.items()}
        return super()._apply(fn, recurse)

    def clear_slot(self, slot: int, writes: Writes | None = None) -> None:
        super().clear_slot(slot, writes)
        self.loaded.pop(slot, None)
        self.added.pop(slot, None)
        # Whatever `loaded` says: a load that failed half way has written one and not the other.
        self._modules["bank"].evict(slot, writes)
        biases = self._modules.get("biases")
        if biases is not None:
            biases.evict(slot, writes)

    def added_in(self, slots: Slots) -> dict[int, dict[str, Tensor]]:
        """What each of these slots adds to the layer's parameters."""
        of_rows = (slots,) if isinstance(slots, int) else distinct(slots)
        return {slot: self.added[slot] for slot in of_rows if slot in self.added}

    # Between the parameter's own shape and the bank's pages.

    def _for_pages(self, matrix):
        return matrix

    def _from_pages(self, matrix):
        return matrix

    def _touched(self, slots: Slots) -> bool:
        """Whether any of these slots changes this layer. Always, for a graph that is compiled once for all adapters."""
        if isinstance(slots, Tensor):
            return True
        return slots in self.loaded if isinstance(slots, int) else any(slot in self.loaded for slot in distinct(slots))

    def _touches_bias(self, slots: Slots) -> bool:
        if self.biases is None:
            return False
        if isinstance(slots, Tensor):
            return True
        of_rows = (slots,) if isinstance(slots, int) else distinct(slots)
        return any("bias" in self.loaded.get(slot, ()) for slot in of_rows)


def _divided(parameters: Mapping[str, Parameter]) -> tuple[dict[str, Parameter], dict[str, Tensor]]:
    """What the bank and the table may hold, and rows that are added, by the parameter that they are added to."""
    deltas, added = {}, {}
    for name, parameter in parameters.items():
        grown = grown_parameter(name)
        if grown is None:
            deltas[name] = as_matrix(parameter)
        else:
            added[grown] = parameter
    return deltas, added


def _are_deltas(parameters: Mapping[str, Parameter]) -> bool:
    """Whether the bank and the table can hold them: a matrix and a vector."""
    for name, p in parameters.items():
        if isinstance(p, Tensor) or name != ("weight" if is_matrix(p) else "bias"):
            return False
    return True
