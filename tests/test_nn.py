from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from layer_rows import both
from torch import nn
from torch.nn.functional import embedding, linear

from dts_fast import DTSEmbedding, DTSLinear, DTSModule, fit, fit_vector, route
from dts_fast.errors import BaseMismatchError, DTSError, MixedBatchError, RoutingError, UnknownAdapterError
from dts_fast.nn import wrap
from dts_fast.slots import SlotTable


class Conv1D(nn.Module):
    """GPT-2's linear: weight ``[in, out]``."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


def two_adapters(layer: DTSModule) -> dict[str, dict[str, torch.Tensor]]:
    """Load adapters "a" (weight and bias) and "b" (weight only); returns their dense parameters."""
    base = dict(layer.base_layer.named_parameters())
    dense = {"__base__": {n: p.detach() for n, p in base.items()}}
    for name in ("a", "b"):
        delta = fit(0.1 * torch.randn(base["weight"].shape), rank=5)
        others = {"bias": fit_vector(0.1 * torch.randn(base["bias"].shape))} if name == "a" and "bias" in base else {}
        layer.load_adapter(name, delta, **others)
        dense[name] = dense["__base__"] | {
            n: base[n].detach() + d.dequantize() for n, d in ({"weight": delta} | others).items()
        }
    return dense


LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 12),
}


def apply_linear(x, parameters, transposed):
    weight = parameters["weight"].t() if transposed else parameters["weight"]
    return linear(x, weight, parameters.get("bias"))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(4, 12), (4, 7, 12), (4, 2, 3, 12)], ids=str)
def test_linear_rows_use_their_own_weights(kind, shape):
    layer = DTSLinear(LAYERS[kind]())
    dense = two_adapters(layer)
    x, names = torch.randn(shape), ["a", "__base__", "b", "a"]
    with route(names):
        y = layer(x)
    expected = torch.stack(
        [apply_linear(row, dense[name], kind == "conv1d") for name, row in zip(names, x, strict=True)]
    )
    # Float32 sums over 12 and 16 terms of size 1.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name in dense:
        with route(name):
            torch.testing.assert_close(layer(x), apply_linear(x, dense[name], kind == "conv1d"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers(dtype):
    layer = DTSLinear(nn.Linear(12, 10))
    dense = two_adapters(layer)
    layer.to(dtype)
    x = torch.randn(2, 12, dtype=dtype)
    with route(["a", "b"]):
        y = layer(x)
    assert y.dtype == dtype
    expected = torch.stack([linear(x[i].float(), dense[n]["weight"], dense[n]["bias"]) for i, n in enumerate("ab")])
    # Weight, base product and two sums are each rounded to the dtype.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_route_is_one_name_or_one_for_each_row():
    layer = DTSLinear(nn.Linear(12, 10))
    two_adapters(layer)
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 3 rows"), route(["a", "b"]):
        layer(torch.randn(3, 12))
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'c'; loaded: 'a', 'b'"), route("c"):
        layer(torch.randn(3, 12))
    for empty in ([], [1], [None]):
        with pytest.raises(RoutingError, match="one name for each row"):
            route(empty)


def test_routes_nest_and_the_active_adapter_holds_outside():
    layer = DTSLinear(nn.Linear(12, 10))
    dense = two_adapters(layer)
    x = torch.randn(3, 12)

    def used() -> str:
        return min(dense, key=lambda name: (layer(x) - apply_linear(x, dense[name], False)).abs().max())

    assert used() == "__base__"
    layer.set_adapter("b")
    assert used() == "b"
    with route("a"):
        assert used() == "a"
        with route("__base__"):
            assert used() == "__base__"
        with pytest.raises(ZeroDivisionError), route("b"):
            raise ZeroDivisionError
        assert used() == "a"
    assert used() == "b"
    with pytest.raises(UnknownAdapterError):
        layer.set_adapter("z")


def test_threads_route_independently():
    layer = DTSLinear(nn.Linear(12, 10))
    dense = two_adapters(layer)
    x, wrong = torch.randn(3, 12), []
    barrier = threading.Barrier(3)

    def serve(name):
        with route(name):
            for _ in range(20):
                barrier.wait()
                if not torch.allclose(layer(x), apply_linear(x, dense[name], False), atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in dense]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_base_rows_and_untouched_layers_are_bitwise_the_base():
    layer = DTSLinear(nn.Linear(12, 10))
    two_adapters(layer)
    x = torch.randn(3, 12)
    with route("__base__"):
        assert torch.equal(layer(x), layer.base_layer(x))
    layer.delete_adapter("a")
    assert layer.slots.names == ["b"]
    with pytest.raises(UnknownAdapterError), route("a"):
        layer(x)


def test_a_deleted_adapter_leaves_nothing_to_the_next_in_its_slot():
    layer = DTSLinear(nn.Linear(12, 10), max_adapters=1)
    layer.load_adapter("old", fit(torch.randn(10, 12), rank=7), bias=fit_vector(torch.randn(10)))
    layer.delete_adapter("old")
    new = fit(torch.randn(10, 12), rank=2)
    layer.load_adapter("new", new)
    x = torch.randn(3, 12)
    with route("new"):
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ new.dequantize().t(), rtol=1e-5, atol=1e-5)


def test_gradients_flow_to_the_input_through_every_kind():
    for kind, make in LAYERS.items():
        layer = DTSLinear(make())
        dense = two_adapters(layer)
        x = torch.randn(2, 3, 12, requires_grad=True)
        with route(["b", "__base__"]):
            (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        y = torch.stack([apply_linear(x[i], dense[n], kind == "conv1d") for i, n in enumerate(("b", "__base__"))])
        (expected,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["one", "each"])
def test_linear_compiles_without_graph_breaks(mode):
    layer = DTSLinear(nn.Linear(12, 10))
    two_adapters(layer)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(2, 12)
    with torch.no_grad(), route("a" if mode == "one" else ["a", "b"]):
        torch.testing.assert_close(compiled(x), layer(x))


def test_embedding_rows_use_their_own_tables():
    layer = DTSEmbedding(nn.Embedding(20, 9, padding_idx=3))
    dense = two_adapters(layer)
    ids, names = torch.randint(0, 20, (3, 5)), ["b", "__base__", "a"]
    with route(names):
        y = layer(ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], embedding(ids[row], dense[name]["weight"]), rtol=1e-5, atol=1e-6)


def test_an_input_shared_by_all_rows_is_expanded_where_adapters_differ():
    layer = DTSEmbedding(nn.Embedding(20, 9))
    dense = two_adapters(layer)
    positions = torch.arange(6)[None]
    with route(["a", "__base__", "b"]):
        y = layer(positions)
    assert y.shape == (3, 6, 9)
    for row, name in enumerate(("a", "__base__", "b")):
        torch.testing.assert_close(y[row], dense[name]["weight"][:6], rtol=1e-5, atol=1e-6)
    with route(["a", "a", "a"]):
        assert layer(positions).shape == (1, 6, 9)
        assert layer(positions[0]).shape == (6, 9)
    with route(["a", "__base__", "b"]):
        assert torch.equal(layer(positions[0]), y)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (lambda: nn.LayerNorm(9), lambda: torch.randn(4, 5, 9)),
        (lambda: nn.Conv2d(3, 6, 3, padding=1), lambda: torch.randn(4, 3, 8, 8)),
        (lambda: nn.Linear(9, 7), lambda: torch.randn(4, 9)),
    ],
)
def test_any_module_by_running_it_once_for_each_adapter(module, x):
    layer, x = DTSModule(module()), x()
    base = dict(layer.base_layer.named_parameters())
    changes = {n: torch.randn(p.shape) for n, p in base.items()}
    layer.load_adapter("delta", **{n: fit_vector(c) if c.dim() == 1 else fit(c, rank=2) for n, c in changes.items()})
    layer.load_adapter("whole", weight=changes["weight"])
    names = ["delta", "__base__", "whole", "delta"]
    with torch.no_grad(), route(names):
        y = layer(x)
        slots = [layer.slots.slot(name) for name in names]
        for row, slot in enumerate(slots):
            parameters = {n: p.detach() for n, p in base.items()} | layer.dense_parameters(slot)
            torch.testing.assert_close(
                y[row], torch.func.functional_call(layer.base_layer, parameters, x[row : row + 1])[0]
            )
    assert torch.equal(layer.dense_parameters(slots[2])["weight"], changes["weight"])
    assert not torch.allclose(y[0], layer.base_layer(x)[0])


def test_a_linear_takes_whole_weights_too_and_heads_of_other_sizes_alone():
    layer = DTSLinear(nn.Linear(12, 10))
    dense = two_adapters(layer)
    head = {"weight": torch.randn(10, 12), "bias": torch.randn(10)}
    layer.load_adapter("whole", **head)
    layer.load_adapter("wider", weight=torch.randn(15, 12), bias=torch.randn(15))
    x = torch.randn(4, 12)
    with route(["whole", "a", "__base__", "b"]):
        y = layer(x)
    expected = [linear(x[0], **head), *(linear(x[i], **dense[n]) for i, n in ((1, "a"), (2, "__base__"), (3, "b")))]
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-5, atol=1e-5)
    with route("wider"):
        assert layer(x).shape == (4, 15)
    with pytest.raises(RoutingError, match="heads of different sizes"), route(["wider", "a", "a", "a"]):
        layer(x)


def test_deltas_that_do_not_fit_are_refused_and_change_nothing():
    layer = DTSLinear(nn.Linear(12, 10))
    with pytest.raises(BaseMismatchError, match=r"base has shape \[10, 12\], the adapter \[12, 10\]"):
        layer.load_adapter("a", fit(torch.randn(12, 10), rank=2))
    with pytest.raises(BaseMismatchError, match="no parameter 'gamma'; it has weight, bias"):
        layer.load_adapter("a", gamma=fit_vector(torch.randn(3)))
    assert layer.slots.names == []


def test_a_fixed_capacity_never_reallocates():
    layer = DTSLinear(nn.Linear(12, 10), max_adapters=2, max_rank=10)
    before = [t.data_ptr() for t in layer.bank.tensors]
    two_adapters(layer)
    assert [t.data_ptr() for t in layer.bank.tensors] == before


def test_the_wrapper_answers_for_the_layer():
    layer = DTSLinear(nn.Linear(12, 10))
    assert layer.weight is layer.base_layer.weight
    assert (layer.in_features, layer.out_features) == (12, 10)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias"}


def test_a_mixture_fits_in_a_bank_of_fixed_capacity():
    layer = DTSLinear(nn.Linear(40, 40), max_adapters=3, max_rank=32)
    deltas = [fit(torch.randn(40, 40), rank=32) for _ in range(2)]
    for name, delta in zip("ab", deltas, strict=True):
        layer.load_adapter(name, delta)
    tensors = [t.data_ptr() for t in layer.bank.tensors]
    layer.mix_slots(2, [(0, 0.5), (1, -0.25)])
    layer.slots.occupy("mixed", 2)
    assert [t.data_ptr() for t in layer.bank.tensors] == tensors
    x = torch.randn(3, 40)
    with route("mixed"):
        y = layer(x)
    weight = layer.base_layer.weight.detach() + 0.5 * deltas[0].dequantize() - 0.25 * deltas[1].dequantize()
    torch.testing.assert_close(y, linear(x, weight, layer.base_layer.bias), rtol=1e-4, atol=1e-4)


def test_members_of_weight_zero_are_not_in_a_mixture():
    layer = DTSLinear(nn.Linear(12, 10))
    two_adapters(layer)
    layer.mix_slots(2, [(0, 0.0), (1, 1.0)])
    assert (layer.bank.slot_pages[2] >= 0).sum() == (layer.bank.slot_pages[1] >= 0).sum()
    layer.mix_slots(3, [(0, 0.0)])
    assert layer.parameters_of(3) == {}


def test_a_mixture_of_whole_and_low_rank_parameters():
    layer = DTSLinear(nn.Linear(12, 10))
    dense = two_adapters(layer)
    whole = torch.randn(10, 12)
    layer.load_adapter("whole", weight=whole)
    layer.mix_slots(3, [(0, 0.5), (2, 0.25)])
    layer.slots.occupy("mixed", 3)
    x, base = torch.randn(4, 12), dense["__base__"]
    with route("mixed"):
        y = layer(x)
    weight = base["weight"] + 0.5 * (dense["a"]["weight"] - base["weight"]) + 0.25 * (whole - base["weight"])
    bias = base["bias"] + 0.5 * (dense["a"]["bias"] - base["bias"])
    torch.testing.assert_close(y, linear(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_recurrent_layers_run_with_an_adapters_parameters():
    layer = nn.LSTM(5, 6, batch_first=True)
    wrapper, dense = both(layer)
    x = torch.randn(4, 3, 5)
    with torch.no_grad(), route("a"):
        y, _ = wrapper(x)
    expected, _ = torch.func.functional_call(layer, dense["a"], x)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, layer(x)[0])


def test_the_general_way_changes_nothing_that_other_threads_see():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            seen.append(layer.inner.weight)
            return self.inner(x)

    layer = Watched()
    wrapper, dense = both(layer)
    x = torch.randn(2, 4)
    with torch.no_grad(), route("a"):
        y = wrapper(x)
    torch.testing.assert_close(y, linear(x, dense["a"]["inner.weight"], dense["a"]["inner.bias"]))
    assert all(weight is layer.inner.weight for weight in seen)


def test_global_hooks_see_the_base_layer():
    for layer, x in ((nn.Linear(12, 10), torch.randn(2, 12)), (nn.LayerNorm(9), torch.randn(2, 9))):
        wrapper, _ = both(layer)
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        try:
            with torch.no_grad(), route("__base__"):
                wrapper(x)
        finally:
            handle.remove()
        assert any(module is layer for module in seen)


def register_hook(wrapper, seen):
    wrapper.register_forward_hook(lambda *_: seen.append(1))


def register_pre_hook(wrapper, seen):
    wrapper.register_forward_pre_hook(lambda *_: seen.append(1))


def replace_forward(wrapper, seen):
    forward = wrapper.forward
    wrapper.forward = lambda *args: (seen.append(1), forward(*args))[1]


@pytest.mark.parametrize("change", [register_hook, register_pre_hook, replace_forward])
@pytest.mark.parametrize("layer", [nn.Linear(12, 12), nn.LayerNorm(12)], ids=["linear", "norm"])
def test_what_is_hooked_onto_a_wrapper_runs_for_the_base_too(change, layer):
    wrapper, _ = both(layer)
    x, seen = torch.randn(2, 12), []
    with torch.no_grad(), route("__base__"):
        wrapper(x)
    change(wrapper, seen)
    if change is not replace_forward:  # a bound method of a copy would be the original's
        wrapper = copy.deepcopy(wrapper)
    for names in ("__base__", "a", ["a", "__base__"]):
        with torch.no_grad(), route(names):
            y = wrapper(x)
        assert len(seen) == 1, names
        seen.clear()
        if names == "__base__":
            torch.testing.assert_close(y, layer(x))


def test_another_base_layer_in_its_place_serves_calls_of_the_base():
    wrapper, other, x = DTSLinear(nn.Linear(12, 10)), nn.Linear(12, 10), torch.randn(2, 12)
    wrapper.base_layer = other
    with torch.no_grad(), route("__base__"), pytest.raises(TypeError, match="input"):
        wrapper()
    for same in (wrapper, copy.copy(wrapper), copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        with torch.no_grad(), route("__base__"):
            assert torch.equal(same(x), other(x))


def test_what_is_loaded_in_inference_mode_can_be_deleted_outside():
    with torch.inference_mode():
        layer = DTSLinear(nn.Linear(12, 10), 2, max_rank=16)
        layer.load_adapter("a", fit(torch.randn(10, 12), rank=2))
    layer.delete_adapter("a")
    layer.load_adapter("b", fit(torch.randn(10, 12), rank=2))
    with torch.inference_mode():
        layer.delete_adapter("b")
    assert layer.bank.slot_pages.max() == -1


def test_a_weight_kept_the_other_way_round_is_told_by_the_layers_sizes():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 16
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x):
            return x @ self.weight

    base = Turned()
    layer, delta, x = DTSLinear(base), fit(0.1 * torch.randn(16, 8), rank=3), torch.randn(4, 8)
    with pytest.raises(BaseMismatchError, match=r"the base has shape \[16, 8\], the adapter \[8, 16\]"):
        layer.load_adapter("b", fit(torch.randn(8, 16), rank=3))
    layer.load_adapter("a", delta)
    with route("a"):
        torch.testing.assert_close(layer(x), base(x) + x @ delta.dequantize().t(), rtol=1e-4, atol=1e-4)


def test_what_is_no_linear_is_refused():
    with pytest.raises(DTSError, match=r"got Conv2d with a weight of shape \[4, 3, 2, 2\]. nn.wrap and"):
        DTSLinear(nn.Conv2d(3, 4, 2))
    with pytest.raises(DTSError, match="got ReLU with a weight of shape None"):
        DTSLinear(nn.ReLU())


def test_hooks_of_the_base_layer_run_for_every_row():
    for layer, x in ((nn.Linear(12, 10), torch.randn(2, 12)), (nn.LayerNorm(9), torch.randn(2, 9))):
        wrapper, _ = both(layer)
        seen = []
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for names in ("__base__", "a", ["a", "b"]):
            before = len(seen)
            with torch.no_grad(), route(names):
                wrapper(x)
            # A norm whose rows differ is computed by its formula, in which the layer itself has no part.
            assert len(seen) > before or (isinstance(layer, nn.LayerNorm) and names == ["a", "b"])


def test_a_weight_that_is_read_is_the_current_adapters():
    wrapper, dense = both(nn.Linear(12, 10))
    x = torch.randn(3, 12)
    base = wrapper.base_layer.weight
    assert wrapper.weight is base
    with torch.no_grad(), route("a"):
        read = wrapper.weight
        assert (read.dtype, read.device, read.shape) == (base.dtype, base.device, base.shape)
        assert isinstance(read, torch.Tensor)
        torch.testing.assert_close(linear(x, read), linear(x, dense["a"]["weight"]))
        torch.testing.assert_close(x @ read.T, linear(x, dense["a"]["weight"]))
        torch.testing.assert_close(read[2:4] + 1, dense["a"]["weight"][2:4] + 1)
    with route(["a", "__base__", "b"]):
        assert wrapper.weight.shape == base.shape
        with pytest.raises(RoutingError, match=r"'weight' of a Linear without calling"):
            linear(x, wrapper.weight)
    with route(["a", "a", "a"]):
        torch.testing.assert_close(linear(x, wrapper.weight), linear(x, dense["a"]["weight"]))
    with route("__base__"):
        assert wrapper.weight is base


def test_parameters_of_the_general_way_are_copies():
    codes = torch.randint(0, 256, (3, 3), dtype=torch.uint8)
    delta = fit(torch.randn(10, 12), rank=3)
    mapped = type(delta)(type(delta.u)(codes, delta.u.levels, 10), delta.s, delta.v, delta.shape)
    layer = DTSModule(nn.Linear(12, 10))
    layer.load_adapter("a", mapped)
    before = layer.dense_parameters(0)["weight"]
    codes.zero_()
    assert torch.equal(layer.dense_parameters(0)["weight"], before)


def test_what_goes_past_python_does_not_get_the_bases_weight():
    wrapper, dense = both(nn.Linear(12, 10))
    x = torch.randn(3, 12)

    @torch.jit.script
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t()

    with torch.no_grad(), route("a"):
        expected = linear(x, dense["a"]["weight"])
        torch.testing.assert_close(product(x, wrapper.weight), expected)
        torch.testing.assert_close(linear(x, torch.as_tensor(wrapper.weight)), expected)
        read = wrapper.weight
        assert read.data_ptr() == read.personal().data_ptr() != wrapper.base_layer.weight.data_ptr()
        with pytest.raises(RoutingError, match="not to be written to"):
            wrapper.weight.add_(1)
        with pytest.raises(RoutingError, match="not to be written to"):
            wrapper.weight.data = torch.zeros(10, 12)


def test_only_a_models_own_input_may_have_several_rows_for_a_name():
    layer = DTSLinear(nn.Linear(12, 10))
    for name in "ab":
        layer.load_adapter(name, weight=torch.randn(10, 12))
    beams = route(["a", "b"], expandable=True)
    assert beams.names_for(4, in_model=True) == ("a", "a", "b", "b")
    with beams, pytest.raises(MixedBatchError, match="4 rows in a batch of 2"):
        layer(torch.randn(4, 12))


def test_experts_are_refused_in_mixed_batches_whatever_the_number_of_tokens():
    layer = wrap(nn.Linear(12, 10), SlotTable(3), "model.layers.0.mlp.experts.3.up_proj")
    dense = two_adapters(layer)
    x = torch.randn(2, 12)
    with torch.no_grad(), route("a"):
        torch.testing.assert_close(layer(x), linear(x, dense["a"]["weight"], dense["a"]["bias"]))
    with pytest.raises(RoutingError, match="tokens from any row"), route(["a", "b"]):
        layer(x)
    assert not wrap(nn.Linear(3, 3), SlotTable(1), "layers.0.mlp.shared_expert.up_proj").gathers


def test_a_tensor_is_no_delta():
    layer = DTSLinear(nn.Linear(4, 4))
    with pytest.raises(DTSError, match=r"what fit\(\) returns"):
        layer.load_adapter("a", torch.randn(4, 4))
    assert layer.slots.names == []
