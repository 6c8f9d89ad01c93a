"""Linear layers that keep their weight in the packed form of `packing`, as the only copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import native, ops
from .codes import PageLayout
from .errors import DTSError
from .packing import pack_weight, unpack_weight
from .routing import slot_ids


class PackedLinear(nn.Linear):
    """What `pack_` makes of a `torch.nn.Linear`: it computes the same, ``weight`` unpacks a copy, and state dicts hold
    the plain weight. Gradients flow to the input alone."""

    packed: Tensor

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, unpacked on each access."""
        return unpack_weight(self.packed, self.out_features, self.in_features)

    def get_parameter(self, target: str) -> nn.Parameter:
        if target == "weight":
            return nn.Parameter(self.weight, requires_grad=False)
        return super().get_parameter(target)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.in_features)
        y = self.run(x, *self._no_adapters, slot_ids(-1, x.shape[0], x.device))
        return y.unflatten(0, input.shape[:-1])

    def run(self, x: Tensor, *bank: Tensor) -> Tensor:
        """``ops.packed_linear`` with the tensors of a bank and slot ids ``[M]``, for ``x [M, K]``."""
        dtype = self.packed.dtype
        if not torch.is_autocast_enabled(x.device.type):
            return ops.packed_linear(x, self.packed, self.bias, self.out_features, *bank)
        y = ops.packed_linear(x.to(dtype), self.packed, self.bias, self.out_features, *bank)
        return y.to(torch.get_autocast_dtype(x.device.type))

    def _apply(self, fn, recurse: bool = True) -> PackedLinear:
        # The packed form depends on the dtype; what the layer is converted to, it is packed for.
        weight = self.weight
        super()._apply(fn, recurse)
        self.packed = pack_weight(fn(weight))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + "weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        shape = (self.out_features, self.in_features)
        if key not in state_dict:
            missing.append(key)
        elif tuple(state_dict[key].shape) != shape:
            errors.append(f"size mismatch for {key}: expected {list(shape)}, got {list(state_dict[key].shape)}.")
        else:
            self.packed.copy_(pack_weight(state_dict[key].to(self.packed.dtype)))


def pack_(linear: nn.Linear) -> PackedLinear:
    """Pack a layer's weight in place: the packed form is then its only copy.

    Raises:
        DTSError: not a plain `torch.nn.Linear` of float32, float16 or bfloat16 on the CPU, or no native kernels.
    """
    if isinstance(linear, PackedLinear):
        return linear
    if type(linear) is not nn.Linear:
        raise DTSError(f"prepack: expected a torch.nn.Linear, got {type(linear).__name__}. Leave prepack off for it.")
    weight = linear.weight.detach()
    if weight.device.type != "cpu" or weight.dtype not in ops.DTYPES:
        raise DTSError(
            f"prepack: expected a float32, float16 or bfloat16 weight on the CPU, got {weight.dtype} on "
            f"{weight.device}. Leave prepack off for it."
        )
    if native.MODULE is None:
        raise DTSError(
            f"prepack needs the native CPU kernels, which are {native.REASON}. Leave prepack off, or build them: see "
            "dts-fast doctor."
        )
    del linear.weight
    linear.__class__ = PackedLinear
    linear.register_buffer("packed", pack_weight(weight), persistent=False)
    linear._no_adapters = (
        torch.empty(0, PageLayout(*weight.shape).nbytes, dtype=torch.uint8),
        torch.full((1, 1), -1, dtype=torch.int32),
        torch.zeros(1, 1),
    )
    return linear


def unpack_(linear: PackedLinear) -> nn.Linear:
    """Make a packed layer a plain `torch.nn.Linear` again, in place."""
    weight = linear.weight
    del linear.packed, linear._no_adapters
    linear.__class__ = nn.Linear
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
