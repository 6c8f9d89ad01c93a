"""Names in checkpoints and in memory; that a config is never the reason to fetch or run anything."""

from __future__ import annotations

import pytest
import torch

from dts_fast.checkpoint import Checkpoint
from dts_fast.renaming import live_names

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.core_model_loading", reason="this release of transformers renames nothing")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def checkpoint_of(tmp_path, **changes) -> Checkpoint:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    saved = Checkpoint.open(tmp_path / "base")
    return Checkpoint(saved.source, saved.tensors, saved.nbytes, {**saved.config, **changes})


def test_a_checkpoints_names_become_those_of_the_model(tmp_path):
    base = checkpoint_of(tmp_path)
    names = live_names(base)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    assert set(names) == set(base.tensors)
    assert set(names.values()) == set(dict(model.named_parameters()))
    assert any(name != live for name, live in names.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"architectures": ["MadeUp"]},
        {"architectures": ["pipeline"]},  # of transformers, and no model
        {"backbone": "any/repo"},
        {"auto_map": {"AutoModel": "any/repo--code.Model"}},
        {"vision_config": {"backbone_kwargs": {"trust_remote_code": True}}},
        {"text_config": {"attn_implementation": "any/kernel"}},
        {"hidden_size": "wide"},
    ],
    ids=str,
)
def test_what_is_not_known_keeps_its_names(tmp_path, changes):
    base = checkpoint_of(tmp_path, **changes)
    assert live_names(base) == {name: name for name in base.tensors}


def test_settings_that_choose_kernels_are_left_out(tmp_path):
    plain = live_names(checkpoint_of(tmp_path))
    assert live_names(checkpoint_of(tmp_path, attn_implementation="any/kernel")) == plain
