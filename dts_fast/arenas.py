"""How much memory each layer's bank gets where a model's memory for adapters is fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter_file import Parameter
from .bank import MOST_MEMBERS, Arena
from .codes import PageLayout, is_matrix, num_pages, terms_of
from .errors import CapacityError, DTSError

# How many times the first adapter's pages in a layer another adapter may take there.
_MOST_OVER_FIRST = 2
_LIST_ENTRY = 8  # bytes of a page's number and weight in a slot's list


@dataclass(frozen=True)
class _Need:
    """What one adapter takes of a layer's bank."""

    shape: tuple[int, int]
    pages: int
    nbytes: int


class Arenas:
    """Sizes of banks: whatever loads need (None), by rank, or by bytes.

    Args:
        max_adapters: number of slots.
        max_rank, max_bytes: see `DTSModel`; at most one of them.

    Raises:
        DTSError: both, or values out of range.
    """

    def __init__(self, max_adapters: int, max_rank: int | None, max_bytes: int | None) -> None:
        if max_rank is not None and max_bytes is not None:
            raise DTSError("give one of max_rank and max_bytes, not both.")
        for name, value in (("max_rank", max_rank), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise DTSError(f"{name} must be at least 1, got {value}.")
        self.max_adapters, self.max_rank, self.left = max_adapters, max_rank, max_bytes
        self._taken: dict[str, int] = {}  # of ``max_bytes``, by layer

    def of(self, modules: Mapping[str, nn.Module], new: Mapping[str, Mapping[str, Parameter]]) -> dict[str, Arena]:
        """Arenas for layers that are wrapped for an adapter's sake, by path; those not named may grow.

        Args:
            modules: by path.
            new: what the adapter has for each of these layers.

        Raises:
            CapacityError: ``max_bytes`` is less than this adapter takes.
        """
        needs: dict[str, _Need] = {}
        vectors: dict[str, int] = {}
        for path, parameters in new.items():
            # Every layer's vectors have a row for each slot, whether or not this adapter changes them.
            own = (p for p in modules[path]._parameters.values() if p is not None and p.dim() == 1)
            vectors[path] = sum((self.max_adapters + 1) * parameter.nbytes for parameter in own)
            weight = parameters.get("weight")
            if weight is not None and not isinstance(weight, Tensor) and is_matrix(weight):
                terms = terms_of(weight)
                n, k = terms[0].u.n, terms[0].v.n
                needs[path] = _Need((n, k), sum(num_pages(term.rank) for term in terms), PageLayout(n, k).nbytes)
        if self.max_rank is not None:
            per_slot = {path: num_pages(min(self.max_rank, *need.shape)) for path, need in needs.items()}
            return {path: Arena(count * self.max_adapters, count) for path, count in per_slot.items()}
        if self.left is None:
            return {}
        entries = _MOST_OVER_FIRST * min(self.max_adapters, MOST_MEMBERS) * self.max_adapters * _LIST_ENTRY
        fixed = {path: vectors[path] + (needs[path].pages * entries if path in needs else 0) for path in new}
        one, besides = sum(need.pages * need.nbytes for need in needs.values()), sum(fixed.values())
        count = min(self.max_adapters, (self.left - besides) // max(one, 1))
        if count < 1 and new:
            raise CapacityError(
                f"max_bytes leaves {self.left} bytes, but the adapter's pages take {one}, and the vectors and lists of "
                f"{self.max_adapters} slots {besides}. Give more bytes, or fewer max_adapters."
            )
        for path in new:
            pages = count * needs[path].pages * needs[path].nbytes if path in needs else 0
            self._taken[path] = fixed[path] + pages
            self.left -= self._taken[path]
        return {
            path: Arena(count * need.pages, min(count, _MOST_OVER_FIRST) * need.pages) for path, need in needs.items()
        }

    def give_back(self, paths: Iterable[str]) -> None:
        """Layers that do not stay wrapped: what `of` took for them can be given to others."""
        for path in paths:
            if self.left is not None:
                self.left += self._taken.pop(path, 0)
