"""The ops in plain torch: the truth that every backend is tested against, and the fallback where no kernel is.

All functions take the bank's tensors as the ops do (see `ops`). Deltas are computed in float32, or in float64
where ``x`` is float64; tests use the latter as the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import PAGE_RANKS, PageLayout


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
) -> Tensor:
    """``y = x W^T + bias + delta``, see `ops.linear`."""
    with torch.autocast(x.device.type, enabled=False):  # the result is of x's dtype
        y = torch.nn.functional.linear(x, weight, bias)
    add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids)
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
) -> None:
    """``y += ((x V) * s) U^T`` for the rows that have a slot, see `ops.add_delta_`."""
    layout = PageLayout(x.shape[1], y.shape[1]) if transpose else PageLayout(y.shape[1], x.shape[1])
    with torch.autocast(x.device.type, enabled=False):  # the sums stay in float32
        _add_delta(y, x, layout, pages, slot_pages, slot_weights, slot_ids, transpose)


def _add_delta(
    y: Tensor,
    x: Tensor,
    layout: PageLayout,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
    transpose: bool,
) -> None:
    wide = x.to(_accumulator(x))
    for slot in _distinct(slot_ids):
        u, s, v = _slot_factors(layout, pages, slot_pages[slot], slot_weights[slot], wide.dtype)
        shrink, expand = (u.t(), v.t()) if transpose else (v.t(), u.t())  # [in, R], [out, R]
        # All rows are computed and those of other slots dropped: with the same shapes whatever the batch holds, a
        # row's result does not depend on its neighbours, not even in its last bit.
        delta = ((wide @ shrink) * s) @ expand.t()  # [M, out]
        rows = slot_ids == slot
        y[rows] = (y[rows].to(wide.dtype) + delta[rows]).to(y.dtype)


def embedding_delta(
    ids: Tensor,
    layout: PageLayout,
    pages: Tensor,
    slot_pages: Tensor,
    slot_weights: Tensor,
    slot_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows ``ids`` of the delta of an embedding table ``[N, K]``, each row in its own slot.

    Args:
        ids: int ``[M]`` in ``0..N-1``.
        slot_ids: int32 ``[M]``, -1 for the base.

    Returns:
        ``[M, K]`` in ``dtype``; zero where the slot is -1.
    """
    out = torch.zeros(ids.shape[0], layout.k, dtype=dtype, device=ids.device)
    for slot in _distinct(slot_ids):
        rows = (slot_ids == slot).nonzero().squeeze(1)
        u, s, v = _slot_factors(layout, pages, slot_pages[slot], slot_weights[slot], dtype)
        with torch.autocast(ids.device.type, enabled=False):
            out[rows] = (u[:, ids[rows]].t() * s) @ v
    return out


def _slot_factors(
    layout: PageLayout, pages: Tensor, page_list: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """All pages of a slot side by side: U ``[R, N]``, s ``[R]`` times the slot's weights, V ``[R, K]``."""
    index = page_list[page_list >= 0].long()
    listed = pages[index]
    s = layout.s(listed).to(dtype) * weights[: index.shape[0], None].to(dtype)
    return layout.u(listed, dtype), s.reshape(index.shape[0] * PAGE_RANKS), layout.v(listed, dtype)


def _distinct(slot_ids: Tensor) -> list[int]:
    return [slot for slot in slot_ids.unique().tolist() if slot >= 0]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
