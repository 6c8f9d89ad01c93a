"""Loading, evicting, replacing and deleting adapters of a model, alone and beside running calls."""

from __future__ import annotations

import copy
import gc
import importlib
import shutil
import threading
import time

import pytest
import torch
from conftest import write_checkpoint
from small_net import IDS, NAMES, Net, check, contents, expected, folder, make_model  # noqa: F401
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress, route
from dts_fast.errors import AdapterFormatError, BaseMismatchError, CapacityError, DTSError, UnknownAdapterError

model_module = importlib.import_module("dts_fast.model")


def test_the_least_recently_used_is_evicted_and_loaded_again_when_used(folder, expected):
    model = make_model(folder, max_adapters=2, eviction="lru")
    for name in NAMES:
        model.load_adapter(folder / name, name)
    assert (model.adapter_names, model.resident_adapters) == (NAMES, ["c", "d"])
    check(model, expected, "c", "a")
    assert model.resident_adapters == ["c", "a"]
    mixed = model(IDS, adapter_names=["d", "b"])
    torch.testing.assert_close(mixed, torch.stack([expected["d"][0], expected["b"][1]]), rtol=1e-5, atol=1e-5)
    assert sorted(model.resident_adapters) == ["b", "d"]
    model.set_adapter("a")
    assert torch.equal(model(IDS), expected["a"])
    with route("b"):  # a route of the user's, around the bare model
        assert torch.equal(model.model(IDS), expected["b"])
    report = model.memory_report()["adapters"]
    assert {name for name, nbytes in report.items() if nbytes} == {"a", "b"}
    model.delete_adapter("c")
    assert model.adapter_names == ["a", "b", "d"]
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'c'; loaded: 'a', 'b', 'd'"):
        model(IDS, adapter_names="c")


def test_files_that_became_another_adapter_are_checked_when_they_are_loaded_again(folder, expected, tmp_path):
    other = {n: torch.randn_like(p) for n, p in Net().state_dict().items()}
    write_checkpoint(tmp_path / "other", other)
    write_checkpoint(tmp_path / "tuned", {n: p + 0.2 * torch.randn_like(p) for n, p in other.items()})
    compress(tmp_path / "other", tmp_path / "tuned", tmp_path / "of another", DTSConfig(rank=7))
    for verify in (True, False):
        model = make_model(folder, max_adapters=1, eviction="lru")
        shutil.copytree(folder / "a", tmp_path / "x", dirs_exist_ok=True)
        model.load_adapter(tmp_path / "x", "x", verify_base=verify)
        model.load_adapter(folder / "b", "b")
        shutil.copytree(folder / "c", tmp_path / "x", dirs_exist_ok=True)  # a new version
        check(model, expected | {"x": expected["c"]}, "x", "b")
        shutil.copytree(tmp_path / "of another", tmp_path / "x", dirs_exist_ok=True)
        if verify:
            with pytest.raises(
                BaseMismatchError, match="'x' was evicted, and cannot be loaded again: this is not the base"
            ):
                model(IDS, adapter_names="x")
        else:
            model(IDS, adapter_names="x")
        check(model, expected, "b")
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(AdapterFormatError, match="'x' was evicted, and cannot be loaded again"):
        model(IDS, adapter_names="x")


def test_uses_loads_and_evictions_are_counted(folder):
    model = make_model(folder, max_adapters=2, eviction="lru")
    for name in "abc":
        model.load_adapter(folder / name, name)
    assert model.cache_info() == (0, 0, 3, 1, 2, 2)
    model(IDS[:1].repeat(3, 1), adapter_names=["b", "c", "__base__"])
    model(IDS, adapter_names="b")
    assert model.cache_info() == (3, 0, 3, 1, 2, 2)
    model(IDS[:1].repeat(3, 1), adapter_names=["a", "b", "b"])  # "a" comes back, and "c" goes
    assert model.cache_info() == (4, 1, 4, 2, 2, 2)
    model(IDS, adapter_names="__base__")
    model.delete_adapter("b")
    info = model.cache_info()
    assert (info.hits, info.misses, info.loads, info.evictions, info.maxsize, info.currsize) == (4, 1, 4, 2, 2, 1)


def test_pinned_adapters_stay(folder, expected):
    model = make_model(folder, max_adapters=2, eviction="lru")
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.pin_adapter("a")
    check(model, expected, "b")
    for name in "cd":
        model.load_adapter(folder / name, name)
    assert model.resident_adapters == ["a", "d"]
    with pytest.raises(CapacityError, match="uses 2 adapters, which with those that are pinned makes 3"):
        model(IDS, adapter_names=["b", "c"])
    model.unpin_adapter("a")
    model(IDS, adapter_names=["b", "c"])
    model.pin_adapter("d")  # loads it again
    assert "d" in model.resident_adapters
    model.pin_adapter("b")
    with pytest.raises(CapacityError, match="all 2 slots are taken"):
        model.load_adapter(folder / "big", "big")
    with pytest.raises(UnknownAdapterError):
        model.pin_adapter("z")


def test_more_adapters_than_slots_in_one_call_are_refused(folder):
    model = make_model(folder, max_adapters=1, eviction="lru")
    for name in "ab":
        model.load_adapter(folder / name, name)
    with pytest.raises(CapacityError, match="uses 2 adapters"):
        model(IDS, adapter_names=["a", "b"])
    with pytest.raises(DTSError, match="expected None or 'lru'"):
        make_model(folder, eviction="fifo")


def test_a_new_version_replaces_the_old_one(folder, expected):
    for settings in ({}, {"max_adapters": 1}):
        model = make_model(folder, **settings)
        model.load_adapter(folder / "a", "x")
        model.pin_adapter("x")
        with pytest.raises(DTSError, match="loaded already"):
            model.load_adapter(folder / "b", "x")
        model.load_adapter(folder / "b", "x", replace=True)
        assert torch.equal(model(IDS, adapter_names="x"), expected["b"])
        assert model.slots.free == model.slots.capacity - 1


@pytest.mark.parametrize("settings", [{"max_rank": 7}, {"max_rank": 20}, {"max_bytes": 60_000}], ids=str)
def test_fixed_memory_is_never_allocated_again(folder, expected, settings):
    model = make_model(folder, max_adapters=3, eviction="lru", **settings)
    model.load_adapter(folder / "a", "a")
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for name in "bcd":
        model.load_adapter(folder / name, name)
    check(model, expected, *NAMES)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before
    assert settings.get("max_bytes", 1 << 30) >= sum(
        wrapper.bank.pages.nbytes for wrapper in model._wrappers.values() if hasattr(wrapper, "bank")
    )


def test_an_adapter_too_large_is_refused_and_evicts_nothing(folder, expected):
    model = make_model(folder, max_adapters=3, max_rank=7, eviction="lru")
    for name in "abc":
        model.load_adapter(folder / name, name)
    before = contents(model)
    with pytest.raises(CapacityError, match=r"'big' would not fit if it were alone: in (embed|first|second) it"):
        model.load_adapter(folder / "big", "big")
    assert contents(model) == before
    check(model, expected, "a", "b", "c")
    for settings, message in (
        ({"max_bytes": 1000}, "max_bytes leaves 1000 bytes"),
        ({"max_bytes": 0}, "at least 1"),
        ({"max_bytes": 10, "max_rank": 3}, "one of max_rank and max_bytes"),
    ):
        with pytest.raises(DTSError, match=message):
            make_model(folder, **settings).load_adapter(folder / "a", "a")


def test_pages_are_freed_for_larger_adapters(folder, expected):
    one = make_model(folder)
    one.load_adapter(folder / "a", "a")
    nbytes = 4 * one.memory_report()["adapters"]["a"]
    model = make_model(folder, max_adapters=4, max_bytes=nbytes, eviction="lru")
    for name in NAMES[:3]:
        model.load_adapter(folder / name, name)
    model.load_adapter(folder / "big", "big")  # two pages in every layer
    assert model.resident_adapters[-1] == "big"
    assert "c" in model.resident_adapters
    assert "a" not in model.resident_adapters
    check(model, expected, "big", "c", "a", "b")


def test_a_mixture_stays_and_keeps_what_it_needs(folder):
    model = make_model(folder, max_adapters=3, eviction="lru")
    for name in "abc":
        model.load_adapter(folder / name, name)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "mix")  # c makes room
    assert "c" not in model.resident_adapters
    y = model(IDS, adapter_names="mix")
    for name in "cd":
        if name == "d":
            model.load_adapter(folder / "d", "d")
        model(IDS, adapter_names=name)
    assert "mix" in model.resident_adapters
    assert torch.equal(model(IDS, adapter_names="mix"), y)
    with pytest.raises(DTSError, match="is a mixture"):
        model.unpin_adapter("mix")
    with pytest.raises(DTSError, match="a mixture in memory"):
        model.push_to_hub("user/x", "mix")


class Slow(nn.Module):
    """Holds a call up in the middle of a model until it is let go."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.reached, self.go = layer, threading.Event(), threading.Event()

    def forward(self, x):
        self.reached.set()
        assert self.go.wait(20)
        return self.layer(x)


def in_the_middle(model: DTSModel, name: str | None):
    """Start a call in another thread and stop it between two layers; returns how to end it and get its result."""
    slow, result = Slow(model.model.norm), []
    model.model.norm = slow

    def run():
        with torch.no_grad():
            result.append(model(IDS, adapter_names=name))

    thread = threading.Thread(target=run)
    thread.start()
    assert slow.reached.wait(20)

    def end():
        slow.go.set()
        thread.join()
        model.model.norm = slow.layer
        return result[0]

    return end


def test_a_running_call_keeps_the_active_adapter_it_began_with(folder, expected):
    model = make_model(folder)
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.set_adapter("a")
    end = in_the_middle(model, None)
    model.set_adapter("b")
    assert torch.equal(end(), expected["a"])
    assert torch.equal(model(IDS), expected["b"])


def test_deleting_and_replacing_wait_for_no_call_and_change_none(folder, expected):
    model = make_model(folder, max_adapters=3)
    for name in "ab":
        model.load_adapter(folder / name, name)
    end = in_the_middle(model, "a")
    model.delete_adapter("a")
    assert model.adapter_names == ["b"]
    model.load_adapter(folder / "c", "a")
    assert torch.equal(end(), expected["a"])
    check(model, {"a": expected["c"], "b": expected["b"]}, "a", "b")
    end = in_the_middle(model, "b")
    model.load_adapter(folder / "d", "b", replace=True)
    assert torch.equal(end(), expected["b"])
    check(model, {"b": expected["d"]}, "b")
    assert model.slots.free == 1


def test_a_load_waits_for_room_that_a_running_call_holds(folder, expected):
    model = make_model(folder, max_adapters=1, eviction="lru")
    model.load_adapter(folder / "a", "a")
    end = in_the_middle(model, "a")
    loading = threading.Thread(target=model.load_adapter, args=(folder / "b", "b"))
    loading.start()
    loading.join(0.2)
    assert loading.is_alive()
    assert torch.equal(end(), expected["a"])
    loading.join(20)
    assert not loading.is_alive()
    check(model, expected, "b", "a")


def test_a_replacement_waits_for_the_call_that_uses_what_it_replaces(folder, expected):
    model = make_model(folder, max_adapters=1, eviction="lru")
    model.load_adapter(folder / "a", "x")
    slots = model._lease(["x"])  # as a running call has it
    thread = threading.Thread(target=lambda: model.load_adapter(folder / "b", "x", replace=True))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    model.slots.end_lease(slots.values())
    thread.join(20)
    assert not thread.is_alive()
    with torch.no_grad():
        assert torch.equal(model(IDS, adapter_names="x"), expected["b"])


def test_a_call_that_loads_does_not_wait_for_itself(folder):
    model = make_model(folder, max_adapters=1, eviction="lru")
    model.load_adapter(folder / "a", "a")
    hook = model.model.norm.register_forward_hook(lambda *_: model.load_adapter(folder / "b", "b"))
    with pytest.raises(CapacityError, match="cannot wait for itself"):
        model(IDS, adapter_names="a")
    hook.remove()
    assert model.adapter_names == ["a"]
    model(IDS, adapter_names="a")


def test_an_interrupted_call_leaves_no_route_and_no_lease(folder, expected):
    model = make_model(folder, max_adapters=2)
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.set_adapter("a")
    interrupt = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for call in (
        lambda: model(IDS, adapter_names=["b", "b"]),
        lambda: model(IDS, adapter_names=["a", "b"]),
        lambda: model.model(IDS),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
    interrupt.remove()
    assert torch.equal(model(IDS), expected["a"])
    assert torch.equal(model.model(IDS), expected["a"])
    assert model.slots._leases == [0, 0]
    model.delete_adapter("b")
    model.load_adapter(folder / "c", "c")
    assert torch.equal(model(IDS, adapter_names="c"), expected["c"])


def test_what_cannot_be_done_leaves_no_pin_and_no_lease(folder, monkeypatch):
    model = make_model(folder, max_adapters=1, eviction="lru")
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.pin_adapter("b")
    with pytest.raises(CapacityError):
        model.pin_adapter("a")
    assert model.slots.pinned == ["b"]
    model.unpin_adapter("b")
    model(IDS, adapter_names="a")
    monkeypatch.setattr(model._wrappers["first"], "dense_parameters", lambda slot: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.merge_and_unload("a")
    assert model.slots._leases == [0]
    model.load_adapter(folder / "b", "again")


def test_a_reload_does_not_undo_what_happened_meanwhile(folder, expected, monkeypatch):
    """Another thread replaces or deletes an adapter while its file is read to load it again."""
    for meanwhile in ("replace", "delete"):
        model = make_model(folder, max_adapters=2, eviction="lru")
        model.load_adapter(folder / "a", "x")
        for name in "bc":
            model.load_adapter(folder / name, name)
        assert "x" not in model.resident_adapters

        def read(*args, original=model_module.open_adapter, model=model, meanwhile=meanwhile, **kwargs):
            monkeypatch.undo()
            adapter = original(*args, **kwargs)
            thread = threading.Thread(
                target=lambda: (
                    model.load_adapter(folder / "d", "x", replace=True)
                    if meanwhile == "replace"
                    else model.delete_adapter("x")
                )
            )
            thread.start()
            thread.join(20)
            return adapter

        monkeypatch.setattr(model_module, "open_adapter", read)
        if meanwhile == "replace":
            assert torch.equal(model(IDS, adapter_names="x"), expected["d"])
        else:
            with pytest.raises(UnknownAdapterError):
                model(IDS, adapter_names="x")
            assert model.adapter_names == ["b", "c"]


def test_a_mixture_is_not_given_up_for_its_own_replacement(folder, monkeypatch):
    model = make_model(folder, max_adapters=3)
    for name in "ab":
        model.load_adapter(folder / name, name)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mix")
    y = model(IDS, adapter_names="mix")
    with pytest.raises(CapacityError):
        model.load_adapter(folder / "c", "mix", replace=True)
    assert torch.equal(model(IDS, adapter_names="mix"), y)
    model.delete_adapter("b")
    model.load_adapter(folder / "c", "mix", replace=True)
    assert not torch.equal(model(IDS, adapter_names="mix"), y)


def test_adapters_are_found_again_from_another_working_directory(folder, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    model = make_model(folder, max_adapters=1, eviction="lru")
    for name in "ab":
        model.load_adapter(name, name)
    monkeypatch.chdir(tmp_path)
    check(model, expected, "a", "b")


def test_a_copy_of_a_model_goes_on_by_itself(folder, expected):
    model = make_model(folder)
    model.load_adapter(folder / "a", "a")
    own = copy.deepcopy(model)
    own.load_adapter(folder / "b", "b")
    check(own, expected, "a", "b")
    assert model.adapter_names == ["a"]


def test_outer_routes_are_leased_for_a_whole_call(folder, expected):
    model = make_model(folder, max_adapters=1, eviction="lru")
    for name in "ab":
        model.load_adapter(folder / name, name)
    with route("a"):
        assert torch.equal(model(IDS), expected["a"])
    with route(["b", "b"]):
        assert torch.equal(model(IDS), expected["b"])
    with model.disable_adapter():
        assert torch.equal(model(IDS), expected["__base__"])


def test_threads_that_load_evict_and_mix_see_whole_adapters(folder, expected):
    """A short version of bench/soak.py."""
    model = make_model(folder, max_adapters=3, eviction="lru")
    for name in NAMES:
        model.load_adapter(folder / name, name)
    wrong, failed, deadline = [], [], time.monotonic() + 3

    def serve(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            while time.monotonic() < deadline:
                names = [[*NAMES, "__base__"][i] for i in torch.randint(0, 5, (2,), generator=generator)]
                with torch.no_grad():
                    y = model(IDS, adapter_names=names)
                for row, name in enumerate(names):
                    if not torch.allclose(y[row], expected[name][row], rtol=1e-5, atol=1e-5):
                        wrong.append((names, row))
                if int(torch.randint(0, 8, (1,), generator=generator)) == 0:
                    own = f"own{seed}"
                    model.load_adapter(folder / "big", own)
                    with torch.no_grad():
                        if not torch.equal(model(IDS, adapter_names=own), expected["big"]):
                            wrong.append((own,))
                    model.delete_adapter(own)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert (wrong, failed) == ([], [])
    assert model.slots._leases == [0] * 3
    gc.collect()
    for wrapper in model._wrappers.values():
        if hasattr(wrapper, "bank"):
            listed = {page for pages in wrapper.bank._listed.values() for page in pages}
            assert sorted([*wrapper.bank._free, *listed]) == list(range(wrapper.bank.pages.shape[0]))
