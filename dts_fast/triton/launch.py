"""The ops on Triton kernels, with the signatures of `reference`; `gpu` chooses them for CUDA devices.

Arguments are checked by `ops`. Where the base is fused a call is two launches, the shrink and the rest; on Hopper and
newer the second begins with the base's weights while the first still runs (programmatic dependent launch). Otherwise it
is torch's linear and two launches behind it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..codes import PageLayout
from .configs import COPY_ENGINE, PREFILL_ROWS, Config, choose
from .counters import counters
from .kernels import expand_kernel, linear_kernel, prefill_kernel, shrink_kernel, together_kernel

# Set by TRITON_INTERPRET=1: kernels run in Python, on tensors of the CPU.
INTERPRETED = triton.knobs.runtime.interpret

# From here on a kernel may be launched before the one before it has ended.
PDL_CAPABILITY = 90

# Programs of a shrink, over all tiles of rows: they share whatever there is to do.
_SHRINK_PROGRAMS = 4 if INTERPRETED else 528


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
    copied = config.block_m < PREFILL_ROWS or ((INTERPRETED or capability >= COPY_ENGINE) and _copied(x, weight))
    if m == 0 or slot_pages.numel() == 0 or not (config.fused and copied) or not _in_order(weight):
        with torch.autocast(x.device.type, enabled=False):  # the result is of x's dtype
            y = torch.nn.functional.linear(x, weight, bias)
        rest = None if config.fused else config  # block sizes of a fused kernel are not those of the expand's
        add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids, config=rest)
        return y
    x = x if _in_order(x) else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    layout, length = PageLayout(n, k), slot_pages.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if config.together:
        _together(y, x, weight, bias, layout, pages, slot_pages, slot_weights, slot_ids, config)
        return y
    h, pdl = _shrink(x, layout, pages, slot_pages, slot_weights, slot_ids, config, False, capability)
    if config.block_m >= PREFILL_ROWS:
        with torch.cuda.device_of(x):
            prefill_kernel[triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),](
                _tiles(x, config.block_m, config.block_k), _tiles(weight, config.block_n, config.block_k), bias, y,
                *_views(pages, layout), slot_pages, slot_ids, h, m, n, k, length, layout.u_offset // 4,
                HAS_BIAS=bias is not None, WIDE=_wide(x), PDL=pdl, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                BLOCK_K=config.block_k, PAGES=config.pages, NEIGHBOURS=config.neighbours, num_warps=config.warps,
                num_stages=config.stages, **_launch(pdl),
            )  # fmt: skip
        return y
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments'
        linear_kernel[triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m)](
            x, x.stride(0), weight, weight.stride(0), bias, y, *_views(pages, layout), slot_pages, slot_ids, h, m, n, k,
            length, layout.u_offset // 4,
            HAS_BIAS=bias is not None, EVEN_K=k % config.block_k == 0, WIDE=_wide(x), PDL=pdl,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, PAGES=config.pages,
            num_warps=config.warps, num_stages=config.stages, **_launch(pdl),
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
    h, pdl = _shrink(x, layout, pages, slot_pages, slot_weights, slot_ids, config, transpose, capability)
    with torch.cuda.device_of(x):
        expand_kernel[triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m)](
            out, out.stride(0), *_views(pages, layout), slot_pages, slot_ids, h, m, n, slot_pages.shape[1],
            layout.u_offset // 4,
            TRANSPOSE=transpose, WIDE=_wide(x), PDL=pdl, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PAGES=config.pages, num_warps=config.warps, **_launch(pdl),
        )  # fmt: skip
    if out is not y:
        y.copy_(out)


def embedding_delta(
    ids: Tensor, layout: PageLayout, pages: Tensor, slot_pages: Tensor, slot_weights: Tensor, slot_ids: Tensor
) -> Tensor:
    """Rows of a table's delta, see `ops.embedding_delta`: a token is a row of U, and nothing is to be shrunk."""
    m, length = ids.shape[0], slot_pages.shape[1]
    out = torch.zeros(m, layout.k, dtype=torch.float32, device=ids.device)
    if m == 0 or slot_pages.numel() == 0:
        return out
    listed = slot_pages[slot_ids.clamp_min(0)].clamp_min(0).long()  # [M, L]; unused entries have coefficients 0
    largest = layout.v_levels(pages).abs().amax(1)[listed]  # the kernels' levels are shares of it
    largest = torch.where(largest > 1e-37, largest, 1.0)
    h = (layout.coefficients(ids, pages, slot_pages, slot_weights, slot_ids) * largest[..., None]).flatten(1)
    config = choose(m, layout.k, layout.n, h.dtype, length, _capability(h), False)
    with torch.cuda.device_of(h):
        expand_kernel[triton.cdiv(layout.k, config.block_n), triton.cdiv(m, config.block_m)](
            out, out.stride(0), *_views(pages, layout), slot_pages, slot_ids, h, m, layout.k, length,
            layout.u_offset // 4,
            TRANSPOSE=True, WIDE=True, PDL=False, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAGES=config.pages,
            num_warps=config.warps,
        )  # fmt: skip
    return out


def _together(y, x, weight, bias, layout, pages, slot_pages, slot_weights, slot_ids, config) -> None:
    """Launch both in one."""
    (m, k), n, length = x.shape, y.shape[1], slot_pages.shape[1]
    tiles, arrivals = triton.cdiv(m, config.block_m), -(-_arrivals(m, length, config) // 32) * 32
    # One buffer: two callers' on one stream would be the same memory.
    count = counters(arrivals + 3 * tiles + 1, x.device)
    h, partial = _hidden_of(x, length, config)
    with torch.cuda.device_of(x):
        together_kernel[config.together + triton.cdiv(n, config.block_n), tiles](
            x, x.stride(0), weight, weight.stride(0), bias, y, *_views(pages, layout), slot_pages, slot_weights,
            slot_ids, partial, h, count, count[arrivals:], m, n, k, length, layout.u_offset // 4,
            HAS_BIAS=bias is not None, EVEN_K=k % config.block_k == 0, WIDE=_wide(x), BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, PAGES=config.pages, SHRINK_BLOCK_K=config.shrink_block_k,
            SHRINK_PAGES=config.shrink_pages, SPLITS=config.splits, SHRINKERS=config.together,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _arrivals(m: int, length: int, config: Config) -> int:
    """How many items' splits are counted."""
    return triton.cdiv(m, config.block_m) * config.block_m * triton.cdiv(length, config.shrink_pages)


def _hidden_of(x: Tensor, length: int, config: Config) -> tuple[Tensor, Tensor]:
    """Memory for h, and for the parts of its sums."""
    h = torch.empty(x.shape[0], 16 * length, dtype=x.dtype, device=x.device)
    return h, h if config.splits == 1 else h.new_empty(config.splits, *h.shape, dtype=torch.float32)


def _shrink(x, layout, pages, slot_pages, slot_weights, slot_ids, config, transpose, capability) -> tuple[Tensor, bool]:
    """Launch the shrink. Returns h, and whether the next kernel may begin beside it."""
    (m, k), length = x.shape, slot_pages.shape[1]
    tiles, groups = triton.cdiv(m, config.block_m), triton.cdiv(length, config.shrink_pages)
    h, partial = _hidden_of(x, length, config)
    count = h if config.splits == 1 else counters(_arrivals(m, length, config), x.device)
    # A tile has at most as many items as it has rows, or the bank slots.
    items = min(config.block_m, m, slot_pages.shape[0]) * groups * config.splits
    programs = max(1, min(items, _SHRINK_PROGRAMS // tiles))
    pdl = capability >= PDL_CAPABILITY and not INTERPRETED
    with torch.cuda.device_of(x):
        shrink_kernel[tiles, programs](
            x, x.stride(0), *_views(pages, layout), slot_pages, slot_weights, slot_ids, partial, h, count, m, k, length,
            layout.u_offset // 4,
            TRANSPOSE=transpose, WIDE=_wide(x), PDL=pdl, BLOCK_M=config.block_m, BLOCK_K=config.shrink_block_k,
            PAGES=config.shrink_pages, SPLITS=config.splits, num_warps=config.shrink_warps,
        )  # fmt: skip
    return h, pdl


def _copied(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can copy tiles of both: rows of elements side by side, at multiples of 16 bytes."""
    return all(
        t.shape[1] > 0 and t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
        for t in (x, weight)
    )


def _tiles(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def _views(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor, int]:
    """Codes and floats of the pages, and the size of a page in their units."""
    return pages.view(torch.int32), pages.view(torch.float32), layout.nbytes // 4


def _launch(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}


def _capability(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _wide(x: Tensor) -> bool:
    return x.dtype == torch.float32 or INTERPRETED


def _in_order(t: Tensor) -> bool:
    return t.stride(1) == 1 or t.shape[1] <= 1
