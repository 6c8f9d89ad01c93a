"""`DTSModule`: any layer with adapters, and what the faster wrappers build on."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _global_forward_hooks as OF_ALL
from torch.nn.modules.module import _global_forward_pre_hooks as OF_ALL_BEFORE
from torch.utils import _pytree as pytree

from ..codes import Delta, LowRankDelta, owned
from ..errors import BaseMismatchError, DTSError, MixedBatchError, NeverMixedError
from ..growth import added_rows_of, grown_parameter
from ..mixture import mix
from ..pieces import Piece
from ..routing import ROUTES, Slots, all_base, current_route, current_slots, narrowed
from ..slots import SlotTable
from ..writes import Writes
from .parameters import ReadParameter, named_tensors, personal_method, run_with, tensor_of, tensors_kept
from .rows import batch_shape, map_rows, merge_rows
from .state import find_cache

Parameter = Delta | Tensor

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

    # The base layer, while the wrapper has no hooks; None where it has some. In the object itself, for `__call__`.
    __slots__ = ("_unhooked",)

    def __new__(cls, *args: object, **kwargs: object):
        self = super().__new__(cls)
        object.__setattr__(self, "_unhooked", None)
        return self

    def __init__(self, base_layer: nn.Module, max_adapters: int = 8, *, slots: SlotTable | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.slots = slots or SlotTable(max_adapters)
        # Whether the first dimension of the input is the batch: what tells its rows apart.
        self.batch_first = True
        # Whether it is given rows that were gathered from anywhere in a batch (experts).
        self.gathers = False
        # Whether it is the model itself.
        self.is_root = False
        # slot -> parameter name -> delta, or the tensor that stands in the parameter's place
        self.stored: dict[int, dict[str, Parameter]] = {}

    def __call__(self, *args, **kwargs):
        # Weights stream through the caches, so that whatever only wrappers look at or run comes from memory. A call of
        # the base alone looks at nothing of the wrapper but this, and then runs what a model without wrappers runs; one
        # with adapters does not look for hooks, of which this tells that there are none.
        if not is_dynamo_compiling() and not is_grad_enabled():
            layer = self._unhooked
            if layer is not None and ROUTES.base_only:
                return layer(*args, **kwargs)
            if layer is not None and not (OF_ALL_BEFORE or OF_ALL):
                return self.forward(*args, **kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    # What tells `_unhooked`.

    def _look_for_hooks(self) -> None:
        own = self.__dict__
        hooked = own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own or "_compiled_call_impl" in own
        object.__setattr__(self, "_unhooked", None if hooked else own["_modules"].get("base_layer"))

    def register_forward_hook(self, *args, **kwargs):
        handle = super().register_forward_hook(*args, **kwargs)
        self._look_for_hooks()
        return handle

    def register_forward_pre_hook(self, *args, **kwargs):
        handle = super().register_forward_pre_hook(*args, **kwargs)
        self._look_for_hooks()
        return handle

    def __setattr__(self, name: str, value: object) -> None:
        layer = self.__dict__.get("_modules", {}).get("base_layer")
        if layer is not None and name in vars(layer) and name not in self.__dict__ and is_state(value, layer, name):
            setattr(layer, name, value)
            return
        super().__setattr__(name, value)
        if name in ("base_layer", "forward", "_compiled_call_impl"):
            self._look_for_hooks()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._look_for_hooks()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            value = getattr(self.base_layer, name)
            if inspect.ismethod(value) and value.__self__ is self.base_layer:
                return personal_method(value, self, name)
            read = isinstance(value, nn.Parameter) or self._changes_buffer(name)
            return ReadParameter.of(value, self, name) if read else value

    def _changes_buffer(self, name: str) -> bool:
        """Whether any adapter has a buffer of its own in the place of this one."""
        held = name in self.base_layer._buffers
        return held and any(self.changes(slot, name) for slot in range(self.slots.capacity))

    def load_adapter(self, name: str, delta: LowRankDelta | None = None, **parameters: Parameter) -> None:
        """Load an adapter for this layer.

        Args:
            name: what `route` and `set_adapter` will call it.
            delta: delta of ``weight``.
            parameters: by parameter name; deltas (`LowRankDelta`, `CodedVector`), or tensors that take the
                parameter's place (new heads).

        Raises:
            DTSError: the name is taken, or ``delta`` is a tensor.
            CapacityError: no slot or page is free.
            BaseMismatchError: shapes differ from the base's.
        """
        if isinstance(delta, Tensor):
            raise DTSError(
                "delta: expected what fit() returns, got a tensor. fit(delta, rank=...) compresses a difference; a "
                "tensor that takes the weight's place is given as weight=."
            )
        if delta is not None:
            parameters["weight"] = delta
        self.check_parameters(parameters)
        with self.slots.loading:
            self.slots.check_new(name)
            slot = self.slots.reserve()
            try:
                self.load_slot(slot, parameters)
            except BaseException:
                self.clear_slot(slot)
                self.slots.cancel(slot)
                raise
            self.slots.occupy(name, slot)

    def check_parameters(self, parameters: Mapping[str, Parameter], path: str = "") -> None:
        """Refuse deltas that do not fit this layer.

        Args:
            path: the layer's in its model, for the message.

        Raises:
            BaseMismatchError: an unknown parameter name, or another shape than the base's.
        """
        kind = f"{path} ({type(self.base_layer).__name__})" if path else type(self.base_layer).__name__
        for name, parameter in parameters.items():
            grown = grown_parameter(name)
            if grown is not None:
                self._check_added(kind, grown, parameter, parameters)
                continue
            shape = self.base_shape(name)
            if shape is None:
                raise BaseMismatchError(
                    f"{kind} has no parameter {name!r}; it has {', '.join(self.base_names()) or 'none'}."
                )
            if not isinstance(parameter, Tensor) and tuple(parameter.shape) != shape:
                raise BaseMismatchError(
                    f"parameter {name!r} of {kind}: the base has shape {list(shape)}, the adapter "
                    f"{list(parameter.shape)}. Attach it to the base it was made for."
                )

    def _check_added(self, kind: str, name: str, rows: Parameter, parameters: Mapping[str, Parameter]) -> None:
        shape = self.base_shape(name)
        whole = isinstance(rows, Tensor) and rows.dim() > 0
        if shape is None or not whole or tuple(rows.shape[1:]) != shape[1:]:
            expected = "no such parameter" if shape is None else f"whole rows of {list(shape[1:])}"
            raise BaseMismatchError(
                f"rows added to {name!r} of {kind}: the base has {expected}, the adapter {list(rows.shape)}. Attach it "
                "to the base it was made for."
            )
        weight = parameters.get(added_rows_of("weight"))
        if name == "bias" and self.base_shape("weight") is not None and (weight is None or len(weight) != len(rows)):
            raise BaseMismatchError(
                f"{kind}: the adapter adds {len(rows)} rows to the bias and {0 if weight is None else len(weight)} to "
                "the weight. Compress with both or neither (--exclude)."
            )

    def base_names(self) -> list[str]:
        """The names of what an adapter may change in the base layer: its parameters, and buffers like them."""
        names = list(named_tensors(self.base_layer))
        return names if "weight" in names or not has_features(self.base_layer) else ["weight", *names]

    def base_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter of the base layer; None if it has no such parameter."""
        layer = self._modules["base_layer"]
        piece = Piece.named(name)
        if piece is not None:
            stack = layer._parameters.get(piece.parameter)
            fits = stack is not None and stack.dim() == 3 and piece.expert < stack.shape[0]
            fits = fits and stack.shape[1] % piece.parts == 0
            return (stack.shape[1] // piece.parts, stack.shape[2]) if fits else None
        own = layer._parameters.get(name)
        if name == "weight" and not (type(layer) is nn.Linear and is_plain(own)) and has_features(layer):
            return layer.out_features, layer.in_features  # whatever shape it is kept in
        if own is None:
            own = named_tensors(layer).get(name)
        return None if own is None else tuple(own.shape)

    def base_parameter(self, name: str) -> Tensor:
        """A parameter of the base layer, or a piece of one, for reading."""
        piece = Piece.named(name)
        own = tensor_of(self.base_layer, name if piece is None else piece.parameter).detach()
        return own if piece is None else piece.of(own)

    def base_kind(self, name: str) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of a parameter of the base layer; of a quantised weight, the dtype of what stands for it."""
        if name == "weight" and not self.has_plain_weight:
            held = (*self.base_layer.parameters(), *self.base_layer.buffers())
            floats = [t.dtype for t in held if t.dtype in (torch.float32, torch.float16, torch.bfloat16)]
            return held[0].device, next(iter(floats), torch.float32)
        parameter = self.base_parameter(name)
        return parameter.device, parameter.dtype

    @property
    def has_plain_weight(self) -> bool:
        """Whether the base's ``weight`` can be read as numbers (packed ones can) and is no library's quantised form."""
        return is_plain(getattr(self.base_layer, "weight", None))

    def bare_layer(self) -> nn.Module:
        """The base layer as it was before it was wrapped; the wrapper is not to be used after."""
        return self.base_layer

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter and free its slot. No other thread may be using it."""
        self.slots.release(name, self.clear_slot)

    def set_adapter(self, name: str) -> None:
        """What rows use outside any `route`; ``"__base__"`` for none."""
        self.slots.slot(name)
        self.slots.active = name

    def dense_parameters(self, slot: int) -> dict[str, Tensor]:
        """The personalised parameters of a slot, materialised in the base's dtypes.

        Raises:
            DTSError: a delta of a quantised weight: the sum would have to be rounded anew.
        """
        dense: dict[str, Tensor] = {}
        held = self.parameters_of(slot)
        for name, parameter in sorted(held.items(), key=lambda item: grown_parameter(item[0]) is not None):
            grown = grown_parameter(name)
            if grown is not None:  # behind what it grows
                if grown == "weight" and "weight" not in dense and not self.has_plain_weight:
                    raise DTSError(
                        f"the weight of this {type(self.base_layer).__name__} is quantised, and no rows can be added "
                        "to it. Serve the adapter unmerged, or merge it into the full-precision base (dts-fast export "
                        "full)."
                    )
                value = dense[grown] if grown in dense else self.base_parameter(grown)
                dense[grown] = torch.cat([value, parameter.to(value.device, value.dtype)])
                continue
            if isinstance(parameter, Tensor):
                value = parameter.to(*self.base_kind(name))
            elif name == "weight" and has_features(self.base_layer) and not self.has_plain_weight:
                raise DTSError(
                    f"the weight of this {type(self.base_layer).__name__} is quantised, and the adapter's delta cannot "
                    "be added to it without rounding the sum anew. Serve the adapter unmerged, or merge it into the "
                    "full-precision base (dts-fast export full) and quantise that."
                )
            else:
                base = self.base_parameter(name)
                wide = torch.promote_types(base.dtype, torch.float32)
                value = (base.to(wide) + parameter.dequantize(wide).to(base.device)).to(base.dtype)
            if name.endswith("running_var"):
                value = value.clamp_min(0)  # of mixtures with negative weights
            piece = Piece.named(name)
            if piece is None:
                dense[name] = value
            else:
                stack = dense.get(piece.parameter)
                if stack is None:
                    stack = dense[piece.parameter] = self.base_parameter(piece.parameter).clone()
                piece.of(stack).copy_(value)
        return dense

    def mix_slots(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        """Fill an empty slot with the weighted sum of what other slots change in this layer.

        Raises:
            DTSError: parameters that cannot be mixed (see `mixture.mix`).
        """
        parts = [(weight, self.parameters_of(member)) for member, weight in members]
        mixed = {}
        for name in dict.fromkeys(name for _, parameters in parts for name in parameters):
            base = None if grown_parameter(name) is not None else self.base_parameter(name)
            parameter = mix(name, [(weight, parameters.get(name)) for weight, parameters in parts], base)
            if parameter is not None:
                mixed[name] = parameter
        if mixed:
            self.load_slot(slot, mixed)

    def fits(self, parameters: Mapping[str, Parameter], without: Collection[int] = ()) -> bool:
        """Whether `load_slot` would find room for these parameters, once these slots are empty."""
        return True

    def has_fast_path(self, parameters: Mapping[str, Parameter]) -> bool:
        """Whether rows with these parameters run together with others."""
        return False

    # A subclass may hold a slot in its own way; these five belong together.

    def changes(self, slot: int, name: str) -> bool:
        """Whether a slot changes a parameter."""
        return is_changed(name, self.stored.get(slot, ()))

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter], writes: Writes | None = None) -> None:
        """`load_adapter` for a slot of a shared table, with checked parameters; pages may be left to ``writes``."""
        self.stored[slot] = {n: p if isinstance(p, Tensor) else owned(p) for n, p in parameters.items()}

    def clear_slot(self, slot: int, writes: Writes | None = None) -> None:
        """Free what a slot holds in this layer; lists and rows may be left to ``writes``."""
        self.stored.pop(slot, None)

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        """What a slot changes in this layer, by parameter name."""
        return self.stored.get(slot, {})

    def forward_fast(self, slots: Slots, *args, **kwargs):
        """Forward for slots that are not in ``stored``: here they change nothing."""
        return self.base_layer(*args, **kwargs)

    def _base(self, *args, **kwargs):
        """What the bare layer would return. Its own call would ask for hooks in more places, and costs a small layer as
        much as its work."""
        layer = self._modules["base_layer"]
        called = is_hooked(layer) or type(layer).__call__ is not nn.Module.__call__
        return layer(*args, **kwargs) if called else layer.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        if all_base():
            return self._base(*args, **kwargs)
        shape = batch_shape(args, kwargs) if self.batch_first else None
        # Ids without a batch dimension are positions, in classes of embeddings that do something of their own.
        rowless = shape is None or (isinstance(self.base_layer, nn.Embedding) and len(shape) == 1)
        # What has no rows asks only whether all rows of the batch agree.
        slots = current_slots(self.slots, (1,) if rowless else shape)
        if isinstance(slots, int):
            return self._forward_one(slots, args, kwargs)
        self.refuse_gathered(slots)
        if rowless:
            raise NeverMixedError(
                f"a {type(self.base_layer).__name__} whose input has no rows for the batch (positions, a table of "
                "relative positions, a parametrized weight) cannot differ from row to row; run these adapters in "
                "separate batches, or compress without it (--exclude)."
            )
        if self.is_root and any(map(self.runs_alone, slots)):
            raise NeverMixedError(
                f"{type(self.base_layer).__name__} has parameters of its own that differ within this batch, and what "
                "it returns may be of the whole batch."
            )
        return self.forward_mixed(slots, shape, args, kwargs)

    def traceable_slots(self, shape: Sequence[int]) -> Slots:
        """`routing.current_slots` for a layer that can do with a tensor where its model is compiled.

        Raises:
            MixedBatchError: see `refuse_gathered`.
        """
        slots = current_slots(self.slots, shape, traceable=True)
        if not isinstance(slots, int):
            self.refuse_gathered(slots)
        return slots

    def refuse_gathered(self, slots: Slots) -> None:
        """Refuse rows that differ where it cannot be told which row is whose.

        Raises:
            MixedBatchError: a layer of experts, in a batch (or compiled for batches) whose rows differ.
        """
        if self.gathers and not isinstance(slots, int):
            raise MixedBatchError(
                f"a {type(self.base_layer).__name__} of an expert gets tokens from any row, so that adapters cannot "
                "differ from row to row; run these adapters in separate batches, or compress without experts "
                "(--exclude)."
            )

    def forward_mixed(self, slots: list[int], shape: torch.Size, args, kwargs):
        """Forward where rows differ; one slot for each row of the batch."""
        rows, batch = shape[0], len(slots)
        if rows == 1:
            if not any(self.changes(slot, name) for slot in set(slots) for name in self.base_names()):
                return self._base(*args, **kwargs)
            refuse_shared_numbers(self.base_layer, batch, args, kwargs)
            # What all rows share (positions, say) becomes one for each where their adapters differ.
            args, kwargs = map_rows(lambda t: t.expand(batch, *t.shape[1:]), 1, args, kwargs)
            rows = batch
        groups: dict[object, list[int]] = {}
        for row, slot in enumerate(slots):
            groups.setdefault(slot if self.runs_alone(slot) else _FAST, []).append(row)
        if groups.keys() == {_FAST}:
            return self.forward_fast(slots, *args, **kwargs)
        cache = find_cache(self.base_layer, (args, kwargs), rows)
        repeats, results, taken = rows // batch, [], []
        kept = tensors_kept(self.base_layer)
        for members in groups.values():
            taken.append([row * repeats + i for row in members for i in range(repeats)])
            index = torch.tensor(taken[-1])
            # A vector that an embedding is given is a list of positions, however many rows there are.
            least = 2 if isinstance(self.base_layer, nn.Embedding) else 1
            given = (args, kwargs) if cache is None else cache.part(taken[-1], (args, kwargs))
            part = map_rows(lambda t, index=index: t[index.to(t.device)], rows, *given, least)
            part_slots = [slots[row] for row in members]
            with narrowed(members, batch):
                if self.runs_alone(part_slots[0]):
                    result = self._forward_one(part_slots[0], *part)
                else:
                    result = self.forward_fast(part_slots, *part[0], **part[1])
            # Learned positions of some models are looked up by length alone: [T, H] or [1, T, H] for ids [B, T].
            if isinstance(self.base_layer, nn.Embedding):
                result = result[None] if result.dim() == len(shape) else result
                result = result.expand(len(taken[-1]), *result.shape[1:])
            results.append(result if cache is None else cache.whole(result))
        if any(kept.get(name) is not value for name, value in tensors_kept(self.base_layer).items()):
            raise MixedBatchError(
                f"{type(self.base_layer).__name__} has parameters of its own that differ within this batch, and keeps "
                "something of the whole batch in itself. Run these adapters in separate batches, or compress without "
                "its parameters (--exclude)."
            )
        merged = merge_rows(results, taken)
        if cache is not None:
            cache.join()
        return merged

    def runs_alone(self, slot: int) -> bool:
        """Whether the layer runs for this slot with its dense parameters."""
        return slot in self.stored

    def _forward_one(self, slot: int, args, kwargs):
        if not self.runs_alone(slot):
            return self.forward_fast(slot, *args, **kwargs)
        return run_with(self.base_layer, self.dense_parameters(slot), args, kwargs)


def is_state(value: object, layer: nn.Module, name: str) -> bool:
    """Whether a value that a model sets on a layer is a state that it keeps there."""
    return isinstance(value, Tensor) or isinstance(vars(layer)[name], Tensor)


def refuse_shared_numbers(layer: nn.Module, batch: int, args, kwargs) -> None:
    """Within a model ids in one row may be those of all rows; numbers in one row are another thing (a table, one of the
    batch's images), of which it cannot be told whose it is.

    Raises:
        MixedBatchError: that is so.
    """
    current = current_route()
    if not (current.of_model or current.expandable):
        return
    first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0)
    if first.is_floating_point():
        raise MixedBatchError(
            f"a {type(layer).__name__} is given one row in a batch of {batch}, so that it cannot be told whose it is. "
            "Run these adapters in separate batches, or compress without that layer (--exclude)."
        )


def is_changed(name: str, held: Collection[str]) -> bool:
    """Whether a parameter is among names, or a piece of it is, or rows that were added to it."""
    pieces = [Piece.named(own) for own in held]
    whole = name in held or added_rows_of(name) in held
    return whole or any(piece is not None and piece.parameter == name for piece in pieces)


def has_features(layer: nn.Module) -> bool:
    """Whether a layer tells the sizes of a linear's weight."""
    return all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))


def is_hooked(layer: nn.Module) -> bool:
    """Whether a layer does more than its class's forward when it is called (a user's hooks, or accelerate's)."""
    own = layer.__dict__
    hooks = own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or "_compiled_call_impl" in own or bool(OF_ALL_BEFORE or OF_ALL)


def is_plain(parameter: object) -> bool:
    """Whether a parameter is floating-point numbers as torch has them, and not a quantised form of some library."""
    return type(parameter) in (nn.Parameter, Tensor) and parameter.is_floating_point()
