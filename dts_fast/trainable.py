"""A low-rank delta whose codes and scales take gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codes import CodedMatrix, LowRankDelta, pack, unpack


class TrainableFactor(nn.Module):
    """A factor ``[n, rank]`` that computes with four levels and learns between them.

    Every element has a continuous value. What computes is the level nearest to it; what is learned goes straight
    through the rounding to the value (the straight-through estimator of quantisation-aware training), so that many
    small steps in one direction end in another code. The levels stay.

    Attributes:
        values: float32 ``[rank, n]``, in units of the levels' root mean square, so that one learning rate serves all
            factors.
    """

    def __init__(self, coded: CodedMatrix) -> None:
        super().__init__()
        levels = coded.levels.float()
        self.unit = float(levels.square().mean().sqrt()) or 1.0
        ascending, order = levels.sort()
        self.register_buffer("levels", ascending)
        self.register_buffer("codes_of_levels", order.to(torch.uint8))
        self.register_buffer("borders", (ascending[1:] + ascending[:-1]) / (2 * self.unit))
        self.values = nn.Parameter(levels[unpack(coded.codes, coded.n).long()] / self.unit)

    def _nearest(self) -> Tensor:
        return torch.bucketize(self.values.detach(), self.borders)

    def forward(self) -> Tensor:
        """``[rank, n]`` of levels."""
        values = self.values * self.unit
        return self.levels[self._nearest()] + (values - values.detach())

    @torch.no_grad()
    def confine_(self) -> None:
        """Bring values that left the range of the levels back to its ends: beyond them nothing changes, and who went
        far would take long to come back."""
        self.values.clamp_(self.levels[0] / self.unit, self.levels[-1] / self.unit)

    @torch.no_grad()
    def coded(self) -> CodedMatrix:
        codes = self.codes_of_levels[self._nearest()]
        levels = torch.empty_like(self.levels)
        levels[self.codes_of_levels.long()] = self.levels
        return CodedMatrix(pack(codes.cpu()), levels.cpu(), self.values.shape[1])


class TrainableDelta(nn.Module):
    """``U diag(s) V^T`` with `TrainableFactor` for U and V.

    Attributes:
        change: float32 ``[r]``; the scales are ``s * (1 + change)``.
    """

    def __init__(self, delta: LowRankDelta) -> None:
        super().__init__()
        self.shape = delta.shape
        self.u, self.v = TrainableFactor(delta.u), TrainableFactor(delta.v)
        self.register_buffer("s", delta.s.float())
        self.change = nn.Parameter(torch.zeros_like(self.s))

    @property
    def factors(self) -> tuple[TrainableFactor, TrainableFactor]:
        return self.u, self.v

    def times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """``x D^T`` for ``x [..., K]`` and the delta ``D [N, K]``; ``x D`` for ``x [..., N]`` where it is
        ``transposed``. In x's dtype."""
        into, out = (self.u, self.v) if transposed else (self.v, self.u)
        h = (x @ into().to(x.dtype).t()) * self._scales().to(x.dtype)
        return h @ out().to(x.dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of D: ``[..., K]`` for ids ``[...]`` below N."""
        h = nn.functional.embedding(ids, self.u().t()) * self._scales()
        return (h @ self.v()).to(dtype)

    def _scales(self) -> Tensor:
        return self.s * (1 + self.change)

    @torch.no_grad()
    def coded(self) -> LowRankDelta:
        return LowRankDelta(self.u.coded(), self._scales().cpu(), self.v.coded(), self.shape)
