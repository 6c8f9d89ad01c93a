"""Coordinate descent over four levels, the inner loop of the refined fit: an op with a native kernel on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native  # noqa: F401  (registers its kernel)
from .codes import NUM_LEVELS

_LIBRARY = torch.library.Library("dts_fast", "FRAGMENT")
_LIBRARY.define(
    "descend_(Tensor(a!) rows, Tensor target, Tensor gram, Tensor curvature, Tensor levels, int sweeps) -> ()"
)

_BLOCK = 16  # components that the plain loop keeps up to date one by one


def descend_(rows: Tensor, target: Tensor, gram: Tensor, levels: Tensor, sweeps: int) -> None:
    """Move every element, component by component, to the level that serves the sum best with all others fixed.

    Minimises ``x^T G x / 2 - t^T x`` for each column x over vectors of levels; columns are independent.

    Args:
        rows: ``[r, n]`` float32 or float64, contiguous, values among ``levels``; changed in place.
        target: ``[r, n]`` in the dtype of ``rows``.
        gram: symmetric ``[r, r]``.
        levels: ``[L]`` descending; the native kernel is for four.
        sweeps: passes over all components.
    """
    if rows.numel() == 0:
        return
    curvature = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    # Deltas in float64, and other numbers of levels than the file's, are rare.
    arguments = (rows, target.contiguous(), gram.contiguous(), curvature, levels.flip(0))
    if rows.dtype == torch.float32 and len(levels) == NUM_LEVELS:
        torch.ops.dts_fast.descend_(*arguments, sweeps)
    else:
        _descend_plain(*arguments, sweeps)


def _descend_plain(rows: Tensor, target: Tensor, gram: Tensor, curvature: Tensor, levels: Tensor, sweeps: int) -> None:
    boundaries = (levels[:-1] + levels[1:]) / 2
    steps = (1 / curvature).tolist()
    residual = target - gram @ rows  # minus the gradient
    for _ in range(sweeps):
        for first in range(0, rows.shape[0], _BLOCK):
            # Within a block the residual is kept up to date component by component; the others see the whole
            # block's change in one product, which is what makes a sweep run at the speed of a matrix product.
            block = slice(first, min(first + _BLOCK, rows.shape[0]))
            before = rows[block].clone()
            change = torch.zeros_like(before)
            for j in range(change.shape[0]):
                k = first + j
                step = torch.addmv(residual[k], change[:j].t(), gram[k, first:k], alpha=-1)
                wanted = torch.add(rows[k], step, alpha=steps[k])
                rows[k] = levels[torch.bucketize(wanted, boundaries)]
                torch.sub(rows[k], before[j], out=change[j])
            residual.addmm_(gram[:, block], change, alpha=-1)


_LIBRARY.impl("descend_", _descend_plain, "CompositeExplicitAutograd")
