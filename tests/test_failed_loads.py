"""Loads and evictions that fail: damaged files, memory that runs out, at any step. Nothing of them stays."""

from __future__ import annotations

import shutil

import pytest
from small_net import IDS, NAMES, Net, check, contents, expected, folder, make_model  # noqa: F401

from dts_fast import DTSModel
from dts_fast.errors import AdapterFormatError, CapacityError
from dts_fast.writes import Writes


def test_a_load_that_fails_leaves_everything_as_it_was(folder, expected, monkeypatch, tmp_path):
    model = make_model(folder, max_adapters=3, eviction="lru")
    for name in "abc":
        model.load_adapter(folder / name, name)
    before = contents(model)
    last = list(model._wrappers.values())[-1]

    def fail(slot, parameters, writes, original=last.load_slot):
        original(slot, parameters, writes)
        raise MemoryError

    shutil.copytree(folder / "d", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterFormatError):
        model.load_adapter(tmp_path / "damaged", "d")
    with pytest.raises(AdapterFormatError):
        model.load_adapter(tmp_path / "damaged", "a", replace=True)
    assert contents(model) == before
    model.delete_adapter("c")
    before = contents(model)
    monkeypatch.setattr(last, "load_slot", fail)
    with pytest.raises(MemoryError):
        model.load_adapter(folder / "d", "d")
    with pytest.raises(MemoryError):
        model.load_adapter(folder / "d", "a", replace=True)
    monkeypatch.undo()
    assert contents(model) == before
    check(model, expected, "a", "b")
    model.load_adapter(folder / "d", "d")
    check(model, expected, "d")


def test_a_file_that_is_gone_is_said_when_it_is_needed_again(folder, tmp_path):
    model = make_model(folder, max_adapters=1, eviction="lru")
    shutil.copytree(folder / "a", tmp_path / "a")
    model.load_adapter(tmp_path / "a", "a")
    model.load_adapter(folder / "b", "b")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="no such directory"):
        model(IDS, adapter_names="a")
    assert model.resident_adapters == ["b"]


def test_a_damaged_file_is_found_before_anything_goes_for_it(folder, expected, tmp_path):
    """The checksum is computed beside the reading."""
    shutil.copytree(folder / "b", tmp_path / "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    model = make_model(folder, max_adapters=2)
    layers = dict(model.model.named_children())
    with pytest.raises(AdapterFormatError, match="damaged"):
        model.load_adapter(tmp_path / "b", "b")  # the first: no layer stays wrapped for it
    assert (dict(model.model.named_children()), model.adapter_names) == (layers, [])
    model.load_adapter(folder / "a", "a")
    before = contents(model)
    for settings in ({}, {"adapter_name": "a", "replace": True}):
        with pytest.raises(AdapterFormatError, match="damaged"):
            model.load_adapter(tmp_path / "b", **({"adapter_name": "b"} | settings))
        assert contents(model) == before
    check(model, expected, "a")
    full = make_model(folder, max_adapters=1, eviction="lru")
    full.load_adapter(folder / "a", "a")
    for settings in ({"adapter_name": "b"}, {"adapter_name": "a", "replace": True}):
        with pytest.raises(AdapterFormatError, match="damaged"):
            full.load_adapter(tmp_path / "b", **settings)
        assert full.resident_adapters == ["a"]
    with pytest.raises(AdapterFormatError, match="damaged"):
        DTSModel.from_pretrained(model.merge_and_unload("__base__"), tmp_path / "b", "b")


# Between two layers; when all are written; and also when that is taken back.
@pytest.mark.parametrize(("fails", "times"), [("add_pages", [2]), ("write", [1]), ("write", [1, 2])])
def test_a_load_that_fails_while_pages_are_written_loses_none(folder, expected, monkeypatch, fails, times):
    model = make_model(folder, max_adapters=2, max_rank=7)
    model.load_adapter(folder / "a", "a")
    before = contents(model)
    calls, original = [], getattr(Writes, fails)

    def fail(*args):
        calls.append(args)
        if len(calls) in times:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(Writes, fails, fail)
    with pytest.raises(MemoryError):
        model.load_adapter(folder / "b", "b")
    monkeypatch.undo()
    assert len(calls) >= max(times)
    if len(times) == 1:
        assert contents(model) == before
    model.load_adapter(folder / "b", "b")
    check(model, expected, "a", "b")
    model.delete_adapter("b")
    assert contents(model) == before


def test_an_eviction_that_fails_leaves_nothing_of_its_adapter_to_the_next(folder, expected, monkeypatch):
    """Neither in the slot, for layers that the next one does not change, nor pages that others get."""
    model = make_model(folder, max_adapters=2)
    model.load_adapter(folder / "a", "a")

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("dts_fast.writes.write_lists", fail)
        with pytest.raises(MemoryError):
            model.delete_adapter("a")
        with pytest.raises(MemoryError):
            model.load_adapter(folder / "b", "b")
    assert model.adapter_names == []
    for name in "bc":
        model.load_adapter(folder / name, name)
    check(model, expected, "b", "c")
    slot = model.slots.slot("b")
    for wrapper in model._wrappers.values():
        for bank in (table for table in wrapper.children() if hasattr(table, "_free")):
            listed = [page for pages in bank._listed.values() for page in pages]
            assert sorted([*listed, *bank._free]) == list(range(len(bank.pages)))
            assert (bank.slot_pages[slot] >= 0).sum() == len(bank._listed[slot])


def test_a_refused_first_adapter_leaves_the_model_as_it_was(folder, expected):
    model = make_model(folder, max_bytes=5_000)
    layers = dict(model.model.named_children())
    with pytest.raises(CapacityError, match="max_bytes"):
        model.load_adapter(folder / "big", "big")
    assert dict(model.model.named_children()) == layers


def test_a_failed_load_gives_back_the_memory_of_the_layers_it_was_the_first_to_change(folder, monkeypatch):
    model = make_model(folder, max_bytes=60_000)
    left, layers = model._arenas.left, dict(model.model.named_children())
    monkeypatch.setattr(Writes, "write", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.load_adapter(folder / "a", "a")
    assert (model._arenas.left, dict(model.model.named_children()), model._wrappers) == (left, layers, {})
    monkeypatch.undo()
    model.load_adapter(folder / "a", "a")
    assert model._arenas.left < left
