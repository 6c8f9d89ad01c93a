"""What serves a call on a GPU. csrc/cuda/ops.cpp decides for its kernels (few rows); what it leaves, or all where it is
not built, comes here: to Triton's kernels, or to plain torch where they do not run.

DTS_FAST_GPU=triton or plain leaves the better ones out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import native, reference
from .codes import PAGE_RANKS, PageLayout

_KERNELS = ("cuda", "triton", "plain")  # the best first


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *bank: Tensor) -> Tensor:
    """`ops.linear` without the CUDA C++ kernels, with checked arguments."""
    return _others().linear(x, weight, bias, *bank)


def add_delta_(y: Tensor, x: Tensor, *bank: Tensor, transpose: bool = False) -> None:
    """`ops.add_delta_` without the CUDA C++ kernels, with checked arguments."""
    _others().add_delta_(y, x, *bank, transpose=transpose)


def embedding_delta(ids: Tensor, layout: PageLayout, *bank: Tensor) -> Tensor:
    """`ops.embedding_delta` on a GPU, with checked arguments: nothing depends on the batch's composition, and nothing
    is copied to the host, so that it can be captured in a graph."""
    others = _others()
    return (
        _plain_embedding_delta(ids, layout, *bank)
        if others is reference
        else others.embedding_delta(ids, layout, *bank)
    )


def _plain_embedding_delta(
    ids: Tensor, layout: PageLayout, pages: Tensor, slot_pages: Tensor, slot_weights: Tensor, slot_ids: Tensor
) -> Tensor:
    coefficients = layout.coefficients(ids, pages, slot_pages, slot_weights, slot_ids)  # [M, L, 16]
    listed = slot_pages[slot_ids.clamp_min(0)].clamp_min(0).long()  # [M, L]; unused entries have coefficients 0
    # All pages are dequantised, whatever the batch uses: which these are the host does not know.
    spread = coefficients.new_zeros(ids.shape[0], pages.shape[0], PAGE_RANKS)
    spread.scatter_add_(1, listed[..., None].expand_as(coefficients), coefficients)
    with torch.autocast(ids.device.type, enabled=False):
        return spread.flatten(1) @ layout.v(pages, torch.float32)


_best = "cuda"


def _use(kernels: str) -> None:
    global _best
    _best = kernels
    if native.MODULE is not None:
        native.MODULE._use_cuda(kernels == "cuda")


@contextmanager
def at_best(kernels: str) -> Iterator[None]:
    """Within, no better kernels than these are used: "triton", or "plain". For all threads; for benches and tests."""
    before = _best
    _use(kernels)
    try:
        yield
    finally:
        _use(before)


def _others() -> ModuleType:
    if _best == "plain" or why_not_triton() is not None:
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


_chosen = os.environ.get("DTS_FAST_GPU", _best)
if _chosen not in _KERNELS:
    raise ValueError(f"DTS_FAST_GPU: expected one of {', '.join(_KERNELS)}, got {_chosen!r}.")
_use(_chosen)
