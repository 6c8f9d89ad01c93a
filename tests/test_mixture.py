from __future__ import annotations

import math

import pytest
import torch

from dts_fast import DeltaSum, LowRankDelta, fit, fit_vector
from dts_fast.errors import DTSError
from dts_fast.mixture import check_weights, mix, select, similarity_weights

VECTORS = {"near": torch.tensor([3.0, 0.0]), "half": torch.tensor([1.0, 1.0]), "away": torch.tensor([-1.0, 0.0])}


def test_weights_are_cosines_that_sum_to_one():
    weights = similarity_weights(torch.tensor([2.0, 0.0]), VECTORS)
    half = 1 / math.sqrt(2)
    assert weights == pytest.approx({"near": 1 / (1 + half), "half": half / (1 + half), "away": 0.0})


def test_the_nearest_adapter_is_selected():
    assert select(torch.tensor([0.0, 1.0]), VECTORS) == ("half", pytest.approx(1 / math.sqrt(2)))
    assert select(torch.tensor([-5.0, 0.1]), VECTORS)[0] == "away"


@pytest.mark.parametrize(
    ("query", "known", "message"),
    [
        (torch.ones(2), {}, "no adapter to choose from"),
        (torch.ones(3), VECTORS, "different lengths: 3 given, 2 for 'near'"),
        (torch.zeros(2), VECTORS, "no direction"),
        (torch.ones(2), {"a": torch.tensor([math.nan, 1.0])}, "'a' has no direction"),
    ],
)
def test_vectors_that_cannot_be_compared(query, known, message):
    with pytest.raises(DTSError, match=message):
        select(query, known)


def test_weights_need_some_similarity():
    with pytest.raises(DTSError, match="above 0"):
        similarity_weights(torch.tensor([1.0, 0.0]), {"away": VECTORS["away"]})


@pytest.mark.parametrize(
    ("members", "weights"), [([], []), (["a"], [1.0, 2.0]), (["a", "a"], [0.5, 0.5]), (["a"], [math.inf])]
)
def test_weights_that_do_not_fit(members, weights):
    with pytest.raises(DTSError, match="mixture"):
        check_weights(members, weights)


def test_deltas_mix_exactly():
    a, b = fit(torch.randn(30, 20), rank=3), fit(torch.randn(30, 20), rank=5)
    mixed = mix("w", [(0.25, a), (-2.0, b), (3.0, None)])
    assert isinstance(mixed, DeltaSum)
    assert (mixed.rank, mixed.shape) == (8, (30, 20))
    expected = 0.25 * a.dequantize(torch.float64) - 2.0 * b.dequantize(torch.float64)
    torch.testing.assert_close(mixed.dequantize(torch.float64), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.transpose().dequantize(torch.float64), expected.t(), rtol=0, atol=1e-6)
    again = mix("w", [(2.0, mixed), (1.0, a)])
    assert len(again.terms) == 3
    torch.testing.assert_close(again.dequantize(), (2 * expected + a.dequantize()).float(), rtol=0, atol=1e-5)


def test_vectors_mix_exactly():
    a, b = fit_vector(torch.randn(9)), fit_vector(torch.randn(9))
    mixed = mix("bias", [(0.5, a), (0.5, b)])
    torch.testing.assert_close(mixed.dequantize(), 0.5 * a.dequantize() + 0.5 * b.dequantize())


def test_one_member_or_none_is_no_sum():
    a = fit(torch.randn(30, 20), rank=3)
    assert isinstance(mix("w", [(0.5, a), (0.0, a)]), LowRankDelta)
    assert mix("w", [(0.5, None), (0.0, a)]) is None


def test_whole_tensors_mix_densely_around_the_base():
    base, a, b = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    expected = base + 0.5 * (a - base) + 0.25 * (b - base)
    torch.testing.assert_close(mix("w", [(0.5, a), (0.25, b)], base), expected)
    torch.testing.assert_close(mix("w", [(0.5, a), (0.5, b)]), 0.5 * a + 0.5 * b)
    delta = fit(torch.randn(4, 3), rank=1)
    expected = base + 0.5 * (a - base) + 0.5 * delta.dequantize()
    torch.testing.assert_close(mix("w", [(0.5, a), (0.5, delta)], base), expected)
    with pytest.raises(DTSError, match=r"weights sum to 0\.75"):
        mix("w", [(0.5, a), (0.25, b)])
    with pytest.raises(DTSError, match="different shapes"):
        mix("w", [(0.5, a), (0.5, torch.randn(5, 3))], base)
