"""From a weight delta to its 2-bit form: decomposition, then thresholding and scaling.

``method="paper"`` is the published algorithm (DTS, arXiv 2512.01461, section 3): a truncated SVD whose
factors are split into four groups by sign and median magnitude, each group replaced by its signed root
mean square. ``method="refined"`` starts there and lets every element take the level that serves the whole
sum of components best, so that components repair each other's quantization errors. A new way of fitting is
one more function here and one more entry in `METHODS`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codes import CodedMatrix, CodedVector, LowRankDelta, matrix_shape, pack
from .decompose import decompose
from .errors import DTSError

# The codes of the four groups, in the order of their levels from high to low.
LARGE_POSITIVE, SMALL_POSITIVE, SMALL_NEGATIVE, LARGE_NEGATIVE = range(4)


def threshold(values: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's thresholding and scaling of all elements of a tensor together.

    Positive and negative elements are split separately: the ``count // 2`` largest magnitudes of a sign form
    its large group, the rest its small group. A group's level is its root mean square with the sign of the
    group, and 0 where the group is empty. An element that is exactly 0 belongs to no group in the paper and stays 0;
    two bits leave no fifth value. Where zeros outnumber the smallest group, the sign with fewer elements makes do with
    one level and 0 gets the other; else a zero takes the level nearest to it.

    Args:
        values: floating point, any shape.

    Returns:
        codes uint8 in the shape of ``values``, and levels float32 ``[4]``.
    """
    flat = values.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    levels = torch.zeros(4, dtype=torch.float64, device=flat.device)
    groups = ((1.0, LARGE_POSITIVE, SMALL_POSITIVE), (-1.0, LARGE_NEGATIVE, SMALL_NEGATIVE))
    counts = {sign: int((flat * sign > 0).sum()) for sign, _, _ in groups}
    fewer = min(counts, key=counts.get)
    zero_needs_a_level = flat.numel() - sum(counts.values()) > counts[fewer] // 2
    for sign, large, small in groups:
        index = (flat * sign > 0).nonzero().squeeze(1)
        magnitudes = flat[index].abs()
        half = index.numel() if zero_needs_a_level and sign == fewer else index.numel() // 2
        in_large = _largest(magnitudes, half)
        for code, members in ((large, in_large), (small, ~in_large)):
            codes[index[members]] = code
            if bool(members.any()):
                levels[code] = sign * magnitudes[members].double().square().mean().sqrt()
    codes[flat == 0] = levels.abs().argmin().to(torch.uint8)
    return codes.reshape(values.shape), levels.float()


def _largest(values: Tensor, count: int) -> Tensor:
    """Which ``count`` of the values are the largest, as a mask; of equal ones the first."""
    if count in (0, values.numel()):
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    least = values.kthvalue(values.numel() - count + 1).values  # a selection, several times faster than sorting
    mask = values > least
    ties = (values == least).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def code_matrix(factor: Tensor) -> CodedMatrix:
    """Threshold a factor ``[n, r]`` as a whole."""
    codes, levels = threshold(factor)
    return CodedMatrix(codes=pack(codes.t()), levels=levels, n=factor.shape[0])


def fit_paper(delta: Tensor, rank: int) -> LowRankDelta:
    """Truncated SVD, each factor thresholded over the whole matrix (paper, section 3)."""
    u, s, v = decompose(delta, rank)
    return LowRankDelta(code_matrix(u), s.float(), code_matrix(v), tuple(delta.shape))


# Lloyd-Max levels of a standard normal variable: singular vectors are nearly Gaussian.
_NORMAL_LEVELS = (1.5104, 0.4528, -0.4528, -1.5104)
_ROUNDS = 3
_SWEEPS = 2
_BLOCK = 16


def fit_refined(delta: Tensor, rank: int) -> LowRankDelta:
    """Factors whose elements are chosen together, by coordinate descent on ``||delta - U diag(s) V^T||_F``.

    With V fixed, the rows of U are independent least-squares problems over four levels, coupled only through the
    Gram matrix of V: one product with the delta serves any number of sweeps over the components. U and V take turns,
    scales and levels are refitted in between. Least squares shrinks what it cannot fit, and a shrunk delta is a
    weaker fine-tune, so at the end the result is stretched (see `_stretch`).
    """
    left, sigma, right = decompose(delta, rank)
    if rank == 0 or not bool(sigma[0] > 0):
        return LowRankDelta(code_matrix(left), sigma.float(), code_matrix(right), tuple(delta.shape))
    u, v = _Side(left), _Side(right)
    product = v.rows @ delta.t()  # [r, N]
    for _ in range(_ROUNDS):
        s = _fit_scales(u, v, product)
        u.improve(product, v, s)
        product = u.rows @ delta  # [r, K]
        s = _fit_scales(v, u, product)
        v.improve(product, u, s)
        product = v.rows @ delta.t()
    s = _fit_scales(u, v, product)
    s = s * _stretch(delta, u.rows.t() * s, v.rows.t(), left * sigma, right)
    return LowRankDelta(u.coded(), s.float(), v.coded(), tuple(delta.shape))


_MAX_OVERSHOOT = 1.25


def _stretch(delta: Tensor, a_left: Tensor, a_right: Tensor, d_left: Tensor, d_right: Tensor) -> Tensor:
    """The factor for a fit A of a delta D with exact rank-r part D_r; both low-rank parts are given as factors.

    Two rules are sound: unbiased along D_r, by ``<D_r, D_r> / <A, D_r>``, and of the delta's norm, by
    ``||D|| / ||A||``. The first leaves out that the lost components worked in the same direction, the second overshoots
    where few components carry the norm of all. Their geometric mean, limited to a quarter above the first, lies
    between; bench/fidelity.py measures what comes of it.
    """
    overlap = ((a_left.t() @ d_left) * (a_right.t() @ d_right)).sum()
    unbiased = d_left.square().sum() / overlap
    norm = ((a_left.t() @ a_left) * (a_right.t() @ a_right)).sum().clamp_min(0).sqrt() * unbiased
    return unbiased * (torch.linalg.vector_norm(delta) / norm).sqrt().clamp(max=_MAX_OVERSHOOT)


class _Side:
    """One factor while it is fitted: its levels, and its elements ``[r, n]`` with components in (contiguous) rows."""

    def __init__(self, vectors: Tensor) -> None:
        # Components of one size share the levels; their lengths go to the scales.
        rms = vectors.square().mean(0).sqrt().clamp_min(torch.finfo(vectors.dtype).tiny)
        self.levels = vectors.new_tensor(_NORMAL_LEVELS)
        self.rows = self.levels[self._nearest((vectors / rms).t().contiguous())]

    def _nearest(self, values: Tensor) -> Tensor:
        """The code of the level next to each value."""
        ascending = self.levels.flip(0)
        return 3 - torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2)

    def coded(self) -> CodedMatrix:
        return CodedMatrix(pack(self._nearest(self.rows).to(torch.uint8)), self.levels.float(), self.rows.shape[1])

    def improve(self, product: Tensor, other: _Side, s: Tensor) -> None:
        """Choose every element anew with the other factor fixed, then the levels.

        Args:
            product: the other factor times the delta, ``[r, n]``.
            s: ``[r]``.
        """
        fixed = other.rows * s[:, None]
        gram = fixed @ fixed.t()  # [r, r]
        target = product * s[:, None]
        curvature = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).tolist()
        ascending = self.levels.flip(0)
        boundaries = (ascending[:-1] + ascending[1:]) / 2
        rows = self.rows
        residual = target - gram @ rows  # minus the gradient
        for _ in range(_SWEEPS):
            for first in range(0, rows.shape[0], _BLOCK):
                # Within a block the residual is kept up to date component by component; the others see the whole
                # block's change in one product, which is what makes a sweep run at the speed of a matrix product.
                block = slice(first, min(first + _BLOCK, rows.shape[0]))
                change = torch.zeros_like(rows[block])
                for j in range(change.shape[0]):
                    k = first + j
                    step = torch.addmv(residual[k], change[:j].t(), gram[k, first:k], alpha=-1)
                    wanted = torch.add(rows[k], step, alpha=1 / curvature[k])
                    torch.sub(ascending[torch.bucketize(wanted, boundaries)], rows[k], out=change[j])
                rows[block] += change
                residual.addmm_(gram[:, block], change, alpha=-1)
        self._refit_levels(target, gram)

    def _refit_levels(self, target: Tensor, gram: Tensor) -> None:
        """The four levels that fit best with these codes: a 4 x 4 least-squares problem."""
        codes = self._nearest(self.rows)
        members = torch.stack([(codes == code).to(gram) for code in range(4)])  # [4, r, n]
        flat = members.flatten(1)
        system = ((gram @ members).flatten(1) @ flat.t()).double()
        wanted = (flat @ target.flatten()).double()
        system.diagonal().add_(1e-9 * system.diagonal().mean() + torch.finfo(torch.float64).tiny)
        levels = torch.linalg.solve(system, wanted).to(self.levels)
        # A code that nothing uses gets level 0, which may equal its neighbour's.
        if bool(torch.isfinite(levels).all()) and bool((levels[:-1] >= levels[1:]).all()):
            self.levels, self.rows = levels, levels[codes]


def _fit_scales(one: _Side, other: _Side, product: Tensor) -> Tensor:
    """The scales ``[r]`` that fit best with these factors; ``product`` is the other factor times the delta."""
    a, b = one.rows, other.rows
    system = ((a @ a.t()) * (b @ b.t())).double()
    wanted = (a * product).sum(1).double()
    system.diagonal().add_(1e-6 * system.diagonal().mean())
    return torch.linalg.solve(system, wanted).to(product)


METHODS = {"paper": fit_paper, "refined": fit_refined}


def paper_rank(shape: tuple[int, int], density: float) -> int:
    """``int(density * min(N, K))``, the paper's rank."""
    return int(density * min(shape))


@torch.no_grad()
def fit(
    delta: Tensor,
    rank: int | None = None,
    *,
    density: float | None = None,
    method: str = "refined",
    name: str = "delta",
) -> LowRankDelta:
    """Compress one weight delta to a low-rank form with 2-bit factors.

    Args:
        delta: floating point, two or more dimensions (flattened to ``[N, K]``, see `codes.matrix_shape`),
            float32 or float64 arithmetic.
        rank: components to keep, at most ``min(N, K)``; give this or ``density``.
        density: ``rank = int(density * min(N, K))``, from 0 to 1.
        method: ``"refined"`` or ``"paper"``.
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
    matrix = checked(delta, name).reshape(as_matrix).contiguous()  # sums in one order, whatever the strides
    # Squares of very small or large deltas leave float32's range. A power of two changes no digit.
    largest = max(map(abs, map(float, matrix.aminmax()))) if matrix.numel() else 0.0
    unit = 2.0 ** math.floor(math.log2(largest)) if largest and not 1e-9 < largest < 1e9 else 1.0
    low_rank = METHODS[method](matrix if unit == 1.0 else matrix / unit, rank)
    return LowRankDelta(low_rank.u, low_rank.s * unit, low_rank.v, tuple(delta.shape))


@torch.no_grad()
def fit_vector(delta: Tensor, *, name: str = "delta") -> CodedVector:
    """Threshold a bias, a norm weight or any parameter without matrix structure into four levels.

    Args:
        delta: floating point, any shape.

    Raises:
        DTSError: NaN or Inf in ``delta``.
    """
    codes, levels = threshold(checked(delta, name))
    return CodedVector(codes=pack(codes.reshape(-1)), levels=levels, shape=tuple(delta.shape))


def relative_error(delta: Tensor, coded: LowRankDelta | CodedVector) -> float:
    """``||delta - coded||_F / ||delta||_F``, in float64 sums; 0 for a zero delta."""
    norm = delta.double().square().sum()
    if norm == 0:
        return 0.0
    residual = delta.double() - coded.dequantize(torch.float64)
    return float((residual.square().sum() / norm).sqrt())


def checked(delta: Tensor, name: str) -> Tensor:
    """The delta in float32 or float64 arithmetic.

    Raises:
        DTSError: NaN or Inf in it.
    """
    delta = delta if delta.dtype == torch.float64 else delta.float()
    if delta.numel() and not all(math.isfinite(bound) for bound in delta.aminmax()):  # NaN is passed on
        bad = int((~torch.isfinite(delta)).sum())
        raise DTSError(
            f"{name}: {bad} of {delta.numel()} values of the delta are NaN or Inf. Expected finite weights on "
            "both sides; check the fine-tune for divergence, or leave the tensor out with --exclude."
        )
    return delta
