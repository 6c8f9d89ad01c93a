"""Bases whose weights a library has quantised, and any module that acts like a linear."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, fit, fit_vector, route
from dts_fast.errors import BaseMismatchError, DTSError
from dts_fast.slots import SlotTable

N, K = 64, 128


def torchao(config: str, layer: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, getattr(quantization, config)(), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    return layer


def bitsandbytes(kind: str, layer: nn.Linear) -> nn.Module:
    modules = pytest.importorskip("bitsandbytes").nn
    dtype = layer.weight.dtype
    if kind == "8bit":
        quantised = modules.Linear8bitLt(K, N, layer.bias is not None, has_fp16_weights=False)
    else:
        quantised = modules.Linear4bit(K, N, layer.bias is not None, quant_type=kind, compute_dtype=dtype)
    quantised.load_state_dict(layer.state_dict())
    quantised.bias.data = quantised.bias.data.to(dtype)
    return quantised.to("cpu")  # this is what quantises


class Grouped(nn.Module):
    """A layer of another library: integers, scales and the bias in buffers, no parameter ``weight``."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias.to(x.dtype))


KINDS = {
    "torchao int8": lambda layer: torchao("Int8WeightOnlyConfig", layer),
    "torchao int8, dynamic": lambda layer: torchao("Int8DynamicActivationInt8WeightConfig", layer),
    "torchao int4": lambda layer: torchao("IntxWeightOnlyConfig", layer),
    "bitsandbytes int8": lambda layer: bitsandbytes("8bit", layer),
    "bitsandbytes nf4": lambda layer: bitsandbytes("nf4", layer),
    "bitsandbytes fp4": lambda layer: bitsandbytes("fp4", layer),
    "another library's": Grouped,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_deltas_are_added_to_what_the_quantised_layer_computes(kind, dtype):
    layer = DTSLinear(KINDS[kind](nn.Linear(K, N).to(dtype)), slots=SlotTable(2))
    delta, bias = fit(0.1 * torch.randn(N, K), rank=5), fit_vector(0.1 * torch.randn(N))
    layer.load_adapter("a", delta, bias=bias)
    layer.load_adapter("b", delta)
    x = torch.randn(3, 4, K, dtype=dtype)
    base = layer.base_layer(x).float()
    change = x.float() @ delta.dequantize().t()
    with route(["a", "__base__", "b"]):
        y = layer(x)
    assert y.dtype == layer.base_layer(x).dtype
    expected = base + torch.stack([change[0] + bias.dequantize(), torch.zeros_like(change[1]), change[2]])
    # The base's result, the delta and the bias are rounded to the dtype one after the other.
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=2 * eps, atol=4 * eps * float(expected.abs().max()))
    assert torch.equal(y[1], layer.base_layer(x)[1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_is_merged_into_a_quantised_weight(kind):
    layer = DTSLinear(KINDS[kind](nn.Linear(K, N)))
    layer.load_adapter("a", fit(torch.randn(N, K), rank=3))
    with pytest.raises(DTSError, match="is quantised"):
        layer.dense_parameters(0)
    head = {"weight": torch.randn(9, K), "bias": torch.randn(9)}
    layer.load_adapter("head", **head)
    x = torch.randn(2, K)
    with route("head"):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, **head))


def make_llama():
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=K, intermediate_size=K, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("llama"), make_llama()
    base.save_pretrained(folder / "base")
    for name in ("a", "b"):
        tuned = make_llama()
        tuned.load_state_dict({n: p + 0.05 * torch.randn_like(p) for n, p in base.state_dict().items()})
        tuned.save_pretrained(folder / name)
        compress(folder / "base", folder / name, folder / f"adapter_{name}", DTSConfig(rank=16))
    make_llama().save_pretrained(folder / "stranger")
    return folder


def quantised_model(kind: str, path) -> nn.Module:
    model = transformers.LlamaForCausalLM.from_pretrained(path).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer.weight.shape == (K, K):
            square = KINDS[kind]
            parent, _, child = name.rpartition(".")
            if kind.startswith("torchao"):
                square(layer)
            elif kind == "another library's":
                layer.bias = nn.Parameter(torch.zeros(K))
                setattr(model.get_submodule(parent), child, square(layer))
    return model


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "another library's"])
@torch.no_grad()
def test_models_with_quantised_layers_serve_mixed_batches(folder, kind):
    model = DTSModel(quantised_model(kind, folder / "base"))
    for name in ("a", "b"):
        model.load_adapter(folder / f"adapter_{name}", name)
    full = DTSModel.from_pretrained(folder / "base", folder / "adapter_a", "a")
    full.load_adapter(folder / "adapter_b", "b")
    ids, names = torch.randint(0, 99, (3, 6)), ["a", "__base__", "b"]
    quantised, exact = (m(ids, adapter_names=names).logits for m in (model, full))
    base_error = (quantised[1] - exact[1]).norm() / exact[1].norm()
    assert 0 < base_error < 0.3  # it is quantised
    for row in (0, 2):
        # Personalised rows are off by what quantising the base costs, and not by more.
        assert (quantised[row] - exact[row]).norm() / exact[row].norm() < 2 * base_error
    with pytest.raises(DTSError, match="is quantised"):
        model.merge_and_unload("a")
    assert torch.equal(model(ids, adapter_names=names).logits, quantised)


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "another library's"])
def test_another_base_is_told_from_a_quantised_one(folder, kind):
    model = DTSModel(quantised_model(kind, folder / "stranger"))
    with pytest.raises(BaseMismatchError, match="not the base"):
        model.load_adapter(folder / "adapter_a", "a")


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
@torch.no_grad()
def test_models_that_transformers_quantises(folder, library):
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = DTSModel.from_pretrained(
        folder / "base", folder / "adapter_a", "a", quantization_config=config, device_map="cpu"
    )
    full = DTSModel.from_pretrained(folder / "base", folder / "adapter_a", "a")
    ids, names = torch.randint(0, 99, (2, 6)), ["a", "__base__"]
    quantised, exact = (m(ids, adapter_names=names).logits.float() for m in (model, full))
    base_error = (quantised[1] - exact[1]).norm() / exact[1].norm()
    assert 0 < base_error < 0.3
    assert (quantised[0] - exact[0]).norm() / exact[0].norm() < 2 * base_error
