"""The dominant singular triplets of a matrix, exact where that is cheap and from a Krylov subspace where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this many elements the exact SVD costs little, and its singular vectors carry the published code's signs.
_EXACT_SVD_ELEMENTS = 256 * 256
# Up to this size (or for ranks that are a large part of it) all eigenpairs of the Gram matrix are cheaper than
# building a subspace.
_GRAM_SIZE = 1024
# A block of this share of the rank, multiplied this many times by the matrix and its transpose: the subspace of all
# powers together holds more of the spectrum than the last power alone does for the same products (Musco and Musco
# 2015); bench/bench_fit.py prints how much.
_BLOCK_SHARE = 0.5
_BLOCK_EXTRA = 8
_KRYLOV_STEPS = 3


@dataclass(frozen=True)
class Operator:
    """A matrix ``[N, K]`` that is only multiplied with: dense, or as ``left @ right^T`` where most of it lies in a
    subspace, which makes products several times cheaper.

    Attributes:
        left: ``[N, K]`` itself, or ``[N, q]``.
        right: None, or ``[K, q]``.
    """

    left: Tensor
    right: Tensor | None = None

    def from_left(self, rows: Tensor) -> Tensor:
        """``rows [r, N]`` times the matrix, ``[r, K]``."""
        return rows @ self.left if self.right is None else (rows @ self.left) @ self.right.t()

    def from_right(self, rows: Tensor) -> Tensor:
        """``rows [r, K]`` times the transposed matrix, ``[r, N]``."""
        return rows @ self.left.t() if self.right is None else (rows @ self.right) @ self.left.t()

    def transpose(self) -> Operator:
        return Operator(self.left.t()) if self.right is None else Operator(self.right, self.left)


def decompose(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets of a matrix ``[N, K]``, in the dtype of the input.

    Returns:
        U ``[N, r]``, s ``[r]`` descending, V ``[K, r]``. Singular vectors of singular value 0 are 0.
    """
    return decompose_with_operator(delta, rank)[:3]


def decompose_with_operator(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Operator]:
    """Like `decompose`, with the matrix for further products: whole, or its part in the subspace that was searched,
    which is wider than the rank."""
    small = min(delta.shape)
    if delta.numel() <= _EXACT_SVD_ELEMENTS:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return u[:, :rank].to(delta), s[:rank].to(delta), vh[:rank].t().to(delta), Operator(delta)
    if delta.shape[0] < delta.shape[1]:
        v, s, u, operator = decompose_with_operator(delta.t(), rank)
        return u, s, v, operator.transpose()
    block = int(_BLOCK_SHARE * rank) + _BLOCK_EXTRA
    if small <= _GRAM_SIZE or (_KRYLOV_STEPS + 1) * block > small // 2:
        v = torch.linalg.eigh(_gram(delta)).eigenvectors[:, -rank:].flip(1) if rank else delta.new_zeros(small, 0)
        u, v, operator = delta @ v.to(delta), v.to(delta), Operator(delta)
    else:
        basis, projected = _krylov_subspace(delta, block)
        values, vectors = torch.linalg.eigh(_gram(projected))
        vectors = vectors[:, -rank:].flip(1) if rank else vectors[:, :0]
        scale = values[-rank:].flip(0).clamp_min(torch.finfo(torch.float64).tiny).rsqrt() if rank else values[:0]
        v = projected @ (vectors * scale).to(delta)
        u, operator = basis @ (vectors / scale).to(delta), Operator(basis, projected)
    s = torch.linalg.vector_norm(u, dim=0)
    # Singular values are known to the square root of the Gram matrix's precision.
    negligible = s <= max(torch.finfo(delta.dtype).eps, 1e-7) * s.amax() if rank else s > 0
    u, v = u / s.masked_fill(negligible, 1.0), v.masked_fill(negligible, 0.0)
    return u.masked_fill(negligible, 0.0), s.masked_fill(negligible, 0.0), v, operator


def singular_values(delta: Tensor, count: int) -> Tensor:
    """The ``count`` largest singular values (fewer if the matrix is smaller), descending, float64."""
    small, tall = min(delta.shape), delta if delta.shape[0] >= delta.shape[1] else delta.t()
    if small <= _GRAM_SIZE:
        values = torch.linalg.eigvalsh(_gram(tall)).flip(0)[:count]
        return values.clamp_min(0).sqrt()
    return decompose(tall, min(count, small))[1].double()


def _gram(matrix: Tensor) -> Tensor:
    """``matrix^T matrix`` in float64, where squaring the singular values loses none that float32 can tell apart."""
    matrix = matrix.double()
    return matrix.t() @ matrix


def _krylov_subspace(matrix: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q ``[N, q]`` of the powers of ``A A^T`` on a random block (Musco and Musco 2015), and
    ``A^T Q [K, q]``."""
    # A fixed seed: the same input gives the same adapter.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=torch.float32)
    basis = matrix.new_empty(matrix.shape[0], (_KRYLOV_STEPS + 1) * block)
    projected = matrix.new_empty(matrix.shape[1], basis.shape[1])
    power = matrix @ start.to(matrix)
    for first in range(0, basis.shape[1], block):
        newest = slice(first, first + block)
        known = basis[:, :first]
        for _ in range(2 if first else 0):  # once leaves what rounding made of it
            power -= known @ (known.t() @ power)
        basis[:, newest] = _orthonormal(power)
        projected[:, newest] = matrix.t() @ basis[:, newest]
        if newest.stop < basis.shape[1]:
            power = matrix @ _orthonormal(projected[:, newest])
    return basis, projected


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns; where they are dependent, the missing directions are 0."""
    gram = _gram(columns)
    scale = gram.diagonal().clamp_min(torch.finfo(columns.dtype).tiny).rsqrt()
    gram = gram * scale * scale[:, None]
    # Cholesky of the Gram matrix is several times faster than QR, and as good for columns that are far from dependent.
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0 and float(lower.diagonal().amin()) > 1e-3:
        mixing = torch.linalg.solve_triangular(lower, torch.diag(scale), upper=False).t()
    else:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > columns.shape[1] * torch.finfo(columns.dtype).eps * values[-1]
        inverse = torch.where(kept, values, 1.0).rsqrt().masked_fill(~kept, 0.0)
        mixing = scale[:, None] * vectors * inverse
    return columns @ mixing.to(columns)
