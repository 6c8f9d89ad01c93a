"""A base layer's parameters as an adapter has them: for a run of the layer, and for code that reads them or calls other
methods than forward, past its wrapper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import NeverMixedError, RoutingError, UnknownAdapterError
from ..routing import current_route, named_slots
from ..slots import BASE, BASE_SLOT


def named_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """What training can change in a layer, by name, tied tensors under each of theirs: its parameters, and buffers of
    floating-point numbers (running means, biases that are moved without gradients)."""
    found = dict(layer.named_parameters(remove_duplicate=False))
    buffers = layer.named_buffers(remove_duplicate=False)
    return found | {name: buffer for name, buffer in buffers if buffer.is_floating_point()}


def tensor_of(layer: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer of a layer, or of one within it."""
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    own = module._buffers.get(leaf)
    return module.get_parameter(leaf) if own is None else own


def run_with(layer: nn.Module, parameters: Mapping[str, Tensor], args: tuple, kwargs: dict):
    """Run a layer with other parameters.

    Raises:
        RoutingError: a layer whose forward was replaced by something unknown.
    """
    if torch.compiler.is_compiling():  # what a graph is made of no other thread sees
        return torch.func.functional_call(layer, dict(parameters), args, kwargs)
    hook = layer.__dict__.get("_hf_hook")  # accelerate's: it moves inputs, and weights that are kept elsewhere
    if hook is None and "forward" in layer.__dict__:
        raise RoutingError(
            f"{type(layer).__name__}: its forward was replaced, so that it cannot run with an adapter's parameters. "
            "Compress without it (--exclude)."
        )
    if hook is not None:
        args, kwargs = hook.pre_forward(layer, *args, **kwargs)
    own = with_parameters(layer, parameters)
    own.__dict__.pop("forward", None)
    result = own(*args, **kwargs)
    # What a layer keeps in itself from call to call.
    for name, value in own.__dict__.items():
        if name not in _OF_A_COPY and layer.__dict__.get(name, own) is not value:
            setattr(layer, name, value)
    for name, value in own._buffers.items():
        if name not in parameters and layer._buffers.get(name, own) is not value:
            layer._buffers[name] = value
    return result if hook is None else hook.post_forward(layer, result)


def tensors_kept(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer may keep in itself from call to call: tensors among its attributes, and buffers."""
    kept = {**vars(layer), **layer._buffers}
    return {name: value for name, value in kept.items() if isinstance(value, Tensor)}


# What `with_parameters` gives a layer of its own.
_OF_A_COPY = frozenset({"_parameters", "_buffers", "_modules", "_flat_weights", "forward"})


def with_parameters(layer: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A layer that shares everything with another but these parameters.

    `torch.func.functional_call` would put them into the layer itself while it runs, where other threads see them.
    """
    own = type(layer).__new__(type(layer))
    own.__dict__.update(layer.__dict__)
    own.__dict__["_parameters"] = dict(layer._parameters)
    own.__dict__["_buffers"] = dict(layer._buffers)
    children: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        child, dot, rest = name.partition(".")
        if dot:
            children.setdefault(child, {})[rest] = value
        else:
            (own._buffers if name in own._buffers else own._parameters)[name] = value
    if children:
        own.__dict__["_modules"] = dict(layer._modules)
        for child, values in children.items():
            own._modules[child] = with_parameters(layer._modules[child], values)
    if isinstance(own, nn.RNNBase):  # it keeps a list of them, for cuDNN
        own.__dict__["_flat_weights"] = [getattr(own, name) for name in own._flat_weights_names]
    return own


class ReadParameter(Tensor):
    """A base layer's parameter as code finds it that reads ``layer.weight`` and does not call the layer: what it says
    of itself (dtype, device, shape) is the base's; where it is computed with, it is the current adapter's. It has no
    memory of its own, so that nothing can compute with the base's by mistake.

    Raises:
        NeverMixedError: where it is computed with and the rows of the batch differ.
        RoutingError: where it is written to.
    """

    @staticmethod
    def of(parameter: nn.Parameter, wrapper: nn.Module, name: str) -> Tensor:
        """The parameter itself where no adapter of the current route changes it."""
        if torch.compiler.is_compiling():
            # Which adapters there will be a graph does not know: description without numbers, which no product takes.
            return torch.empty_like(parameter, device="meta")
        if current_route() is None and wrapper.slots.active == BASE:
            return parameter
        try:
            slots = named_slots(wrapper.slots)
        except UnknownAdapterError:
            return parameter  # outside of calls, and the active adapter is evicted
        if not any(wrapper.changes(slot, name) for slot in slots):
            return parameter
        read = Tensor._make_wrapper_subclass(
            ReadParameter, parameter.size(), dtype=parameter.dtype, device=parameter.device
        )
        read.origin, read.found = (wrapper, name, slots), None
        return read

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if (function.__self__.__name__ if name == "__get__" else name) in TELLS_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if name == "__set__" or (name.endswith("_") and not name.endswith("__") and isinstance(args[0], cls)):
            raise RoutingError("an adapter's parameter is not to be written to; write to base_layer's.")
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map(lambda t: t.personal() if isinstance(t, cls) else t, (args, kwargs or {}))
        return function(*args, **kwargs)

    def personal(self) -> Tensor:
        wrapper, name, slots = self.origin
        if len(slots) > 1:
            raise NeverMixedError(
                f"the model computes with {name!r} of a {type(wrapper.base_layer).__name__} without calling that "
                "layer, and the rows of this batch have different ones. Run these adapters in separate batches, or "
                "compress without it (--exclude)."
            )
        if self.found is None:
            self.found = wrapper.dense_parameters(next(iter(slots)))[name]
        return self.found


# What is asked of a parameter's description.
TELLS_NO_VALUES = frozenset({
    "dtype", "device", "shape", "ndim", "itemsize", "nbytes", "layout", "requires_grad", "is_leaf", "is_cuda",
    "is_meta", "is_cpu", "is_sparse", "is_quantized", "size", "dim", "numel", "nelement", "element_size", "stride",
    "get_device", "is_contiguous", "is_floating_point", "is_complex", "ndimension", "__len__",
})  # fmt: skip


def personal_method(method: Callable, wrapper: nn.Module, name: str) -> Callable:
    """A method of a base layer that the model calls beside its forward, with the current adapter's parameters.

    Raises (when called):
        NeverMixedError: the rows of the batch have different ones.
    """
    if torch.compiler.is_compiling():  # which adapters there will be a graph does not know
        slots = {BASE_SLOT, *range(wrapper.slots.capacity)}
    elif current_route() is None and wrapper.slots.active == BASE:
        return method
    else:
        slots = _current(wrapper)
    if not any(wrapper.changes(slot, own) for slot in slots for own in wrapper.base_names()):
        return method

    def run(*args, **kwargs):
        if len(slots) > 1:
            raise NeverMixedError(
                f"the model calls {name}() of a {type(wrapper.base_layer).__name__}, and the rows of this batch have "
                "different parameters there, or will have in a compiled model. Run these adapters in separate batches, "
                "not compiled, or compress without it (--exclude)."
            )
        own = with_parameters(wrapper.base_layer, wrapper.dense_parameters(next(iter(slots))))
        return getattr(own, name)(*args, **kwargs)

    return run


def _current(wrapper: nn.Module) -> set[int]:
    try:
        return named_slots(wrapper.slots)
    except UnknownAdapterError:
        return set()  # outside of calls, and the active adapter is evicted
