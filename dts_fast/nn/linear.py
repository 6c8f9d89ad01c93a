"""`DTSLinear`: base and delta of a linear layer in one go."""

from __future__ import annotations

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import linear

from .. import ops
from ..bank import Arena
from ..errors import DTSError
from ..prepack import PackedLinear, pack_, unpack_
from ..routing import ROUTES, Slots, all_base, slot_ids
from ..slots import SlotTable
from .banked import BankedModule
from .module import OF_ALL, OF_ALL_BEFORE, DTSModule, has_features, is_hooked, is_plain
from .rows import for_each


class DTSLinear(BankedModule):
    """A linear layer that computes base and delta in one go, each row with its own adapter.

        y = x W^T + b + ((x V) * s) U^T

    Args:
        base_layer: `torch.nn.Linear`, a layer like GPT-2's ``Conv1D`` (weight ``[in, out]``), or any layer with a
            2-D ``weight`` that acts like a linear. A plain `torch.nn.Linear` runs through the fused op, any other
            runs itself and has the delta added.
        max_adapters: slots, where no ``slots`` table is shared.
        max_rank: fixes the capacity, so that loading never allocates: every slot may take this rank. None lets the
            bank grow when a load needs it.
        arena: a capacity in pages, in place of ``max_rank``.
        prepack: keep the weight in the order in which the CPU kernels read it, as the only copy (`prepack.pack_`);
            for a plain `torch.nn.Linear` on the CPU. ``base_layer`` is changed in place; its ``weight`` can still be
            read, and state dicts stay as they are.
        slots: table of names shared with other layers of a model.

    Raises:
        DTSError: a layer without such a weight; ``prepack`` for another layer, see `prepack.pack_`.

    Input ``[..., in_features]``, first dimension the batch; output ``[..., out_features]`` in the same dtype.
    """

    can_grow = True

    def __init__(
        self,
        base_layer: nn.Module,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        arena: Arena | None = None,
        prepack: bool = False,
        slots: SlotTable | None = None,
    ) -> None:
        if isinstance(base_layer, nn.Embedding):
            raise DTSError("DTSLinear: an Embedding looks rows up; DTSEmbedding serves it.")
        weight = getattr(base_layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype == torch.float64:
            raise DTSError("DTSLinear: the layer is float64; expected float32, float16 or bfloat16. Convert it first.")
        # Conv1D of transformers keeps its weight as [in, out]; known by name, because this file imports no models.
        self_transposed = type(base_layer).__name__ == "Conv1D"
        if self_transposed:
            k, n = base_layer.weight.shape
        elif has_features(base_layer):  # the weight of a quantised layer may have any shape
            n, k = base_layer.out_features, base_layer.in_features
        else:
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                shape = list(weight.shape) if isinstance(weight, Tensor) else None
                raise DTSError(
                    f"DTSLinear: expected a layer that acts like a linear, with a weight [N, K], got "
                    f"{type(base_layer).__name__} with a weight of shape {shape}. nn.wrap and DTSModel choose the "
                    "wrapper that a layer needs."
                )
            n, k = weight.shape
        super().__init__(base_layer, (n, k), max_adapters, slots, max_rank, arena)
        if prepack:
            pack_(base_layer)
        self.transposed = self_transposed
        self.in_features, self.out_features = k, n

    def bare_layer(self) -> nn.Module:
        packed = isinstance(self.base_layer, PackedLinear)
        return unpack_(self.base_layer) if packed else self.base_layer

    def _forward_one(self, slot: int, args, kwargs):
        if slot in self.stored and (isinstance(self.base_layer, PackedLinear) or not self.has_plain_weight):
            dense = {"bias": self.base_layer.bias, **self.dense_parameters(slot)}
            if "weight" not in dense:
                dense["weight"] = self.base_layer.weight
            return linear(*args, **kwargs, **dense)
        return super()._forward_one(slot, args, kwargs)

    def _oriented(self, matrix):
        """Between the parameter's orientation and the bank's ``[N, K]``; its own inverse."""
        return matrix.transpose() if self.transposed else matrix

    def _for_pages(self, matrix):
        return self._oriented(matrix)

    def _from_pages(self, matrix):
        return self._oriented(matrix)

    def __call__(self, *args, **kwargs):
        # `DTSModule.__call__` for what a model has most of. `all_base` and `is_hooked` are written out, because each
        # function that only wrappers call is more code to come from memory; and the parameters are looked up where they
        # are, because an attribute of a module is looked for in several places.
        if not is_dynamo_compiling() and not is_grad_enabled():
            layer = self._unhooked
            if not ROUTES.base_only:
                if layer is not None and not (OF_ALL_BEFORE or OF_ALL):
                    return self.forward(*args, **kwargs)
            elif type(layer) is nn.Linear and len(args) == 1 and not kwargs:
                own = layer.__dict__
                hooked = own["_forward_pre_hooks"] or own["_forward_hooks"] or OF_ALL_BEFORE or OF_ALL
                if not (hooked or "forward" in own or "_compiled_call_impl" in own):
                    own = own["_parameters"]
                    return linear(args[0], own["weight"], own["bias"])
        return DTSModule.__call__(self, *args, **kwargs)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if all_base():
            return self._base(input, *args, **kwargs)
        if self.stored or self.added or args or kwargs or input.dim() == 0:
            return super().forward(input, *args, **kwargs)
        # What is most often asked, without the general way's questions: a small layer is done in less time than those
        # take.
        slots = self.traceable_slots(input.shape)
        if isinstance(slots, list) and input.shape[0] == 1:
            return super().forward(input)
        return self.forward_fast(slots, for_each(slots, input))

    def forward_fast(self, slots: Slots, input: Tensor) -> Tensor:
        layer = self._modules["base_layer"]
        if not self._touched(slots):
            return self._base(input)
        # Modules' attributes are looked up in several places; these are where they are. The dictionary is read once: a
        # bank that grows gets a new one.
        bank = self._modules["bank"]._buffers
        bank = bank["pages"], bank["slot_pages"], bank["slot_weights"]
        x = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        ids = slot_ids(slots, x.shape[0], x.device)
        weight = layer._parameters.get("weight")
        packed = type(layer) is PackedLinear
        # A layer with hooks (a user's, or accelerate's that move or offload it) must run itself, or they do not.
        plain = (packed or (type(layer) is nn.Linear and is_plain(weight))) and not is_hooked(layer)
        if plain:
            bias, own_biases = layer._parameters["bias"], None
            if self.biases is not None and self._touches_bias(slots):
                # One adapter's takes the place of the base's; many are added behind.
                values = self.biases.values
                bias, own_biases = (values[slots], None) if isinstance(slots, int) else (None, values)
            if packed:
                y = layer.run(x, bias, *bank, ids)
            else:
                # First whether there is any: that is asked without the name of a device.
                if (is_dynamo_compiling() or _is_any_autocast_enabled()) and is_autocast_enabled(x.device.type):
                    dtype = torch.get_autocast_dtype(x.device.type)
                    x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
                y = ops.linear(x, weight, bias, *bank, ids)
            if own_biases is not None:
                y = y + own_biases[ids].to(y.dtype)
        else:
            y = layer(input).reshape(-1, self.out_features)
            ops.add_delta_(y, x.to(y.dtype), *bank, ids)
            if self.biases is not None and self._touches_bias(slots):
                values = self.biases.values.float()
                y = (y + (values[ids] - values[-1])).to(y.dtype)
        if self.added:
            y = self._with_added(y, x, slots, ids)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], y.shape[-1])

    def _with_added(self, y: Tensor, x: Tensor, slots: Slots, ids: Tensor) -> Tensor:
        """``y [M, N]`` with the outputs that adapters of the call add (tokens that a head's base does not have). Where
        another adapter's row has none stands the least number that there is, and not minus infinity: differences of
        two such (guidance) are to be numbers."""
        added = self.added_in(slots)
        if not added:
            return y
        width, least = max(len(rows["weight"]) for rows in added.values()), torch.finfo(y.dtype).min
        more = y.new_full((y.shape[0], width), least)
        for slot, rows in added.items():
            own = linear(x.to(rows["weight"].dtype), rows["weight"], rows.get("bias")).to(y.dtype)
            part = more[:, : own.shape[1]]
            part.copy_(torch.where((ids == slot)[:, None], own, part))
        return torch.cat([y, more], 1)


def acts_like_linear(layer: nn.Module) -> bool:
    """Whether `DTSLinear` can serve a layer: linear by type, or by its sizes (libraries' own quantised layers)."""
    if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward and is_plain(layer.weight):
        return False  # it may do more than multiply (a router): its output is then not to be added to
    by_size = has_features(layer) and not any(True for _ in layer.children())
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or by_size
