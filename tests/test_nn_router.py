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
    "by name": lambda x, w: linear(weight=w, input=x),
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


# Each row by itself, so that what is expected of a batch is what each row alone gives.
WRITES = {
    "in place": lambda x, w: linear(x.mul_(2), w),
    "by an operator": lambda x, w: linear(x.__imul__(2), w),
    "through a view": lambda x, w: (x[:, 0].zero_(), linear(x, w))[1],
    "by an index": lambda x, w: (x.__setitem__((slice(None), 1), 0.0), linear(x, w))[1],
    "as an output": lambda x, w: linear(torch.exp(x, out=x), w),
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
    assert not wrapper.as_expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rows_are_their_own(wrapper, dense, torch.randn(4, 5, 19), 1e-4)
        wrapper.load_adapter("late", weight=fit(torch.randn(21, 19), rank=2))
        assert set(wrapper.stored) == {0, 1, 2}


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITES)
def test_inputs_that_are_written_to(kind):
    wrapper, dense = both(Router(WRITES[kind]))
    x = torch.randn(4, 5, 19)
    expected = [WRITES[kind](x[i : i + 1].clone(), dense[name]["weight"]) for i, name in enumerate(ROWS)]
    with pytest.warns(UserWarning, match="no fast path for Router"), route(ROWS):
        torch.testing.assert_close(wrapper(x.clone()), torch.cat(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_linear_layers_that_do_more():
    class Gate(nn.Linear):
        def forward(self, x):
            return super().forward(x.float()).sigmoid(), x

    wrapper, dense = both(Gate(19, 21))
    assert type(wrapper) is DTSRouter
    x = torch.randn(4, 19)
    with route(ROWS):
        y, same = wrapper(x)
    expected = torch.cat([linear(x[i : i + 1], **dense[name]) for i, name in enumerate(ROWS)]).sigmoid()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert same is x
    assert wrapper.as_expected


@torch.no_grad()
def test_calls_that_run_while_another_gives_up():
    wrapper, dense = both(Router(lambda x, w: linear(x, w) if entered.is_set() else x @ w.T))
    entered, given_up, seen = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x):
            entered.set()
            given_up.wait(60)
            return linear(x, self.weight)

    waiting = Waits()
    waiting.weight = wrapper.base_layer.weight
    x, plain = torch.randn(3, 19), wrapper.base_layer

    def run() -> None:
        with route("a"), torch.no_grad():
            seen.append(wrapper(x))

    wrapper.base_layer = waiting
    thread = threading.Thread(target=run)
    thread.start()
    entered.wait(60)
    with pytest.warns(UserWarning, match="no fast path"):
        wrapper._give_up()
    given_up.set()
    thread.join()
    wrapper.base_layer = plain
    torch.testing.assert_close(seen[0], linear(x, dense["a"]["weight"]), rtol=1e-4, atol=1e-4)
    wrapper.delete_adapter("a")
    assert wrapper.bank.nbytes_of(0) == 0
    assert list(wrapper.stored) == [1]


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
