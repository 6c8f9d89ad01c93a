from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dts_fast import bank as bank_module
from dts_fast import paging
from dts_fast.bank import Arena, Bank, give_back_memory
from dts_fast.errors import CapacityError
from dts_fast.writes import Writes

pytestmark = pytest.mark.usefixtures("two_threads")


def pages(count: int, value: int) -> torch.Tensor:
    return torch.full((count, 128), value, dtype=torch.uint8)


def contents(bank: Bank, slot: int) -> list[int]:
    """The first byte of each page a slot lists."""
    return [int(bank.pages[page, 0]) for page in bank.slot_pages[slot].tolist() if page >= 0]


def test_slots_list_the_pages_loaded_into_them():
    bank = Bank(128, 3)
    bank.load(0, pages(2, 7))
    bank.load(2, pages(1, 9), weight=0.5)
    assert [contents(bank, slot) for slot in range(3)] == [[7, 7], [], [9]]
    assert bank.slot_weights[2, 0] == 0.5
    assert bank.slot_pages[2].tolist() == [2, -1]


def test_evicted_pages_are_used_again_without_growing():
    bank = Bank(128, 2)
    bank.load(0, pages(3, 1))
    bank.load(1, pages(1, 2))
    size = bank.pages.shape[0]
    bank.evict(0)
    assert contents(bank, 0) == []
    bank.load(0, pages(3, 5))
    assert bank.pages.shape[0] == size
    assert contents(bank, 0) == [5, 5, 5]
    assert contents(bank, 1) == [2]


def test_reloading_a_slot_reuses_its_own_pages():
    bank = Bank(128, 1, arena=Arena(2, 2))
    bank.load(0, pages(2, 1))
    bank.load(0, pages(2, 3))
    assert contents(bank, 0) == [3, 3]


def test_a_fixed_bank_keeps_its_tensors():
    bank = Bank(128, 2, arena=Arena(3, 2))
    before = [t.data_ptr() for t in bank.tensors]
    bank.load(0, pages(2, 1))
    bank.evict(0)
    bank.load(1, pages(2, 4))
    assert [t.data_ptr() for t in bank.tensors] == before


def test_a_load_that_does_not_fit_changes_nothing():
    bank = Bank(128, 2, arena=Arena(3, 2))
    bank.load(0, pages(2, 1))
    with pytest.raises(CapacityError, match="takes 2 pages, 1 of 3 are free"):
        bank.load(1, pages(2, 2))
    with pytest.raises(CapacityError, match="at most 2"):
        bank.load(1, pages(3, 2))
    assert contents(bank, 0) == [1, 1]
    assert contents(bank, 1) == []


def test_an_empty_load_is_an_empty_slot():
    bank = Bank(128, 1)
    bank.load(0, pages(0, 0))
    assert contents(bank, 0) == []


def test_conversions_of_a_model_do_not_round_the_bank():
    bank = Bank(128, 1)
    bank.load(0, pages(1, 1), weight=1 / 3)
    bank.half().to(torch.bfloat16)
    assert bank.slot_weights.dtype == torch.float32
    assert bank.slot_weights[0, 0] == torch.tensor(1 / 3)
    assert bank.state_dict() == {}


def test_a_mixture_lists_the_pages_of_its_members():
    bank = Bank(128, 4)
    bank.load(0, pages(2, 7), weight=2.0)
    bank.load(1, pages(1, 9))
    size = bank.pages.shape[0]
    bank.share(2, [(0, 0.5), (1, -1.0)])
    assert bank.pages.shape[0] == size
    assert contents(bank, 2) == [7, 7, 9]
    assert bank.slot_weights[2, :3].tolist() == [1.0, 1.0, -1.0]


def test_what_is_shared_or_loaded_twice_is_freed_once():
    """Layers with tied weights share a bank, and each of them loads, mixes and clears."""
    bank = Bank(128, 3, arena=Arena(4, 2))
    for _ in range(2):
        bank.load(0, pages(2, 7))
    for _ in range(2):
        bank.share(1, [(0, 0.5)])
    for slot in (0, 0, 1, 1):
        bank.evict(slot)
    assert sorted(bank._free) == [0, 1, 2, 3]
    assert bank._users == {}


def test_shared_pages_stay_until_the_last_slot_lets_go():
    bank = Bank(128, 3, arena=Arena(4, 4))
    bank.load(0, pages(2, 7))
    bank.share(1, [(0, 1.0)])
    bank.evict(0)
    with pytest.raises(CapacityError, match="takes 3 pages, 2 of 4 are free"):
        bank.load(2, pages(3, 1))
    bank.load(2, pages(2, 1))
    assert contents(bank, 1) == [7, 7]
    bank.evict(1)
    bank.load(0, pages(2, 3))
    assert contents(bank, 2) == [1, 1]
    with pytest.raises(CapacityError, match="lists 14 pages, a slot of this bank at most 12"):
        bank.share(1, [(0, 1.0), (2, 1.0)] * 3 + [(0, 1.0)])
    assert contents(bank, 1) == []


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_replaced_arenas_are_given_back_once_they_are_worth_it(monkeypatch):
    trims = []
    library = SimpleNamespace(malloc_trim=trims.append)
    monkeypatch.setattr(bank_module.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(bank_module, "_replaced", [])
    bank = Bank(1 << 20, 24)
    for slot in range(24):  # 1 + 2 + ... MiB are replaced: 66 at the 12th growth
        bank.load(slot, torch.ones(1, 1 << 20, dtype=torch.uint8))
        give_back_memory()
        assert len(trims) == (0 if slot < 11 else 1 if slot < 16 else 2 if slot < 20 else 3 if slot < 23 else 4), slot


def test_lists_are_the_same_however_they_are_written():
    """At once, with others', in plain torch, and as to a GPU."""
    lists, banks, own = {1: [4, 2, 0], 3: [], 4: [5]}, [], torch.tensor([0.25, 2.0])
    for _ in range(4):
        banks.append(Bank(128, 3, parts=2, arena=Arena(6, 3)))
        banks[-1].slot_pages[3:] = 9  # what was there goes
    banks[0]._list(lists, 0.5)
    gathered = Writes()
    banks[1]._list(lists, 0.5, gathered)
    assert (banks[1].slot_pages[:3] == -1).all()
    gathered.write()
    rows, counts, numbers, weights = [1, 3, 4], [3, 0, 1], [4, 2, 0, 5], [0.5] * 3
    for bank, write in ((banks[2], torch.ops.dts_fast.send_lists_), (banks[3], paging._write_lists_plain)):
        write([bank.slot_pages] * 3, [bank.slot_weights] * 3, rows, counts, numbers, weights)
    for bank in banks:
        bank._list({0: [1, 3]}, own)
        shown = [[page for page in row if page >= 0] for row in bank.slot_pages.tolist()]
        assert shown == [[1, 3], [4, 2, 0], [], [], [5], [9] * 9]
        assert bank.slot_weights[bank.slot_pages >= 0].tolist() == [0.25, 2.0, 0.5, 0.5, 0.5, 0.5, *[0.0] * 9]
