import math

import numpy as np
import pytest
import torch

from dts_fast.decompose import decompose
from dts_fast.errors import DTSError
from dts_fast.fit import SMALL_POSITIVE, fit, fit_vector, relative_error, threshold


def paper_threshold(values: np.ndarray) -> np.ndarray:
    """The published thresholding in float64: by sign, then the larger half by magnitude; each group its signed RMS."""
    flat, result = values.ravel(), np.zeros(values.size)
    for sign in (1, -1):
        index = np.flatnonzero(flat * sign > 0)
        order = index[np.argsort(-np.abs(flat[index]), kind="stable")]
        half = int(len(order) * 0.5)
        for group in (order[:half], order[half:]):
            if len(group):
                result[group] = sign * math.sqrt(float(np.mean(flat[group] ** 2)))
    return result.reshape(values.shape)


def paper_delta(delta: torch.Tensor, density: float) -> np.ndarray:
    # The published code takes its triplets, and with them their signs, from torch.linalg.svd.
    u, s, vh = (t.numpy() for t in torch.linalg.svd(delta.double(), full_matrices=False))
    r = int(density * len(s))
    return (paper_threshold(u[:, :r]) * s[:r]) @ paper_threshold(vh[:r])


def test_threshold_by_hand():
    # Positive 4, 3, 2, 1: the larger half is 4, 3 with RMS sqrt(12.5), the rest sqrt(2.5).
    # Negative -5, -2, -1 (odd): one large, -5; two small with RMS sqrt(2.5).
    values = torch.tensor([1.0, -1, 2, -2, 3, -5, 4])
    codes, levels = threshold(values)
    assert codes.tolist() == [1, 2, 1, 2, 0, 3, 0]
    torch.testing.assert_close(levels, torch.tensor([12.5**0.5, 2.5**0.5, -(2.5**0.5), -5.0]))


def test_threshold_of_a_single_element_is_exact():
    codes, levels = threshold(torch.tensor([[-0.75]]))
    assert levels[codes.long()].tolist() == [[-0.75]]


def test_threshold_is_over_the_whole_matrix_not_by_column():
    values = torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    _, levels = threshold(values)
    torch.testing.assert_close(levels, torch.tensor([25000.0**0.5, 2.5**0.5, 0.0, 0.0]))


def test_exact_zeros_take_the_level_nearest_to_zero():
    codes, levels = threshold(torch.tensor([0.0, 1.0, 4.0, 5.0, 2.0, -1.5, -6.0, -7.0, -2.0]))
    assert levels[codes[0].long()] == levels[SMALL_POSITIVE] == pytest.approx(2.5**0.5)
    codes, levels = threshold(torch.tensor([0.0, 2.0, 3.0]))
    assert levels[codes[0].long()] == 0.0  # no negative elements: that group's level is 0


def test_many_exact_zeros_get_a_level_of_their_own():
    values = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0, -2.0, -4.0, -5.0])
    codes, levels = threshold(values)
    # The positive sign has fewer elements: one level for both, their RMS sqrt(5).
    torch.testing.assert_close(levels, torch.tensor([5.0**0.5, 0.0, -(10.0**0.5), -5.0]))
    assert codes.tolist() == [1, 1, 1, 0, 0, 2, 2, 3]


def test_equal_magnitudes_split_the_same_way_every_time():
    values = torch.ones(1001)
    assert torch.equal(threshold(values)[0], threshold(values)[0])
    assert int((threshold(values)[0] == 0).sum()) == 500


# Not [2, 2]: elements of an orthogonal factor of that size are as large as one another, so that rounding decides which
# of them are below the median.
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (40, 40), (129, 31), (3, 3)])
@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_method_equals_the_published_algorithm(shape, density, dtype):
    delta = torch.randn(shape, dtype=dtype)
    fitted = fit(delta, density=density, method="paper")
    assert fitted.rank == int(density * min(shape))
    # Levels and s are stored in float32: 2^-24 relative, over a product of three of them.
    torch.testing.assert_close(
        fitted.dequantize(torch.float64), torch.from_numpy(paper_delta(delta, density)), rtol=1e-6, atol=1e-6
    )


def test_vector_equals_the_published_algorithm():
    delta = torch.randn(37, dtype=torch.float64)
    torch.testing.assert_close(
        fit_vector(delta).dequantize(torch.float64), torch.from_numpy(paper_threshold(delta.numpy())), rtol=1e-6, atol=0
    )


def test_rank_one_matrix_by_hand():
    # delta = 6 * u v^T with u = (2, 2, 1) / 3, v = (0.8, -0.6). In U the larger half of three positives is one of the
    # two elements 2/3 (the first: ties keep their order), the others share the RMS sqrt((4/9 + 1/9) / 2).
    delta = 6 * torch.outer(torch.tensor([2.0, 2.0, 1.0]) / 3, torch.tensor([0.8, -0.6]))
    fitted = fit(delta, rank=1, method="paper")
    small = (5 / 18) ** 0.5
    expected = 6 * torch.outer(torch.tensor([2 / 3, small, small]), torch.tensor([0.8, -0.6]))
    torch.testing.assert_close(fitted.dequantize(), expected, rtol=1e-5, atol=1e-6)


def test_conv_weights_are_fitted_as_out_by_rest():
    delta = torch.randn(6, 3, 2, 2)
    fitted = fit(delta, rank=4)
    assert (fitted.u.n, fitted.v.n, fitted.shape) == (6, 12, (6, 3, 2, 2))
    flat = fit(delta.reshape(6, 12), rank=4)
    assert torch.equal(fitted.dequantize().reshape(6, 12), flat.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fit_takes_any_dtype_and_stride(dtype):
    delta = torch.randn(20, 30).to(dtype).t()
    fitted = fit(delta, rank=5)
    assert torch.equal(fitted.dequantize(), fit(delta.contiguous(), rank=5).dequantize())


def test_rank_zero_is_an_empty_delta():
    fitted = fit(torch.randn(5, 6), rank=0)
    assert fitted.rank == 0
    assert torch.equal(fitted.dequantize(), torch.zeros(5, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name(bad):
    delta = torch.zeros(3, 4)
    delta[1, 2] = bad
    with pytest.raises(DTSError, match=r"layer\.7\.weight: 1 of 12 values"):
        fit(delta, rank=1, name="layer.7.weight")
    with pytest.raises(DTSError, match=r"layer\.7\.bias"):
        fit_vector(delta[1], name="layer.7.bias")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 5}, "0..4"),
        ({"rank": -1}, "0..4"),
        ({"density": 1.5}, "density"),
        ({"rank": 1, "density": 0.5}, "exactly one"),
        ({}, "exactly one"),
        ({"rank": 1, "method": "magic"}, "known: "),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(DTSError, match=message):
        fit(torch.zeros(4, 6), **arguments)
    with pytest.raises(DTSError, match="fit_vector"):
        fit(torch.zeros(6), rank=1)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300), (1500, 1100)])
def test_decompose_gives_the_dominant_singular_triplets(shape):
    # A spectrum that decays as a fine-tune's does; the randomised path is taken for the largest shape.
    left = torch.linalg.qr(torch.randn(shape[0], 64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 64)).Q
    spectrum = 0.9 ** torch.arange(64.0)
    delta = (left * spectrum) @ right.t() + 1e-4 * torch.randn(shape) / max(shape) ** 0.5
    u, s, v = decompose(delta, 24)
    exact = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(s, exact.S[:24], rtol=1e-4, atol=0)
    torch.testing.assert_close(u.t() @ u, torch.eye(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(v.t() @ v, torch.eye(24), rtol=0, atol=1e-4)
    best = (exact.U[:, :24] * exact.S[:24]) @ exact.Vh[:24]
    torch.testing.assert_close((u * s) @ v.t(), best, rtol=0, atol=1e-4)


def test_decompose_of_a_rank_deficient_matrix_stays_finite():
    delta = torch.zeros(400, 300)
    delta[:3] = torch.randn(3, 300)
    u, s, v = decompose(delta, 10)
    assert torch.isfinite(u).all()
    torch.testing.assert_close((u * s) @ v.t(), delta, rtol=0, atol=1e-4)
    assert s[3:].max() < 1e-4 * s[0]


def test_relative_error():
    delta = torch.randn(8, 6)
    fitted = fit(delta, rank=3)
    expected = (delta - fitted.dequantize()).norm() / delta.norm()
    assert relative_error(delta, fitted) == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(torch.zeros(8, 6), fitted) == 0.0


def decaying(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random matrix with the spectrum of a fine-tune's delta."""
    u = torch.linalg.qr(torch.randn(n, min(n, k), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(k, min(n, k), dtype=torch.float64)).Q
    return ((u * 0.93 ** torch.arange(min(n, k))) @ v.t()).to(dtype)


def best_scaled_error(delta: torch.Tensor, approximation: torch.Tensor) -> float:
    """Relative error after the best common factor: how well the direction fits, whatever the length."""
    cosine = (delta * approximation).sum() / (delta.norm() * approximation.norm())
    return float((1 - cosine.square()).sqrt())


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (300, 280)])
@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refined_is_stretched_between_unbiased_and_the_deltas_norm(shape, rank, dtype):
    delta = decaying(*shape, dtype)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
    fitted = fit(delta, rank, method="refined").dequantize(torch.float64)
    overshoot = (fitted * exact).sum() / exact.square().sum()  # 1 would be unbiased
    to_the_norm = delta.double().norm() / (fitted / overshoot).norm()
    assert float(overshoot) == pytest.approx(min(float(to_the_norm) ** 0.5, 1.25), rel=1e-3)


@pytest.mark.parametrize("rank", [4, 16, 40])
def test_refined_fits_better_than_the_paper_and_errors_are_repaired_at_high_rank(rank):
    delta = decaying(160, 120)
    paper, refined = (fit(delta, rank, method=method).dequantize() for method in ("paper", "refined"))
    assert best_scaled_error(delta, refined) < best_scaled_error(delta, paper)
    if rank == 40:
        assert best_scaled_error(delta, refined) < 0.75 * best_scaled_error(delta, paper)


def test_refined_finds_a_delta_that_four_levels_hold_exactly():
    delta = 0.3 * torch.outer(torch.randn(50).sign(), torch.randn(40).sign())
    torch.testing.assert_close(fit(delta, 1, method="refined").dequantize(), delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["paper", "refined"])
def test_degenerate_deltas_stay_finite(method):
    few = torch.zeros(30, 20)
    few[:2] = torch.randn(2, 20)
    constant = torch.ones(30, 20)
    for delta in (torch.zeros(30, 20), few, constant, 1e-30 * few, 1e30 * torch.randn(30, 20).clamp(-1, 1)):
        for rank in (0, 1, 5, 20):
            fitted = fit(delta, rank, method=method)
            assert fitted.rank == rank
            assert torch.isfinite(fitted.dequantize(torch.float64)).all()
    assert relative_error(constant, fit(constant, 1, method=method)) < 1e-3
    assert torch.equal(fit(torch.zeros(30, 20), 5, method=method).dequantize(), torch.zeros(30, 20))


@pytest.mark.parametrize("method", ["paper", "refined"])
def test_the_same_delta_gives_the_same_bits(method):
    delta = decaying(1200, 1100)
    first, second = fit(delta, 20, method=method), fit(delta, 20, method=method)
    for part in ("u", "v"):
        assert torch.equal(getattr(first, part).codes, getattr(second, part).codes)
        assert torch.equal(getattr(first, part).levels, getattr(second, part).levels)
    assert torch.equal(first.s, second.s)


@pytest.mark.parametrize("method", ["paper", "refined"])
@pytest.mark.parametrize(("shape", "rows"), [((2000, 64), 1), ((2000, 64), 5), ((32, 32), 1)])
def test_deltas_of_few_rows_are_not_blown_up(method, shape, rows):
    """An embedding of which few tokens changed: storing nothing would have error 1."""
    delta = torch.zeros(shape)
    delta[:rows] = torch.randn(rows, shape[1])
    assert relative_error(delta, fit(delta, rank=rows, method=method)) < 0.8


def test_fit_keeps_no_graph():
    weight = torch.nn.Parameter(torch.randn(8, 6))
    fitted = fit(torch.randn(8, 6) - weight, rank=2)
    assert not fitted.s.requires_grad
    assert not fitted.u.levels.requires_grad
    assert not fit_vector(torch.randn(8) - weight[:, 0]).levels.requires_grad


def test_ranks_beyond_the_deltas_own_cost_nothing():
    delta = torch.randn(300, 20) @ torch.randn(20, 280)
    exact, beyond = (relative_error(delta, fit(delta, rank, method="paper")) for rank in (20, 48))
    assert beyond == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("method", ["paper", "refined"])
def test_autocast_does_not_reach_the_fit(method):
    delta = torch.randn(64, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fit(delta, rank=4, method=method)
    assert torch.equal(inside.dequantize(), fit(delta, rank=4, method=method).dequantize())
