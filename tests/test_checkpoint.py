from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import plain_tensors, write_checkpoint
from safetensors.torch import save_file

from dts_fast.checkpoint import Checkpoint, common_prefix, is_embedding, pair_tensors
from dts_fast.dense import write_like
from dts_fast.errors import CheckpointError


def write_sharded(folder, tensors, shards=3):
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_numbers_that_json_has_none_for(tmp_path):
    """As transformers writes configs with infinities in them."""
    write_checkpoint(tmp_path, plain_tensors())
    (tmp_path / "config.json").write_text('{"limit": [0.0, {"__float__": "Infinity"}], "other": {"a": {"b": 1}}}')
    assert Checkpoint.open(tmp_path).config == {"limit": [0.0, float("inf")], "other": {"a": {"b": 1}}}


@pytest.mark.parametrize("form", ["file", "directory", "sharded", "index"])
def test_every_form_of_a_checkpoint_reads_the_same(tmp_path, form):
    tensors = plain_tensors()
    if form in ("file", "directory"):
        source = write_checkpoint(tmp_path / "m", tensors, {"hidden_size": 12})
        source = source / "model.safetensors" if form == "file" else source
    else:
        source = write_sharded(tmp_path / "m", tensors)
        source = source / "model.safetensors.index.json" if form == "index" else source
    checkpoint = Checkpoint.open(source)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.get(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == tensor.dtype
    assert checkpoint.nbytes == sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors"))
    assert checkpoint.config == ({"hidden_size": 12} if form in ("file", "directory") else {})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt"])
def test_pickle_checkpoints_are_refused_with_the_way_to_convert(tmp_path, name):
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained"):
            Checkpoint.open(source)


def test_unusable_sources_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="found none"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file"):
        Checkpoint.open(tmp_path / "notes.txt")


def test_hub_ids_go_to_the_hub():
    with pytest.raises(CheckpointError, match=r"org/model.*the hub did not give it"):
        Checkpoint.open("org/model")


def test_damaged_indexes_and_missing_shards(tmp_path):
    folder = write_sharded(tmp_path / "m", plain_tensors())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing: model-00002-of-00003"):
        Checkpoint.open(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("names", "base", "expected"),
    [
        (["h.0.w", "h.1.w"], ["h.0.w", "h.1.w"], ("", "")),
        (["bert.a.w", "bert.b.w", "head.w"], ["a.w", "b.w"], ("bert.", "")),
        (["a.w", "b.w"], ["model.a.w", "model.b.w", "head.w"], ("", "model.")),
        (["base_model.model.a.w", "base_model.model.b.w"], ["a.w", "b.w"], ("base_model.model.", "")),
        (["x.w"], ["y.w"], ("", "")),
    ],
)
def test_common_prefix(names, base, expected):
    assert common_prefix(names, base) == expected


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (9, 4), True),
        ("transformer.wte.weight", (9, 4), True),
        ("embeddings.word_embeddings.weight", (9, 4), True),
        ("vit.embeddings.position_embeddings", (1, 9, 4), True),
        ("embeddings.LayerNorm.weight", (4,), False),
        ("embeddings.patch_embeddings.projection.weight", (4, 3, 2, 2), False),
        ("lm_head.weight", (9, 4), False),
    ],
)
def test_is_embedding(name, shape, expected):
    assert is_embedding(name, shape) == expected


def open_pair(tmp_path, base, model):
    return Checkpoint.open(write_checkpoint(tmp_path / "b", base)), Checkpoint.open(
        write_checkpoint(tmp_path / "m", model)
    )


def test_pairing_through_a_prefix_with_a_new_head(tmp_path):
    base = plain_tensors()
    model = {f"net.{name}": t for name, t in base.items()} | {"classifier.weight": torch.randn(3, 12)}
    pairing = pair_tensors(*open_pair(tmp_path, base, model))
    assert pairing.pairs == {name: f"net.{name}" for name in base if name != "position_ids"}
    assert pairing.added == {"classifier.weight": "classifier.weight"}
    assert pairing.skipped == {"position_ids": "integer"}


def test_missing_tensors_are_listed(tmp_path):
    base, model = plain_tensors(), plain_tensors()
    for name in ("layers.0.proj.weight", "conv.weight"):
        del model[name]
    pair = open_pair(tmp_path, base, model)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .*: conv\.weight, layers\.0\.proj\.weight\."):
        pair_tensors(*pair)
    assert "conv.weight" not in pair_tensors(*pair, exclude=r"conv|proj\.weight").pairs


def test_other_shapes_are_listed_and_may_be_stored_whole(tmp_path):
    base, model = plain_tensors(), plain_tensors() | {"embed_tokens.weight": torch.randn(48, 12)}
    pair = open_pair(tmp_path, base, model)
    with pytest.raises(CheckpointError, match=re.escape("embed_tokens.weight: base [50, 12], fine-tune [48, 12]")):
        pair_tensors(*pair)
    assert pair_tensors(*pair, whole="embed").added == {"embed_tokens.weight": "embed_tokens.weight"}


def test_checkpoints_that_share_nothing(tmp_path):
    pair = open_pair(tmp_path, {"a.weight": torch.zeros(2, 2)}, {"b.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        pair_tensors(*pair)


@pytest.mark.parametrize("where", ["base", "model", "both"])
def test_tied_weights_written_twice_are_taken_once(tmp_path, where):
    base, model = plain_tensors(torch.Generator().manual_seed(0)), plain_tensors(torch.Generator().manual_seed(1))
    if where in ("base", "both"):
        base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    if where in ("model", "both"):
        model["lm_head.weight"] = model["embed_tokens.weight"].clone()
    pairing = pair_tensors(*open_pair(tmp_path, base, model))
    assert "lm_head.weight" not in pairing.pairs
    assert pairing.added == {}
    assert pairing.tied == {"lm_head.weight": "embed_tokens.weight"}


def test_a_head_untied_by_the_fine_tune_is_kept(tmp_path):
    base, model = plain_tensors(), plain_tensors()
    base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    model["lm_head.weight"] = torch.randn(50, 12)
    assert "lm_head.weight" in pair_tensors(*open_pair(tmp_path, base, model)).pairs


def test_buffers_of_old_checkpoints_take_no_part(tmp_path):
    base = plain_tensors() | {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "rotary_emb.inv_freq": torch.randn(8)}
    pairing = pair_tensors(*open_pair(tmp_path, base, plain_tensors()))
    assert {name for name, reason in pairing.skipped.items() if reason == "buffer"} == {
        "h.0.attn.bias",
        "rotary_emb.inv_freq",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_running_variances_are_stored_whole_where_they_differ(tmp_path, dtype):
    base = plain_tensors() | {"bn.running_var": torch.ones(8), "other.running_var": torch.ones(8)}
    model = base | {"bn.running_var": torch.full((8,), 2.0, dtype=dtype), "other.running_var": torch.ones(8).to(dtype)}
    pairing = pair_tensors(*open_pair(tmp_path, base, model))
    assert "bn.running_var" in pairing.added
    assert "other.running_var" in pairing.pairs


def test_stacks_of_experts_are_matrices_and_convolutions_are_not(tmp_path):
    shapes = {
        "layers.0.experts.up_proj": (3, 20, 17), "block_sparse_moe.input_linear.weight": (2, 16, 16),
        "moe_conv.weight": (40, 24, 3), "smoe.kernel": (4, 20, 20), "expertise.weight": (4, 20, 20),
    }  # fmt: skip
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_checkpoint(tmp_path / "base", tensors)
    base = Checkpoint.open(tmp_path / "base")
    pieces = [f"layers.0.experts.up_proj[{e},0/1]" for e in range(3)]
    pieces += [f"block_sparse_moe.input_linear.weight[{e},0/1]" for e in range(2)]
    assert set(base.tensors) == {*pieces, "moe_conv.weight", "smoe.kernel", "expertise.weight"}
    for e in range(3):
        assert torch.equal(base.get(pieces[e]), tensors["layers.0.experts.up_proj"][e])
        assert base.tensors[pieces[e]].shape == (20, 17)
    assert base.as_stored().keys() == tensors.keys()
    assert Checkpoint.open(tmp_path / "base", stacks=True).tensors.keys() == tensors.keys()
    write_like(base, tmp_path / "again", base.get, added={f"moe.new[{e},0/1]": torch.full((16, 16), e) for e in (1, 0)})
    again = Checkpoint.open(tmp_path / "again").as_stored()
    assert again.pop("moe.new")[:, 0, 0].tolist() == [0, 1]
    assert all(torch.equal(again.pop(name), tensor) for name, tensor in tensors.items())
    assert not again
