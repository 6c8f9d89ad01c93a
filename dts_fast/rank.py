"""Ranks for every matrix of a model: from one density, one rank, a share of the energy, or a budget in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from .codes import packed_size
from .errors import DTSError
from .fit import paper_rank

Shapes = Mapping[str, tuple[int, int]]
Ranks = dict[str, int]


def ranks_by_density(shapes: Shapes, density: float) -> Ranks:
    """``int(density * min(N, K))`` for each matrix (the paper's rule)."""
    return {name: paper_rank(shape, density) for name, shape in shapes.items()}


def uniform_ranks(shapes: Shapes, rank: int) -> Ranks:
    """The same rank everywhere, limited by ``min(N, K)``."""
    return {name: min(rank, *shape) for name, shape in shapes.items()}


def rank_by_energy(spectrum: Tensor, energy: float, total: float) -> int:
    """The smallest rank whose singular values hold a share of a matrix's squared Frobenius norm.

    Args:
        spectrum: ``[q]`` singular values, descending.
        energy: the share, from 0 to 1.
        total: the squared Frobenius norm.
    """
    kept = torch.cumsum(spectrum.double().square(), 0)
    return int((kept < energy * total * (1 - 1e-9)).sum()) + (total > 0) if energy > 0 else 0


def ranks_by_uniform_budget(shapes: Shapes, budget: int, size_of: Callable[[Ranks], int]) -> Ranks:
    """The largest density whose adapter fits a budget.

    Args:
        budget: bytes on disk, all files of the adapter.
        size_of: exact (or never too small) size in bytes of the adapter with given ranks.

    Raises:
        DTSError: even rank 0 everywhere is larger than the budget.
    """
    _check_smallest(shapes, budget, size_of)
    # Every density at which some matrix gains a rank, in order, just past the rounding of the division.
    steps = sorted({r / min(shape) * (1 + 1e-9) for shape in shapes.values() for r in range(1, min(shape) + 1)})
    return _largest(lambda i: ranks_by_density(shapes, steps[i - 1]) if i else ranks_by_density(shapes, 0.0),
                    len(steps), budget, size_of)  # fmt: skip


def ranks_by_spectral_budget(
    shapes: Shapes,
    spectra: Mapping[str, Tensor],
    budget: int,
    size_of: Callable[[Ranks], int],
) -> Ranks:
    """The next component goes to the matrix where it buys the most squared singular value per byte, until the budget
    is spent.

    Args:
        spectra: singular values ``[q]`` of each delta, descending.
        budget, size_of: see `ranks_by_uniform_budget`.

    Raises:
        DTSError: even rank 0 everywhere is larger than the budget.
    """
    _check_smallest(shapes, budget, size_of)
    offers = []
    for name, spectrum in spectra.items():
        n, k = shapes[name]
        cost = packed_size(n) + packed_size(k) + 4
        gains = spectrum.double().square() / cost
        offers += [(-gain, name) for gain in gains.tolist() if gain > 0]
    names = [name for _, name in sorted(offers)]  # ties fall the same way on every run

    def after(count: int) -> Ranks:
        return dict.fromkeys(shapes, 0) | {n: len(list(g)) for n, g in groupby(sorted(names[:count]))}

    return _largest(after, len(names), budget, size_of)


def _largest(ranks: Callable[[int], Ranks], count: int, budget: int, size_of: Callable[[Ranks], int]) -> Ranks:
    """The last of ``ranks(0), ..., ranks(count)``, sizes ascending, that fits the budget."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if size_of(ranks(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return ranks(low)


def _check_smallest(shapes: Shapes, budget: int, size_of: Callable[[Ranks], int]) -> None:
    smallest = size_of(dict.fromkeys(shapes, 0))
    if smallest > budget:
        raise DTSError(
            f"the budget is {budget:,} bytes, but what is not a matrix (vectors, whole tensors, headers and card) "
            f"takes {smallest:,} already. Raise the budget, or leave tensors out with --exclude or --embeddings skip."
        )
