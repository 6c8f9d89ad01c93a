"""Which kernels serve a call on a GPU: CUDA C++ for few rows, Triton's for the rest, plain torch where neither runs.

`_decodes` decides; none of its numbers has been measured yet. DTS_FAST_GPU=cuda, triton or plain overrides it for what
the named kernels can do.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import native, reference

_MOST_DECODE_ROWS = 32  # csrc/cuda/decode.h
_FEW_ROWS = 16  # up to which the decode kernel's own way through the weights is preferred


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *bank: Tensor) -> Tensor:
    """`ops.linear` on a GPU, with checked arguments."""
    if not _decodes(x, weight, bank):
        return _others().linear(x, weight, bias, *bank)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    torch.ops.dts_fast.decode_(y, x, weight, bias, *bank)
    return y


def add_delta_(y: Tensor, x: Tensor, *bank: Tensor, transpose: bool = False) -> None:
    """`ops.add_delta_` on a GPU, with checked arguments."""
    if transpose or y.stride(1) != 1 or not _decodes(x, None, bank):
        _others().add_delta_(y, x, *bank, transpose=transpose)
    else:
        torch.ops.dts_fast.decode_(y, x, None, None, *bank)


def _decodes(x: Tensor, weight: Tensor | None, bank: tuple[Tensor, ...]) -> bool:
    """Whether the decode kernel is to be used, and can."""
    asked = os.environ.get("DTS_FAST_GPU")
    most = _MOST_DECODE_ROWS if asked == "cuda" else 0 if asked in ("triton", "plain") else _FEW_ROWS
    return (
        0 < x.shape[0] <= most
        and why_not_cuda() is None
        and x.dtype in (torch.bfloat16, torch.float16)
        and _whole_vectors(x)
        and (weight is None or _whole_vectors(weight))
        and bank[1].numel() > 0
    )


def _whole_vectors(t: Tensor) -> bool:
    """Whether rows are of whole 16 bytes, and aligned to them."""
    return t.stride(1) == 1 and t.shape[1] % 8 == 0 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def _others() -> ModuleType:
    if os.environ.get("DTS_FAST_GPU") == "plain" or why_not_triton() is not None:
        return reference
    from . import triton  # slow to import, and of no use without a GPU

    return triton


@cache
def why_not_cuda() -> str | None:
    """Why the CUDA C++ kernels are not used on a GPU; None where they are."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if native.MODULE is None:
        return f"the extension is {native.REASON}"
    if not native.MODULE.build_info()["cuda"]:
        return "the extension was built without CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no bfloat16 matrix units"
    return None


@cache
def why_not_triton() -> str | None:
    """Why Triton's kernels are not used on a GPU; None where they are."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.version.hip:
        return "not tried on AMD GPUs"
    try:
        from . import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no bfloat16 matrix units"
    return None
