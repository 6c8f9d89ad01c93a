"""Matrices that are kept within larger tensors: the experts of a mixture, which transformers stacks on loading (gate
and up projections of an expert also above each other) where a checkpoint stores them one by one, and which other
checkpoints store in stacks. A delta of low rank is one of an expert, not of a stack."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

_NAME = re.compile(r"(?P<parameter>[^\[\]]+)\[(?P<expert>\d+),(?P<part>\d+)/(?P<parts>\d+)\]")


@dataclass(frozen=True)
class Piece:
    """One of the equal blocks of rows of one expert's matrix.

    Attributes:
        parameter: the name of the stack ``[E, N, K]``, in its module or its checkpoint.
        expert: 0 to E - 1.
        part, parts: which block of rows, and of how many.
    """

    parameter: str
    expert: int
    part: int
    parts: int

    @staticmethod
    def named(name: str) -> Piece | None:
        """The piece that a name means; None for an ordinary parameter's."""
        match = _NAME.fullmatch(name) if name.endswith("]") else None
        if match is None or int(match["part"]) >= int(match["parts"]):
            return None
        return Piece(match["parameter"], int(match["expert"]), int(match["part"]), int(match["parts"]))

    @property
    def bank(self) -> str:
        """What the bank is called that holds its deltas, with those of the same block of the other experts."""
        return f"{self.parameter}_{self.part}_of_{self.parts}"

    def __str__(self) -> str:
        return f"{self.parameter}[{self.expert},{self.part}/{self.parts}]"

    def of(self, stack: Tensor) -> Tensor:
        """``[N / parts, K]``: a view of the stack ``[E, N, K]``."""
        rows = stack.shape[1] // self.parts
        return stack[self.expert].narrow(0, self.part * rows, rows)
