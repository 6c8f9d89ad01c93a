"""The dominant singular triplets of a matrix, exact where that is cheap and randomised where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many elements the exact SVD costs little, and its singular vectors carry the published code's signs.
_EXACT_SVD_ELEMENTS = 256 * 256
# Up to this size (or for ranks that are a large part of it) all eigenpairs of the Gram matrix are cheaper than
# iterating on a subspace.
_GRAM_SIZE = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


def decompose(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets of a matrix ``[N, K]``, in the dtype of the input.

    Returns:
        U ``[N, r]``, s ``[r]`` descending, V ``[K, r]``. Singular vectors of singular value 0 are 0.
    """
    small = min(delta.shape)
    if delta.numel() <= _EXACT_SVD_ELEMENTS:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return u[:, :rank].to(delta), s[:rank].to(delta), vh[:rank].t().to(delta)
    if delta.shape[0] < delta.shape[1]:
        v, s, u = decompose(delta.t(), rank)
        return u, s, v
    if small <= _GRAM_SIZE or rank + _OVERSAMPLING > small // 4:
        basis = torch.linalg.eigh(_gram(delta)).eigenvectors[:, -rank:].flip(1) if rank else delta.new_zeros(small, 0)
    else:
        basis = _dominant_subspace(delta, rank + _OVERSAMPLING)[:, :rank]
    v = basis.to(delta)
    u = delta @ v
    s = torch.linalg.vector_norm(u, dim=0)
    negligible = s <= torch.finfo(delta.dtype).eps * s.amax() if rank else s > 0
    u, v = u / s.masked_fill(negligible, 1.0), v.masked_fill(negligible, 0.0)
    return u.masked_fill(negligible, 0.0), s.masked_fill(negligible, 0.0), v


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


def _dominant_subspace(matrix: Tensor, size: int) -> Tensor:
    """Right singular vectors ``[K, size]`` by randomised subspace iteration (Halko, Martinsson, Tropp 2011)."""
    # A fixed seed: the same input gives the same adapter.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float32)
    q = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.t() @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    projected = matrix.t() @ q  # [K, size] = V diag(s) W^T
    values, vectors = torch.linalg.eigh(_gram(projected))
    scale = values.flip(0).clamp_min(torch.finfo(torch.float64).tiny).rsqrt().to(matrix)
    return (projected @ vectors.flip(1).to(matrix)) * scale
