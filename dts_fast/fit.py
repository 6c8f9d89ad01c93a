"""From a weight delta to its 2-bit form: decomposition, then thresholding and scaling.

``method="paper"`` is the published algorithm (DTS, arXiv 2512.01461, section 3): a truncated SVD whose
factors are split into four groups by sign and median magnitude, each group replaced by its signed root
mean square. ``method="refined"`` starts there and lets every element take the level that serves the whole
sum of components best, so that components repair each other's quantization errors. A new way of fitting is
one more function here and one more entry in `METHODS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .codes import CodedMatrix, CodedVector, LowRankDelta, matrix_shape, pack
from .decompose import decompose, decompose_with_operator
from .descent import descend_
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
    # In ascending order the groups are neighbouring ranges, which makes boundaries and sums cheap.
    ordered = _sorted(flat)
    count = flat.numel()
    negative, positive = int((flat < 0).sum()), int((flat > 0).sum())
    large_negative, large_positive = negative // 2, positive // 2
    if count - negative - positive > min(negative, positive) // 2:  # zeros need a level
        if positive <= negative:
            large_positive = positive
        else:
            large_negative = negative
    squares = ordered.double().square()
    bounds = (0, large_negative, negative, count - positive, count - large_positive, count)
    groups = (LARGE_NEGATIVE, SMALL_NEGATIVE, None, SMALL_POSITIVE, LARGE_POSITIVE)
    levels = torch.zeros(4, dtype=torch.float64, device=flat.device)
    for code, first, last in zip(groups, bounds[:-1], bounds[1:], strict=True):
        if code is not None and last > first:
            rms = squares[first:last].mean().sqrt()
            levels[code] = rms if code in (LARGE_POSITIVE, SMALL_POSITIVE) else -rms
    least = ordered[count - large_positive] if large_positive else math.inf
    most = ordered[large_negative - 1] if large_negative else -math.inf
    codes = (flat < least).to(torch.uint8) + (flat < 0).to(torch.uint8) + (flat <= most).to(torch.uint8)
    # Of equal magnitudes at a boundary the first ones are large.
    for boundary, large, small, wanted in (
        (least, LARGE_POSITIVE, SMALL_POSITIVE, large_positive),
        (most, LARGE_NEGATIVE, SMALL_NEGATIVE, large_negative),
    ):
        excess = int((codes == large).sum()) - wanted
        if excess:
            codes[(flat == boundary).nonzero().squeeze(1)[-excess:]] = small
    codes[flat == 0] = levels.abs().argmin().to(torch.uint8)
    return codes.reshape(values.shape), levels.float()


def _sorted(flat: Tensor) -> Tensor:
    """In ascending order; on a CPU by numpy, whose sort uses vector instructions and takes a fraction of torch's
    time."""
    return torch.from_numpy(np.sort(flat.numpy())) if flat.device.type == "cpu" else flat.sort().values


def code_matrix(factor: Tensor) -> CodedMatrix:
    """Threshold a factor ``[n, r]`` as a whole."""
    codes, levels = threshold(factor)
    return CodedMatrix(codes=pack(codes.t()), levels=levels, n=factor.shape[0])


def fit_paper(delta: Tensor, rank: int) -> LowRankDelta:
    """Truncated SVD, each factor thresholded over the whole matrix (paper, section 3)."""
    u, s, v = decompose(delta, rank)
    true_rank = int((s > 0).sum())  # the zeros beyond would count as elements and take a level
    coded = (_padded(code_matrix(factor[:, :true_rank]), rank) for factor in (u, v))
    return LowRankDelta(next(coded), s.float(), next(coded), tuple(delta.shape))


def _padded(factor: CodedMatrix, rank: int) -> CodedMatrix:
    """With components of code 0 up to a rank; their scales are 0."""
    missing = factor.codes.new_zeros(rank - factor.rank, factor.codes.shape[1])
    return CodedMatrix(torch.cat([factor.codes, missing]), factor.levels, factor.n)


@dataclass(frozen=True)
class Refinement:
    """The ingredients of `fit_refined`; bench/ablation.py measures each on several fine-tunes.

    Attributes:
        levels: where the levels of a factor start, descending and symmetric; Lloyd-Max levels of a standard normal
            variable, because singular vectors are nearly Gaussian. The file holds four.
        rounds: how often U and V take turns.
        sweeps: passes over the components each time.
        refit_levels: whether levels follow the codes, in the last round.
        stretch: ``"none"``, ``"unbiased"``, ``"norm"`` or ``"mean"``, see `_stretch`.
    """

    levels: tuple[float, ...] = (1.5104, 0.4528, -0.4528, -1.5104)
    rounds: int = 3
    sweeps: int = 2
    refit_levels: bool = True
    stretch: str = "mean"


def fit_refined(delta: Tensor, rank: int) -> LowRankDelta:
    """Factors whose elements are chosen together, see `refine`."""
    u, s, v = refine(delta, rank)
    return LowRankDelta(u.coded(), s.float(), v.coded(), tuple(delta.shape))


def refine(delta: Tensor, rank: int, options: Refinement = Refinement()) -> tuple[_Side, Tensor, _Side]:
    """Coordinate descent on ``||delta - U diag(s) V^T||_F`` over factors of a few levels.

    With V fixed, the rows of U are independent least-squares problems over the levels, coupled only through the
    Gram matrix of V: one product with the delta serves any number of sweeps over the components. U and V take turns,
    scales and levels are refitted in between. Least squares shrinks what it cannot fit, and a shrunk delta is a
    weaker fine-tune, so at the end the result is stretched (see `_stretch`).
    """
    left, sigma, right, operator = decompose_with_operator(delta, rank)
    u, v = _Side(left, options), _Side(right, options)
    if rank == 0 or not bool(sigma[0] > 0):
        return u, sigma, v
    product = operator.from_right(v.rows)  # [r, N]
    for done in range(options.rounds):
        refit = options.refit_levels and done + 1 == options.rounds
        s = _fit_scales(u, v, product)
        u.improve(product, v, s, refit)
        product = operator.from_left(u.rows)  # [r, K]
        s = _fit_scales(v, u, product)
        v.improve(product, u, s, refit)
        product = operator.from_right(v.rows)
    s = _fit_scales(u, v, product)
    return u, s * _stretch(options.stretch, delta, u.rows.t() * s, v.rows.t(), left * sigma, right), v


_MAX_OVERSHOOT = 1.25


def _stretch(
    rule: str, delta: Tensor, a_left: Tensor, a_right: Tensor, d_left: Tensor, d_right: Tensor
) -> Tensor | float:
    """The factor for a fit A of a delta D with exact rank-r part D_r; both low-rank parts are given as factors.

    Two rules are sound: unbiased along D_r, by ``<D_r, D_r> / <A, D_r>``, and of the delta's norm, by
    ``||D|| / ||A||``. The first leaves out that the lost components worked in the same direction, the second overshoots
    where few components carry the norm of all. Their geometric mean, limited to a quarter above the first, lies
    between, and is the default; bench/ablation.py compares them.
    """
    if rule == "none":
        return 1.0
    overlap = ((a_left.t() @ d_left) * (a_right.t() @ d_right)).sum()
    unbiased = d_left.square().sum() / overlap
    norm = ((a_left.t() @ a_left) * (a_right.t() @ a_right)).sum().clamp_min(0).sqrt() * unbiased
    missing = torch.linalg.vector_norm(delta) / norm
    factors = {"unbiased": 1.0, "norm": missing, "mean": missing.sqrt().clamp(max=_MAX_OVERSHOOT)}
    return unbiased * factors[rule]


class _Side:
    """One factor while it is fitted: its levels, and its elements ``[r, n]`` with components in (contiguous) rows."""

    def __init__(self, vectors: Tensor, options: Refinement) -> None:
        # Components of one size share the levels; their lengths go to the scales.
        rms = vectors.square().mean(0).sqrt().clamp_min(torch.finfo(vectors.dtype).tiny)
        self.options, self.levels = options, vectors.new_tensor(options.levels)
        self.rows = self.levels[self._nearest((vectors / rms).t().contiguous()).long()]

    def _nearest(self, values: Tensor) -> Tensor:
        """The code of the level next to each value."""
        codes = torch.zeros_like(values, dtype=torch.uint8)
        for boundary in (self.levels[:-1] + self.levels[1:]) / 2:
            codes += values <= boundary  # several times faster than a search for each element
        return codes

    def coded(self) -> CodedMatrix:
        return CodedMatrix(pack(self._nearest(self.rows)), self.levels.float(), self.rows.shape[1])

    def improve(self, product: Tensor, other: _Side, s: Tensor, refit_levels: bool) -> None:
        """Choose every element anew with the other factor fixed, then perhaps the levels.

        Args:
            product: the other factor times the delta, ``[r, n]``.
            s: ``[r]``.
        """
        fixed = other.rows * s[:, None]
        gram = fixed @ fixed.t()  # [r, r]
        target = product * s[:, None]
        descend_(self.rows, target, gram, self.levels, self.options.sweeps)
        if refit_levels:
            self._refit_levels(target, gram)

    def _refit_levels(self, target: Tensor, gram: Tensor) -> None:
        """The levels that fit best with these codes: a least-squares problem with one unknown each."""
        codes = self._nearest(self.rows)
        members = torch.stack([(codes == code).to(gram) for code in range(len(self.levels))])  # [L, r, n]
        flat = members.flatten(1)
        system = ((gram @ members).flatten(1) @ flat.t()).double()
        wanted = (flat @ target.flatten()).double()
        system.diagonal().add_(1e-9 * system.diagonal().mean() + torch.finfo(torch.float64).tiny)
        levels = torch.linalg.solve(system, wanted).to(self.levels)
        # A code that nothing uses gets level 0, which may equal its neighbour's.
        if bool(torch.isfinite(levels).all()) and bool((levels[:-1] >= levels[1:]).all()):
            self.levels, self.rows = levels, levels[codes.long()]


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
    if not isinstance(delta, Tensor):
        raise DTSError(f"{name}: fit() takes a torch.Tensor, got {type(delta).__name__}; torch.as_tensor makes one.")
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
    finite, largest = _checked(delta, name)
    matrix = finite.reshape(as_matrix).contiguous()  # sums in one order, whatever the strides
    # Squares of very small or large deltas leave float32's range. A power of two changes no digit.
    unit = 2.0 ** math.floor(math.log2(largest)) if largest and not 1e-9 < largest < 1e9 else 1.0
    with torch.autocast(delta.device.type, enabled=False):
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
    return _checked(delta, name)[0]


def _checked(delta: Tensor, name: str) -> tuple[Tensor, float]:
    """`checked`, and the largest magnitude."""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    if not delta.numel():
        return delta, 0.0
    largest = max(abs(float(bound)) for bound in delta.aminmax())  # NaN is passed on
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(delta)).sum())
        raise DTSError(
            f"{name}: {bad} of {delta.numel()} values of the delta are NaN or Inf. Expected finite weights on "
            "both sides; check the fine-tune for divergence, or leave the tensor out with --exclude."
        )
    return delta, largest
