"""Mixed batches where a model's inner inputs do not show the batch: encoder-decoders, flattened tokens, sharing."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import write_checkpoint
from safetensors.torch import load_file
from torch import nn

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, fit, fit_vector, route
from dts_fast.adapter_file import load_adapter
from dts_fast.errors import BaseMismatchError, RoutingError
from dts_fast.export import export_full

SIZES = {"d_model": 32, "vocab_size": 99}


def bart():
    config = transformers.BartConfig(
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
        decoder_ffn_dim=40, max_position_embeddings=40, eos_token_id=2, decoder_start_token_id=2, **SIZES,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(num_layers=2, num_heads=4, d_kv=8, d_ff=40, decoder_start_token_id=0, **SIZES)
    return transformers.T5ForConditionalGeneration(config)


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, ffn_dim=40, num_attention_heads=4, vocab_size=99, word_embed_proj_dim=32,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def adapters(tmp_path, make, tune=lambda model: None, **settings) -> tuple[DTSModel, dict[str, nn.Module]]:
    """A model with adapters "a" and "b", and the dense model of each and of the base."""
    base = make().eval()
    base.save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        tuned = make()
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            tune(tuned)
        tuned.save_pretrained(tmp_path / f"tuned_{name}")
        compress(tmp_path / "base", tmp_path / f"tuned_{name}", tmp_path / name, DTSConfig(density=0.3, **settings))
        export_full(tmp_path / name, tmp_path / "base", tmp_path / f"dense_{name}")
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    dense = {n: type(base).from_pretrained(tmp_path / f"dense_{n}").eval() for n in ("a", "b")}
    return model, dense | {"__base__": type(base).from_pretrained(tmp_path / "base").eval()}


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 3, 5])  # as many tokens as rows, and not
@pytest.mark.parametrize(
    ("make", "settings"),
    [(bart, {}), (opt, {}), (t5, {"exclude": "relative_attention_bias"})],
    ids=["bart", "opt", "t5"],
)
def test_mixed_logits_and_generation(tmp_path, make, settings, length):
    model, dense = adapters(tmp_path, make, **settings)
    names = ["b", "__base__", "a"]
    ids = torch.randint(3, 99, (3, length))
    extra = {} if make is opt else {"decoder_input_ids": torch.randint(3, 99, (3, length))}
    mixed = model(input_ids=ids, adapter_names=names, **extra).logits
    expected = torch.stack([dense[n](input_ids=ids, **extra).logits[row] for row, n in enumerate(names)])
    # Float32 sums of base and delta apart instead of together.
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for beams in (1, 2):
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
        tokens = model.generate(input_ids=ids, adapter_names=names, **settings)
        for row, name in enumerate(names):
            alone = dense[name].generate(input_ids=ids[row : row + 1], **settings)
            assert torch.equal(tokens[row : row + 1], alone)


@torch.no_grad()
def test_the_number_of_names_is_checked_against_the_models_input(tmp_path):
    model, _ = adapters(tmp_path, opt)
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 1 rows"):
        model(torch.randint(3, 99, (1, 5)), adapter_names=["a", "b"])
    with pytest.raises(RoutingError, match="2 adapter names for a batch of 4 rows"):
        model(torch.randint(3, 99, (4, 5)), adapter_names=["a", "b"])


def switch():
    config = transformers.SwitchTransformersConfig(
        num_layers=2, num_heads=4, d_kv=8, d_ff=40, num_experts=3, expert_capacity=16, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, decoder_start_token_id=0, **SIZES,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a batch of these adapters")
@pytest.mark.parametrize("length", [2, 3, 4, 6])
def test_gathered_tokens_are_not_given_to_wrong_rows(tmp_path, length):
    """Experts get the tokens that are theirs, from any row."""
    model, dense = adapters(tmp_path, switch, exclude="relative_attention_bias")
    ids = torch.randint(3, 99, (2, length))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    for name in ("a", "b", "__base__"):
        expected = dense[name](**inputs).logits
        logits = model(**inputs, adapter_names=name).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # Once for each adapter, unless an expert happened to get all tokens in their order.
    mixed = model(**inputs, adapter_names=["a", "b"]).logits
    expected = torch.stack([dense[name](**inputs).logits[row] for row, name in enumerate("ab")])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def deberta():
    config = transformers.DebertaV2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=99,
        relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def mamba():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4)
    return transformers.MambaForCausalLM(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("make", [deberta, mamba])
def test_models_that_compute_with_weights_of_layers_they_do_not_call(tmp_path, make):
    model, dense = adapters(tmp_path, make)
    ids = torch.randint(3, 99, (2, 6))
    for name in ("a", "b", "__base__"):
        expected = dense[name](ids).logits
        logits = model(ids, adapter_names=name).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if make is mamba:  # a mixer has parameters of its own, and runs once for each adapter
        mixed = model(ids, adapter_names=["a", "b"], use_cache=False).logits
        expected = torch.stack([dense[name](ids).logits[row] for row, name in enumerate("ab")])
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def deepseek():
    config = transformers.DeepseekV3Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def resnet():
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("make", [deepseek, resnet])
def test_buffers_that_training_moves(tmp_path, make):
    """DeepSeek's bias of the choice of experts, running means and variances: no parameters, and a fine-tune's own."""

    def tune(model):
        for name, tensor in model.state_dict().items():
            if name.endswith(("e_score_correction_bias", "running_mean")):
                tensor += torch.randn_like(tensor)
            elif name.endswith("running_var"):
                tensor *= torch.rand_like(tensor) + 0.5

    model, dense = adapters(tmp_path, make, tune=tune)
    x = torch.randn(3, 3, 32, 32) if make is resnet else torch.randint(3, 99, (3, 6))
    alone = {name: dense[name](x).logits for name in ("a", "b", "__base__")}
    held = load_adapter(tmp_path / "a").parameters
    changed = [name for name in held if name.endswith(("e_score_correction_bias", "running_mean"))]
    variances = [parameter for name, parameter in held.items() if name.endswith("running_var")]
    assert (len(changed), len(variances)) == ((6, 6) if make is resnet else (1, 0))
    assert all(isinstance(variance, torch.Tensor) for variance in variances)  # whole: none may be negative
    for name, expected in alone.items():
        torch.testing.assert_close(model(x, adapter_names=name).logits, expected, rtol=1e-3, atol=1e-3)
    names = ["b", "__base__", "a"]
    mixed = model(x, adapter_names=names).logits
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload("b")
    torch.testing.assert_close(merged(x).logits, alone["b"], rtol=1e-3, atol=1e-3)


SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def gpt_oss():
    config = transformers.GptOssConfig(num_local_experts=4, head_dim=8, sliding_window=5, **SMALL)
    return transformers.GptOssForCausalLM(config)


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], **SMALL,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def falcon_h1():
    config = transformers.FalconH1Config(
        head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=8, **SMALL,
    )  # fmt: skip
    return transformers.FalconH1ForCausalLM(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("make", [mamba, gpt_oss, qwen3_next, falcon_h1])
def test_generate_where_layers_with_a_cache_have_parameters_of_their_own(tmp_path, make):
    """Mixers' decays, attention sinks: such a layer runs once for each adapter, with its rows of the cache."""
    model, dense = adapters(tmp_path, make)
    ids, names = torch.randint(3, 99, (4, 6)), ["a", "b", "__base__", "a"]
    known = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    for implementation in (None, "static"):
        kind = {"cache_implementation": implementation} if implementation else {}
        mixed = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=7, **known, **kind)
        logits = torch.stack(mixed.logits, 1)
        alone = [
            dense[name].generate(input_ids=ids[row : row + 1], max_new_tokens=7, **known, **kind)
            for row, name in enumerate(names)
        ]
        expected = torch.cat([torch.stack(each.logits, 1) for each in alone])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    beams = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, num_beams=2, do_sample=False)
    for row, name in enumerate(names):
        own = dense[name].generate(input_ids=ids[row : row + 1], max_new_tokens=4, num_beams=2, do_sample=False)
        assert beams[row, : own.shape[1]].tolist() == own[0].tolist()


def test_gradient_checkpointing_outside_its_route_is_refused_not_wrong():
    from torch.utils.checkpoint import checkpoint

    layer = DTSLinear(nn.Linear(6, 6))
    layer.load_adapter("a", fit(torch.randn(6, 6), rank=2))
    x = torch.randn(2, 6, requires_grad=True)
    with route("a"):
        y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RoutingError, match="gradient"):
        y.sum().backward()
    with route("a"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()


def test_a_route_may_be_entered_twice():
    from dts_fast.routing import current_route

    once = route("a")
    with once, once:
        assert current_route() is once
    assert current_route() is None


class Shared(nn.Module):
    """One linear at two places, and a scalar."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.second(self.first(x).relu()) * self.scale


@torch.no_grad()
def test_shared_modules_and_scalars(tmp_path):
    base, tuned = Shared(), Shared()
    tuned.load_state_dict({n: p + 0.1 * torch.randn_like(p) for n, p in base.state_dict().items()})
    tuned.second = tuned.first
    names = ["first.weight", "first.bias", "scale"]
    for name, model in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / name, {n: model.state_dict()[n].clone() for n in names})
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=6))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    dense = Shared()
    state = load_file(tmp_path / "dense" / "model.safetensors")
    dense.load_state_dict(state | {f"second.{n}": state[f"first.{n}"] for n in ("weight", "bias")})
    model = DTSModel.from_pretrained(base, tmp_path / "a", "a")
    x = torch.randn(3, 12)
    with route(["a", "__base__", "a"]):
        y = model(x)
    torch.testing.assert_close(y[[0, 2]], dense(x)[[0, 2]], rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload("a")
    assert merged.first is merged.second
    torch.testing.assert_close(merged(x), dense(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("changed", ["all", "head", "embeddings", "skipped"])
def test_a_head_untied_by_the_fine_tune(tmp_path, by_path, changed):
    def make(tied: bool):
        config = transformers.LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
            tie_word_embeddings=tied,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    base, tuned = make(True), make(False)
    state = base.state_dict()
    moved = {"head": ("lm_head",), "embeddings": ("embed_tokens",)}.get(changed, ("",))
    tuned.load_state_dict(
        {n: t + 0.05 * torch.randn_like(t) if any(part in n for part in moved) else t for n, t in state.items()}
    )
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    settings = {"embeddings": "skip"} if changed == "skipped" else {}
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3, **settings))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    model = DTSModel.from_pretrained(tmp_path / "base" if by_path else make_copy(base), tmp_path / "a", "a")
    ids = torch.randint(3, 99, (2, 5))
    logits = model(ids, adapter_names=["a", "__base__"]).logits
    torch.testing.assert_close(logits[0], dense(ids).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], base(ids).logits[1], rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload("a")
    torch.testing.assert_close(merged(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(ids).logits, merged(ids).logits)


@torch.no_grad()
def test_what_stays_tied_beside_an_untied_head(tmp_path):
    """BART shares one table between encoder, decoder and head, and its configuration has one switch for all."""
    base = bart().eval()
    base.save_pretrained(tmp_path / "base")
    tuned = make_copy(base)
    tuned.config.tie_word_embeddings = False
    tuned.lm_head.weight = nn.Parameter(base.lm_head.weight + 0.05 * torch.randn_like(base.lm_head.weight))
    for module in (tuned.model.encoder, tuned.model.decoder):
        module.embed_tokens.weight = nn.Parameter(base.model.shared.weight.clone())
    tuned.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = {"input_ids": torch.randint(3, 99, (2, 5)), "decoder_input_ids": torch.randint(3, 99, (2, 4))}
    expected = tuned(**ids).logits
    for served in (model, transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "dense").eval()):
        torch.testing.assert_close(served(**ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.merge_and_unload("a").save_pretrained(tmp_path / "merged")
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_rows_of_one_model_cannot_differ_in_is_refused(tmp_path):
    base = t5().eval()
    base.save_pretrained(tmp_path / "base")
    tuned = make_copy(base)
    tuned.lm_head.weight = nn.Parameter(base.lm_head.weight + 0.05 * torch.randn_like(base.lm_head.weight))
    tuned.config.tie_word_embeddings, tuned.config.scale_decoder_outputs = False, False
    tuned.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3))
    assert load_adapter(tmp_path / "a").config["model_config"]["scale_decoder_outputs"] is False
    for model in (tmp_path / "base", base):
        with pytest.raises(BaseMismatchError, match="one model cannot do both"):
            DTSModel.from_pretrained(model, tmp_path / "a", "a")


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=8,
            patch_size=4, projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
        ),
        image_token_index=98, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no fast path")
@pytest.mark.parametrize("exclude", [None, "vision_tower|multi_modal_projector"], ids=["all", "text"])
def test_images_of_rows(tmp_path, exclude):
    model, dense = adapters(tmp_path, llava, exclude=exclude)
    names, places = ["a", "b"], 4  # of each image's patches
    for counts in ((1, 1), (2, 0)):
        ids = torch.randint(3, 97, (2, 12))
        for row, count in enumerate(counts):
            ids[row, : places * count] = 98
        images = torch.randn(2, 3, 8, 8)
        inputs = {"input_ids": ids, "pixel_values": images}
        if exclude is None and counts == (2, 0):
            with pytest.raises(RoutingError, match="different numbers of images"):
                model(**inputs, adapter_names=names)
            with pytest.raises(RoutingError, match="different numbers of images"):
                model.generate(**inputs, adapter_names=names, max_new_tokens=2)
            continue
        logits = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            whole = dense[name](**inputs).logits[row]
            torch.testing.assert_close(logits[row], whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@torch.no_grad()
def test_layers_that_are_called_from_a_list(tmp_path):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.order = [self.second, self.first]

        def forward(self, x):
            return self.order[1](self.order[0](x))

    base = Listed()
    tuned = {n: p + 0.1 * torch.randn_like(p) for n, p in base.state_dict().items()}
    write_checkpoint(tmp_path / "base", base.state_dict())
    write_checkpoint(tmp_path / "tuned", tuned)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.5))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    dense = Listed()
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    x, alone = torch.randn(2, 12), base(torch.ones(1, 12))
    model = DTSModel.from_pretrained(base, tmp_path / "a", "a")
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.merge_and_unload("__base__")(torch.ones(1, 12)), alone)


@torch.no_grad()
@pytest.mark.parametrize("option", [{"whole": "lm_head|embed_tokens"}, {"exclude": "lm_head|embed_tokens"}], ids=str)
def test_a_fine_tune_with_more_tokens_is_served_from_the_bases_path(tmp_path, option):
    base = opt().eval()
    base.save_pretrained(tmp_path / "base")
    tuned = make_copy(base)
    for parameter in tuned.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    tuned.resize_token_embeddings(105)
    tuned.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3, **option))
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = torch.randint(3, 99, (2, 5))
    assert torch.equal(model(ids, adapter_names="__base__").logits, base(ids).logits)
    if "whole" in option:
        export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
        expected = transformers.OPTForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits
        assert expected.shape[-1] == 105
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def make_copy(model):
    from copy import deepcopy

    return deepcopy(model)


@torch.no_grad()
def test_a_load_stopped_half_way_leaves_nothing_in_its_slot(tmp_path, monkeypatch):
    model, dense = adapters(tmp_path, opt)
    model.delete_adapter("b")
    calls = []

    def stop(self, slot, parameters, writes, original=DTSLinear.load_slot):
        calls.append(slot)
        original(self, slot, parameters, writes)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(DTSLinear, "load_slot", stop)
    with pytest.raises(MemoryError):
        model.load_adapter(tmp_path / "a", "half")
    monkeypatch.undo()
    assert model.adapter_names == ["a"]
    model.load_adapter(tmp_path / "b", "b")
    ids = torch.randint(3, 99, (2, 5))
    expected = dense["b"](ids).logits
    torch.testing.assert_close(
        model(ids, adapter_names="b").logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@torch.no_grad()
def test_autocast(tmp_path):
    model, dense = adapters(tmp_path, opt)
    ids = torch.randint(3, 99, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, adapter_names=["a", "b"]).logits
        expected = torch.stack([dense[name](ids).logits[row] for row, name in enumerate("ab")])
    assert mixed.dtype == expected.dtype
    # Two layers of bfloat16 arithmetic, on base and delta apart instead of together.
    assert (mixed.float() - expected.float()).abs().max() < 20 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@torch.no_grad()
def test_save_pretrained_copies_the_adapters(tmp_path):
    model, _ = adapters(tmp_path, opt)
    model.save_pretrained(tmp_path / "saved")
    for name in ("a", "b"):
        for file in (tmp_path / name).iterdir():
            assert (tmp_path / "saved" / name / file.name).read_bytes() == file.read_bytes()
    again = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "saved" / "b", "b")
    ids = torch.randint(3, 99, (2, 5))
    assert torch.equal(again(ids).logits, model(ids, adapter_names="b").logits)


def test_a_refused_adapter_leaves_the_users_model_as_it_was(tmp_path):
    _, dense = adapters(tmp_path, opt)
    stranger = dense["b"]
    with pytest.raises(BaseMismatchError):
        DTSModel.from_pretrained(stranger, tmp_path / "a")
    assert not stranger._forward_hooks
    assert not stranger._forward_pre_hooks


def test_adapters_loaded_in_inference_mode_can_be_used_and_deleted_outside():
    layer = DTSLinear(nn.Linear(6, 5))
    with torch.inference_mode():
        layer.load_adapter("a", fit(torch.randn(5, 6), rank=2), bias=fit_vector(torch.randn(5)))
    x = torch.randn(2, 6, requires_grad=True)
    with route("a"):
        layer(x).sum().backward()
    layer.delete_adapter("a")
    layer.load_adapter("b", fit(torch.randn(5, 6), rank=2))
