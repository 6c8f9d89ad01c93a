"""From a weight delta to its 2-bit form: decomposition, then thresholding and scaling.

``method="paper"`` is the published algorithm (DTS, arXiv 2512.01461, section 3): a truncated SVD whose
factors are split into four groups by sign and median magnitude, each group replaced by its signed root
mean square. A new way of fitting is one more function here and one more entry in `METHODS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import CodedMatrix, CodedVector, LowRankDelta, matrix_shape, pack
from .errors import DTSError

# The codes of the four groups, in the order of their levels from high to low.
LARGE_POSITIVE, SMALL_POSITIVE, SMALL_NEGATIVE, LARGE_NEGATIVE = range(4)


def threshold(values: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's thresholding and scaling of all elements of a tensor together.

    Positive and negative elements are split separately: the ``count // 2`` largest magnitudes of a sign form
    its large group, the rest its small group. A group's level is its root mean square with the sign of the
    group, and 0 where the group is empty. An element that is exactly 0 belongs to no group in the paper; two
    bits leave no fifth value, so it takes the level nearest to 0.

    Args:
        values: floating point, any shape.

    Returns:
        codes uint8 in the shape of ``values``, and levels float32 ``[4]``.
    """
    flat = values.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    levels = torch.zeros(4, dtype=torch.float64, device=flat.device)
    groups = ((1.0, LARGE_POSITIVE, SMALL_POSITIVE), (-1.0, LARGE_NEGATIVE, SMALL_NEGATIVE))
    for sign, large, small in groups:
        index = (flat * sign > 0).nonzero().squeeze(1)
        # Stable, so that equal magnitudes fall the same way on every run.
        order = torch.argsort(flat[index].abs(), descending=True, stable=True)
        half = index.numel() // 2
        for code, members in ((large, index[order[:half]]), (small, index[order[half:]])):
            codes[members] = code
            if members.numel():
                levels[code] = sign * flat[members].double().square().mean().sqrt()
    codes[flat == 0] = levels.abs().argmin().to(torch.uint8)
    return codes.reshape(values.shape), levels.float()


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


def code_matrix(factor: Tensor) -> CodedMatrix:
    """Threshold a factor ``[n, r]`` as a whole."""
    codes, levels = threshold(factor)
    return CodedMatrix(codes=pack(codes.t()), levels=levels, n=factor.shape[0])


def fit_paper(delta: Tensor, rank: int) -> LowRankDelta:
    """Truncated SVD, each factor thresholded over the whole matrix (paper, section 3)."""
    u, s, v = decompose(delta, rank)
    return LowRankDelta(code_matrix(u), s.float(), code_matrix(v), tuple(delta.shape))


METHODS = {"paper": fit_paper}


def paper_rank(shape: tuple[int, int], density: float) -> int:
    """``int(density * min(N, K))``, the paper's rank."""
    return int(density * min(shape))


def fit(
    delta: Tensor,
    rank: int | None = None,
    *,
    density: float | None = None,
    method: str = "paper",
    name: str = "delta",
) -> LowRankDelta:
    """Compress one weight delta to a low-rank form with 2-bit factors.

    Args:
        delta: floating point, two or more dimensions (flattened to ``[N, K]``, see `codes.matrix_shape`),
            float32 or float64 arithmetic.
        rank: components to keep, at most ``min(N, K)``; give this or ``density``.
        density: ``rank = int(density * min(N, K))``, from 0 to 1.
        method: ``"paper"``.
        name: what error messages call the tensor.

    Returns:
        `LowRankDelta` in the shape of ``delta``, on its device.

    Raises:
        DTSError: NaN or Inf in ``delta``, no matrix structure, a rank, density or method out of range.
    """
    as_matrix = matrix_shape(tuple(delta.shape))
    if as_matrix is None or not delta.is_floating_point():
        raise DTSError(
            f"{name}: fit() takes a floating-point matrix, got {delta.dtype} of shape {tuple(delta.shape)}. "
            "Use fit_vector() for parameters without matrix structure."
        )
    if (rank is None) == (density is None):
        raise DTSError("fit() takes exactly one of rank and density.")
    if density is not None:
        if not 0 <= density <= 1:
            raise DTSError(f"density must lie in 0..1, got {density}.")
        rank = paper_rank(as_matrix, density)
    if not 0 <= rank <= min(as_matrix):
        raise DTSError(f"{name}: rank must lie in 0..{min(as_matrix)} for a matrix {list(as_matrix)}, got {rank}.")
    if method not in METHODS:
        raise DTSError(f"unknown method {method!r}; known: {', '.join(sorted(METHODS))}.")
    matrix = _checked(delta, name).reshape(as_matrix)
    low_rank = METHODS[method](matrix, rank)
    return LowRankDelta(low_rank.u, low_rank.s, low_rank.v, tuple(delta.shape))


def fit_vector(delta: Tensor, *, name: str = "delta") -> CodedVector:
    """Threshold a bias, a norm weight or any parameter without matrix structure into four levels.

    Args:
        delta: floating point, any shape.

    Raises:
        DTSError: NaN or Inf in ``delta``.
    """
    codes, levels = threshold(_checked(delta, name))
    return CodedVector(codes=pack(codes.reshape(-1)), levels=levels, shape=tuple(delta.shape))


def relative_error(delta: Tensor, coded: LowRankDelta | CodedVector) -> float:
    """``||delta - coded||_F / ||delta||_F``, in float64 sums; 0 for a zero delta."""
    norm = delta.double().square().sum()
    if norm == 0:
        return 0.0
    residual = delta.double() - coded.dequantize(torch.float64)
    return float((residual.square().sum() / norm).sqrt())


def _checked(delta: Tensor, name: str) -> Tensor:
    """The delta in float32 or float64 arithmetic, refused where it is not finite."""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    bad = int((~torch.isfinite(delta)).sum())
    if bad:
        raise DTSError(
            f"{name}: {bad} of {delta.numel()} values of the delta are NaN or Inf. Expected finite weights on "
            "both sides; check the fine-tune for divergence, or leave the tensor out with --exclude."
        )
    return delta
