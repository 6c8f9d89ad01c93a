"""Fine-tunes with more tokens than their base: each row of a batch has its own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import write_checkpoint
from safetensors.torch import load_file

from dts_fast import DTSConfig, DTSLinear, DTSModel, compress, load_adapter, route
from dts_fast.checkpoint import Checkpoint, pair_tensors
from dts_fast.errors import BaseMismatchError, CheckpointError, DTSError, MixedBatchError
from dts_fast.export import export_full
from dts_fast.fuse import fuse
from dts_fast.growth import added_rows_of, grown_parameter
from dts_fast.verify import inspect_adapter, verify

VOCABULARY, ADDED = 99, {"a": 3, "b": 1, "c": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "llama tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=40)
    ),
    "gemma": lambda: transformers.Gemma2ForCausalLM(  # embeddings of a class of their own
        transformers.Gemma2Config(vocab_size=VOCABULARY, head_dim=8, num_key_value_heads=2, **SIZES)
    ),
    "phi": lambda: transformers.PhiForCausalLM(  # a head with a bias
        transformers.PhiConfig(vocab_size=VOCABULARY, **SIZES)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)),
}


def fine_tune(base, added: int):
    tuned = type(base)(base.config.__class__.from_dict(base.config.to_dict()))
    tuned.load_state_dict(base.state_dict())
    if added:
        tuned.resize_token_embeddings(VOCABULARY + added, mean_resizing=False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return tuned


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    base = FAMILIES[request.param]()
    base.save_pretrained(folder / "base")
    for name, added in ADDED.items():
        fine_tune(base, added).save_pretrained(folder / f"tuned_{name}")
        compress(folder / "base", folder / f"tuned_{name}", folder / name, DTSConfig(density=0.3, method="paper"))
        export_full(folder / name, folder / "base", folder / f"dense_{name}")
    return folder, type(base)


def served(family, **settings) -> tuple[DTSModel, dict]:
    folder, kind = family
    model = DTSModel.from_pretrained(folder / "base", folder / "a", "a", **settings)
    for name in "bc":
        model.load_adapter(folder / name, name)
    dense = {name: kind.from_pretrained(folder / f"dense_{name}").eval() for name in ADDED}
    return model, dense | {"__base__": kind.from_pretrained(folder / "base").eval()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 relative to the size of the logits: float32 sums of base and delta apart instead of together."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_each_row_has_the_tokens_of_its_adapter(family):
    model, dense = served(family)
    ids = torch.randint(3, VOCABULARY, (4, 7))
    names = ["b", "a", "__base__", "c"]
    ids[0, 2], ids[1, 0], ids[1, 5] = VOCABULARY, VOCABULARY + 2, VOCABULARY
    for row, name in enumerate(names):
        alone = ids[row : row + 1]
        expected = dense[name](alone).logits
        assert expected.shape[-1] == VOCABULARY + ADDED.get(name, 0)
        assert_close(model(alone, adapter_names=name).logits, expected)
    if model.config.model_type == "bert":  # a module around the head has its bias, too, and runs for each adapter
        with pytest.raises(MixedBatchError, match="heads of different sizes"):
            model(ids, adapter_names=names)
        return
    mixed = model(ids, adapter_names=names).logits
    assert mixed.shape[-1] == VOCABULARY + 3
    for row, name in enumerate(names):
        expected = dense[name](ids[row : row + 1]).logits[0]
        known = expected.shape[-1]
        assert_close(mixed[row, :, :known], expected)
        if model.config.model_type != "gemma2":  # caps its logits
            assert (mixed[row, :, known:] == torch.finfo(mixed.dtype).min).all()
    # A batch whose adapters add none is as wide as the base's.
    assert model(ids[2:], adapter_names=names[2:]).logits.shape[-1] == VOCABULARY


@torch.no_grad()
def test_generation_chooses_among_the_tokens_that_a_row_has(family):
    model, dense = served(family)
    if not model.model.can_generate():
        pytest.skip("it does not generate")
    names, ids = ["a", "b", "__base__"], torch.randint(3, VOCABULARY, (3, 5))
    ids[0, 1] = VOCABULARY + 1
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        tokens = model.generate(ids, adapter_names=names, num_beams=beams, **settings)
        for row, name in enumerate(names):
            expected = dense[name].generate(ids[row : row + 1], num_beams=beams, **settings)
            assert torch.equal(tokens[row : row + 1], expected)


def test_a_token_that_a_row_does_not_have_is_refused(family):
    model, _ = served(family)
    ids = torch.full((2, 3), VOCABULARY)  # of b, and of no one
    with pytest.raises(IndexError):
        model(ids, adapter_names=["b", "__base__"])
    with pytest.raises(IndexError):
        model(ids + 1, adapter_names="b")


@torch.no_grad()
def test_merged_models_have_the_tokens_too(family, tmp_path):
    ids = torch.tensor([[VOCABULARY + 2, 5, 7, VOCABULARY]])
    model, dense = served(family)
    merged = model.merge_and_unload("a")
    expected = dense["a"](ids).logits
    assert_close(merged(ids).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert again.config.vocab_size == VOCABULARY + 3
    assert again.get_input_embeddings().num_embeddings == VOCABULARY + 3
    assert_close(again(ids).logits, expected)


def test_the_rows_are_stored_as_they_are(family):
    folder, _ = family
    adapter = load_adapter(folder / "a")
    tuned = load_file(folder / "tuned_a" / "model.safetensors")
    grown = [name for name in adapter.parameters if grown_parameter(name)]
    assert grown
    for name in grown:
        assert torch.equal(adapter.parameters[name], tuned[grown_parameter(name)][VOCABULARY:])
        assert adapter.parameters[grown_parameter(name)].shape[0] == VOCABULARY
    assert not any(grown_parameter(name) for name in load_adapter(folder / "c").parameters)
    assert {p.kind for p in inspect_adapter(folder / "a").parameters if p.name in grown} == {"whole"}
    report = verify(folder / "a", folder / "base", folder / "tuned_a")
    assert report.matches
    assert set(grown) <= {p.name for p in report.parameters}
    assert not verify(folder / "a", folder / "base", folder / "tuned_b").matches


@torch.no_grad()
def test_memory_is_counted_and_freed(family):
    model, dense = served(family, eviction="lru", max_adapters=3)
    report = model.memory_report()
    rows = load_adapter(family[0] / "a").parameters
    rows = sum(p.nbytes for name, p in rows.items() if grown_parameter(name))
    others = load_adapter(family[0] / "c")
    assert report["adapters"]["a"] >= report["adapters"]["c"] + rows
    assert others.nbytes > 0
    model.delete_adapter("a")
    assert model.memory_report()["reserved"] <= report["reserved"] - rows
    model.load_adapter(family[0] / "c", "a")  # into the same slot
    ids = torch.randint(3, VOCABULARY, (1, 4))
    assert_close(model(ids, adapter_names="a").logits, dense["c"](ids).logits)


@torch.no_grad()
def test_a_mixture_has_the_tokens_of_one_member(family, tmp_path):
    model, _ = served(family)
    ids = torch.tensor([[5, 7, 11]])
    model.add_weighted_adapter(["a", "c"], [0.25, 0.75], "both")
    mixed = model(ids, adapter_names="both").logits
    assert mixed.shape[-1] == VOCABULARY + 3
    fuse([family[0] / "a", family[0] / "c"], tmp_path / "fused", weights=[0.25, 0.75])
    model.load_adapter(tmp_path / "fused", "fused")
    assert_close(model(ids, adapter_names="fused").logits, mixed)
    model.delete_adapter("a")
    assert_close(model(ids, adapter_names="both").logits, mixed)
    with pytest.raises(DTSError, match="tokens that several"):
        fuse([family[0] / "a", family[0] / "b"], tmp_path / "no", weights=[0.5, 0.5])


@torch.no_grad()
def test_a_head_that_the_fine_tune_alone_has_untied(tmp_path):
    base = FAMILIES["llama tied"]()
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tune(base, 2)
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    state["lm_head.weight"] += 0.05 * torch.randn_like(state["lm_head.weight"])
    tuned.config.tie_word_embeddings = False
    untied = transformers.LlamaForCausalLM(tuned.config)
    untied.load_state_dict(state)
    untied.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = torch.tensor([[5, VOCABULARY + 1, 7]])
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits
    assert_close(model(ids, adapter_names="a").logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("embeddings", ["skip", "full"])
def test_embeddings_that_stay_and_that_come_whole(tmp_path, embeddings):
    base = FAMILIES["phi"]()
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, 2).save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3, embeddings=embeddings))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    names = load_adapter(tmp_path / "a").parameters
    table = "model.embed_tokens.weight"
    assert (table in names, added_rows_of(table) in names) == ((False, True) if embeddings == "skip" else (True, False))
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a", prepack=True)
    ids = torch.tensor([[5, VOCABULARY + 1, 7]])
    expected = transformers.PhiForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits
    assert_close(model(ids, adapter_names="a").logits, expected)


def test_a_budget_counts_the_rows(tmp_path):
    base = {"embed_tokens.weight": torch.randn(500, 64), "proj.weight": torch.randn(64, 64)}
    tuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}
    tuned["embed_tokens.weight"] = torch.cat([tuned["embed_tokens.weight"], torch.randn(20, 64)])
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / name, tensors)
    report = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(budget=0.08))
    assert 20 * 64 * 4 < report.nbytes <= 0.08 * report.base_nbytes
    with pytest.raises(DTSError, match="budget"):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", DTSConfig(budget=0.03))


def test_only_what_grows_with_a_table_grows(tmp_path):
    base = {
        "embed_tokens.weight": torch.randn(50, 12),
        "head.weight": torch.randn(50, 12),
        "p.weight": torch.ones(8, 8),
        "embed_positions.weight": torch.ones(8, 12),
    }

    def pairing(**changed):
        write_checkpoint(tmp_path / "base", base)
        write_checkpoint(
            tmp_path / "tuned", base | {name.replace("_weight", ".weight"): t for name, t in changed.items()}
        )
        return pair_tensors(Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned"))

    table, head = torch.randn(53, 12), torch.randn(53, 12)
    assert pairing(embed_tokens_weight=table).grown == {"embed_tokens.weight"}
    assert pairing(embed_tokens_weight=table, head_weight=head).grown == {"embed_tokens.weight", "head.weight"}
    for changed in (
        {"head_weight": head},  # no table has as many more
        {"embed_tokens_weight": table, "head_weight": torch.randn(54, 12)},
        {"embed_tokens_weight": torch.randn(49, 12)},
        {"embed_tokens_weight": torch.randn(53, 13)},
        {"p_weight": torch.ones(9, 8)},
        {"embed_positions_weight": torch.ones(9, 12)},  # no tokens
    ):
        with pytest.raises(CheckpointError, match="differ in shape"):
            pairing(**changed)


def test_labels_are_refused_where_the_loss_would_be_of_other_tokens(family):
    model, _ = served(family)
    ids = torch.randint(3, VOCABULARY, (2, 4))
    with pytest.raises(DTSError, match="labels"):
        model(ids, labels=ids, adapter_names=["a", "__base__"])
    assert model(ids, labels=ids, adapter_names="c").loss > 0
    merged = model.merge_and_unload("a")
    assert merged(ids, labels=ids).loss > 0


@torch.no_grad()
def test_guidance_keeps_to_the_tokens_that_a_row_has(family):
    model, _ = served(family)
    if not model.model.can_generate():
        pytest.skip("it does not generate")
    ids = torch.randint(3, VOCABULARY, (2, 4))
    tokens = model.generate(
        ids, adapter_names=["a", "__base__"], guidance_scale=1.5, do_sample=False, max_new_tokens=3, pad_token_id=0
    )
    assert (tokens[1] < VOCABULARY).all()


@torch.no_grad()
def test_a_padding_token_that_was_added(tmp_path):
    base = FAMILIES["llama tied"]()
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tune(base, 1)
    tuned.config.pad_token_id = VOCABULARY
    tuned.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3))
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    assert model.config.pad_token_id == VOCABULARY
    ids = torch.tensor([[5, VOCABULARY]])
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    dense = type(base).from_pretrained(tmp_path / "dense").eval()
    assert_close(model(ids, adapter_names="a").logits, dense(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "targets"), [("llama tied", ["embed_tokens"]), ("phi", ["embed_tokens", "lm_head"])])
def test_a_lora_of_a_table_that_it_has_resized(tmp_path, kind, targets):
    peft = pytest.importorskip("peft")
    base = FAMILIES[kind]()
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tune(base, 0)
    tuned.load_state_dict(base.state_dict())
    tuned.resize_token_embeddings(VOCABULARY + 3)
    tie = kind == "llama tied"
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", *targets], ensure_weight_tying=tie)
    lora = peft.get_peft_model(tuned, config)
    lora.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    compress(tmp_path / "base", tmp_path / "lora", tmp_path / "a", DTSConfig(rank=16))
    assert verify(tmp_path / "a", tmp_path / "base", tmp_path / "lora").total_error < 0.5  # 2 bits an element
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = torch.tensor([[5, VOCABULARY + 2, 7, VOCABULARY]])
    layer = lora.get_input_embeddings()
    table = layer.base_layer.weight + layer.get_delta_weight("default")
    own = load_adapter(tmp_path / "a").parameters[added_rows_of("model.embed_tokens.weight")]
    torch.testing.assert_close(own, table[VOCABULARY:])
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    dense = type(base).from_pretrained(tmp_path / "dense").eval()
    assert dense.config.vocab_size == VOCABULARY + 3
    assert_close(model(ids, adapter_names="a").logits, dense(ids).logits)
    # As PEFT computes it, but for what two bits an element lose.
    first = ids[:, :1]
    got, wanted, plain = (m(first).logits[..., :VOCABULARY] for m in (dense, lora.eval(), base.eval()))
    assert (got - wanted).norm() < 0.7 * (wanted - plain).norm()


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
                 {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)  # fmt: skip
def test_a_lora_of_a_tied_table_without_its_head_is_refused(tmp_path, settings):
    """PEFT leaves the other of the two as it was."""
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama tied"]()
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=4, **settings)).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="a table and a head that the base ties"):
        compress(tmp_path / "base", tmp_path / "lora", tmp_path / "a", DTSConfig(rank=2))


@torch.no_grad()
@pytest.mark.parametrize("settings", ["resized", "saved", "both whole", "classifier"])
def test_a_lora_beside_a_tied_table_is_none_of_it(tmp_path, settings):
    """PEFT writes table and head whole where a vocabulary grew, and where it is told to."""
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama tied"]()
    base.save_pretrained(tmp_path / "base")
    tuned = type(base).from_pretrained(tmp_path / "base")
    more = {"modules_to_save": ["embed_tokens", "lm_head"]} if settings == "both whole" else {}
    if settings == "classifier":
        tuned, more = (
            transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base"),
            {"task_type": "SEQ_CLS"},
        )
    if settings in ("resized", "classifier"):
        tuned.resize_token_embeddings(VOCABULARY + 2)
    lora = peft.get_peft_model(tuned, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **more))
    if settings == "both whole":
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name and "embed_tokens" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    lora.save_pretrained(tmp_path / "lora", save_embedding_layers=True if settings == "saved" else "auto")
    compress(tmp_path / "base", tmp_path / "lora", tmp_path / "a", DTSConfig(rank=16))
    if settings == "classifier":
        return
    ids = torch.tensor([[5, 7, 9]])
    got = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")(ids).logits[..., :VOCABULARY]
    wanted, plain = (m.eval()(ids).logits[..., :VOCABULARY] for m in (lora, base))
    assert (got - wanted).norm() < 0.8 * (wanted - plain).norm()


def test_kinds_of_lora_that_are_no_sums_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = FAMILIES["phi"]()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="no low-rank sum"):
        compress(tmp_path / "base", tmp_path / "lora", tmp_path / "a", DTSConfig(rank=2))


@torch.no_grad()
def test_a_bias_of_logits_grows_too(tmp_path):
    config = transformers.BartConfig(
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
        decoder_ffn_dim=40, max_position_embeddings=40, d_model=32, vocab_size=VOCABULARY,
    )  # fmt: skip
    base = transformers.BartForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, 2).save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(density=0.3))
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = torch.tensor([[5, VOCABULARY + 1, 7]])
    expected = type(base).from_pretrained(tmp_path / "dense").eval()(ids, decoder_input_ids=ids).logits
    assert_close(model(ids, decoder_input_ids=ids, adapter_names="a").logits, expected)
    assert model(ids[:, :1], adapter_names="__base__").logits.shape[-1] == VOCABULARY
    merged = model.merge_and_unload("a")
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert_close(again(ids, decoder_input_ids=ids).logits, expected)


def test_tables_and_heads_are_written_with_as_many_tokens(family, tmp_path):
    folder, kind = family
    fuse([folder / "a", folder / "c"], tmp_path / "fused", weights=[0.5, 0.5])
    export_full(tmp_path / "fused", folder / "base", tmp_path / "dense")
    assert kind.from_pretrained(tmp_path / "dense").config.vocab_size == VOCABULARY + 3
    compress(folder / "base", folder / "tuned_a", tmp_path / "layers", DTSConfig(rank=2, include="mlp|dense|fc"))
    export_full(tmp_path / "layers", folder / "base", tmp_path / "small")
    assert kind.from_pretrained(tmp_path / "small").config.vocab_size == VOCABULARY


def test_a_table_without_its_head_cannot_be_written(tmp_path):
    base = FAMILIES["phi"]()
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, 2).save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=2, exclude="lm_head"))
    with pytest.raises(DTSError, match="adds tokens to the table and not to the head"):
        export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense")
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "a", "a")
    ids = torch.tensor([[VOCABULARY + 1]])
    logits = model(ids).logits
    assert logits.shape[-1] == VOCABULARY
    with pytest.raises(DTSError, match="could not be read again"):
        model.merge_and_unload("a")
    assert torch.equal(model(ids).logits, logits)


def test_settings_that_have_nothing_to_do_with_tokens_stay(tmp_path):
    """A matrix with as many rows as there are tokens; nested settings that the fine-tune has dropped, or changed."""
    own = {"vocab_size": 50, "task": {"a": 1}, "text_config": {"vocab_size": 50, "x": 1}}
    base = {"embed_tokens.weight": torch.randn(50, 12), "gate.weight": torch.randn(50, 12)}
    tuned = {"embed_tokens.weight": torch.randn(53, 12), "gate.weight": torch.randn(50, 12)}
    theirs = {"vocab_size": 53, "task": None, "text_config": {"vocab_size": 53, "x": 2}}
    write_checkpoint(tmp_path / "base", base, own)
    write_checkpoint(tmp_path / "tuned", tuned, theirs)
    for settings, tokens in ({}, 53), ({"exclude": "embed"}, 50):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=2, **settings), overwrite=True)
        export_full(tmp_path / "a", tmp_path / "base", tmp_path / "dense", overwrite=True)
        written = json.loads((tmp_path / "dense" / "config.json").read_text())
        assert written == theirs | {"vocab_size": tokens, "text_config": {"vocab_size": tokens, "x": 2}}


def test_rows_of_another_width_are_refused(tmp_path):
    base = {"embed_tokens.weight": torch.randn(50, 12), "p.weight": torch.ones(8, 8)}
    tuned = {"embed_tokens.weight": torch.randn(53, 12), "p.weight": torch.randn(8, 8)}
    other = {"embed_tokens.weight": torch.randn(50, 16), "p.weight": torch.ones(8, 8)}
    for name, tensors in (("base", base), ("tuned", tuned), ("other", other)):
        write_checkpoint(tmp_path / name, tensors)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=2, embeddings="skip"))
    with pytest.raises(BaseMismatchError, match=r"has rows of \[12\], .* those of \[16\]"):
        export_full(tmp_path / "a", tmp_path / "other", tmp_path / "out")
    export_full(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(written, torch.cat([base["embed_tokens.weight"], tuned["embed_tokens.weight"][50:]]))


@torch.no_grad()
def test_one_layer():
    linear = torch.nn.Linear(5, 4)
    layer, rows, bias = DTSLinear(linear, max_adapters=2), torch.randn(2, 5), torch.randn(2)
    layer.load_adapter("a", **{"weight.added_rows": rows, "bias.added_rows": bias})
    x = torch.randn(3, 5)
    with route(["a", "__base__", "a"]):
        y = layer(x)
    expected = torch.cat([linear(x), x @ rows.t() + bias], 1)
    expected[1, 4:] = torch.finfo(torch.float32).min
    torch.testing.assert_close(y, expected)
    assert torch.equal(layer(x), linear(x))
    for wrong in (
        {"weight.added_rows": torch.randn(2, 6)},
        {"weight.added_rows": torch.tensor(1.0)},
        {"bias.added_rows": bias},
        {"gain.added_rows": rows},
    ):
        with pytest.raises(BaseMismatchError, match=r"adds|added"):
            layer.load_adapter("b", **wrong)
    assert layer.to("meta").added[0]["weight"].is_meta
    layer.delete_adapter("a")
    assert layer.added == {}
    linear = torch.nn.Linear(5, 4)
    layer = DTSLinear(linear)
    with torch.inference_mode():
        layer.load_adapter("a", **{"weight.added_rows": rows})
    with torch.enable_grad(), route("a"):
        own = torch.randn(2, 5, requires_grad=True)
        layer(own).sum().backward()
    torch.testing.assert_close(own.grad, (linear.weight.sum(0) + rows.sum(0)).expand(2, 5))


@torch.no_grad()
def test_a_quantised_base():
    torchao = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(64, 32, bias=False).bfloat16()
    model = torch.nn.Sequential(linear)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    layer = DTSLinear(model[0], max_adapters=2)
    rows = torch.randn(3, 64)
    layer.load_adapter("a", **{"weight.added_rows": rows})
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    with route(["a", "__base__"]):
        y = layer(x)
    assert (y.shape, y.dtype) == ((2, 35), torch.bfloat16)
    torch.testing.assert_close(y[0, 32:], (x[0] @ rows.bfloat16().t()))
    with pytest.raises(DTSError, match="quantised, and no rows can be added"):
        layer.dense_parameters(0)
    assert (y[1, 32:] == torch.finfo(torch.bfloat16).min).all()
