"""Layers that serve many adapters on one resident base: `DTSLinear`, `DTSEmbedding`, and `DTSModule` for the rest.

A wrapper holds the original layer as ``base_layer`` and answers for its attributes, so that code which reads
``layer.weight`` goes on working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import ops, reference
from .bank import Bank, SlotTable
from .codes import (
    Delta,
    LowRankDelta,
    PageLayout,
    VectorPageLayout,
    from_pages,
    from_vector_pages,
    is_matrix,
    to_pages,
    to_vector_pages,
)
from .errors import BaseMismatchError, RoutingError
from .mixture import mix
from .prepack import PackedLinear, pack_, unpack_, why_not_packable
from .routing import current_route, current_slots, narrowed, slot_ids

Parameter = Delta | Tensor
Slots = int | list[int]

_FAST = object()  # the rows that no stored slot claims


class DTSModule(nn.Module):
    """Any layer with adapters for its own parameters: runs the layer once for each distinct adapter of a batch.

    Correct for every layer whose inputs and outputs have the batch as first dimension. The subclasses do better for
    the layers that carry most weights, and fall back to this for what they cannot hold.

    Args:
        base_layer: the layer; its parameters stay where they are.
        max_adapters: slots, where no ``slots`` table is shared.
        slots: table of names shared with other layers of a model.
    """

    def __init__(self, base_layer: nn.Module, max_adapters: int = 8, *, slots: SlotTable | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = slots or SlotTable(max_adapters)
        # Whether the first dimension of the input is the batch: what tells its rows apart.
        self.batch_first = True
        # slot -> parameter name -> delta, or the tensor that stands in the parameter's place
        self.stored: dict[int, dict[str, Parameter]] = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def load_adapter(self, name: str, delta: LowRankDelta | None = None, **parameters: Parameter) -> None:
        """Load an adapter for this layer.

        Args:
            name: what `route` and `set_adapter` will call it.
            delta: delta of ``weight``.
            parameters: by parameter name; deltas (`LowRankDelta`, `CodedVector`), or tensors that take the
                parameter's place (new heads).

        Raises:
            DTSError: the name is taken.
            CapacityError: no slot or page is free.
            BaseMismatchError: shapes differ from the base's.
        """
        if delta is not None:
            parameters["weight"] = delta
        slot = self.slots.free_slot(name)
        self.check_parameters(parameters)
        try:
            self.load_slot(slot, parameters)
        except BaseException:
            self.clear_slot(slot)
            raise
        self.slots.occupy(name, slot)

    def check_parameters(self, parameters: Mapping[str, Parameter]) -> None:
        """Refuse deltas that do not fit this layer.

        Raises:
            BaseMismatchError: an unknown parameter name, or another shape than the base's.
        """
        own = self.base_shapes()
        kind = type(self.base_layer).__name__
        for name, parameter in parameters.items():
            if name not in own:
                raise BaseMismatchError(f"{kind} has no parameter {name!r}; it has {', '.join(own) or 'none'}.")
            if not isinstance(parameter, Tensor) and tuple(parameter.shape) != own[name]:
                raise BaseMismatchError(
                    f"parameter {name!r} of {kind}: the base has shape {list(own[name])}, the adapter "
                    f"{list(parameter.shape)}. Attach it to the base it was made for."
                )

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of the base layer."""
        return {name: tuple(parameter.shape) for name, parameter in self.base_layer.named_parameters()}

    def base_kind(self, name: str) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of a parameter of the base layer."""
        parameter = self.base_layer.get_parameter(name)
        return parameter.device, parameter.dtype

    def bare_layer(self) -> nn.Module:
        """The base layer as it was before it was wrapped; the wrapper is not to be used after."""
        return self.base_layer

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter and free its slot."""
        self.clear_slot(self.slots.release(name))

    def set_adapter(self, name: str) -> None:
        """What rows use outside any `route`; ``"__base__"`` for none."""
        self.slots.slot(name)
        self.slots.active = name

    def dense_parameters(self, slot: int) -> dict[str, Tensor]:
        """The personalised parameters of a slot, materialised in the base's dtypes."""
        dense = {}
        for name, parameter in self.parameters_of(slot).items():
            if isinstance(parameter, Tensor):
                dense[name] = parameter.to(*self.base_kind(name))
            else:
                base = self.base_layer.get_parameter(name).detach()
                wide = torch.promote_types(base.dtype, torch.float32)
                dense[name] = (base.to(wide) + parameter.dequantize(wide).to(base.device)).to(base.dtype)
        return dense

    def mix_slots(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        """Fill an empty slot with the weighted sum of what other slots change in this layer.

        Raises:
            DTSError: parameters that cannot be mixed (see `mixture.mix`).
        """
        parts = [(weight, self.parameters_of(member)) for member, weight in members]
        mixed = {}
        for name in dict.fromkeys(name for _, parameters in parts for name in parameters):
            base = self.base_layer.get_parameter(name)
            parameter = mix(name, [(weight, parameters.get(name)) for weight, parameters in parts], base)
            if parameter is not None:
                mixed[name] = parameter
        if mixed:
            self.load_slot(slot, mixed)

    def nbytes_of(self, slot: int) -> int:
        """Bytes that a slot takes in this layer."""
        return sum(parameter.nbytes for parameter in self.stored.get(slot, {}).values())

    # A subclass may hold a slot in its own way; these four belong together.

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter]) -> None:
        """`load_adapter` for a slot of a shared table, with checked parameters."""
        self.stored[slot] = dict(parameters)

    def clear_slot(self, slot: int) -> None:
        """Free what a slot holds in this layer."""
        self.stored.pop(slot, None)

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        """What a slot changes in this layer, by parameter name."""
        return self.stored.get(slot, {})

    def forward_fast(self, slots: Slots, *args, **kwargs):
        """Forward for slots that are not in ``stored``: here they change nothing."""
        return self.base_layer(*args, **kwargs)

    def forward(self, *args, **kwargs):
        # A table of positions has no rows: what matters is only whether all rows of the batch agree.
        shape = _batch_shape(args, kwargs) if self.batch_first else torch.Size([1])
        slots = current_slots(self.slots, shape)
        if isinstance(slots, int):
            return self._forward_one(slots, args, kwargs)
        if not self.batch_first:
            raise RoutingError(
                f"a {type(self.base_layer).__name__} whose input has no rows for the batch (a table of relative "
                "positions) cannot differ from row to row; run these adapters in separate batches, or compress without "
                "it (--exclude)."
            )
        return self.forward_mixed(slots, shape, args, kwargs)

    def forward_mixed(self, slots: list[int], shape: torch.Size, args, kwargs):
        """Forward where rows differ; one slot for each row of the batch."""
        rows, batch = shape[0], len(slots)
        if rows == 1:
            # An input shared by all rows (position ids, say) becomes one for each where their adapters differ.
            args, kwargs = _map_rows(lambda t: t.expand(batch, *t.shape[1:]), 1, args, kwargs)
            rows = batch
        groups: dict[object, list[int]] = {}
        for row, slot in enumerate(slots):
            groups.setdefault(slot if slot in self.stored else _FAST, []).append(row)
        if groups.keys() == {_FAST}:
            return self.forward_fast(slots, *args, **kwargs)
        repeats, results, taken = rows // batch, [], []
        for members in groups.values():
            taken.append([row * repeats + i for row in members for i in range(repeats)])
            index = torch.tensor(taken[-1])
            # A vector that an embedding is given is a list of positions, however many rows there are.
            least = 2 if isinstance(self.base_layer, nn.Embedding) else 1
            part = _map_rows(lambda t, index=index: t[index.to(t.device)], rows, args, kwargs, least)
            part_slots = [slots[row] for row in members]
            with narrowed(members):
                if part_slots[0] in self.stored:
                    result = self._forward_one(part_slots[0], *part)
                else:
                    result = self.forward_fast(part_slots, *part[0], **part[1])
            # Learned positions of some models are looked up by length alone: [T, H] or [1, T, H] for ids [B, T].
            if isinstance(self.base_layer, nn.Embedding):
                result = result[None] if result.dim() == len(shape) else result
                result = result.expand(len(taken[-1]), *result.shape[1:])
            results.append(result)
        return _merge_rows(results, taken)

    def _forward_one(self, slot: int, args, kwargs):
        if slot not in self.stored:
            return self.forward_fast(slot, *args, **kwargs)
        return torch.func.functional_call(self.base_layer, self.dense_parameters(slot), args, kwargs)


class _BankedModule(DTSModule):
    """A layer whose ``weight`` deltas lie in a bank of rank pages, and whose ``bias`` deltas in a bank of vectors."""

    def __init__(
        self,
        base_layer: nn.Module,
        shape: tuple[int, int],
        max_adapters: int,
        slots: SlotTable | None,
        max_rank: int | None,
    ) -> None:
        super().__init__(base_layer, max_adapters, slots=slots)
        self.layout = PageLayout(*shape)
        device, capacity = base_layer.weight.device, self.slots.capacity
        per_slot = None if max_rank is None else -(-max_rank // 16)
        num_pages = None if per_slot is None else per_slot * capacity
        self.bank = Bank(self.layout.nbytes, capacity, num_pages=num_pages, pages_per_slot=per_slot, device=device)
        self.bias_bank: Bank | None = None
        # Which parameters each slot changes; a slot that is not here costs the layer nothing.
        self.loaded: dict[int, frozenset[str]] = {}

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter]) -> None:
        if not all(
            not isinstance(p, Tensor) and name == ("weight" if is_matrix(p) else "bias")
            for name, p in parameters.items()
        ):
            return super().load_slot(slot, parameters)
        if "weight" in parameters:
            self.bank.load(slot, to_pages(self._oriented(parameters["weight"])))
        if "bias" in parameters:
            if self.bias_bank is None:
                nbytes = VectorPageLayout(self.base_layer.bias.numel()).nbytes
                self.bias_bank = Bank(nbytes, self.slots.capacity, device=self.bank.pages.device)
            self.bias_bank.load(slot, to_vector_pages(parameters["bias"]))
        self.loaded[slot] = frozenset(parameters)
        return None

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        found = dict(super().parameters_of(slot))
        for name in self.loaded.get(slot, ()):
            shape = self.base_shapes()[name]
            bank = self.bank if name == "weight" else self.bias_bank
            listed = bank.slot_pages[slot] >= 0
            pages, weights = bank.pages[bank.slot_pages[slot][listed].long()], bank.slot_weights[slot][listed]
            if name == "bias":
                found[name] = from_vector_pages(VectorPageLayout(shape[0]), pages, weights, shape)
            elif len(pages):
                found[name] = self._oriented(from_pages(self.layout, pages, weights))
        return found

    def nbytes_of(self, slot: int) -> int:
        banks = [self.bank] if self.bias_bank is None else [self.bank, self.bias_bank]
        return super().nbytes_of(slot) + sum(bank.nbytes_of(slot) for bank in banks)

    def mix_slots(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        if any(member in self.stored for member, _ in members):
            return super().mix_slots(slot, members)
        present = [(member, weight) for member, weight in members if member in self.loaded and weight != 0]
        if present:
            self.bank.share(slot, present)
            if self.bias_bank is not None:
                self.bias_bank.share(slot, present)
            self.loaded[slot] = frozenset().union(*(self.loaded[member] for member, _ in present))
        return None

    def clear_slot(self, slot: int) -> None:
        super().clear_slot(slot)
        self.loaded.pop(slot, None)
        # Whatever `loaded` says: a load that failed half way has written one bank and not the other.
        self.bank.evict(slot)
        if self.bias_bank is not None:
            self.bias_bank.evict(slot)

    def _oriented(self, matrix):
        """Between the parameter's orientation and the bank's ``[N, K]``; its own inverse."""
        return matrix

    def _touched(self, slots: Slots) -> bool:
        """Whether any of these slots changes this layer."""
        return slots in self.loaded if isinstance(slots, int) else any(slot in self.loaded for slot in slots)

    def _touches_bias(self, slots: Slots) -> bool:
        distinct = {slots} if isinstance(slots, int) else set(slots)
        return any("bias" in self.loaded.get(slot, ()) for slot in distinct)


class DTSLinear(_BankedModule):
    """A linear layer that computes base and delta in one go, each row with its own adapter.

        y = x W^T + b + ((x V) * s) U^T

    Args:
        base_layer: `torch.nn.Linear`, a layer like GPT-2's ``Conv1D`` (weight ``[in, out]``), or any layer with a
            2-D ``weight`` that acts like a linear. A plain `torch.nn.Linear` runs through the fused op, any other
            runs itself and has the delta added.
        max_adapters: slots, where no ``slots`` table is shared.
        max_rank: fixes the capacity, so that loading never allocates: every slot may take this rank. None lets the
            bank grow when a load needs it.
        prepack: keep the weight in the order in which the CPU kernels read it, as the only copy (`prepack.pack_`);
            for a plain `torch.nn.Linear` on the CPU. ``base_layer`` is changed in place; its ``weight`` can still be
            read, and state dicts stay as they are.
        slots: table of names shared with other layers of a model.

    Raises:
        DTSError: ``prepack`` for another layer, see `prepack.pack_`.

    Input ``[..., in_features]``, first dimension the batch; output ``[..., out_features]`` in the same dtype.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        prepack: bool = False,
        slots: SlotTable | None = None,
    ) -> None:
        # Conv1D of transformers keeps its weight as [in, out]; known by name, because this file imports no models.
        self_transposed = type(base_layer).__name__ == "Conv1D"
        n, k = reversed(base_layer.weight.shape) if self_transposed else base_layer.weight.shape
        super().__init__(base_layer, (n, k), max_adapters, slots, max_rank)
        if prepack:
            pack_(base_layer)
        self.transposed = self_transposed
        self.in_features, self.out_features = k, n

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().base_shapes()
        if isinstance(self.base_layer, PackedLinear):
            shapes["weight"] = (self.out_features, self.in_features)
        return shapes

    def base_kind(self, name: str) -> tuple[torch.device, torch.dtype]:
        if isinstance(self.base_layer, PackedLinear) and name == "weight":
            return self.base_layer.packed.device, self.base_layer.packed.dtype
        return super().base_kind(name)

    def bare_layer(self) -> nn.Module:
        packed = isinstance(self.base_layer, PackedLinear)
        return unpack_(self.base_layer) if packed else self.base_layer

    def _forward_one(self, slot: int, args, kwargs):
        if slot in self.stored and isinstance(self.base_layer, PackedLinear):
            dense = {"bias": self.base_layer.bias, **self.dense_parameters(slot)}
            if "weight" not in dense:
                dense["weight"] = self.base_layer.weight
            return nn.functional.linear(*args, **kwargs, **dense)
        return super()._forward_one(slot, args, kwargs)

    def _oriented(self, matrix):
        if not self.transposed:
            return matrix
        return matrix.t() if isinstance(matrix, Tensor) else matrix.transpose()

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if self.stored or args or kwargs or input.dim() == 0:
            return super().forward(input, *args, **kwargs)
        # What is most often asked, without the general way's questions: a small layer is done in less time than those
        # take.
        slots = current_slots(self.slots, input.shape)
        if isinstance(slots, list) and input.shape[0] == 1:
            return super().forward(input)
        return self.forward_fast(slots, input)

    def forward_fast(self, slots: Slots, input: Tensor) -> Tensor:
        # Modules' attributes are looked up in several places; these are where they are.
        layer, bank = self._modules["base_layer"], self._modules["bank"]._buffers
        if not self._touched(slots):
            return layer(input)
        x = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        bank = bank["pages"], bank["slot_pages"], bank["slot_weights"]
        ids = slot_ids(slots, x.shape[0], x.device)
        if type(layer) is PackedLinear:
            y = layer.run(x, *bank, ids)
        # A layer that accelerate moves or offloads must run itself, or its hooks do not.
        elif type(layer) is nn.Linear and "_hf_hook" not in layer.__dict__:
            weight, bias = layer.weight, layer.bias
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
            y = ops.linear(x, weight, bias, *bank, ids)
        else:
            y = layer(input).reshape(-1, self.out_features)
            ops.add_delta_(y, x.to(y.dtype), *bank, ids)
        if self.bias_bank is not None and self._touches_bias(slots):
            delta = reference.vector_delta(self.out_features, *self.bias_bank.tensors, ids)
            y = (y + delta).to(y.dtype)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)


class DTSEmbedding(_BankedModule):
    """An embedding table with adapters: looks up base rows and adds ``(U[ids] * s) V^T``.

    Args:
        base_layer: `torch.nn.Embedding`.
        max_adapters, max_rank, slots: see `DTSLinear`.

    Input: int ids ``[B, ...]``; output ``[B, ..., embedding_dim]`` in the table's dtype.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        slots: SlotTable | None = None,
    ) -> None:
        super().__init__(base_layer, tuple(base_layer.weight.shape), max_adapters, slots, max_rank)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() > 1 or current_route() is None:
            return super().forward(input)
        # Ids without a batch dimension are positions, shared by all rows; where rows differ each gets its own.
        y = super().forward(input[None])
        return y[0] if y.shape[0] == 1 else y

    def forward_fast(self, slots: Slots, input: Tensor) -> Tensor:
        y = self.base_layer(input)
        if not self._touched(slots):
            return y
        flat = input.reshape(-1)
        routed = slot_ids(slots, flat.shape[0], input.device)
        delta = reference.embedding_delta(flat, self.layout, *self.bank.tensors, routed)
        return (y + delta.reshape(y.shape)).to(y.dtype)


# Tables that are looked up with [query, key] distances: their input has no batch dimension, whatever its size.
_RELATIVE_POSITIONS = ("relative_attention_bias", "relative_position_bias", "rel_embeddings")


def wrap(layer: nn.Module, slots: SlotTable, path: str = "", *, prepack: bool = False) -> DTSModule:
    """The wrapper that serves a layer best; ``path`` is its name in the model, ``prepack`` `DTSLinear`'s where the
    layer allows it."""
    if type(layer) is nn.Embedding:
        wrapper = DTSEmbedding(layer, slots=slots)
    elif isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        wrapper = DTSLinear(layer, prepack=prepack and why_not_packable(layer) is None, slots=slots)
    else:
        wrapper = DTSModule(layer, slots=slots)
    wrapper.batch_first = not path.endswith(_RELATIVE_POSITIONS)
    return wrapper


def _batch_shape(args, kwargs) -> torch.Size:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape
    raise RoutingError("a DTS layer was called without any tensor that has a batch dimension.")


def _map_rows(function, rows: int, args, kwargs, least_dim: int = 1):
    """Apply ``function`` to every tensor of the arguments whose first dimension is the batch."""

    def on_leaf(leaf):
        has_rows = isinstance(leaf, Tensor) and leaf.dim() >= least_dim and leaf.shape[0] == rows
        return function(leaf) if has_rows else leaf

    return pytree.tree_map(on_leaf, (tuple(args), dict(kwargs)))


def _merge_rows(results: list, members: list[list[int]]):
    """Outputs of parts of a batch, back in the order of its rows."""
    order = torch.tensor([row for part in members for row in part]).argsort()

    def merge(*leaves):
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            raise RoutingError(
                f"the adapters of this batch give outputs of different shapes, {[list(t.shape[1:]) for t in leaves]} "
                "a row (heads of different sizes); run them in separate batches."
            )
        return torch.cat(leaves)[order.to(leaves[0].device)]

    return pytree.tree_map(merge, *results)
