"""Uploads, against a hub that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from conftest import write_checkpoint
from huggingface_hub.errors import HFValidationError
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress
from dts_fast.cli import main
from dts_fast.errors import AdapterFormatError, DTSError, UnknownAdapterError
from dts_fast.hub import push_adapter


@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of it."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **settings):
            if " " in repo_id:
                raise HFValidationError("a blank")
            if "/" not in repo_id:
                raise OSError("no route")
            calls.append(("create", repo_id, settings))

        def upload_folder(self, **settings):
            calls.append(("upload", settings))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


@pytest.fixture
def adapter(tmp_path):
    base = nn.Linear(12, 10)
    write_checkpoint(tmp_path / "base", base.state_dict())
    write_checkpoint(tmp_path / "tuned", {n: p + 0.1 * torch.randn_like(p) for n, p in base.state_dict().items()})
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", DTSConfig(rank=3))
    return base, tmp_path / "a"


def test_the_three_files_are_uploaded_to_a_repository_of_their_own(hub, adapter):
    base, path = adapter
    (path / "notes.txt").write_text("mine")
    model = DTSModel.from_pretrained(base, path, "mine")
    assert model.push_to_hub("me/sql", private=True, token="t") == "https://hub/commit/1"
    assert hub[0] == ("token", "t")
    assert hub[1] == ("create", "me/sql", {"private": True, "exist_ok": True})
    settings = hub[2][1]
    assert (settings["repo_id"], settings["folder_path"], settings["revision"]) == ("me/sql", str(path), None)
    assert sorted(settings["allow_patterns"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(UnknownAdapterError):
        model.push_to_hub("me/sql", "other")
    with pytest.raises(DTSError, match="it is the base"):
        model.push_to_hub("me/sql", "__base__")


def test_what_is_no_adapter_is_not_sent(hub, tmp_path, adapter):
    _, path = adapter
    (path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFormatError, match="damaged"):
        push_adapter(path, "me/sql")
    with pytest.raises(AdapterFormatError, match="no such directory"):
        push_adapter(tmp_path / "none", "me/sql")
    assert hub == []


def test_a_refusal_says_what_to_do(hub, adapter):
    with pytest.raises(DTSError, match=r"sql: the upload failed: .* cannot be reached \(OSError: no route\).*network"):
        push_adapter(adapter[1], "sql")
    with pytest.raises(DTSError, match=r"not the name of a repository \(a blank\). Expected user/name"):
        push_adapter(adapter[1], "my sql")


def test_the_command_prints_the_address(hub, adapter):
    result = CliRunner().invoke(main, ["push", str(adapter[1]), "me/sql", "--private", "--message", "v2"])
    assert result.output == "https://hub/commit/1\n"
    assert hub[1][2]["private"] is True
    assert hub[2][1]["commit_message"] == "v2"
