"""Linear layers that keep their weight in the packed form of `packing`, as the only copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import native, ops
from .codes import PageLayout
from .errors import DTSError
from .packing import pack_weight, packed_elements, packed_shape, unpack_weight
from .routing import slot_ids


class PackedLinear(nn.Linear):
    """What `pack_` makes of a `torch.nn.Linear`: it computes the same, and state dicts hold the plain weight.

    ``weight`` can be read, and is unpacked each time: what is written to it is lost. Gradients flow to the input and
    the bias alone.
    """

    packed: Tensor

    @property
    def weight(self) -> nn.Parameter:
        """``[out_features, in_features]``, a copy."""
        return nn.Parameter(unpack_weight(self.packed, self.out_features, self.in_features), requires_grad=False)

    def numel(self) -> int:
        """Elements of the weight."""
        return self.out_features * self.in_features

    def elements(self, positions: Tensor) -> Tensor:
        """Elements of the flattened weight, without unpacking the others: int64 ``[P]`` to ``[P]``."""
        return packed_elements(self.packed, self.in_features, positions)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, input.shape[-1])
        y = self.run(x, self.bias, *self._no_adapters, slot_ids(-1, x.shape[0], x.device))
        return y.view(*input.shape[:-1], self.out_features)

    def run(self, x: Tensor, bias: Tensor | None, *bank: Tensor) -> Tensor:
        """``ops.packed_linear`` with a bias, the tensors of a bank and slot ids ``[M]``, for ``x [M, K]``."""
        dtype = self.packed.dtype
        if not torch.is_autocast_enabled(x.device.type):
            return ops.packed_linear(x, self.packed, bias, self.out_features, *bank)
        y = ops.packed_linear(x.to(dtype), self.packed, bias, self.out_features, *bank)
        return y.to(torch.get_autocast_dtype(x.device.type))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply(self, fn, recurse: bool = True) -> PackedLinear:
        # The packed form depends on the dtype: the weight is packed anew for what the layer is converted to.
        converted = fn(self.packed.new_empty(0))
        shape = packed_shape(self.out_features, self.in_features, converted.dtype)
        if shape != tuple(self.packed.shape):
            packed = pack_weight(fn(unpack_weight(self.packed, self.out_features, self.in_features)))
            self.packed = None
            super()._apply(fn, recurse)
            self.packed = packed
        else:
            super()._apply(fn, recurse)
            self.packed = self.packed.contiguous()
        self._no_adapters = tuple(t.to(self.packed.device) for t in self._no_adapters)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "weight"] = self.weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        key, shape = prefix + "weight", (self.out_features, self.in_features)
        value = state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if value is None:
            missing.append(key)
            return
        state_dict[key] = value
        if tuple(value.shape) != shape:
            errors.append(f"size mismatch for {key}: expected {list(shape)}, got {list(value.shape)}.")
        elif metadata.get("assign_to_params_buffers", False):
            self.packed = pack_weight(value.detach())
        else:
            self.packed.copy_(pack_weight(value.detach().to(self.packed.dtype)))


def why_not_packable(linear: nn.Module) -> str | None:
    """Why `pack_` refuses a layer; None if it does not."""
    if isinstance(linear, PackedLinear):
        return None
    if type(linear) is not nn.Linear:
        return f"expected a torch.nn.Linear, got {type(linear).__name__}"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, prune)"
    if "forward" in linear.__dict__ or "_hf_hook" in linear.__dict__:
        return "its forward was replaced (accelerate moves or offloads it)"
    if weight.device.type != "cpu" or weight.dtype not in ops.DTYPES:
        return f"expected a float32, float16 or bfloat16 weight on the CPU, got {weight.dtype} on {weight.device}"
    return no_kernels()


def no_kernels() -> str | None:
    """Why nothing can be packed here; None where kernels for packed weights are."""
    if native.MODULE is None:
        return f"it needs the native CPU kernels, which are {native.REASON}; see dts-fast doctor"
    return None


@torch.inference_mode(False)
def pack_(linear: nn.Linear) -> PackedLinear:
    """Pack a layer's weight in place: the packed form is then its only copy.

    Raises:
        DTSError: not a plain `torch.nn.Linear` of float32, float16 or bfloat16 on the CPU, or no native kernels. The
            layer stays as it was.
    """
    if isinstance(linear, PackedLinear):
        return linear
    reason = why_not_packable(linear)
    if reason is not None:
        raise DTSError(f"prepack: {reason}. Leave prepack off for it.")
    weight = linear.weight
    packed = pack_weight(weight.detach())
    no_adapters = (
        torch.empty(0, PageLayout(*weight.shape).nbytes, dtype=torch.uint8, device=weight.device),
        torch.full((1, 1), -1, dtype=torch.int32, device=weight.device),
        torch.zeros(1, 1, device=weight.device),
    )
    # In an order that leaves a layer that runs after every step: another thread may be running it.
    linear.register_buffer("packed", packed, persistent=False)
    linear._no_adapters, linear._trained = no_adapters, weight.requires_grad
    linear.__class__ = PackedLinear
    del linear._parameters["weight"]
    return linear


@torch.inference_mode(False)
def unpack_(linear: PackedLinear) -> nn.Linear:
    """Make a packed layer the plain `torch.nn.Linear` that it was, in place."""
    weight = nn.Parameter(linear.weight.detach(), requires_grad=linear._trained)
    linear._parameters = {"weight": weight, **linear._parameters}  # in the order that they had
    linear.__class__ = nn.Linear
    del linear.packed, linear._no_adapters, linear._trained
    return linear
