"""Adapters that stay in host memory: they come back without their files, and as they were."""

from __future__ import annotations

import copy
import importlib
import shutil

import pytest
import torch
from conftest import write_checkpoint
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress
from dts_fast.codes import is_matrix, sizes_of
from dts_fast.errors import DTSError
from dts_fast.fuse import fuse

model_module = importlib.import_module("dts_fast.model")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False)
        self.out.weight = self.embed.weight
        self.first, self.norm, self.second = nn.Linear(20, 24), nn.LayerNorm(24), nn.Linear(24, 20)

    def forward(self, input_ids):
        return self.out(self.second(self.norm(self.first(self.embed(input_ids))).relu()))


IDS, NAMES = torch.arange(12).reshape(2, 6), ["a", "b", "c", "both"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and adapters of it; "c" stores a layer whole, "both" is a sum of two."""
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("adapters"), Net()
    weights = {name: p for name, p in base.state_dict().items() if name != "out.weight"}
    write_checkpoint(folder / "base", weights)
    for name in "abc":
        tuned = {n: p + 0.2 * torch.randn_like(p) for n, p in weights.items()}
        write_checkpoint(folder / f"tuned_{name}", tuned)
        config = DTSConfig(rank=9, whole="second" if name == "c" else None)
        compress(folder / "base", folder / f"tuned_{name}", folder / name, config)
    fuse([folder / "a", folder / "b"], folder / "both", [0.5, 0.25])
    torch.save(base.state_dict(), folder / "base.pt")
    return folder


def make_model(folder, host_bytes: int, **settings) -> DTSModel:
    base = Net()
    base.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
    return DTSModel(base.eval(), eviction="lru", host_bytes=host_bytes, **{"max_adapters": 1, **settings})


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, torch.Tensor]:
    model = make_model(folder, 0, max_adapters=4)
    for name in NAMES:
        model.load_adapter(folder / name, name)
    with torch.no_grad():
        return {name: model(IDS, adapter_names=name) for name in NAMES}


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The folders whose files were read."""
    found = []

    def note(folder, original=model_module.open_adapter, **settings):
        found.append(folder.name)
        return original(folder, **settings)

    monkeypatch.setattr(model_module, "open_adapter", note)
    return found


@torch.no_grad()
def check(model: DTSModel, expected: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        assert torch.equal(model(IDS, adapter_names=name), expected[name]), name


@pytest.mark.parametrize("fixed", [{}, {"max_rank": 40}])
def test_what_was_evicted_comes_back_without_its_file(folder, expected, opened, tmp_path, fixed):
    model = make_model(folder, 1 << 20, **fixed)
    for name in NAMES:
        shutil.copytree(folder / name, tmp_path / name)
        model.load_adapter(tmp_path / name, name)
    sizes = {name: model.memory_report()["host"] for name in NAMES}
    assert opened == NAMES
    shutil.rmtree(tmp_path)
    for _ in range(2):
        check(model, expected, *NAMES)
        check(model, expected, *reversed(NAMES))
    assert opened == NAMES
    assert model.cache_info().loads > 8
    assert {name: model.memory_report()["host"] for name in NAMES} == sizes


def test_only_as_many_bytes_are_kept_as_may_be(folder, expected, opened):
    one = make_model(folder, 1 << 20)
    one.load_adapter(folder / "a", "a")
    nbytes = one.memory_report()["host"]
    opened.clear()
    model = make_model(folder, 2 * nbytes + 1)
    for name in ["a", "b", "a", "both", "b"]:  # both takes as much as two
        if name not in model.adapter_names:
            model.load_adapter(folder / name, name)
        check(model, expected, name)
        assert 0 < model.memory_report()["host"] <= 2 * nbytes + 1
    assert opened == ["a", "b", "both", "b"]
    too_little = make_model(folder, nbytes - 1)
    too_little.load_adapter(folder / "a", "a")
    assert too_little.memory_report()["host"] == 0


def test_another_version_and_another_adapter_of_the_name_are_not_taken_for_the_first(folder, expected, opened):
    model = make_model(folder, 1 << 20, max_adapters=2)
    model.load_adapter(folder / "a", "x")
    model.load_adapter(folder / "b", "x", replace=True)
    for name in ["a", "c"]:
        model.load_adapter(folder / name, name)
    check(model, expected | {"x": expected["b"]}, "x")
    assert opened == ["a", "b", "a", "c"]
    model.delete_adapter("x")
    model.load_adapter(folder / "c", "x")
    assert opened[-1] == "c"
    for name in ["a", "c", "x"]:
        check(model, expected | {"x": expected["c"]}, name)
    model.merge_and_unload("a")
    assert model.memory_report()["host"] == 0


def test_layers_that_have_changed_get_the_file(folder, expected, opened):
    model = make_model(folder, 1 << 20)
    for name in "ab":
        model.load_adapter(folder / name, name)
    wrapper = model._wrappers["first"]
    wrapper.bank = copy.deepcopy(wrapper.bank)
    check(model, expected, "a", "b", "a", "b")
    assert opened == ["a", "b", "a", "b"]


def test_a_layer_that_needs_numbers_gets_the_file(folder, expected, opened, monkeypatch):
    model = make_model(folder, 1 << 20)
    for name in "ab":
        model.load_adapter(folder / name, name)
    wrapper = model._wrappers["first"]
    general = type(wrapper).__mro__[2].load_slot
    monkeypatch.setattr(wrapper, "load_slot", lambda *args: general(wrapper, *args), raising=False)
    for name in "aba":
        torch.testing.assert_close(model(IDS, adapter_names=name), expected[name], rtol=1e-4, atol=1e-5)
    assert opened[2:4] == ["a", "b"]


def test_a_load_that_fails_leaves_what_is_kept(folder, expected, opened, monkeypatch):
    model = make_model(folder, 1 << 20)
    for name in "ab":
        model.load_adapter(folder / name, name)
    last = list(model._wrappers.values())[-1]

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(last, "load_slot", fail, raising=False)
        with pytest.raises(MemoryError):
            model(IDS, adapter_names="a")
    assert model.resident_adapters == []
    check(model, expected, "b", "a")
    assert opened == ["a", "b"]


def test_layers_that_were_unwrapped_meanwhile_get_the_file(folder, expected, opened):
    model = make_model(folder, 1 << 20)
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.slots.evict("b", model._residency.clear)
    path = "first"
    model._live.put(path, model._wrappers.pop(path).bare_layer())
    check(model, expected, "a", "b", "a")
    assert opened == ["a", "b", "a", "b"]


def test_matrices_of_layers_that_hold_them_whole_count(folder, monkeypatch):
    model = make_model(folder, 1 << 20)
    model.load_adapter(folder / "a", "a")
    before = model.memory_report()["host"]
    model.delete_adapter("a")
    wrapper = model._wrappers["first"]
    general = type(wrapper).__mro__[2].load_slot
    monkeypatch.setattr(wrapper, "load_slot", lambda *args: general(wrapper, *args), raising=False)
    model.load_adapter(folder / "a", "a")
    weight = wrapper.stored[model.slots.slot("a")]["weight"]
    pages = len(wrapper.bank.pages) * wrapper.bank.page_nbytes
    assert model.memory_report()["host"] == before - pages + weight.nbytes


def test_sizes_alone_are_not_numbers(folder):
    loaded, _ = model_module.open_adapter(folder / "both")
    for parameter in loaded.parameters.values():
        if is_matrix(parameter):
            left = sizes_of(parameter)
            assert (left.shape, left.rank, left.nbytes) == (parameter.shape, parameter.rank, parameter.nbytes)
            with pytest.raises(Exception, match=r"meta|Tensor"):
                left.dequantize().tolist()


def test_host_memory_without_eviction_is_refused():
    with pytest.raises(DTSError, match="host_bytes: expected 0 or more, and eviction='lru' with it, got 5"):
        DTSModel(Net(), host_bytes=5)
    with pytest.raises(DTSError, match="host_bytes"):
        DTSModel(Net(), host_bytes=-1, eviction="lru")
