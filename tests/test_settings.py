"""Settings of a configuration that fine-tunes change: what one model serves beside others, and what it refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from dts_fast import DTSConfig, DTSModel, compress, fuse
from dts_fast.errors import BaseMismatchError, CheckpointError, DTSError
from dts_fast.export import export_full
from dts_fast.settings import conflicts

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 56, "vocab_size": 60}


def save(kind: str, folder: Path, seed: int, like=None, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, kind.partition("For")[0].removesuffix("Model") + "Config")(**{**SMALL, **settings})
    model = getattr(transformers, kind)(config).eval()
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (seed > 0)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def llamas(tmp_path):
    """A base, and adapters "plain" and, of a fine-tune with other settings, "other"."""

    def make(**settings) -> Path:
        base = save("LlamaForCausalLM", tmp_path / "base", 0)
        for seed, (name, own) in enumerate({"plain": {}, "other": settings}.items(), start=1):
            save("LlamaForCausalLM", tmp_path / f"tuned-{name}", seed, base, **own)
            compress(tmp_path / "base", tmp_path / f"tuned-{name}", tmp_path / name, DTSConfig(rank=4))
        return tmp_path

    return make


DIFFERENT = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, "rope_theta"),
    ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
    ({"hidden_act": "relu"}, "hidden_act"),
]


@pytest.mark.parametrize(("settings", "key"), DIFFERENT, ids=[key for _, key in DIFFERENT])
def test_what_all_rows_share_comes_with_the_first_and_is_refused_behind_it(llamas, settings, key):
    folder = llamas(**settings)
    with pytest.warns(UserWarning, match=rf"settings of the fine-tune, .*{key} = .*those of '__base__' are not"):
        model = DTSModel.from_pretrained(folder / "base", folder / "other", "other")
    ids = torch.randint(0, 60, (1, 9))
    tuned = transformers.LlamaForCausalLM.from_pretrained(folder / "tuned-other")
    merged = {n: p for n, p in model.merge_and_unload().state_dict().items() if n in tuned.state_dict()}
    tuned.load_state_dict(merged)
    model = DTSModel.from_pretrained(folder / "base", folder / "other", "other")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tuned.eval()(ids).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(BaseMismatchError, match=rf"{key}: .*, where the model has"):
        model.load_adapter(folder / "plain", "plain")
    assert model.adapter_names == ["other"]
    for base in (folder / "base", transformers.LlamaForCausalLM.from_pretrained(folder / "base")):
        second = DTSModel.from_pretrained(base, folder / "plain", "plain")
        with pytest.raises(BaseMismatchError, match=rf"{key}: .*, where the model has"):
            second.load_adapter(folder / "other", "other")
    live = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(BaseMismatchError, match=key):
        DTSModel.from_pretrained(live, folder / "other", "other")


def test_what_changes_nothing_that_is_computed_is_no_conflict(llamas):
    folder = llamas(
        use_cache=False, attention_dropout=0.1, initializer_range=0.5, max_position_embeddings=4096, pad_token_id=7
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = DTSModel.from_pretrained(folder / "base", folder / "other", "other")
        model.load_adapter(folder / "plain", "plain")
    assert model.config.use_cache


def changed(config, wanted: dict, own: dict | None = None) -> dict[str, object]:
    """What an adapter wants otherwise than a model has it."""
    own = config.to_dict() if own is None else own
    before = json.dumps([own, wanted], default=str)
    found = {c.key: c.wanted for c in conflicts(config, own, wanted)}
    assert json.dumps([own, wanted], default=str) == before
    return found


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def test_positions_as_releases_of_transformers_write_them():
    plain = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert changed(plain, {"rope_theta": 5e5, "rope_scaling": None, "unsloth_version": "2025.1"}) == {}
    assert changed(plain, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}) == {}
    assert changed(plain, {"rope_theta": 1e4}) == {"rope_parameters.rope_theta": 1e4}
    longer = changed(plain, {"rope_scaling": {"type": "linear", "factor": 8.0}})
    assert longer["rope_parameters.factor"] == 8.0
    assert longer["rope_parameters.rope_type"] == "linear"
    scaled = transformers.LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert changed(scaled, {"rope_theta": 5e5, "rope_scaling": LLAMA3}) == {}
    assert changed(scaled, {"rope_theta": 5e5, "rope_scaling": None})["rope_parameters.rope_type"] == "default"
    assert changed(scaled, {"rope_scaling": {**LLAMA3, "factor": 32.0}}) == {"rope_parameters.factor": 32.0}
    # The base's, where the model has a fine-tune's.
    assert changed(scaled, {}, own=plain.to_dict())["rope_parameters.rope_type"] == "default"
    nested = transformers.LlavaConfig(text_config=plain)
    assert changed(nested, {"text_config": {**plain.to_dict(), "rms_norm_eps": 0.5, "attention_dropout": 0.3}}) == {
        "text_config.rms_norm_eps": 0.5
    }


def test_what_is_written_otherwise_and_means_the_same():
    idle = transformers.Qwen2Config(use_sliding_window=False, sliding_window=32768, max_window_layers=24)
    assert idle.sliding_window is None
    assert changed(idle, {"sliding_window": 32768, "max_window_layers": 21, "head_dim": None}) == {}
    used = transformers.Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=2)
    assert changed(used, {"sliding_window": 32, "max_window_layers": 3}) == {
        "sliding_window": 32, "max_window_layers": 3
    }  # fmt: skip
    llama = transformers.LlamaConfig(**SMALL)
    assert llama.num_key_value_heads == llama.num_attention_heads
    assert changed(llama, {"num_key_value_heads": None, "head_dim": None}) == {}
    assert changed(llama, {"num_key_value_heads": 2}) == {"num_key_value_heads": 2}
    # Of training, of generation, and what other programs leave.
    whisper = transformers.WhisperConfig(forced_decoder_ids=[[1, 2]], suppress_tokens=[5], mask_time_prob=0.05)
    left = {"forced_decoder_ids": None, "suppress_tokens": [], "mask_time_prob": 0.5}
    assert changed(whisper, left) == {}
    marked = transformers.LlamaConfig(**SMALL, unsloth_version="2024.9", model_max_length=5)
    assert changed(marked, {"unsloth_version": "2025.1", "model_max_length": 7}) == {}


STYLES = {  # how the base's config.json has positions, and how the fine-tune's
    "old": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "old, longer": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "new": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    "new, longer": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
    "new, plain": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("old", "new"), ("new", "old"), ("old", "new, longer"), ("new", "old, longer"), ("old", "old, longer"),
     ("new", "new, longer"), ("old", "new, plain"), ("new", "new, plain")],
)  # fmt: skip
def test_bases_and_fine_tunes_of_different_releases(llamas, ours, theirs):
    folder = llamas()
    for name, style in (("base", ours), ("tuned-other", theirs), ("tuned-plain", ours)):
        file = folder / name / "config.json"
        settings = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("rope_")}
        file.write_text(json.dumps(settings | STYLES[style]))
        if name != "base":
            adapter = name.removeprefix("tuned-")
            compress(folder / "base", folder / name, folder / adapter, DTSConfig(rank=4), overwrite=True)
    wanted = transformers.AutoConfig.from_pretrained(folder / "tuned-other").rope_parameters
    same = wanted == transformers.AutoConfig.from_pretrained(folder / "base").rope_parameters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = DTSModel.from_pretrained(folder / "base", folder / "other", "other")
    assert model.config.rope_parameters == wanted
    assert any("settings of the fine-tune" in str(w.message) for w in caught) == (not same)
    export_full(folder / "other", folder / "base", folder / "full")
    assert transformers.AutoConfig.from_pretrained(folder / "full").rope_parameters == wanted
    if same:
        model.load_adapter(folder / "plain", "plain")
    else:
        with pytest.raises(BaseMismatchError, match="rope_parameters"):
            model.load_adapter(folder / "plain", "plain")


@pytest.fixture
def classifiers(tmp_path):
    base = save("BertModel", tmp_path / "base", 0)
    kinds = {
        "three": ("BertForSequenceClassification", 3), "five": ("BertForSequenceClassification", 5),
        "tokens": ("BertForTokenClassification", 5), "spans": ("BertForQuestionAnswering", 2),
    }  # fmt: skip
    for seed, (name, (kind, classes)) in enumerate(kinds.items(), start=1):
        save(kind, tmp_path / f"tuned-{name}", seed, num_labels=classes)
        compress(tmp_path / "base", tmp_path / f"tuned-{name}", tmp_path / name, DTSConfig(rank=2, exclude="pooler"))
    assert base is not None
    return tmp_path


@pytest.mark.filterwarnings("ignore:Some weights")
def test_heads_of_another_kind_are_refused_and_labels_of_other_sizes(classifiers):
    model = DTSModel.from_pretrained(classifiers / "base", classifiers / "three", "three")
    model.load_adapter(classifiers / "five", "five")
    for other in ("tokens", "spans"):
        with pytest.raises(BaseMismatchError, match=r"its class: BertFor.*, where the model has BertForSequenceClass"):
            model.load_adapter(classifiers / other, other)
    ids = torch.randint(0, 60, (2, 5))
    assert model(ids, adapter_names="five").logits.shape == (2, 5)
    assert model(ids, adapter_names="three", labels=torch.tensor([0, 2])).loss.isfinite()
    for names in ("five", ["three", "five"]):
        with pytest.raises(DTSError, match="classes, the model would compute the loss with 3"):
            model(ids, adapter_names=names, labels=torch.tensor([0, 2]))


def test_classifiers_that_decode_share_their_padding(tmp_path):
    base = save("LlamaModel", tmp_path / "base", 0, pad_token_id=None)
    for seed, pad in enumerate((3, 4), start=1):
        save("LlamaForSequenceClassification", tmp_path / f"tuned{pad}", seed, num_labels=3, pad_token_id=pad)
        compress(tmp_path / "base", tmp_path / f"tuned{pad}", tmp_path / f"pad{pad}", DTSConfig(rank=2))
    assert base is not None
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "pad3", "pad3")
    with pytest.raises(BaseMismatchError, match="pad_token_id: 4, where the model has 3"):
        model.load_adapter(tmp_path / "pad4", "pad4")


@pytest.mark.parametrize(
    "config", [{"model_type": "foo", "auto_map": {"AutoModel": "x.Y"}}, {"hidden_size": 8}], ids=["own code", "no type"]
)
def test_models_that_transformers_does_not_know(llamas, config):
    folder = llamas()
    (folder / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"pass the model: DTSModel\.from_pretrained"):
        DTSModel.from_pretrained(folder / "base", folder / "plain", "plain")


def test_an_architecture_that_is_no_class(llamas):
    folder = llamas()
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["pipeline"]}))
    with pytest.raises(BaseMismatchError, match="got LlamaModel"):  # which has no head
        DTSModel.from_pretrained(folder / "base", folder / "plain", "plain")


def test_mixtures_in_files_say_in_what_their_members_differ(llamas):
    folder = llamas(hidden_act="relu", use_cache=False)
    with pytest.warns(UserWarning, match="differ in hidden_act; the mixture has the base's"):
        fuse([folder / "plain", folder / "other"], folder / "mixture", weights=[0.5, 0.5])
