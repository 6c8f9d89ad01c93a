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


def round_up(ranks: Ranks, shapes: Shapes, multiple: int) -> Ranks:
    """Each rank at the next multiple, limited by ``min(N, K)``."""
    return {name: min(-(-rank // multiple) * multiple, *shapes[name]) for name, rank in ranks.items()}


def rank_by_energy(spectrum: Tensor, energy: float, total: float) -> int:
    """The smallest rank whose singular values hold a share of a matrix's squared Frobenius norm.

    Args:
        spectrum: ``[q]`` singular values, descending.
        energy: the share, from 0 to 1.
        total: the squared Frobenius norm.
    """
    kept = torch.cumsum(spectrum.double().square(), 0)
    return int((kept < energy * total * (1 - 1e-9)).sum()) + (total > 0) if energy > 0 else 0


def ranks_by_uniform_budget(shapes: Shapes, budget: int, size_of: Callable[[Ranks], int], multiple: int = 1) -> Ranks:
    """The largest density whose adapter fits a budget.

    Args:
        budget: bytes on disk, all files of the adapter.
        size_of: exact (or never too small) size in bytes of the adapter with given ranks.
        multiple: ranks are rounded up to multiples of this.

    Raises:
        DTSError: even rank 0 everywhere is larger than the budget.
    """
    _check_smallest(shapes, budget, size_of)
    # Every density at which some matrix gains a rank, in order, just past the rounding of the division.
    steps = sorted({r / min(shape) * (1 + 1e-9) for shape in shapes.values() for r in range(1, min(shape) + 1)})

    def ranks(count: int) -> Ranks:
        return round_up(ranks_by_density(shapes, steps[count - 1] if count else 0.0), shapes, multiple)

    return _largest(ranks, len(steps), budget, size_of)


def ranks_by_spectral_budget(
    shapes: Shapes,
    spectra: Mapping[str, Tensor],
    budget: int,
    size_of: Callable[[Ranks], int],
    multiple: int = 1,
) -> Ranks:
    """The next component goes to the matrix where it buys the most squared singular value per byte, until the budget
    is spent.

    What the next one in turn leaves over goes to those that still fit. (The names and levels of a matrix are not
    counted as its price: that starves small matrices, and models got worse.)

    Args:
        spectra: singular values ``[q]`` of each delta, descending.
        budget, size_of: see `ranks_by_uniform_budget`.
        multiple: so many components are given at a time, as long as there are that many.

    Raises:
        DTSError: even rank 0 everywhere is larger than the budget.
    """
    _check_smallest(shapes, budget, size_of)
    nothing = dict.fromkeys(shapes, 0)
    offers = []
    for name, spectrum in spectra.items():
        n, k = shapes[name]
        cost = packed_size(n) + packed_size(k) + 4
        bundles = spectrum[: min(n, k)].double().square().split(multiple)
        offers += [(-float(bundle.mean()) / cost, name) for bundle in bundles if bool(bundle[0] > 0)]
    names = [name for _, name in sorted(offers)]  # ties fall the same way on every run

    def more(ranks: Ranks, name: str) -> Ranks:
        return ranks | {name: min(ranks[name] + multiple, *shapes[name])}

    def after(count: int) -> Ranks:
        given = {name: multiple * len(list(group)) for name, group in groupby(sorted(names[:count]))}
        return nothing | {name: min(rank, *shapes[name]) for name, rank in given.items()}

    ranks = _largest(after, len(names), budget, size_of)
    taken = sum(-(-rank // multiple) for rank in ranks.values())
    for name in names[taken : taken + _FILLING]:
        if size_of(more(ranks, name)) <= budget:
            ranks = more(ranks, name)
    return ranks


# How many components in turn are tried for what the budget leaves over.
_FILLING = 64


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
