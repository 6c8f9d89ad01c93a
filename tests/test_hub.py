"""The hub, which is not there: what is asked of it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import write_checkpoint
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress, load_adapter
from dts_fast.checkpoint import hub_id
from dts_fast.cli import main
from dts_fast.errors import AdapterFormatError, CheckpointError, DTSError, UnknownAdapterError
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


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    """Repositories by name and revision, which are directories here; and what was asked."""
    known, asked = {}, []

    def snapshot_download(repo_id, revision=None, allow_patterns=(), ignore_patterns=(), **access):
        asked.append((repo_id, revision, access) if access else (repo_id, revision))
        if (repo_id, revision) not in known:
            raise OSError("no such repository")
        target = tmp_path / f"snapshot_{len(asked)}"
        names = [str(file.relative_to(known[repo_id, revision])) for file in known[repo_id, revision].rglob("*.*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known[repo_id, revision] / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return known, asked


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gpt2", ("gpt2", None)),
        ("org/name", ("org/name", None)),
        ("org/name@v1.2", ("org/name", "v1.2")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("a/b/c", None),
        ("./name", None),
        ("/org/name", None),
        ("org/name@", None),
        ("@v1", None),
        ("org/na me", None),
    ],
)
def test_what_is_a_hub_id(source, expected):
    assert hub_id(source) == expected


def test_revisions_of_adapters_and_models(repositories, adapter, tmp_path):
    known, asked = repositories
    base, path = adapter
    (tmp_path / "base" / "original").mkdir()
    for copy in ("original/model.safetensors", "consolidated.safetensors"):  # other copies, which are not fetched
        shutil.copyfile(tmp_path / "base" / "model.safetensors", tmp_path / "base" / copy)
    known |= {("me/a", "v1"): path, ("me/base", None): tmp_path / "base", ("me/tuned", "x/y"): tmp_path / "tuned"}
    model = DTSModel(base)
    model.load_adapter("me/a@v1", "a")
    compress("me/base", "me/tuned@x/y", tmp_path / "again", DTSConfig(rank=3))
    assert asked == [("me/a", "v1"), ("me/base", None), ("me/tuned", "x/y")]
    written = load_adapter(tmp_path / "again")
    assert written.config["base_model_name_or_path"] == "me/base"
    assert written.parameters.keys() == load_adapter(path).parameters.keys()
    for source in ("me/a", "me/a@v2"):
        with pytest.raises(CheckpointError, match=f"{source}: no such local path"):
            model.load_adapter(source, "b")
    with pytest.raises(AdapterFormatError, match="no such directory"):
        model.load_adapter("a-model@v1", "b")


def test_a_model_of_a_revision_is_asked_for_by_it(repositories, tmp_path):
    known, asked = repositories
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "llama")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "llama-tuned")
    compress(tmp_path / "llama", tmp_path / "llama-tuned", tmp_path / "adapter", DTSConfig(rank=2))
    known["me/llama", "v1"] = tmp_path / "llama"
    given = []

    def from_pretrained(source, config, **kwargs):
        given.append((source, kwargs))
        return base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "from_pretrained", from_pretrained)
        for source, settings in (("me/llama@v1", {}), ("me/llama", {"revision": "v1"})):
            DTSModel.from_pretrained(source, tmp_path / "adapter", verify_base=False, **settings)
            base = transformers.LlamaForCausalLM(config)
        access = {"token": "secret", "cache_dir": "cache"}
        DTSModel.from_pretrained("me/llama@v1", tmp_path / "adapter", verify_base=False, **access)
        base = transformers.LlamaForCausalLM(config)
        # A directory has no revisions.
        DTSModel.from_pretrained(tmp_path / "llama", tmp_path / "adapter", verify_base=False, revision="v1")
    assert given[:2] == [("me/llama", {"revision": "v1"})] * 2
    assert given[2:] == [("me/llama", {"revision": "v1", **access}), (str(tmp_path / "llama"), {})]
    assert asked == [("me/llama", "v1")] * 2 + [("me/llama", "v1", access)]


def test_a_lora_on_the_hub_is_taken_for_one(repositories, tmp_path):
    peft = pytest.importorskip("peft")
    known, _ = repositories
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "llama")
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    known["me/lora", None] = tmp_path / "lora"
    compress(tmp_path / "llama", "me/lora", tmp_path / "adapter", DTSConfig(rank=2))
    assert list(load_adapter(tmp_path / "adapter").parameters) == ["model.layers.0.self_attn.q_proj.weight"]
