"""The ops on Triton kernels, with the signatures of `reference`; `ops` registers them for CUDA devices.

Arguments are checked by `ops`. Two launches a call: the shrink, and the rest. On Hopper and newer the second begins
with the base's weights while the first still runs (programmatic dependent launch).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..codes import PageLayout
from .configs import Config, choose
from .kernels import expand_kernel, linear_kernel, shrink_kernel

# Set by TRITON_INTERPRET=1: kernels run in Python, on tensors of the CPU.
INTERPRETED = triton.knobs.runtime.interpret

# From here on a kernel may be launched before the one before it has ended.
PDL_CAPABILITY = 90


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
    *,
    config: Config | None = None,
) -> Tensor:
    """``y = x W^T + bias + delta``, see `ops.linear`.

    Args:
        config: what `configs.choose` would choose, otherwise.
    """
    (m, k), n = x.shape, weight.shape[0]
    capability = _capability(x)
    config = config or choose(m, n, k, x.dtype, slot_pages.shape[1], capability, True)
    if m == 0 or slot_pages.numel() == 0 or not config.fused or not _in_order(weight):
        with torch.autocast(x.device.type, enabled=False):  # the result is of x's dtype
            y = torch.nn.functional.linear(x, weight, bias)
        add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids)
        return y
    x = x if _in_order(x) else x.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    shared, pdl = _shrink(x, PageLayout(n, k), pages, slot_pages, slot_weights, slot_ids, config, False, capability)
    words, floats, page_words, h, plan, u_offset, steps_most = shared
    with _device(x):
        linear_kernel[triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m)](
            x, x.stride(0), weight, weight.stride(0), bias, y, words, floats, page_words, slot_pages, slot_ids, h, plan,
            m, n, k, slot_pages.shape[1], u_offset, steps_most,
            HAS_BIAS=bias is not None, EVEN_K=k % config.block_k == 0, WIDE=_wide(x), PDL=pdl,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, PAGES=config.pages,
            SPLITS=config.splits, ONE_ROW=m == 1, STEP_STAGES=config.step_stages, num_warps=config.warps,
            num_stages=config.stages, **_launch(pdl),
        )  # fmt: skip
    return y


def add_delta_(
    y: Tensor,
    x: Tensor,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
    *,
    transpose: bool = False,
    config: Config | None = None,
) -> None:
    """``y += delta`` in place, see `ops.add_delta_`."""
    (m, k), n = x.shape, y.shape[1]
    if m == 0 or slot_pages.numel() == 0:
        return
    capability = _capability(x)
    config = config or choose(m, n, k, x.dtype, slot_pages.shape[1], capability, False)
    layout = PageLayout(k, n) if transpose else PageLayout(n, k)
    out = y if _in_order(y) else y.contiguous()
    x = x if _in_order(x) else x.contiguous()
    shared, pdl = _shrink(x, layout, pages, slot_pages, slot_weights, slot_ids, config, transpose, capability)
    words, floats, page_words, h, plan, u_offset, steps_most = shared
    with _device(x):
        expand_kernel[triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m)](
            out, out.stride(0), words, floats, page_words, slot_pages, slot_ids, h, plan, m, n, slot_pages.shape[1],
            u_offset, steps_most,
            TRANSPOSE=transpose, WIDE=_wide(x), PDL=pdl, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PAGES=config.pages, SPLITS=config.splits, ONE_ROW=m == 1, STEP_STAGES=config.step_stages,
            num_warps=config.warps, **_launch(pdl),
        )  # fmt: skip
    if out is not y:
        y.copy_(out)


def _shrink(x, layout, pages, slot_pages, slot_weights, slot_ids, config, transpose, capability):
    """Launch the shrink. Returns what the next kernel shares with it, and whether that may begin beside it."""
    (m, k), length = x.shape, slot_pages.shape[1]
    tiles = triton.cdiv(m, config.block_m)
    parts = triton.cdiv(length, config.pages)
    steps_most = config.block_m * parts
    h = torch.empty(config.splits, m, 16 * length, dtype=torch.float32, device=x.device)
    plan = torch.empty(tiles, 1 + 2 * steps_most, dtype=torch.int32, device=x.device)
    words, floats = pages.view(torch.int32), pages.view(torch.float32)
    page_words, u_offset = layout.nbytes // 4, layout.u_offset // 4
    pdl = capability >= PDL_CAPABILITY and not INTERPRETED
    with _device(x):
        shrink_kernel[tiles * config.leaders, parts, config.splits](
            x, x.stride(0), words, floats, page_words, slot_pages, slot_weights, slot_ids, h, plan, m, k, length,
            u_offset, steps_most,
            TRANSPOSE=transpose, WIDE=_wide(x), PDL=pdl, BLOCK_M=config.block_m, BLOCK_K=config.shrink_block_k,
            BLOCK_L=16, PAGES=config.pages, SPLITS=config.splits, LEADERS=config.leaders, PARTS=parts,
            num_warps=config.shrink_warps,
        )  # fmt: skip
    return (words, floats, page_words, h, plan, u_offset, steps_most), pdl


def _launch(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}


def _device(x: Tensor):
    # Triton launches on the current device, whatever its arguments'.
    return torch.cuda.device_of(x)


def _capability(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _wide(x: Tensor) -> bool:
    return x.dtype == torch.float32 or INTERPRETED


def _in_order(t: Tensor) -> bool:
    return t.stride(1) == 1 or t.shape[1] <= 1
