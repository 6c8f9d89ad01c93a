"""`DTSModel` on small random models of four Hugging Face families, against dense checkpoints."""

from __future__ import annotations

import asyncio
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from dts_fast import DTSConfig, DTSModel, compress, fuse, native, route
from dts_fast.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CapacityError,
    DTSError,
    RoutingError,
    UnknownAdapterError,
)
from dts_fast.export import export_full
from dts_fast.routing import current_route

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 56}

FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    ),
    "llama untied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=99, num_labels=3, **SMALL)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SMALL)
    ),
}


@dataclass
class Family:
    """A base, two fine-tunes and their adapters on disk, and inputs for four rows."""

    folder: Path
    inputs: dict[str, torch.Tensor]

    def base(self):
        architecture = json.loads((self.folder / "base" / "config.json").read_text())["architectures"][0]
        return getattr(transformers, architecture).from_pretrained(self.folder / "base").eval()

    def dense(self, name: str):
        """The exported dense checkpoint of an adapter, loaded by transformers alone."""
        target = self.folder / f"dense_{name}"
        if not target.exists():
            export_full(self.folder / name, self.folder / "base", target)
        return type(self.base()).from_pretrained(target).eval()

    def model(self, **kwargs) -> DTSModel:
        model = DTSModel.from_pretrained(self.folder / "base", self.folder / "a", "a", **kwargs)
        model.load_adapter(self.folder / "b", "b")
        return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    base = FAMILIES[request.param]()
    base.save_pretrained(folder / "base")
    for name in ("a", "b"):
        tuned = FAMILIES[request.param]()
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / f"tuned_{name}")
        compress(folder / "base", folder / f"tuned_{name}", folder / name, DTSConfig(density=0.3))
    if request.param == "vit":
        return Family(folder, {"pixel_values": torch.randn(4, 3, 16, 16)})
    return Family(folder, {"input_ids": torch.randint(3, 99, (4, 7))})


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 relative to the size of the logits: float32 sums of base and delta apart instead of together."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_logits_equal_the_dense_checkpoints_single_and_mixed(family):
    model = family.model()
    expected = {name: family.dense(name)(**family.inputs).logits for name in ("a", "b")}
    expected["__base__"] = family.base()(**family.inputs).logits
    for name, logits in expected.items():
        assert_logits_equal(model(**family.inputs, adapter_names=name).logits, logits)
    names = ["b", "__base__", "a", "b"]
    mixed = model(**family.inputs, adapter_names=names).logits
    assert_logits_equal(mixed, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    # The adapters do something that this tolerance can see.
    assert (expected["a"] - expected["b"]).abs().max() > 1e-2 * expected["a"].abs().max()


@torch.no_grad()
def test_active_adapter_disable_and_delete(family):
    model, base = family.model(), family.base()(**family.inputs).logits
    assert (model.adapter_names, model.active_adapter) == (["a", "b"], "a")
    a = model(**family.inputs).logits
    model.set_adapter("b")
    b = model(**family.inputs).logits
    assert not torch.allclose(a, b)
    with model.disable_adapter():
        assert torch.equal(model(**family.inputs).logits, base)
        for names in ("b", ["a", "b", "a", "b"]):
            assert torch.equal(model(**family.inputs, adapter_names=names).logits, base)
        with route("b"):
            assert torch.equal(model(**family.inputs).logits, b)
    assert torch.equal(model(**family.inputs, adapter_names="a").logits, a)
    model.delete_adapter("b")
    assert torch.equal(model(**family.inputs).logits, base)
    model.load_adapter(family.folder / "b", "again")
    assert torch.equal(model(**family.inputs, adapter_names="again").logits, b)
    with pytest.raises(UnknownAdapterError, match="'b'; loaded: 'a', 'again'"):
        model.set_adapter("b")


def test_modes_and_keywords(family):
    base = family.base().train()
    model = DTSModel.from_pretrained(base, family.folder / "a", "a")
    assert not any(module.training for module in model.modules())  # as PEFT's
    assert DTSModel(family.base().train()).training
    assert not DTSModel(family.base()).training
    with pytest.raises(DTSError, match="got dtype, max_adapter: no option of DTSModel"):
        DTSModel.from_pretrained(family.base(), family.folder / "a", "a", max_adapter=64, dtype=torch.bfloat16)
    with pytest.raises(DTSError, match="subfolder"):
        DTSModel.from_pretrained(family.folder / "base", family.folder / "a", "a", subfolder="x")
    with pytest.raises(AttributeError, match=r"no 'disable_adapters'; it has disable_adapter\(\)"):
        model.disable_adapters()
    assert not hasattr(model, "peft_config")
    with pytest.raises(DTSError, match="save_pretrained: the files of 'a' are gone"):
        _without_files(model, family).save_pretrained(family.folder / "saved")
    assert not (family.folder / "saved").exists()
    with pytest.raises(AdapterFormatError, match="adapters in directories below it: a, b"):
        model.load_adapter(family.folder, "all")


def _without_files(model: DTSModel, family: Family) -> DTSModel:
    moved = family.folder / "moved"
    (family.folder / "a").rename(moved)
    try:
        model.save_pretrained(family.folder / "saved")
    finally:
        moved.rename(family.folder / "a")
    return model


@torch.no_grad()
def test_a_state_dict_that_is_loaded_holds_for_rows_of_mixed_batches(family):
    model = family.model()
    before = model(**family.inputs, adapter_names=["a", "b", "__base__", "a"]).logits
    state = {n: t.clone() for n, t in model.state_dict().items()}
    other = {n: t + 0.3 if t.dim() == 1 and t.is_floating_point() else t for n, t in state.items()}
    model.load_state_dict(other)
    alone = model(**family.inputs, adapter_names="__base__").logits
    mixed = model(**family.inputs, adapter_names=["a", "b", "__base__", "a"]).logits
    assert_logits_equal(mixed[2], alone[2])
    assert (mixed - before).abs().amax(-1).min() > 1e-3
    model.load_state_dict(state)
    assert_logits_equal(model(**family.inputs, adapter_names=["a", "b", "__base__", "a"]).logits, before)


def test_what_a_trace_makes_of_a_base_only_call_is_not_kept(family):
    model, x = family.model(), torch.empty(57, 2)  # rows that no other test has
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._calls.routed("__base__", x)
    real = model._calls.routed("__base__", x)
    assert type(real.ids) is torch.Tensor
    assert real.ids.tolist() == [-1] * 57
    assert model._calls.routed("__base__", x) is real


@torch.no_grad()
def test_merge_and_unload_is_the_dense_model(family):
    expected = family.dense("b")(**family.inputs).logits
    merged = family.model().merge_and_unload("b")
    assert type(merged) is type(family.base())
    assert_logits_equal(merged(**family.inputs).logits, expected)
    assert merged.state_dict().keys() == family.base().state_dict().keys()
    unmerged = family.model().merge_and_unload("__base__")
    assert torch.equal(unmerged(**family.inputs).logits, family.base()(**family.inputs).logits)


GENERATION = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama untied", "gpt2"], indirect=True)
@pytest.mark.parametrize("settings", GENERATION, ids=str)
def test_generate_gives_each_row_the_text_of_its_own_model(family, settings):
    model, ids = family.model(), family.inputs["input_ids"][:3]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0} | settings
    # Left padding, as in any batch of prompts.
    ids[0, :2] = 0
    mask = (ids != 0).long()
    names = ["a", "__base__", "b"]
    mixed = model.generate(ids, attention_mask=mask, adapter_names=names, **settings)
    count = settings.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        dense = family.base() if name == "__base__" else family.dense(name)
        alone = dense.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **settings)
        assert torch.equal(mixed[row * count : (row + 1) * count], alone)


def test_bad_names_and_batches_are_refused(family):
    model = family.model()
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'c'; loaded: 'a', 'b', and '__base__'"):
        model(**family.inputs, adapter_names=["a", "c", "a", "a"])
    with pytest.raises(RoutingError, match="3 adapter names for a batch of 4 rows"):
        model(**family.inputs, adapter_names=["a", "b", "a"])
    with pytest.raises(DTSError, match="'a' is loaded already"):
        model.load_adapter(family.folder / "b", "a")
    for names in ({"a", "b"}, {"a": 1}, 3, None, []):
        with pytest.raises(RoutingError, match="one name or a non-empty list"):
            route(names)
    assert torch.isfinite(model(**family.inputs).logits).all()


def test_bases_that_cannot_be_served_are_refused(family):
    model = family.model()
    with pytest.raises(DTSError, match="is in a DTSModel already: its load_adapter"):
        DTSModel(model)
    with pytest.raises(DTSError, match="is in a DTSModel already"):
        DTSModel(model.model)
    bare = family.dense("a")
    other = DTSModel(bare)
    with pytest.raises(DTSError, match="is in a DTSModel already"):
        DTSModel(bare)
    assert DTSModel(other.merge_and_unload("__base__")).adapter_names == []
    empty = DTSModel(family.dense("a").to("meta"))
    for verify in (True, False):
        with pytest.raises(BaseMismatchError, match=r"is not in memory .* Load the base without offloading"):
            empty.load_adapter(family.folder / "a", "a", verify_base=verify)
    with pytest.raises(BaseMismatchError, match="is float64; expected float32, float16 or bfloat16"):
        DTSModel(family.dense("a").double()).load_adapter(family.folder / "a", "a")
    # Where it was changed after adapters have been loaded, too.
    for moved, message in ((model.double, "is float64"), (lambda: model.to("meta"), "is not in memory")):
        moved()
        with pytest.raises(BaseMismatchError, match=message):
            model.load_adapter(family.folder / "b", "another", verify_base=False)


def test_saved_adapters_stay_below_their_directory(family, tmp_path):
    model = family.model()
    for name in ("../evil", str(tmp_path / "evil"), "..", "x" * 300):
        model.load_adapter(family.folder / "a", name)
        with pytest.raises(DTSError, match="is the name of no directory below"):
            model.save_pretrained(tmp_path / "in" / "here")
        model.delete_adapter(name)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_model_keeps_what_it_has(family):
    model = DTSModel.from_pretrained(family.folder / "base", family.folder / "a", "a", max_adapters=1)
    with pytest.raises(CapacityError, match="all 1 slots are taken"):
        model.load_adapter(family.folder / "b", "b")
    assert model.adapter_names == ["a"]


def test_another_base_is_refused_and_nothing_is_loaded(family):
    with pytest.raises(BaseMismatchError, match="not the base the adapter was made for"):
        DTSModel.from_pretrained(family.folder / "tuned_b", family.folder / "a")
    other = FAMILIES["bert" if family.folder.name.startswith("llama") else "llama"]()
    with pytest.raises(BaseMismatchError, match="the model has no parameters for"):
        DTSModel.from_pretrained(other, family.folder / "a")
    wrong = DTSModel(family.dense("b"))
    with pytest.raises(BaseMismatchError):
        wrong.load_adapter(family.folder / "a", "a")
    assert wrong.adapter_names == []
    assert wrong._wrappers == {}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_may_be_loaded_in_half_precision(family, dtype):
    model = DTSModel.from_pretrained(family.folder / "base", family.folder / "a", "a", dtype=dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs.items()}
    logits = model(**inputs, adapter_names=["a", "__base__", "a", "a"]).logits
    assert logits.dtype == dtype
    expected = family.dense("a")(**family.inputs).logits
    # Two layers of half-precision arithmetic against float32.
    error = (logits[[0, 2, 3]].float() - expected[[0, 2, 3]]).abs().max() / expected.abs().max()
    assert error < 20 * torch.finfo(dtype).eps


@torch.no_grad()
def test_a_loaded_model_and_an_outer_route_work_too(family):
    model = DTSModel.from_pretrained(family.base(), family.folder / "a", "a")
    with route(["__base__", "a", "a", "__base__"]):
        logits = model(**family.inputs).logits
    assert torch.equal(logits, model(**family.inputs, adapter_names=["__base__", "a", "a", "__base__"]).logits)


def bert_with_head(tmp_path: Path, name: str, num_labels: int) -> torch.nn.Module:
    """A classifier fine-tuned from a bare encoder without head (names prefixed by ``bert.``), and its adapter."""
    config = transformers.BertConfig(vocab_size=99, **SMALL)
    if not (tmp_path / "base").exists():
        transformers.BertModel(config).save_pretrained(tmp_path / "base")
    config.num_labels = num_labels
    tuned = transformers.BertForSequenceClassification(config).eval()
    tuned.bert.load_state_dict(transformers.BertModel.from_pretrained(tmp_path / "base").state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / f"tuned_{name}")
    compress(tmp_path / "base", tmp_path / f"tuned_{name}", tmp_path / name, DTSConfig(density=1.0, embeddings="full"))
    return tuned


@torch.no_grad()
def test_new_heads_come_with_their_model_class_and_mix_when_of_one_size(tmp_path):
    bert_with_head(tmp_path, "three", 3)
    bert_with_head(tmp_path, "other", 3)
    bert_with_head(tmp_path, "five", 5)
    ids = torch.randint(3, 99, (2, 6))
    model = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "three", "three")
    for name in ("other", "five"):
        model.load_adapter(tmp_path / name, name)
    assert type(model.model) is transformers.BertForSequenceClassification
    expected = {}
    for name, labels in (("three", 3), ("other", 3), ("five", 5)):
        export_full(tmp_path / name, tmp_path / "base", tmp_path / f"dense_{name}")
        config = transformers.BertConfig.from_pretrained(tmp_path / f"tuned_{name}")
        dense = transformers.BertForSequenceClassification(config)
        state = load_file(tmp_path / f"dense_{name}" / "model.safetensors")
        # The base's names have no prefix; the head keeps the fine-tune's.
        dense.load_state_dict({n if n.startswith("classifier") else f"bert.{n}": t for n, t in state.items()})
        expected[name] = dense.eval()(ids).logits
        logits = model(ids, adapter_names=name).logits
        assert logits.shape == (2, labels)
        assert_logits_equal(logits, expected[name])
    mixed = model(ids, adapter_names=["other", "three"]).logits
    assert_logits_equal(mixed, torch.stack([expected["other"][0], expected["three"][1]]))
    with pytest.raises(RoutingError, match="heads of different sizes"):
        model(ids, adapter_names=["five", "three"])


def test_a_head_the_model_lacks_is_said(tmp_path):
    bert_with_head(tmp_path, "three", 3)
    bare = transformers.BertModel.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="classifier"):
        DTSModel.from_pretrained(bare, tmp_path / "three")


@torch.no_grad()
def test_a_base_file_beside_its_config_is_enough(tmp_path):
    """A single .safetensors file with another name, as in shared folders of fine-tunes."""
    tuned = bert_with_head(tmp_path, "three", 3)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "flat").mkdir()
    save_file(tensors, tmp_path / "flat" / "encoder.safetensors", metadata={"format": "pt"})
    (tmp_path / "flat" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    ids = torch.randint(3, 99, (2, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = DTSModel.from_pretrained(tmp_path / "flat" / "encoder.safetensors", tmp_path / "three")
    reference = DTSModel.from_pretrained(tmp_path / "base", tmp_path / "three")
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert type(model.model) is type(tuned)


def test_a_mixture_equals_its_dense_checkpoint(family, tmp_path):
    model = family.model()
    sizes = {path: wrapper.bank.pages.shape for path, wrapper in model._wrappers.items() if hasattr(wrapper, "bank")}
    assert model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "mixed") == {"a": 0.3, "b": 0.7}
    for path, size in sizes.items():
        assert model._wrappers[path].bank.pages.shape == size, "pages are shared"
    fuse([family.folder / "a", family.folder / "b"], tmp_path / "mixed", [0.3, 0.7])
    export_full(tmp_path / "mixed", family.folder / "base", tmp_path / "dense")
    dense = type(family.base()).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        expected = dense(**family.inputs).logits
        names = ["mixed", "mixed", "__base__", "a"]
        base, of_a = model(**family.inputs, adapter_names="__base__").logits, model(**family.inputs).logits
        mixed = model(**family.inputs, adapter_names=names).logits
        torch.testing.assert_close(mixed[:2], expected[:2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed[2:], torch.stack([base[2], of_a[3]]), rtol=1e-4, atol=1e-4)
        # Its members may go; and the file of the mixture gives the same.
        model.delete_adapter("a")
        model.delete_adapter("b")
        torch.testing.assert_close(model(**family.inputs, adapter_names="mixed").logits, expected, rtol=1e-4, atol=1e-4)
        model.load_adapter(tmp_path / "mixed", "file")
        torch.testing.assert_close(model(**family.inputs, adapter_names="file").logits, expected, rtol=1e-4, atol=1e-4)


def test_a_mixture_that_cannot_be_made_changes_nothing(family):
    model = family.model(max_adapters=3)
    for weights, error in (([0.5], DTSError), (None, DTSError)):
        with pytest.raises(error):
            model.add_weighted_adapter(["a", "b"], weights, "mixed")
    with pytest.raises(UnknownAdapterError):
        model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "mixed")
    with pytest.raises(DTSError, match="'a' has no characteristic"):
        model.add_weighted_adapter(["a", "b"], characteristic=torch.ones(3))
    with pytest.raises(DTSError, match="no adapter to choose from"):
        model.select(torch.ones(3))
    assert model.adapter_names == ["a", "b"]
    assert not any(wrapper.parameters_of(2) for wrapper in model._wrappers.values())


def test_a_mixture_that_fails_half_way_leaves_nothing(family):
    model = family.model(max_adapters=3)
    wrappers = list(model._wrappers.values())
    free = [list(w.bank._free) for w in wrappers if hasattr(w, "bank")]

    def fail(slot, members):
        raise DTSError("no")

    wrappers[-1].mix_slots = fail
    with pytest.raises(DTSError, match="no"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mixed")
    assert model.adapter_names == ["a", "b"]
    assert not any(wrapper.parameters_of(2) for wrapper in wrappers)
    assert [list(w.bank._free) for w in wrappers if hasattr(w, "bank")] == free
    del wrappers[-1].mix_slots
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mixed")


@pytest.mark.parametrize("prepack", [False, True])
def test_memory_is_reported_by_adapter(family, prepack):
    if prepack and native.MODULE is None:
        pytest.skip("packed weights are for the native CPU kernels")
    model = family.model(prepack=prepack)
    report = model.memory_report()
    base = sum(p.nbytes for p in family.base().parameters())
    # Packed panels of 32 outputs are padded.
    assert base <= report["base"] <= (2 * base if prepack else base)
    assert report["adapters"].keys() == {"a", "b"}
    assert all(nbytes > 0 for nbytes in report["adapters"].values())
    assert report["reserved"] >= sum(report["adapters"].values())
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both")
    after = model.memory_report()
    assert after["base"] == report["base"]
    model.delete_adapter("b")
    assert model.memory_report()["adapters"].keys() == {"a", "both"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_generate_takes_one_name_for_each_prompt(family):
    model, ids = family.model(), family.inputs["input_ids"][:4]
    for names in (["a", "b"], ["a"], ["a", "b"] * 4):
        with pytest.raises(RoutingError, match=f"{len(names)} adapter names for 4 prompts; expected one name"):
            model.generate(ids, adapter_names=names, max_new_tokens=2)
        with route(names), pytest.raises(RoutingError, match="for 4 prompts"):
            model.generate(ids, max_new_tokens=2)
    with pytest.raises(RoutingError, match="4 adapter names for 1 prompts"):
        model.generate(ids[:1], adapter_names=["a", "b", "a", "b"], num_return_sequences=4, do_sample=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_is_set_is_the_models(family):
    model, ids = family.model(), family.inputs["input_ids"][:2]
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert model.model.generation_config is model.generation_config
    assert model.generate(ids).shape[1] == ids.shape[1] + 2
    model.note = "kept"
    assert model.model.note == model.note == "kept"
    del model.note
    assert not hasattr(model.model, "note")
    with pytest.raises(AttributeError):
        model.active_adapter = "b"
    calls = []

    def watched(*args, forward=model.forward, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = watched
    assert torch.equal(model(ids, adapter_names="a").logits, model.model(ids).logits)
    assert calls == [{"adapter_names": "a"}]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_tasks_of_an_event_loop_have_routes_of_their_own(family):
    model, ids = family.model(), family.inputs["input_ids"][:1]
    expected = {name: model(ids, adapter_names=name).logits for name in ("a", "b", "__base__")}

    async def serve(name: str, pause: float) -> torch.Tensor:
        with route(name) if name != "__base__" else model.disable_adapter():
            await asyncio.sleep(pause)
            logits = model(ids).logits
            await asyncio.sleep(2 * pause)
            assert torch.equal(model(ids).logits, logits)
            return logits

    async def together() -> list[torch.Tensor]:
        # They end in another order than they began in.
        return await asyncio.gather(serve("a", 0.02), serve("b", 0.01), serve("__base__", 0.015))

    for name, logits in zip(expected, asyncio.run(together()), strict=True):
        assert torch.equal(logits, expected[name])
    with route("b"):  # what is entered outside counts for tasks without one of their own
        assert torch.equal(asyncio.run(as_task(model, ids)), expected["b"])
    model.set_adapter("a")
    assert torch.equal(model(ids).logits, expected["a"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_tasks_route_holds_for_the_tasks_that_it_starts(family):
    model, ids = family.model(), family.inputs["input_ids"][:1]
    expected = {name: model(ids, adapter_names=name).logits for name in ("a", "b", "__base__")}
    again = route("b")

    async def parent() -> list[torch.Tensor]:
        with again:
            waited = await asyncio.wait_for(as_task(model, ids), 60)
            with route("a"):
                inner = await asyncio.gather(as_task(model, ids), as_task(model, ids))
            return [waited, model(ids).logits, *inner]

    for name, logits in zip(("b", "b", "a", "a"), asyncio.run(parent()), strict=True):
        assert torch.equal(logits, expected[name])
    with again:  # what was entered in a loop can be entered outside of one
        assert torch.equal(model(ids).logits, expected["b"])
    for _ in range(2):  # nor does a call of the base keep anything of a loop
        assert torch.equal(asyncio.run(as_task(model, ids, "__base__")), expected["__base__"])
        assert torch.equal(model(ids, adapter_names="__base__").logits, expected["__base__"])
    assert current_route() is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_compiled_models_run_in_event_loops(family):
    model, ids = family.model(max_rank=20), family.inputs["input_ids"][:2]
    expected = model(ids, adapter_names=["a", "b"]).logits
    model.compile(fullgraph=True, backend="eager")
    logits = asyncio.run(as_task(model, ids, ["a", "b"]))
    # Fused and unfused sums.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


async def as_task(model, ids, names=None):
    return model(ids, adapter_names=names).logits
