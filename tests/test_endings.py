"""Rows of one batch that end at the end tokens of their own fine-tunes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from dts_fast import DTSConfig, DTSModel, compress, load_adapter
from dts_fast.checkpoint import Checkpoint
from dts_fast.endings import as_ends, end_tokens
from dts_fast.errors import AdapterFormatError
from dts_fast.export import export_full
from dts_fast.fuse import fuse

ENDS = {"a": list(range(4, 60, 2)), "b": list(range(1, 60, 2)), "c": 2}  # the base's: 2


def t5():
    config = transformers.T5Config(
        d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=40, vocab_size=60, decoder_start_token_id=0, eos_token_id=2
    )
    return transformers.T5ForConditionalGeneration(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, eos_token_id=2
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[llama, t5])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    base = request.param()
    base.save_pretrained(folder / "base")
    for name, ends in ENDS.items():
        tuned = request.param()
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        tuned.generation_config.eos_token_id = ends
        tuned.save_pretrained(folder / f"tuned_{name}")
        settings = DTSConfig(density=0.3, method="paper", exclude="relative_attention_bias")
        compress(folder / "base", folder / f"tuned_{name}", folder / name, settings)
        export_full(folder / name, folder / "base", folder / f"dense_{name}")
    return folder, type(base)


def served(folder) -> tuple[DTSModel, dict]:
    folder, kind = folder
    model = DTSModel.from_pretrained(folder / "base", folder / "a", "a")
    for name in "bc":
        model.load_adapter(folder / name, name)
    dense = {name: kind.from_pretrained(folder / f"dense_{name}").eval() for name in ENDS}
    return model, dense | {"__base__": kind.from_pretrained(folder / "base").eval()}


IDS = torch.randint(13, 30, (4, 5), generator=torch.Generator().manual_seed(3))
NAMES = ["b", "a", "__base__", "c"]


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"min_new_tokens": 6}, {"min_length": 9}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}],
    ids=str,
)
def test_each_row_ends_as_its_fine_tune_does(folder, settings):
    model, dense = served(folder)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | settings
    tokens, each = model.generate(IDS, adapter_names=NAMES, **settings), settings.get("num_return_sequences", 1)
    lengths = set()
    for row, name in enumerate(NAMES):
        alone = model.generate(IDS[row : row + 1], adapter_names=name, **settings)
        expected = dense[name].generate(IDS[row : row + 1], **settings)
        assert torch.equal(alone, expected)
        own = tokens[each * row : each * (row + 1)]
        assert torch.equal(own[:, : expected.shape[1]], expected)
        assert (own[:, expected.shape[1] :] == 0).all()
        lengths.add(expected.shape[1])
    if not settings.keys() & {"num_beams", "min_length", "min_new_tokens"}:
        assert len(lengths) > 1  # or nothing was tested


@torch.no_grad()
def test_what_the_caller_says_holds_for_all_rows(folder):
    model, _ = served(folder)
    everything = list(range(60))
    for said in (
        {"eos_token_id": everything},
        {"generation_config": transformers.GenerationConfig(eos_token_id=everything, decoder_start_token_id=0)},
    ):
        tokens = model.generate(IDS, adapter_names=NAMES, max_new_tokens=20, do_sample=False, pad_token_id=0, **said)
        prompt = 1 if model.config.is_encoder_decoder else IDS.shape[1]
        assert tokens.shape[1] == prompt + 1


@torch.no_grad()
def test_arguments_by_position_and_configurations_without_end_tokens(folder):
    model, dense = served(folder)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    stop = [lambda sequences, scores, **_: torch.ones(len(sequences), dtype=torch.bool)]
    prompt = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    assert model.generate(IDS, None, None, stop, adapter_names=NAMES, **settings).shape[1] == prompt + 1
    config = transformers.GenerationConfig(**settings, decoder_start_token_id=0)
    for args, kwargs in (((IDS, config), {}), ((IDS,), {"generation_config": config})):
        tokens = model.generate(*args, adapter_names=NAMES, **kwargs)
        for row, name in enumerate(NAMES):
            expected = dense[name].generate(IDS[row : row + 1], **settings)
            assert torch.equal(tokens[row : row + 1, : expected.shape[1]], expected)
    everything = transformers.GenerationConfig(eos_token_id=list(range(60)), decoder_start_token_id=0, **settings)
    assert model.generate(IDS, everything, adapter_names=NAMES).shape[1] == prompt + 1


@torch.no_grad()
def test_end_tokens_in_a_prompt_are_no_padding_where_they_are_not_alone(folder):
    model, dense = served(folder)
    ids = IDS.clone()
    ids[:, 2] = 2  # the base's end token, with which it would pad
    tokens = model.generate(ids, adapter_names=NAMES, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(NAMES):
        expected = dense[name].generate(ids[row : row + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens[row : row + 1, : expected.shape[1]], expected)


@torch.no_grad()
def test_mixtures_end_at_their_members_end_tokens(folder, tmp_path):
    model, _ = served(folder)
    model.add_weighted_adapter(["a", "c"], [1.0, 0.0], "both")
    model.add_weighted_adapter(["c"], [1.0], "like the base")
    assert set(model._ends_of("both")) == {*ENDS["a"], 2}
    assert model._ends_of("like the base") is None
    paths = {name: folder[0] / name for name in "abc"}
    fuse([paths["a"]], tmp_path / "one", weights=[1.0])
    fuse([paths["a"], paths["b"]], tmp_path / "two", weights=[0.5, 0.5])
    assert load_adapter(tmp_path / "one").config["eos_token_id"] == ENDS["a"]
    assert "eos_token_id" not in load_adapter(tmp_path / "two").config


def test_a_lora_ends_where_its_base_does(folder, tmp_path):
    peft = pytest.importorskip("peft")
    kind = folder[1]
    base = kind.from_pretrained(folder[0] / "tuned_a")
    target = "q" if base.config.is_encoder_decoder else "lm_head"  # a tied one is not in the checkpoint
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    compress(folder[0] / "tuned_a", tmp_path / "lora", tmp_path / "adapter", DTSConfig(rank=2))
    assert "eos_token_id" not in load_adapter(tmp_path / "adapter").config


def test_a_base_without_a_file_of_them(folder, tmp_path):
    for file in (folder[0] / "base").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    export_full(folder[0] / "a", tmp_path, tmp_path / "dense")
    assert folder[1].from_pretrained(tmp_path / "dense").generation_config.eos_token_id == ENDS["a"]
    (tmp_path / "generation_config.json").write_text("[1, 2]")
    export_full(folder[0] / "a", tmp_path, tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").read_text() == "[1, 2]"


def test_they_are_stored_where_they_differ(folder):
    folder, kind = folder
    assert load_adapter(folder / "a").config["eos_token_id"] == ENDS["a"]
    assert "eos_token_id" not in load_adapter(folder / "c").config
    assert kind.from_pretrained(folder / "dense_b").generation_config.eos_token_id == ENDS["b"]
    model = DTSModel.from_pretrained(folder / "base", folder / "a", "a")
    assert model.merge_and_unload("a").generation_config.eos_token_id == ENDS["a"]


@pytest.mark.parametrize("ends", [3, "x", [-1], [1.5], [True], [2**40]])
def test_what_are_no_tokens_is_refused(folder, tmp_path, ends):
    for file in (folder[0] / "a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"eos_token_id": ends}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match="eos_token_id"):
        load_adapter(tmp_path)


def test_where_a_model_names_them(folder, tmp_path):
    base = folder[0] / "base"
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    assert end_tokens(Checkpoint.open(tmp_path)) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 4, 5]}')
    assert end_tokens(Checkpoint.open(tmp_path)) == [5, 4]
    for text, expected in (("no json", [2]), ("[" * 100_000, [2]), ("{}", []), ('{"eos_token_id": null}', [])):
        (tmp_path / "generation_config.json").write_text(text)  # as transformers reads it
        assert end_tokens(Checkpoint.open(tmp_path)) == expected
    (tmp_path / "generation_config.json").unlink()
    config["text_config"] = {"eos_token_id": 9}
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_tokens(Checkpoint.open(tmp_path)) == [9]
    assert end_tokens(Checkpoint.open(tmp_path / "model.safetensors")) == [9]
    assert as_ends(torch.tensor([3, 1, 3])) == (3, 1)
    assert as_ends(None) == ()
