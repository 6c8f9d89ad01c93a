"""`DTSNorm`: layer norms and RMS norms of which every row of a batch may use its own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..bank import VectorTable
from ..codes import is_matrix
from ..routing import Slots, all_base, slot_ids
from ..slots import SlotTable
from ..writes import Writes
from .module import DTSModule, Parameter
from .parameters import run_with, with_parameters
from .rows import for_each


class DTSNorm(DTSModule):
    """A norm over the last dimension, with adapters: each row of the batch is scaled (and shifted) by its own vectors.

    Args:
        base_layer: a layer for which `why_not_norm` has no objection.
        max_adapters, slots: see `DTSModule`.

    Input and output ``[B, ..., n]``.
    """

    def __init__(self, base_layer: nn.Module, max_adapters: int = 8, *, slots: SlotTable | None = None) -> None:
        super().__init__(base_layer, max_adapters, slots=slots)
        # All of them from the start: calls in other threads go through them, and compiled graphs have them.
        own = base_layer._parameters.items()
        self.tables = nn.ModuleDict(
            {
                name: VectorTable(parameter, self.slots.capacity, (base_layer, name))
                for name, parameter in own
                if parameter is not None
            }
        )
        self.loaded: dict[int, frozenset[str]] = {}

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter], writes: Writes | None = None) -> None:
        if any(isinstance(p, Tensor) or is_matrix(p) for p in parameters.values()):
            return super().load_slot(slot, parameters, writes)
        for name, delta in parameters.items():
            self.tables[name].load(slot, delta, writes)
        self.loaded[slot] = frozenset(parameters)
        return None

    def clear_slot(self, slot: int, writes: Writes | None = None) -> None:
        super().clear_slot(slot, writes)
        self.loaded.pop(slot, None)
        for table in self.tables.values():
            table.evict(slot, writes)

    def has_fast_path(self, parameters: Mapping[str, Parameter]) -> bool:
        return True

    def changes(self, slot: int, name: str) -> bool:
        return name in self.loaded.get(slot, ()) or super().changes(slot, name)

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        own = {name: self.tables[name].deltas[slot] for name in self.loaded.get(slot, ())}
        return {**super().parameters_of(slot), **own}

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if all_base():
            return self._base(input, *args, **kwargs)
        if self.stored or args or kwargs or input.dim() < 2 or "forward" in self.base_layer.__dict__:
            return super().forward(input, *args, **kwargs)
        slots = self.traceable_slots(input.shape)
        if isinstance(slots, list) and input.shape[0] == 1:
            return super().forward(input)
        return self.forward_fast(slots, for_each(slots, input))

    def forward_fast(self, slots: Slots, input: Tensor, *args, **kwargs) -> Tensor:
        layer = self._modules["base_layer"]
        tables = self._modules["tables"]._modules
        if isinstance(slots, int):
            if slots not in self.loaded:
                return layer(input, *args, **kwargs)
            own = {name: table.values[slots] for name, table in tables.items()}
            hooked = layer._forward_hooks or layer._forward_pre_hooks
            if type(layer) is nn.LayerNorm and not (hooked or args or kwargs):
                weight, bias = (own.get(name, layer._parameters[name]) for name in ("weight", "bias"))
                return nn.functional.layer_norm(input, layer.normalized_shape, weight, bias, layer.eps)
            return run_with(layer, own, (input, *args), kwargs)
        if isinstance(slots, list) and not any(slot in self.loaded for slot in slots):
            return layer(input, *args, **kwargs)
        ids = slot_ids(slots, input.shape[0], input.device)
        each = input.shape[0], *[1] * (input.dim() - 2), input.shape[-1]
        own = {name: table.values[ids].view(each) for name, table in tables.items()}
        return _run_each(layer, own, input, *args, **kwargs)


def _run_each(layer: nn.Module, own: Mapping[str, Tensor], input: Tensor, *args, **kwargs) -> Tensor:
    """The layer with other parameters for each row, ``[B, 1, ..., n]``."""
    if isinstance(layer, nn.LayerNorm):
        # Its fused kernel takes one weight. As there, everything is in float32 and rounded once.
        wide = torch.promote_types(input.dtype, torch.float32)
        y = nn.functional.layer_norm(input.to(wide), layer.normalized_shape, None, None, layer.eps)
        weight, bias = (own.get(name, layer._parameters.get(name)) for name in ("weight", "bias"))
        y = y if weight is None else y * weight.to(wide)
        y = y if bias is None else y + bias.to(wide)
        return y.to(input.dtype)
    if type(layer) is nn.RMSNorm:
        wide = torch.promote_types(input.dtype, torch.float32)
        eps = torch.finfo(input.dtype).eps if layer.eps is None else layer.eps
        y = nn.functional.rms_norm(input.to(wide), layer.normalized_shape, None, eps)
        return (y * own["weight"].to(wide)).to(input.dtype)
    # Models' own norms multiply in Python, where a weight with a dimension for the batch is as good as one without.
    return run_with(layer, own, (input, *args), kwargs)


_ROWS = 2


@torch.no_grad()
def why_not_norm(layer: nn.Module) -> str | None:
    """Why `DTSNorm` cannot serve a layer; None where it can. Asked by its name, and by running it on made-up rows with
    a weight for each: what gives the same as the layer run once for each of them is such a norm."""
    if "norm" not in type(layer).__name__.lower():
        return "no norm by its name"
    parameters = dict(layer.named_parameters())
    shapes = {tuple(p.shape) for p in parameters.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or list(layer.buffers()) or list(layer.children()):
        return "its parameters are no vectors of one size"
    if "forward" in layer.__dict__ or any(p.is_meta for p in parameters.values()):
        return "it cannot be tried out"
    (n,), first = next(iter(shapes)), next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)  # nobody's random numbers are used up

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(first.device, first.dtype)

    x = noise(_ROWS, 3, n)
    own = {name: noise(_ROWS, n) for name in parameters}
    try:
        together = _run_each(layer, {name: value[:, None] for name, value in own.items()}, x)
        alone = [with_parameters(layer, {k: v[row] for k, v in own.items()})(x[row : row + 1]) for row in range(_ROWS)]
        # Half types: one rounding more or less.
        tolerance = 8 * torch.finfo(first.dtype).eps
        torch.testing.assert_close(together, torch.cat(alone), rtol=tolerance, atol=tolerance)
    except Exception as error:
        return f"it does not take a weight for each row ({type(error).__name__})"
    return None
