"""A base weight in the order in which the CPU kernels read it: panels of 32 outputs.

    float32, float16   [ceil(N / 32), K, 32, 1]            panel, input, output
    bfloat16           [ceil(N / 32), ceil(K / 2), 32, 2]  panel, two neighbouring inputs, output

Sums then run down the lanes of a vector register, and every weight is read once, in the order in which it lies. Pairs
of bfloat16 are widened by one instruction each (a shift, a mask). What pads the last panel and the last pair is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 32


def packed_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Shape of the packed form of a weight ``[n, k]``."""
    pair = 2 if dtype == torch.bfloat16 else 1
    return -(-n // PANEL), -(-k // pair), PANEL, pair


def pack_weight(weight: Tensor) -> Tensor:
    """The packed form of a weight ``[N, K]``, see above; same dtype and device."""
    panels, steps, _, pair = packed_shape(*weight.shape, weight.dtype)
    n, k = weight.shape
    padded = pad(weight, (0, steps * pair - k, 0, panels * PANEL - n))
    return padded.reshape(panels, PANEL, steps, pair).transpose(1, 2).contiguous()


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight ``[n, k]`` of a packed form, bit for bit; a copy."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].clone(memory_format=torch.contiguous_format)


def packed_elements(packed: Tensor, k: int, positions: Tensor) -> Tensor:
    """Elements at int64 ``positions [P]`` of the flattened weight ``[n, k]``: ``[P]``."""
    rows, columns = positions // k, positions % k
    pair = packed.shape[3]
    return packed[rows // PANEL, columns // pair, rows % PANEL, columns % pair]
