"""Compiled models: one graph for all adapters, and none compiled again for a load, an eviction or a switch."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import write_checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, fit, route

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 56}
MAKE = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=99, num_labels=3, **SIZES)
    ),
}
NAMES = "abcd"


@pytest.fixture(scope="module", params=MAKE)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp(request.param), MAKE[request.param]()
    base.save_pretrained(folder / "base")
    for name in NAMES:
        tuned = MAKE[request.param]()
        tuned.load_state_dict({n: p + 0.05 * torch.randn_like(p) for n, p in base.state_dict().items()})
        tuned.save_pretrained(folder / f"tuned_{name}")
        compress(folder / "base", folder / f"tuned_{name}", folder / name, DTSConfig(rank=5))
    return folder


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@torch.no_grad()
def decode(model: DTSModel, names: str | list[str]) -> torch.Tensor:
    """Logits of a prompt and three more tokens, with a cache of fixed size where the model generates."""
    ids = torch.arange(3, 17).reshape(2, 7)
    if not model.can_generate():
        return model(ids, adapter_names=names).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    logits = [model(ids, past_key_values=cache, use_cache=True, adapter_names=names).logits]
    for step in range(3):
        logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True, adapter_names=names).logits)
    return torch.cat(logits, 1)


def test_loading_evicting_and_switching_compile_nothing_anew(folder):
    eager = DTSModel.from_pretrained(folder / "base", folder / "a", "a")
    for name in NAMES[1:]:
        eager.load_adapter(folder / name, name)
    model = DTSModel.from_pretrained(folder / "base", folder / "a", "a", max_adapters=2, max_rank=5, eviction="lru")
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    decode(model, ["a", "__base__"])
    frames = counter.frame_count
    assert frames == (2 if model.can_generate() else 1)  # the prompt, and a token
    torch.compiler.set_stance("fail_on_recompile")
    for name in NAMES[1:]:
        model.load_adapter(folder / name, name)
    for names in (["b", "c"], ["d", "a"], ["__base__", "__base__"], "c", "__base__", ["c", "b"], ["a", "a"]):
        # The same operations in another order of fusion; nothing but float32 rounding.
        torch.testing.assert_close(decode(model, names), decode(eager, names), rtol=1e-4, atol=1e-5)
    model.set_adapter("d")
    torch.testing.assert_close(decode(model, None), decode(eager, "d"), rtol=1e-4, atol=1e-5)
    model.delete_adapter("d")
    model.load_adapter(folder / "b", "c", replace=True)
    torch.testing.assert_close(decode(model, ["c", "b"]), decode(eager, "b"), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_generation_with_a_static_cache_compiles_nothing_anew(folder):
    model = DTSModel.from_pretrained(folder / "base", folder / "a", "a", max_rank=5)
    for name in NAMES[1:]:
        model.load_adapter(folder / name, name)
    ids = torch.arange(3, 12).reshape(3, 3)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "cache_implementation": "static"}
    cases = [["a", "b", "__base__"], ["c", "d", "a"], ["b", "b", "b"]]
    expected = [model.generate(ids, adapter_names=names, **settings) for names in cases]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(model.generate(ids, adapter_names=cases[0], **settings), expected[0])
    frames = counter.frame_count
    assert frames >= 2
    for names, tokens in zip(cases[1:], expected[1:], strict=True):
        assert torch.equal(model.generate(ids, adapter_names=names, **settings), tokens)
    assert counter.frame_count == frames


class WithPositions(torch.nn.Module):
    """Positions are embedded once for all rows, and go through linear layers and norms as ``[1, T, H]``."""

    def __init__(self):
        super().__init__()
        self.positions, self.project = torch.nn.Embedding(8, 12), torch.nn.Linear(12, 12)
        self.norm, self.mix = torch.nn.LayerNorm(12), torch.nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, input_ids):
        shared = torch.arange(4)[None].to(torch.float32)[..., None].expand(1, 4, 12) / 4
        return self.mix(self.norm(self.project(shared))) + self.positions(input_ids)


def test_inputs_that_all_rows_share(tmp_path):
    base = WithPositions().eval()
    write_checkpoint(tmp_path / "base", base.state_dict())
    for name in "ab":
        tuned = {n: p + 0.2 * torch.randn_like(p) for n, p in base.state_dict().items()}
        write_checkpoint(tmp_path / f"tuned_{name}", tuned)
        compress(tmp_path / "base", tmp_path / f"tuned_{name}", tmp_path / name, DTSConfig(rank=4))
    model = DTSModel(base, max_rank=4)
    for name in "ab":
        model.load_adapter(tmp_path / name, name)
    ids = torch.randint(0, 8, (2, 4))
    with torch.no_grad():
        eager = [model(ids, adapter_names=names) for names in (["a", "b"], "b", ["b", "__base__"])]
        counter = CompileCounterWithBackend("aot_eager")
        model.compile(backend=counter, fullgraph=True, dynamic=False)
        compiled = [model(ids, adapter_names=names) for names in (["a", "b"], "b", ["b", "__base__"])]
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class ReadsWeights(torch.nn.Module):
    """Asks a layer's weight for its dtype, as T5 does, and computes with another's, as Mamba does."""

    def __init__(self, computes: bool):
        super().__init__()
        self.first, self.second, self.computes = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), computes

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        return x @ self.second.weight.t() if self.computes else self.second(x)


@pytest.mark.parametrize("computes", [False, True])
def test_weights_that_a_compiled_model_reads(tmp_path, computes):
    base = ReadsWeights(computes).eval()
    write_checkpoint(tmp_path / "base", base.state_dict())
    tuned = {n: p + 0.2 * torch.randn_like(p) for n, p in base.state_dict().items()}
    write_checkpoint(tmp_path / "tuned", tuned)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=4))
    model = DTSModel.from_pretrained(base, tmp_path / "a", "a", max_rank=4)
    x = torch.randn(2, 8)
    with torch.no_grad():
        eager = model(x)
        assert not torch.allclose(eager, model(x, adapter_names="__base__"))
        model.compile(backend="aot_eager", fullgraph=True)
        if computes:
            with pytest.raises(Exception, match="meta"):  # refused, not computed with the base's
                model(x)
        else:
            torch.testing.assert_close(model(x), eager, rtol=1e-5, atol=1e-5)


def test_routes_in_and_around_a_compiled_function_are_each_layers_own():
    """What layers ask first, whether all is the base's, follows the route through graphs and what is between them."""
    torch.manual_seed(0)
    base, x = nn.Linear(32, 32), torch.randn(2, 32)
    layer, delta = DTSLinear(base, 2), fit(torch.randn(32, 32), rank=4)
    layer.load_adapter("a", delta)

    def calls(x):
        with route("a"):
            first = layer(x)
            torch._dynamo.graph_break()
            second = layer(x)
        return first, second, layer(x)

    with torch.no_grad():
        personal, plain = x @ (base.weight + delta.dequantize()).t() + base.bias, base(x)
        compiled = torch.compile(calls)
        for run in (calls, compiled, compiled):
            with route("__base__"):
                torch.testing.assert_close(run(x), (personal, personal, plain), rtol=1e-4, atol=1e-4)
        layer.set_adapter("a")
        torch.testing.assert_close(run(x), (personal, personal, personal), rtol=1e-4, atol=1e-4)
