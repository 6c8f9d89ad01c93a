"""Which kernels serve a call on a GPU: CUDA C++ for few rows, Triton's for the rest, plain torch where neither runs.

`_decodes` decides; none of its numbers has been measured yet. DTS_FAST_GPU=triton or plain leaves the better ones out.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import native, reference
from .codes import PAGE_RANKS, PageLayout

_DECODE_ROWS, _DECODE_INPUTS = 64, 1 << 24  # csrc/cuda/decode.h


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


def embedding_delta(
    ids: Tensor, layout: PageLayout, pages: Tensor, slot_pages: Tensor, slot_weights: Tensor, slot_ids: Tensor
) -> Tensor:
    """`ops.embedding_delta` on a GPU, with checked arguments: nothing depends on the batch's composition, and nothing
    is copied to the host, so that it can be captured in a graph."""
    coefficients = layout.coefficients(ids, pages, slot_pages, slot_weights, slot_ids)  # [M, L, 16]
    listed = slot_pages[slot_ids.clamp_min(0)].clamp_min(0).long()  # [M, L]; unused entries have coefficients 0
    # All pages are dequantised, whatever the batch uses: [P * 16, K] is small beside the table.
    spread = coefficients.new_zeros(ids.shape[0], pages.shape[0], PAGE_RANKS)
    spread.scatter_add_(1, listed[..., None].expand_as(coefficients), coefficients)
    with torch.autocast(ids.device.type, enabled=False):
        return spread.flatten(1) @ layout.v(pages, torch.float32)


def _decodes(x: Tensor, weight: Tensor | None, bank: tuple[Tensor, ...]) -> bool:
    """Whether the decode kernel is to be used, and can."""
    return (
        0 < x.shape[0] <= _DECODE_ROWS
        and os.environ.get("DTS_FAST_GPU") not in ("triton", "plain")
        and 0 < x.shape[1] <= _DECODE_INPUTS
        and why_not_cuda(x.device) is None
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


def why_not_cuda(device: torch.device | None = None) -> str | None:
    """Why the CUDA C++ kernels are not used on a GPU (the current one if None); None where they are."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    index = None if device is None else device.index
    return _why_not_cuda(torch.cuda.current_device() if index is None else index)


@cache
def _why_not_cuda(index: int) -> str | None:
    if native.MODULE is None:
        return f"the extension is {native.REASON}"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "this GPU has no bfloat16 matrix units"
    with torch.cuda.device(index):
        return native.MODULE.why_not_cuda()


@cache
def why_not_triton() -> str | None:
    """Why Triton's kernels are not used on a GPU; None where they are."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.version.hip:
        return "not tried on AMD GPUs"
    try:
        from . import triton  # noqa: F401
    except (ImportError, AttributeError) as error:  # not there, or a release without what the kernels use
        return f"{type(error).__name__}: {error}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no bfloat16 matrix units"
    return None
