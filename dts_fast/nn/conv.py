"""`DTSConv`: convolutions (patch embeddings, audio front ends) of which every row of a batch may use its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..bank import Arena
from ..codes import DeltaSum, LowRankDelta, matrix_shape, terms_of
from ..routing import Slots, all_base, slot_ids
from ..slots import SlotTable
from .banked import BankedModule
from .rows import for_each


class DTSConv(BankedModule):
    """A convolution with adapters: its delta is a linear layer on the patches that the kernel sees,
    ``[out, in * kernel]``.

    Args:
        base_layer: a layer for which `why_not_conv` has no objection.
        max_adapters, max_rank, arena, slots: see `DTSLinear`.

    Input ``[B, in, ...]``, output ``[B, out, ...]``.
    """

    def __init__(
        self,
        base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        max_adapters: int = 8,
        *,
        max_rank: int | None = None,
        arena: Arena | None = None,
        slots: SlotTable | None = None,
    ) -> None:
        out, *rest = base_layer.weight.shape
        super().__init__(base_layer, (out, math.prod(rest)), max_adapters, slots, max_rank, arena)

    def _from_pages(self, matrix):
        shape = tuple(self.base_layer.weight.shape)
        return DeltaSum(tuple(LowRankDelta(t.u, t.s, t.v, shape) for t in terms_of(matrix)))

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if all_base():
            return self._base(input, *args, **kwargs)
        if self.stored or args or kwargs or input.dim() != self.base_layer.weight.dim():
            return super().forward(input, *args, **kwargs)
        slots = self.traceable_slots(input.shape)
        if isinstance(slots, list) and input.shape[0] == 1:
            return super().forward(input)
        return self.forward_fast(slots, for_each(slots, input))

    def forward_fast(self, slots: Slots, input: Tensor) -> Tensor:
        layer = self.base_layer
        y = layer(input)
        if not self._touched(slots):
            return y
        batch, out, *size = y.shape
        patches = _patches(layer, input).to(y.dtype)
        ids = slot_ids(slots, patches.shape[0], y.device)
        delta = torch.zeros(patches.shape[0], out, dtype=y.dtype, device=y.device)
        ops.add_delta_(delta, patches, *self.bank.tensors, ids)
        y = y + delta.view(batch, *size, out).movedim(-1, 1)
        if self._touches_bias(slots):
            values = self.biases.values
            own = values[slot_ids(slots, batch, y.device)].float() - values[-1].float()
            y = (y + own.view(batch, out, *[1] * len(size))).to(y.dtype)
        return y


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What the kernel sees at each output: ``[B * outputs, in * kernel]``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    spatial = len(layer.kernel_size)
    for i in range(spatial):
        x = x.unfold(2 + i, layer.kernel_size[i], layer.stride[i])
    # [B, in, *outputs, *kernel] to [B, *outputs, in, *kernel]
    return x.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial)


def why_not_conv(layer: nn.Module) -> str | None:
    """Why `DTSConv` cannot serve a layer; None where it can."""
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return "no convolution"
    if layer.groups != 1 or any(d != 1 for d in layer.dilation):
        return "its channels are in groups, or its kernel is dilated"
    shape = tuple(layer.weight.shape)
    if matrix_shape(shape) != (shape[0], math.prod(shape[1:])):
        return "its weight is no matrix of outputs and inputs"
    return None
