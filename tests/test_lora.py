"""To and from PEFT's LoRA; peft itself says what is equal."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress, load_adapter
from dts_fast.checkpoint import Checkpoint
from dts_fast.errors import CheckpointError, DTSError
from dts_fast.lora import LoraCheckpoint, export_lora, is_lora
from dts_fast.verify import verify

peft = pytest.importorskip("peft")


class Model(nn.Module):
    """An embedding, a convolution, a norm, linear layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 12)
        self.conv = nn.Conv2d(1, 6, (3, 12))
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6, bias=False)

    def forward(self, ids):
        x = self.conv(self.embed_tokens(ids)[:, None])[..., 0].transpose(1, 2)
        return self.down(self.up(self.norm(x)).relu())


def moved(model: nn.Module, scale: float = 0.1) -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * torch.randn_like(parameter)
    return tuned


@pytest.fixture
def adapter(tmp_path):
    """(base model, its file, an adapter)"""
    base = Model()
    for name, model in (("base", base), ("tuned", moved(base))):
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "dts", DTSConfig(rank=5))
    return base, tmp_path / "base.safetensors", tmp_path / "dts"


@torch.no_grad()
def test_peft_computes_the_same_from_the_exported_lora(adapter, tmp_path):
    base, file, path = adapter
    assert export_lora(path, file, tmp_path / "lora") == []
    assert is_lora(tmp_path / "lora")
    model = DTSModel.from_pretrained(copy.deepcopy(base), path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    ids = torch.randint(0, 30, (4, 9))
    # Float32 sums in another order; norms and biases are rounded to the base's type either way.
    torch.testing.assert_close(theirs(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs(ids), base(ids), atol=1e-2)
    ranks = {n: p.shape[0] for n, p in theirs.named_parameters() if ".lora_A." in n}
    assert set(ranks.values()) == {5}


@torch.no_grad()
def test_running_statistics_are_saved_with_their_module(tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()
    tuned = moved(base)
    tuned[1].running_mean += torch.randn(8)
    tuned[1].running_var += torch.rand(8)
    for name, model in (("base", base), ("tuned", tuned)):
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "dts", DTSConfig(rank=4))
    assert export_lora(tmp_path / "dts", tmp_path / "base.safetensors", tmp_path / "lora") == []
    model = DTSModel.from_pretrained(copy.deepcopy(base), tmp_path / "dts")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    x = torch.randn(2, 3, 9, 9)
    # A mean is approximated by the adapter, and rounded to the base's type either way.
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gpt2_keeps_its_weights_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=20)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    moved(base, 0.02).save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "dts", DTSConfig(rank=4, exclude="wte|wpe"))
    export_lora(tmp_path / "dts", tmp_path / "base", tmp_path / "lora")
    ids = torch.randint(0, 40, (2, 7))
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "dts")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modules_have_the_names_of_the_model_in_memory(tmp_path):
    """transformers renames ViT's on loading; PEFT finds them by what they are called then, both ways."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    base = transformers.ViTForImageClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    moved(base, 0.05).save_pretrained(tmp_path / "tuned")
    exclude = "cls_token|position_embeddings"
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "dts", DTSConfig(rank=4, exclude=exclude))
    assert export_lora(tmp_path / "dts", tmp_path / "base", tmp_path / "lora") == []
    pixels = torch.randn(2, 3, 8, 8)
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "dts")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    trained = saved_lora(base, tmp_path / "trained", target_modules=targets, r=2)
    compress(tmp_path / "base", tmp_path / "trained", tmp_path / "again", DTSConfig(rank=16))
    again = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "again")
    expected = trained.eval()(pixels).logits
    old = tmp_path / "trained" / "adapter_model.safetensors"
    factors = load_file(old)
    names = {"layers.": "encoder.layer.", ".q_proj": ".attention.query", ".k_proj": ".attention.key"}
    names |= {".v_proj": ".attention.value", ".o_proj": ".output.dense"}
    names |= {".mlp.fc1": ".intermediate.dense", ".mlp.fc2": ".output.dense"}
    in_base = Checkpoint.open(tmp_path / "base").tensors

    def renamed(key: str) -> str:
        for new, before in names.items():
            key = key.replace(new, before)
        return key

    save_file({renamed(key): tensor for key, tensor in factors.items()}, old)
    as_before = LoraCheckpoint.of(tmp_path / "trained", Checkpoint.open(tmp_path / "base"))
    assert len(as_before.low_rank) == len(factors) // 2
    assert set(as_before.low_rank) <= set(in_base)
    # Two components, coded eight times over: what is left of them is less than what a module not found would leave.
    assert (again(pixels).logits - expected).norm() < 0.6 * (base(pixels).logits - expected).norm()


def test_a_table_that_the_head_is_tied_to_is_refused(tmp_path):
    """PEFT would change the table and not the head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=20)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    moved(base, 0.02).save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "dts", DTSConfig(rank=4, embeddings="low-rank"))
    with pytest.raises(DTSError, match=r"cannot hold 1 parameters of this adapter \(transformer.wte.weight\)"):
        export_lora(tmp_path / "dts", tmp_path / "base", tmp_path / "lora")
    assert export_lora(tmp_path / "dts", tmp_path / "base", tmp_path / "lora", drop=True) == ["transformer.wte.weight"]


@torch.no_grad()
def test_a_convolution_of_one_output_is_stored_whole(tmp_path):
    base = nn.Sequential(nn.Conv1d(6, 1, 3), nn.Linear(8, 4))
    for name, model in (("base", base), ("tuned", moved(base))):
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "dts", DTSConfig(rank=2))
    export_lora(tmp_path / "dts", tmp_path / "base.safetensors", tmp_path / "lora")
    x = torch.randn(5, 6, 10)
    model = DTSModel.from_pretrained(copy.deepcopy(base), tmp_path / "dts")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_peft_cannot_hold_is_refused_or_left_out(tmp_path):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 6, 8))

    base = Table()
    for name, model in (("base", base), ("tuned", moved(base))):
        save_model(model, str(tmp_path / f"{name}.safetensors"))
    compress(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "dts", DTSConfig(rank=2))
    with pytest.raises(DTSError, match=r"cannot hold 1 parameters of this adapter \(table\)"):
        export_lora(tmp_path / "dts", tmp_path / "base.safetensors", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert export_lora(tmp_path / "dts", tmp_path / "base.safetensors", tmp_path / "lora", drop=True) == ["table"]


def saved_lora(base: nn.Module, path, **settings) -> nn.Module:
    """A PEFT model with random factors, saved."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down", "conv", "embed_tokens"]} | settings
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "modules_to_save" in name or ("bias" in name and settings.get("bias")):
                parameter += 0.1
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
        {"rank_pattern": {"up": 5}, "alpha_pattern": {"up": 2}},
    ],
    ids=str,
)
def test_a_lora_is_read_as_peft_merges_it(tmp_path, settings):
    base = Model()
    save_model(base, str(tmp_path / "base.safetensors"))
    model = saved_lora(base, tmp_path / "lora", **settings)
    merged = model.merge_and_unload().state_dict()
    checkpoint = LoraCheckpoint.of(tmp_path / "lora", Checkpoint.open(tmp_path / "base.safetensors"))
    assert set(checkpoint.tensors) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(checkpoint.get(name), tensor, rtol=1e-5, atol=1e-6)


def test_a_lora_is_compressed(tmp_path):
    base = Model()
    save_model(base, str(tmp_path / "base.safetensors"))
    merged = saved_lora(base, tmp_path / "lora", modules_to_save=["norm"]).merge_and_unload().state_dict()
    report = compress(tmp_path / "base.safetensors", tmp_path / "lora", tmp_path / "dts", DTSConfig(rank=12))
    adapter = load_adapter(tmp_path / "dts")
    assert adapter.deltas.keys() == {
        "up.weight", "down.weight", "conv.weight", "embed_tokens.weight", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert report.skipped["up.bias"] == "unchanged"
    for name in ("up.weight", "down.weight"):
        exact = merged[name] - base.get_parameter(name)
        error = (adapter.parameters[name].dequantize() - exact).norm() / exact.norm()
        assert error < 0.6  # two bits an element; three components, coded four times over
    assert verify(tmp_path / "dts", tmp_path / "base.safetensors", tmp_path / "lora").matches
    again = json.loads((tmp_path / "dts" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(tmp_path / "base.safetensors")


@pytest.mark.parametrize("damage", ["half a pair", "dora", "another base"])
def test_a_lora_that_does_not_fit_is_refused(tmp_path, damage):
    base = Model()
    save_model(base, str(tmp_path / "base.safetensors"))
    saved_lora(base, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.up.lora_A.weight"
    if damage == "half a pair":
        del tensors[key]
    elif damage == "dora":
        tensors["base_model.model.up.lora_magnitude_vector"] = torch.ones(20)
    else:
        tensors["base_model.model.up.lora_B.weight"] = torch.ones(21, 3)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lora_A and lora_B|no low-rank sum|has shape"):
        compress(tmp_path / "base.safetensors", tmp_path / "lora", tmp_path / "dts", DTSConfig(rank=2))
