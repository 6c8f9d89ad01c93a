"""Norms of which every row has its own weights."""

from __future__ import annotations

import pytest
import torch
from layer_rows import assert_rows_are_their_own, both
from torch import nn

from dts_fast import DTSModule, route
from dts_fast.nn import DTSNorm, wrap
from dts_fast.slots import SlotTable


class RMSNorm(nn.Module):
    """As Llama and its descendants have it."""

    def __init__(self, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n))

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class GemmaNorm(RMSNorm):
    """As Gemma has it."""

    def forward(self, x):
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normal * (1.0 + self.weight.float())).to(x.dtype)


class ChannelsFirstNorm(nn.LayerNorm):
    """As ConvNeXt has it: the vector does not lie along the last dimension."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "LayerNorm": lambda n: nn.LayerNorm(n),
    "LayerNorm without bias": lambda n: nn.LayerNorm(n, bias=False),
    "torch's RMSNorm": lambda n: nn.RMSNorm(n),
    "torch's RMSNorm, eps": lambda n: nn.RMSNorm(n, eps=1e-5),
    "Llama's": RMSNorm,
    "Gemma's": GemmaNorm,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 9), (4, 5, 9), (4, 2, 3, 9)], ids=str)
def test_norm_rows_use_their_own_vectors(kind, dtype, shape):
    layer = NORMS[kind](9).to(dtype)
    wrapper, dense = both(layer)
    assert type(wrapper) is DTSNorm
    # Half types: the mixed path rounds once, torch's kernels once or twice.
    assert_rows_are_their_own(wrapper, dense, torch.randn(shape).to(dtype), 4 * torch.finfo(dtype).eps)
    assert wrapper.parameters_of(0).keys() == dict(layer.named_parameters()).keys()
    before = layer.weight.detach().clone()
    wrapper.delete_adapter("a")
    assert torch.equal(wrapper.tables["weight"].values[0], before)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "layer",
    [ChannelsFirstNorm(9), nn.BatchNorm1d(9), nn.GroupNorm(3, 9), nn.LayerNorm((3, 9)), RMSNorm(9).to("meta")],
    ids=lambda layer: type(layer).__name__,
)
def test_norms_of_another_kind_take_the_general_way(layer):
    assert type(wrap(layer, SlotTable(2))) is DTSModule


def test_norms_mix_exactly_and_take_whole_vectors():
    wrapper, dense = both(RMSNorm(9))
    wrapper.mix_slots(2, [(0, 0.5), (1, -0.25)])
    base = dense["__base__"]["weight"]
    mixed = base + 0.5 * (dense["a"]["weight"] - base) - 0.25 * (dense["b"]["weight"] - base)
    torch.testing.assert_close(wrapper.tables["weight"].values[2], mixed, rtol=1e-5, atol=1e-6)
    wrapper.clear_slot(2)
    whole = torch.randn(9)
    wrapper.load_adapter("whole", weight=whole)
    x = torch.randn(3, 4, 9)
    with torch.no_grad(), route(["whole", "a", "__base__"]):
        y = wrapper(x)
    for row, weight in enumerate((whole, dense["a"]["weight"], base)):
        torch.testing.assert_close(
            y[row], torch.func.functional_call(wrapper.base_layer, {"weight": weight}, x[row : row + 1])[0]
        )
