"""Caches in parts: what is of rows and what is not, in place and anew, and what cannot be divided."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dts_fast import route
from dts_fast.errors import RoutingError
from dts_fast.nn import DTSModule


class State:
    """Of one layer: a static tensor, one that grows, one that comes with the first use, counters."""

    def __init__(self, rows: int) -> None:
        self.static = torch.zeros(rows, 3)
        self.grown = torch.zeros(rows, 0, 3)
        self.late = None
        self.count, self.position = 0, torch.tensor(0)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.states = {0: None, "list": [None, torch.zeros(rows, 3)]}
        self.flag = False
        self.batch_size = rows
        self.untouched = torch.ones(1, 3).expand(rows, 3)  # that could not be written to
        self.scale = torch.ones(3)
        self.window = (2, 3)


class Layer(nn.Module):
    def __init__(self, index: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 1)
        self.layer_idx = index

    def forward(self, x: torch.Tensor, cache=None):
        state, y = cache.layers[self.layer_idx], x * self.scale
        state.static.add_(y)
        state.grown = torch.cat([state.grown, y[:, None]], 1)
        state.late = y.clone() if state.late is None else state.late + y
        state.count += 1
        state.position.add_(1)
        state.lengths += 1
        state.states[0] = y * 2
        state.states["list"][1].mul_(0.5).add_(y)
        state.flag = True
        return y + state.static, cache


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_kind_of_state_is_what_runs_alone_would_have_made_it(mode):
    with mode():
        check_every_kind()


def check_every_kind():
    layer = Layer()
    wrapper = DTSModule(layer)
    own = {"__base__": layer.scale, "a": torch.rand(3), "b": torch.rand(3)}
    wrapper.load_adapter("a", scale=own["a"])
    wrapper.load_adapter("b", scale=own["b"])
    names = ["b", "a", "__base__", "b", "a"]
    cache, other = SimpleNamespace(layers=[State(5), State(5)]), State(5)
    untouched, state = cache.layers
    addresses = state.static.data_ptr(), state.position.data_ptr(), state.lengths.data_ptr()
    addresses += (state.states["list"][1].data_ptr(),)
    alone = [SimpleNamespace(layers=[None, State(1)]) for _ in names]
    for _ in range(3):
        x = torch.randn(5, 3)
        with route(names):
            y, returned = wrapper(x, cache)
        assert returned is cache
        assert [id(own) for own in cache.layers] == [id(untouched), id(state)]
        for row, name in enumerate(names):
            single = Layer()
            single.scale = nn.Parameter(own[name])
            torch.testing.assert_close(y[row : row + 1], single(x[row : row + 1], alone[row])[0])
    each = [one.layers[1] for one in alone]
    for name in ("static", "grown", "late", "lengths"):
        torch.testing.assert_close(getattr(state, name), torch.cat([getattr(one, name) for one in each]))
    torch.testing.assert_close(state.states[0], torch.cat([one.states[0] for one in each]))
    torch.testing.assert_close(state.states["list"][1], torch.cat([one.states["list"][1] for one in each]))
    assert (state.count, int(state.position), state.flag, state.states["list"][0]) == (3, 3, True, None)
    assert (state.batch_size, state.window) == (5, (2, 3))
    changed = state.static.data_ptr(), state.position.data_ptr(), state.lengths.data_ptr()
    assert (*changed, state.states["list"][1].data_ptr()) == addresses
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(untouched, name), value)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["no layers", "an object within", "an object beside", "no number", "two of them", "offloaded"]
)
def test_what_cannot_be_divided_is_refused(kind):
    wrapper = DTSModule(Layer("first" if kind == "no number" else 1))
    wrapper.load_adapter("a", scale=torch.rand(3))
    cache = SimpleNamespace(layers=[State(2), State(2)], offloading=kind == "offloaded")
    if kind == "no layers":
        cache = SimpleNamespace()
    if kind == "an object within":
        cache.layers[1].states["list"][0] = SimpleNamespace(tensor=torch.zeros(2))
    if kind == "an object beside":
        cache.more = [torch.zeros(2)]
    x = torch.randn(2, 3)
    with route(["a", "__base__"]), pytest.raises(RoutingError, match="whole batch"):
        wrapper(x, [cache, SimpleNamespace()] if kind == "two of them" else cache)


def count(layer, cache):
    cache.layers[1].count = float(layer.scale.sum())


def pair(layer, cache):
    cache.layers[1].count = (torch.zeros(2), torch.ones(1))


def rescale(layer, cache):
    cache.layers[1].scale.mul_(layer.scale)


def grow_unlike(layer, cache):
    cache.layers[1].late = torch.zeros(2 + int(layer.scale.sum() > 3), 3)


def append(layer, cache):
    cache.layers.append(State(1))


@torch.no_grad()
@pytest.mark.parametrize("change", [count, pair, rescale, grow_unlike, append])
def test_what_differs_between_adapters_and_is_of_no_rows_is_refused_and_nothing_is_changed(change):
    class Changing(Layer):
        def forward(self, x, cache=None):
            super().forward(x, cache)
            change(self, cache)
            return x

    wrapper = DTSModule(Changing())
    wrapper.load_adapter("a", scale=torch.full((3,), 0.5))
    cache = SimpleNamespace(layers=[None, State(2)])
    with route(["a", "__base__"]), pytest.raises(RoutingError, match="same for all rows"):
        wrapper(torch.randn(2, 3), cache)
    state, before = cache.layers[1], State(2)
    assert (state.count, int(state.position), state.flag, state.late) == (0, 0, False, None)
    assert torch.equal(state.static, before.static)
    assert torch.equal(state.states["list"][1], before.states["list"][1])


@torch.no_grad()
@pytest.mark.parametrize("in_buffer", [False, True])
def test_what_a_layer_keeps_in_itself_is_kept_for_one_adapter_and_refused_for_several(in_buffer):
    class Recurrent(Layer):
        def __init__(self):
            super().__init__()
            if in_buffer:
                self.register_buffer("state", None)
            else:
                self.state = None

        def forward(self, x):
            self.state = x * self.scale if self.state is None else self.state * 0.5 + x * self.scale
            self.dtype = x.dtype  # no matter
            return self.state

    layer, alone = Recurrent(), Recurrent()
    wrapper = DTSModule(layer)
    wrapper.load_adapter("a", scale=torch.full((3,), 0.5))
    alone.scale = nn.Parameter(torch.full((3,), 0.5))
    x = torch.randn(2, 3)
    with route("a"):
        for _ in range(3):
            torch.testing.assert_close(wrapper(x), alone(x))
    assert layer.dtype == torch.float32
    with route(["a", "__base__"]), pytest.raises(RoutingError, match="in itself"):
        wrapper(x)


@torch.no_grad()
def test_a_buffer_that_is_read_past_its_layer_is_the_adapters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("moved", torch.ones(3))
            self.register_buffer("fixed", torch.ones(3))

    wrapper = DTSModule(Scaled())
    wrapper.load_adapter("a", moved=torch.full((3,), 2.0))
    with route("a"):
        assert torch.equal(wrapper.moved + 0, torch.full((3,), 2.0))
        assert wrapper.fixed is wrapper.base_layer.fixed
    with route(["a", "__base__"]), pytest.raises(RoutingError, match="without calling"):
        wrapper.moved + 0
