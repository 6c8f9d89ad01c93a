"""`DTSEmbedding`: tables of which every row of a batch may use its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..bank import Arena
from ..routing import Slots, all_base, current_route, slot_ids
from ..slots import SlotTable
from .banked import BankedModule


class DTSEmbedding(BankedModule):
    """An embedding table with adapters: looks up base rows and adds ``(U[ids] * s) V^T``.

    Args:
        base_layer: `torch.nn.Embedding`.
        max_adapters, max_rank, arena, slots: see `DTSLinear`.

    Input: int ids ``[B, ...]``; output ``[B, ..., embedding_dim]`` in the table's dtype.
    """

    can_grow = True

    def __init__(
        self,
        base_layer: nn.Embedding,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        arena: Arena | None = None,
        slots: SlotTable | None = None,
    ) -> None:
        super().__init__(base_layer, tuple(base_layer.weight.shape), max_adapters, slots, max_rank, arena)

    def forward(self, input: Tensor) -> Tensor:
        if all_base():
            return self._base(input)
        if input.dim() > 1 and not (self.stored or self.added):
            slots = self.traceable_slots(input.shape)
            if not isinstance(slots, int) and input.shape[0] == 1 and self._touched(slots):
                # Shared by all rows (position ids, say): one for each, where their adapters differ.
                input = input.expand(len(slots), *input.shape[1:])
            return self.forward_fast(slots, input)
        if input.dim() > 1 or current_route() is None:
            return super().forward(input)
        # Ids without a batch dimension are positions, shared by all rows; where rows differ each gets its own.
        y = self.forward(input[None])
        return y[0] if y.shape[0] == 1 else y

    def forward_fast(self, slots: Slots, input: Tensor) -> Tensor:
        if not self._touched(slots):
            return self.base_layer(input)
        flat, rows, places = input.reshape(-1), self.layout.n, {}
        ids = slot_ids(slots, flat.shape[0], input.device)
        if self.added:
            # Tokens that a row's adapter adds. Others that the base does not have stay, and are refused as it does.
            for slot, added in self.added_in(slots).items():
                places[slot] = (ids == slot) & (flat >= rows) & (flat < rows + len(added["weight"]))
                input = input.masked_fill(places[slot].view(input.shape), 0)
        y = self.base_layer(input)
        delta = ops.embedding_delta(input.reshape(-1), self.layout, *self.bank.tensors, ids)
        y = (y + delta.view(y.shape)).to(y.dtype)
        for slot, place in places.items():
            added = self.added[slot]["weight"]
            own = added[(flat - rows).clamp(0, len(added) - 1)].to(y.dtype)  # of all: nothing is waited for
            y = torch.where(place[:, None], own, y.view(own.shape)).view(y.shape)
        return y
