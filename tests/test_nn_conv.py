"""Convolutions of which every row has its own kernels."""

from __future__ import annotations

import pytest
import torch
from layer_rows import assert_rows_are_their_own, both
from torch import nn

from dts_fast import DTSModule
from dts_fast.nn import DTSConv

CONVS = {
    "patches": (lambda: nn.Conv2d(3, 6, 4, stride=4), (4, 3, 16, 8)),
    "overlapping": (lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 3, 9, 7)),
    "same": (lambda: nn.Conv2d(2, 5, (2, 3), padding="same", bias=False), (4, 2, 6, 6)),
    "reflect": (lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="reflect"), (4, 3, 11)),
    "audio": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), (4, 8, 15)),
    "video": (lambda: nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4)), (4, 3, 4, 8, 8)),
    "one by one": (lambda: nn.Conv2d(5, 6, 1), (4, 5, 3, 3)),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_rows_use_their_own_kernels(kind, dtype):
    make, shape = CONVS[kind]
    wrapper, dense = both(make().to(dtype))
    assert type(wrapper) is DTSConv
    # Float32 sums in two parts; in bfloat16 base, delta and bias are rounded apart, at values of a few units.
    tolerance = 1e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert_rows_are_their_own(wrapper, dense, torch.randn(shape).to(dtype), tolerance)
    weight = wrapper.parameters_of(0)["weight"].dequantize()
    assert weight.shape == wrapper.base_layer.weight.shape
    torch.testing.assert_close(
        (dense["__base__"]["weight"].float() + weight).to(dtype), dense["a"]["weight"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(5, 1, 4)],
    ids=str,
)
def test_other_convolutions_take_the_general_way(layer):
    wrapper, dense = both(layer)
    assert type(wrapper) is DTSModule
    assert_rows_are_their_own(wrapper, dense, torch.randn(4, layer.in_channels, *[7] * (layer.weight.dim() - 2)), 1e-5)
