from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dts_fast import DTSLinear, DTSModel, fit, native, ops, route
from dts_fast.bank import Bank
from dts_fast.codes import PageLayout
from dts_fast.errors import BaseMismatchError, DTSError
from dts_fast.packing import pack_weight
from dts_fast.prepack import PackedLinear, pack_, unpack_

pytestmark = pytest.mark.usefixtures("two_threads")

needs_native = pytest.mark.skipif(native.MODULE is None, reason="packed weights are for the native CPU kernels")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layers(dtype=torch.float32, bias=True) -> tuple[nn.Linear, DTSLinear, DTSLinear]:
    """A linear layer, and two personalised ones of the same weights, the second prepacked."""
    base = nn.Linear(50, 70, bias=bias, dtype=dtype).requires_grad_(False)
    plain, packed = DTSLinear(copy.deepcopy(base)), DTSLinear(copy.deepcopy(base), prepack=True)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        delta = fit(0.1 * torch.randn(70, 50), rank=9)
        plain.load_adapter(name, delta)
        packed.load_adapter(name, delta)
    return base, plain, packed


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 50), (3, 4, 50), (1, 50), (0, 50)], ids=str)
def test_a_packed_layer_computes_what_the_plain_one_does(dtype, bias, shape):
    _, plain, packed = layers(dtype, bias)
    x = torch.randn(shape).to(dtype)
    names = (["a", "__base__", "b"] * shape[0])[: shape[0]] or "a"
    for chosen in (names, "a", "__base__"):
        with torch.no_grad(), route(chosen):
            # Float32 sums over 50 terms in another order, and one rounding.
            torch.testing.assert_close(packed(x), plain(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@needs_native
def test_the_weight_has_one_copy_and_can_be_read():
    base, _, packed = layers()
    tensors = [*packed.base_layer.parameters(), *packed.base_layer.buffers()]
    assert sum(t.numel() for t in tensors) == 96 * 50 + 70  # three panels of 32 outputs, and the bias
    assert torch.equal(packed.weight, base.weight)
    assert torch.equal(packed.base_layer.get_parameter("weight"), base.weight)


@needs_native
def test_state_dicts_stay_as_they_are():
    base, plain, packed = layers()
    state = packed.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert torch.equal(state["base_layer.weight"], base.weight)
    other = nn.Linear(50, 70)
    packed.base_layer.load_state_dict(other.state_dict())
    assert torch.equal(packed.weight, other.weight)
    assert torch.equal(packed.bias, other.bias)
    before = packed.weight
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: expected \[70, 50\], got \[3, 3\]"):
        packed.base_layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": other.bias})
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.base_layer.load_state_dict({"bias": other.bias})
    assert torch.equal(packed.weight, before)


@needs_native
def test_loading_tensors_that_train_leaves_no_graph_behind():
    _, _, packed = layers()
    other = nn.Linear(50, 70)
    packed.base_layer.load_state_dict(dict(other.named_parameters()))
    assert not packed.base_layer.packed.requires_grad
    assert torch.equal(copy.deepcopy(packed).weight, other.weight)
    half = {name: value.bfloat16() for name, value in other.state_dict().items()}
    packed.base_layer.load_state_dict(half, assign=True)
    assert packed.weight.dtype == packed(torch.randn(2, 50).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(packed.weight, half["weight"])


@needs_native
def test_what_was_packed_is_unpacked_as_it_was():
    layer = nn.Linear(50, 70)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in layer.named_parameters()}
    assert unpack_(pack_(layer)) is layer
    assert [name for name, _ in layer.named_parameters()] == list(before)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    with torch.inference_mode():
        pack_(layer)
    layer(torch.randn(2, 50, requires_grad=True)).sum().backward()  # no inference tensor


@needs_native
def test_an_input_without_a_batch():
    base, plain, packed = layers()
    x = torch.randn(50)
    torch.testing.assert_close(packed.base_layer(x), base(x))
    for layer in (plain, packed):
        layer.set_adapter("a")
    torch.testing.assert_close(packed(x), plain(x))
    with pytest.raises(ValueError, match="weight: expected"):
        packed.base_layer(torch.randn(2, 49))


@needs_native
def test_elements_are_read_without_unpacking():
    for dtype in DTYPES:
        layer = nn.Linear(51, 70, dtype=dtype)
        positions = torch.randint(0, 51 * 70, (30,))
        expected = layer.weight.detach().flatten()[positions]
        assert torch.equal(pack_(layer).elements(positions), expected)


@needs_native
def test_a_packed_layer_can_be_converted_and_copied():
    base, _, packed = layers()
    layer = copy.deepcopy(packed.base_layer).bfloat16()
    assert torch.equal(layer.weight, base.weight.bfloat16())
    assert torch.equal(layer.half().weight, base.weight.bfloat16().half())
    where = layer.packed.data_ptr()
    assert layer.to("cpu").packed.data_ptr() == where
    layer.to(memory_format=torch.channels_last)  # for the 4-D tensors of a model around it
    torch.testing.assert_close(
        layer(torch.ones(1, 50).half()), (base.weight.sum(1) + base.bias)[None].half(), rtol=0.05, atol=0.05
    )
    plain = unpack_(copy.deepcopy(packed.base_layer))
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, base.weight)
    assert plain.state_dict().keys() == base.state_dict().keys()


@needs_native
def test_heads_of_other_sizes_and_whole_weights():
    _, plain, packed = layers()
    head = {"weight": torch.randn(5, 50), "bias": torch.randn(5)}
    plain.load_adapter("head", **head)
    packed.load_adapter("head", **head)
    x = torch.randn(2, 50)
    with route("head"):
        torch.testing.assert_close(packed(x), plain(x))
    with route(["a", "b"]):
        torch.testing.assert_close(packed(x), plain(x))
    with pytest.raises(BaseMismatchError, match=r"the base has shape \[70, 50\]"):
        packed.load_adapter("wrong", fit(torch.randn(3, 50), rank=1))


@needs_native
def test_autocast_and_gradients_to_the_input():
    _, plain, packed = layers()
    x = torch.randn(3, 50, requires_grad=True)
    with route("a"):
        expected, got = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (plain, packed))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == plain(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16  # base alone


@needs_native
def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DTSError, match=r"expected a torch.nn.Linear, got Embedding"):
        pack_(nn.Embedding(4, 4))
    with pytest.raises(DTSError, match=r"got torch.float64 on cpu"):
        pack_(nn.Linear(4, 4, dtype=torch.float64))
    with pytest.raises(DTSError, match=r"its weight is computed by a hook"):
        pack_(torch.nn.utils.weight_norm(nn.Linear(4, 4)))
    replaced = nn.Linear(4, 4)
    replaced.forward = replaced.forward
    with pytest.raises(DTSError, match=r"its forward was replaced"):
        pack_(replaced)
    with pytest.raises(DTSError, match=r"on meta"):
        pack_(nn.Linear(4, 4, device="meta"))


def test_without_native_kernels_packing_is_refused_and_the_op_still_computes(monkeypatch):
    monkeypatch.setattr(native, "MODULE", None)
    layer, x, bank = nn.Linear(4, 4), torch.randn(2, 4), Bank(PageLayout(4, 4).nbytes, 1)
    with pytest.raises(DTSError, match="needs the native CPU kernels"):
        DTSLinear(layer, prepack=True)
    assert type(layer) is nn.Linear
    assert layer.weight.shape == (4, 4)
    with pytest.raises(DTSError, match="needs the native CPU kernels"):
        DTSModel(nn.Sequential(layer), prepack=True)
    y = ops._packed_linear_plain(x, pack_weight(layer.weight), layer.bias, 4, *bank.tensors, torch.zeros(2).int())
    torch.testing.assert_close(y, layer(x))


class Model(nn.Module):
    """Two linear layers, the second tied with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


@needs_native
def test_a_model_packs_the_layers_that_adapters_change_and_unloads_them(saved_adapter):
    base, path = saved_adapter
    plain, packed = DTSModel(copy.deepcopy(base)), DTSModel(copy.deepcopy(base), prepack=True)
    for model in (plain, packed):
        model.load_adapter(path, "a")
        model.load_adapter(path, "b")  # the base's fingerprint is read from packed weights now
        model.set_adapter("a")
    assert type(packed.model.first.base_layer) is PackedLinear
    assert type(packed.model.second.base_layer) is nn.Linear  # tied
    x = torch.randn(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(
            packed(x, adapter_names=["a", "__base__", "b"]), plain(x, adapter_names=["a", "__base__", "b"])
        )
    packed.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mixture")
    merged = packed.merge_and_unload("a")
    assert type(merged.first) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(merged(x), plain(x), rtol=1e-4, atol=1e-4)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}


@pytest.fixture
def saved_adapter(tmp_path):
    """(base model, directory of an adapter for it)"""
    from safetensors.torch import save_model

    from dts_fast import DTSConfig, compress

    torch.manual_seed(0)
    base = Model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_model(base, str(tmp_path / "base.safetensors"))
    save_model(tuned, str(tmp_path / "tuned.safetensors"))
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "adapter", DTSConfig(rank=4))
    return base, tmp_path / "adapter"
