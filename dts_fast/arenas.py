"""How much memory each layer's bank gets where a model's memory for adapters is fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter_file import Parameter
from .bank import MOST_MEMBERS, Arena, page_count
from .codes import PageLayout, as_matrix, is_matrix, num_pages, terms_of
from .errors import CapacityError, DTSError
from .pieces import Piece

# How many times the first adapter's pages in a layer another adapter may take there.
_MOST_OVER_FIRST = 2
_LIST_ENTRY = 8  # bytes of a page's number and weight in a slot's list


@dataclass
class _Need:
    """What one adapter takes of a bank.

    Attributes:
        shape: of a matrix.
        matrices: that the bank has place for in each slot: one, or all experts'.
        largest, pages: of one matrix, and of all that the adapter changes.
    """

    shape: tuple[int, int]
    matrices: int
    largest: int = 0
    pages: int = 0

    @property
    def nbytes(self) -> int:
        return self.pages * PageLayout(*self.shape).nbytes


def _needs(module: nn.Module, parameters: Mapping[str, Parameter]) -> dict[str, _Need]:
    """By bank: that of the layer's ``weight``, or those of a mixture's experts."""
    needs: dict[str, _Need] = {}
    for name, parameter in parameters.items():
        piece, parameter = Piece.named(name), as_matrix(parameter)
        known = name == "weight" or piece is not None or (name.endswith("_bias") and hasattr(module, "num_experts"))
        if not known or isinstance(parameter, Tensor) or not is_matrix(parameter):
            continue
        first = terms_of(parameter)[0]
        matrices = 1 if piece is None else len(module.get_parameter(piece.parameter))
        need = needs.setdefault(name if piece is None else piece.bank, _Need((first.u.n, first.v.n), matrices))
        need.largest = max(need.largest, page_count(parameter))
        need.pages += page_count(parameter)
    return needs


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

    def of(
        self, modules: Mapping[str, nn.Module], new: Mapping[str, Mapping[str, Parameter]]
    ) -> dict[str, dict[str, Arena]]:
        """Arenas for layers that are wrapped for an adapter's sake, by path and bank; those not named may grow.

        Args:
            modules: by path.
            new: what the adapter has for each of these layers.

        Raises:
            CapacityError: ``max_bytes`` is less than this adapter takes.
        """
        needs = {path: _needs(modules[path], parameters) for path, parameters in new.items()}
        if self.max_rank is not None:
            return {path: {key: self._of_rank(need) for key, need in own.items()} for path, own in needs.items()}
        if self.left is None:
            return {}
        entries = _MOST_OVER_FIRST * min(self.max_adapters, MOST_MEMBERS) * self.max_adapters * _LIST_ENTRY
        fixed = {}
        for path, own in needs.items():
            # Every layer's vectors have a row for each slot, whether or not this adapter changes them.
            vectors = (p for p in modules[path]._parameters.values() if p is not None and p.dim() == 1)
            fixed[path] = sum((self.max_adapters + 1) * vector.nbytes for vector in vectors)
            fixed[path] += sum(need.matrices * need.largest * entries for need in own.values())
        one = sum(need.nbytes for own in needs.values() for need in own.values())
        besides = sum(fixed.values())
        count = min(self.max_adapters, (self.left - besides) // max(one, 1))
        if count < 1 and new:
            raise CapacityError(
                f"max_bytes leaves {self.left} bytes, but the adapter's pages take {one}, and the vectors and lists of "
                f"{self.max_adapters} slots {besides}. Give more bytes, or fewer max_adapters."
            )
        for path, own in needs.items():
            self._taken[path] = fixed[path] + count * sum(need.nbytes for need in own.values())
            self.left -= self._taken[path]
        most = min(count, _MOST_OVER_FIRST)
        return {
            path: {key: Arena(count * need.pages, most * need.largest) for key, need in own.items()}
            for path, own in needs.items()
        }

    def _of_rank(self, need: _Need) -> Arena:
        pages = num_pages(min(self.max_rank, *need.shape))
        return Arena(pages * need.matrices * self.max_adapters, pages)

    def give_back(self, paths: Iterable[str]) -> None:
        """Layers that do not stay wrapped: what `of` took for them can be given to others."""
        for path in paths:
            if self.left is not None:
                self.left += self._taken.pop(path, 0)
