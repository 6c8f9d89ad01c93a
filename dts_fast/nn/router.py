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
from ..writes import Writes
from .banked import BankedModule
from .module import DTSModule, Parameter, is_plain
from .parameters import TELLS_NO_VALUES
from .rows import batch_shape
from .state import has_objects


class DTSRouter(BankedModule):
    """A module with a ``weight`` [N, K] (and a ``bias`` [N]) that only `torch.nn.functional.linear` gets to see, with
    the module's input as it came (reshaped or in another dtype): its own code runs, and the product in it gets the
    adapters' deltas.

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

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter], writes: Writes | None = None) -> None:
        if self.as_expected and parameters.keys() <= {"weight", "bias"}:
            super().load_slot(slot, parameters, writes)
        else:
            DTSModule.load_slot(self, slot, parameters, writes)

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
        try:
            return self._with_deltas(slots, args, kwargs)
        except _UnexpectedError:
            self._give_up()
        return DTSModule.forward(self, *args, **kwargs)

    def _with_deltas(self, slots: Slots, args: tuple, kwargs: dict):
        if has_objects((args, kwargs)):  # what changes while it runs would be changed twice if this were given up
            raise _UnexpectedError
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        inputs = [leaf for leaf in leaves if leaf.shape[0] == leaves[0].shape[0]]
        bank, biases, found = self.bank.tensors, self._touches_bias(slots), []

        def add(x: Tensor, y: Tensor, bias: object) -> Tensor:
            found.append(True)
            rows = x.reshape(-1, self.layout.k)
            if rows.shape[0] % (1 if isinstance(slots, int) else len(slots)) or (biases and bias is None):
                raise _UnexpectedError
            ids = slot_ids(slots, rows.shape[0], x.device)
            dtype = y.dtype if y.dtype in (torch.bfloat16, torch.float16) else torch.float32
            flat = y.reshape(-1, self.layout.n).to(dtype)
            ops.add_delta_(flat, rows.to(dtype), *bank, ids)
            if biases:
                values = self.biases.values.float()
                flat = flat + (values[ids] - values[-1]).to(dtype)
            return flat.view(y.shape).to(y.dtype)

        weights = [self.base_layer.weight, *([self.base_layer.bias] if biases else [])]
        with _Products(weights, inputs, add):
            result = self._base(*args, **kwargs)
        if not found:
            raise _UnexpectedError
        return result

    def _give_up(self) -> None:
        """From now on as any other module. What the bank holds stays there: calls of other threads compute with it."""
        with self.slots.loading:
            if not self.as_expected:
                return
            for slot in list(self.loaded):
                DTSModule.load_slot(self, slot, self.parameters_of(slot))
            self.as_expected = False
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
    if isinstance(layer, nn.Embedding) or type(layer).__module__.startswith("torch.nn."):
        return "it is known for something else"
    return None


class _UnexpectedError(Exception):
    """The weight is used otherwise."""


class _Products(TorchFunctionMode):
    """Within, products of inputs with a weight get something added.

    Args:
        weights: the weight, and perhaps its bias; also looked for in other dtypes.
        inputs: whose rows are known, also reshaped and in other dtypes: rows that were reordered would get another
            one's adapter.
        add: takes ``x [..., K]``, the product ``y [..., N]`` and its bias, and returns the sum.

    Raises:
        _UnexpectedError: the weight is used in any other way, or an input is written to (before it is).
    """

    def __init__(
        self, weights: list[Tensor], inputs: list[Tensor], add: Callable[[Tensor, Tensor, object], Tensor]
    ) -> None:
        super().__init__()
        self.weights, self.inputs, self.add = weights, inputs, add

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        written = first if name in _WRITES or kwargs.get("inplace") else kwargs.get("out")
        if isinstance(written, Tensor) and self._is_of_an_input(written):
            raise _UnexpectedError
        result = function(*args, **kwargs)
        if function is nn.functional.linear:
            x, weight, bias = (*args, *(kwargs.get(n) for n in ("input", "weight", "bias")[len(args) :]))
            if _is_among(weight, self.weights):
                if not _is_among(x, self.inputs):
                    raise _UnexpectedError
                return self.add(x, result, bias)
        if any(_is_among(value, self.weights) for value in pytree.tree_leaves((args, kwargs))):
            if name in _CASTS and _is_among(first, self.weights):
                self.weights.append(result)
            elif (function.__self__.__name__ if name == "__get__" else name) not in TELLS_NO_VALUES:
                raise _UnexpectedError
        elif name in _KEEPS_ROWS and _is_among(first, self.inputs):
            self.inputs.append(result)
        return result

    def _is_of_an_input(self, tensor: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return _is_among(tensor, self.inputs)
        memory = tensor.untyped_storage().data_ptr()
        return any(memory == each.untyped_storage().data_ptr() for each in self.inputs)


# By the names of Tensor's methods.
_CASTS = frozenset({"to", "type", "float", "half", "bfloat16"})
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITES = frozenset(
    [name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")]
    + [f"__i{name}__" for name in _OPERATORS]
    + ["__setitem__"]
)
_KEEPS_ROWS = _CASTS | {"reshape", "view", "flatten", "contiguous", "unsqueeze", "squeeze", "detach"}


def _is_among(value: object, tensors: list[Tensor]) -> bool:
    return any(value is tensor for tensor in tensors)
