"""Ranks for every matrix of a model: from one density, one rank, or a budget in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def ranks_by_budget(shapes: Shapes, budget: int, size_of: Callable[[Ranks], int]) -> Ranks:
    """The largest density whose adapter fits a budget.

    Args:
        budget: bytes on disk, all files of the adapter.
        size_of: exact (or never too small) size in bytes of the adapter with given ranks.

    Raises:
        DTSError: even rank 0 everywhere is larger than the budget.
    """
    smallest = size_of(ranks_by_density(shapes, 0.0))
    if smallest > budget:
        raise DTSError(
            f"the budget is {budget:,} bytes, but what is not a matrix (vectors, whole tensors, headers and card) "
            f"takes {smallest:,} already. Raise the budget, or leave tensors out with --exclude or --embeddings skip."
        )
    if size_of(ranks_by_density(shapes, 1.0)) <= budget:
        return ranks_by_density(shapes, 1.0)
    low, high = 0.0, 1.0
    # 30 halvings separate densities finer than 1 / min(N, K) of any matrix there is.
    for _ in range(30):
        middle = (low + high) / 2
        if size_of(ranks_by_density(shapes, middle)) <= budget:
            low = middle
        else:
            high = middle
    return ranks_by_density(shapes, low)
