"""`DTSRouter`: modules that multiply with a weight of their own and go on from there, as the routers of mixtures do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import ops
from ..bank import Arena
from ..routing import Slots, all_base, slot_ids
from ..slots import SlotTable
from .banked import BankedModule
from .module import TELLS_NO_VALUES, DTSModule, Parameter, batch_shape, is_plain


class DTSRouter(BankedModule):
    """A module with a ``weight`` [N, K] that only `torch.nn.functional.linear` gets to see, with the module's input as
    it came (reshaped or in another dtype): its own code runs, and the product in it gets the adapters' deltas.

    Where that turns out not to be so, it is served as any other module, once for each distinct adapter of a batch.

    Args:
        base_layer: see `why_not_router`.
        max_adapters, arena, slots: see `DTSLinear`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        max_adapters: int = 8,
        *,
        arena: Arena | None = None,
        slots: SlotTable | None = None,
    ) -> None:
        super().__init__(base_layer, tuple(base_layer.weight.shape), max_adapters, slots, None, arena)
        self.as_expected = True

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter]) -> None:
        if self.as_expected and parameters.keys() == {"weight"}:
            super().load_slot(slot, parameters)
        else:
            DTSModule.load_slot(self, slot, parameters)

    def forward(self, *args, **kwargs):
        if all_base():
            return self._base(*args, **kwargs)
        if self.stored or not self.batch_first:
            return super().forward(*args, **kwargs)
        shape = batch_shape(args, kwargs)
        slots = self.traceable_slots(shape)
        if isinstance(slots, list) and shape[0] == 1:
            return super().forward(*args, **kwargs)
        return self.forward_fast(slots, *args, **kwargs)

    def forward_fast(self, slots: Slots, *args, **kwargs):
        if not self._touched(slots):
            return self._base(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        inputs = [leaf for leaf in leaves if leaf.shape[0] == leaves[0].shape[0]]
        bank, found = self.bank.tensors, []

        def add(x: Tensor, y: Tensor) -> Tensor:
            found.append(True)
            rows = x.reshape(-1, self.layout.k)
            if rows.shape[0] % (1 if isinstance(slots, int) else len(slots)):
                raise _UnexpectedError
            dtype = y.dtype if y.dtype in (torch.bfloat16, torch.float16) else torch.float32
            flat = y.reshape(-1, self.layout.n).to(dtype)
            ops.add_delta_(flat, rows.to(dtype), *bank, slot_ids(slots, rows.shape[0], x.device))
            return flat.view(y.shape).to(y.dtype)

        try:
            with _Products(self.base_layer.weight, inputs, add):
                result = self._base(*args, **kwargs)
            if found:
                return result
        except _UnexpectedError:
            pass
        self._give_up()
        return DTSModule.forward(self, *args, **kwargs)

    def _give_up(self) -> None:
        with self.slots.loading:
            if not self.as_expected:
                return
            self.as_expected = False
            for slot in list(self.loaded):
                DTSModule.load_slot(self, slot, self.parameters_of(slot))
                del self.loaded[slot]
                self.bank.evict(slot)
        warnings.warn(
            f"no fast path for {type(self.base_layer).__name__}: it computes with its weight in another way than a "
            "product with its input. A batch runs it once for each of its adapters. To leave it at the base, compress "
            "with --exclude.",
            stacklevel=2,
        )


def why_not_router(layer: nn.Module) -> str | None:
    """Why `DTSRouter` cannot serve a module; None if it may."""
    weight = layer._parameters.get("weight")
    if not is_plain(weight) or weight.dim() != 2:
        return "it has no weight [N, K]"
    if isinstance(layer, nn.Embedding):
        return "it looks its weight up"
    return None


class _UnexpectedError(Exception):
    """The weight is used otherwise."""


class _Products(TorchFunctionMode):
    """Within, products of inputs with a weight get something added.

    Args:
        weight: what is looked for, also in other dtypes.
        inputs: whose rows are known, also reshaped and in other dtypes: rows that were reordered would get another
            one's adapter.
        add: takes ``x [..., K]`` and the product ``y [..., N]``, and returns the sum.

    Raises:
        _UnexpectedError: the weight is used in any other way.
    """

    def __init__(self, weight: Tensor, inputs: list[Tensor], add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weights, self.inputs, self.add = [weight], inputs, add

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        if function is nn.functional.linear and len(args) > 1 and _is_among(args[1], self.weights):
            if not _is_among(first, self.inputs):
                raise _UnexpectedError
            return self.add(first, result)
        if any(_is_among(value, self.weights) for value in pytree.tree_leaves((args, kwargs))):
            if name in _CASTS and _is_among(first, self.weights):
                self.weights.append(result)
            elif (function.__self__.__name__ if name == "__get__" else name) not in TELLS_NO_VALUES:
                raise _UnexpectedError
        elif name in _KEEPS_ROWS and _is_among(first, self.inputs):
            self.inputs.append(result)
        return result


# By the names of Tensor's methods.
_CASTS = frozenset({"to", "type", "float", "half", "bfloat16"})
_KEEPS_ROWS = _CASTS | {"reshape", "view", "flatten", "contiguous", "unsqueeze", "squeeze", "detach"}


def _is_among(value: object, tensors: list[Tensor]) -> bool:
    return any(value is tensor for tensor in tensors)
