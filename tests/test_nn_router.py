"""Modules that multiply with a weight of their own: the product gets the adapters' deltas, or they are served as any
other."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from layer_rows import ROWS, assert_rows_are_their_own, both
from torch import nn

from dts_fast import DTSModule, fit, route
from dts_fast.errors import RoutingError
from dts_fast.nn import DTSEmbedding, DTSRouter, wrap
from dts_fast.slots import SlotTable

linear = nn.functional.linear


class Router(nn.Module):
    def __init__(self, product) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(21, 19))
        self.product = product

    def forward(self, x):
        return self.product(x, self.weight)


AS_EXPECTED = {
    "plain": linear,
    "flattened": lambda x, w: linear(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], 21).softmax(-1),
    "wide": lambda x, w: linear(x.type(torch.float32), w.type(torch.float32)).sigmoid(),
    "wider": lambda x, w: linear(x.to(torch.float64), w.to(torch.float64)).float(),
    "twice": lambda x, w: linear(x, w) + linear(x.float().to(w.dtype), w),
    "with more": lambda x, w: linear(x.to(w.device, w.dtype), w, torch.ones(w.shape[0])).topk(3).values,
}
OTHERWISE = {
    "a matrix product": lambda x, w: x @ w.T,
    "transposed": lambda x, w: linear(x.transpose(0, 1).contiguous(), w).transpose(0, 1),
    "of something else": lambda x, w: linear(x * 2, w),
    "its norm": lambda x, w: linear(x, w) / w.norm(),
    "its rows": lambda x, w: linear(x, w[:5]),
    "in a list": lambda x, w: linear(x, torch.cat([w, w])),
    "its data": lambda x, w: linear(x, w.data),
    "not at all": lambda x, w: linear(x, torch.from_numpy(w.detach().numpy())),
}


@pytest.mark.parametrize("kind", AS_EXPECTED)
def test_products_with_an_own_weight(kind):
    wrapper, dense = both(Router(AS_EXPECTED[kind]))
    assert type(wrapper) is DTSRouter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((4, 19), (4, 5, 19)):
            # Float32 sums of base and delta apart instead of together, of values up to thirty.
            assert_rows_are_their_own(wrapper, dense, torch.randn(shape), 1e-4)
    assert wrapper.as_expected
    assert not wrapper.stored


@pytest.mark.parametrize("kind", OTHERWISE)
def test_weights_that_are_used_otherwise(kind):
    wrapper, dense = both(Router(OTHERWISE[kind]))
    assert type(wrapper) is DTSRouter
    with pytest.warns(UserWarning, match="no fast path for Router"), route(ROWS), torch.no_grad():
        wrapper(torch.randn(4, 5, 19))
    assert wrapper.loaded == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rows_are_their_own(wrapper, dense, torch.randn(4, 5, 19), 1e-4)
        wrapper.load_adapter("late", weight=fit(torch.randn(21, 19), rank=2))
        assert set(wrapper.stored) == {0, 1, 2}


def test_flattened_rows_gradients_and_tokens_that_do_not_fit():
    wrapper, dense = both(Router(linear))
    x = torch.randn(2, 19, requires_grad=True)
    with route(["a", "b"]):
        wrapper(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    torch.cat([linear(expected[i : i + 1], dense[n]["weight"]) for i, n in enumerate("ab")]).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-3)
    with route(["a", "b"], flattened=[3]), torch.no_grad():
        flat = torch.randn(6, 19)
        y = wrapper(flat)
        torch.testing.assert_close(y[:3], linear(flat[:3], dense["a"]["weight"]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[3:], linear(flat[3:], dense["b"]["weight"]), rtol=1e-4, atol=1e-4)
        with pytest.raises(RoutingError):
            wrapper(torch.randn(5, 19))


def test_other_modules_are_none():
    class Scaled(nn.Embedding):
        pass

    for layer in (Scaled(4, 3), nn.Bilinear(2, 3, 4), nn.GRU(3, 3)):
        assert type(wrap(layer, SlotTable(1))) is DTSModule
    assert type(wrap(nn.Embedding(4, 3), SlotTable(1))) is DTSEmbedding


def test_threads_do_not_see_each_others_products():
    wrapper, dense = both(Router(linear))
    x, wrong = torch.randn(4, 19), []

    def run(name: str) -> None:
        expected = linear(x, dense[name]["weight"])
        for _ in range(50):
            with route(name), torch.no_grad():
                if not torch.allclose(wrapper(x), expected, rtol=1e-4, atol=1e-4):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b", "__base__")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
