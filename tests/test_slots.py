from __future__ import annotations

import copy
import threading

import pytest

from dts_fast.errors import CapacityError, DTSError, UnknownAdapterError
from dts_fast.slots import BASE, SlotTable


def table_with(*names: str, capacity: int = 3) -> SlotTable:
    table = SlotTable(capacity)
    for name in names:
        table.occupy(name, table.reserve())
    return table


def test_names_have_slots_until_they_are_released():
    table = table_with("a", "b", capacity=2)
    assert table.slot(BASE) == -1
    assert (table.slot("a"), table.slot("b"), table.names) == (0, 1, ["a", "b"])
    with pytest.raises(CapacityError, match=r"all 2 slots are taken \(a, b\)"):
        table.reserve()
    table.active = "a"
    assert table.release("a") == 0
    assert table.active == BASE
    assert table.reserve() == 0
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'a'; loaded: 'b', and '__base__'"):
        table.slot("a")


@pytest.mark.parametrize(("name", "message"), [("a", "loaded already"), (BASE, "reserved"), ("", "non-empty")])
def test_names_that_cannot_be_taken(name, message):
    with pytest.raises(DTSError, match=message):
        table_with("a").check_new(name)
    with pytest.raises(DTSError, match="at least 1"):
        SlotTable(0)


def test_a_reserved_slot_is_no_one_elses_until_it_is_given_back():
    table = SlotTable(2)
    assert (table.reserve(), table.reserve(), table.free) == (0, 1, 0)
    table.cancel(0)
    assert (table.free, table.reserve()) == (1, 0)


def test_a_slot_in_use_is_emptied_when_its_last_call_ends():
    table, cleared = table_with("a"), []
    first, second = table.lease(["a", BASE]), table.lease(["a"])
    assert first == {"a": 0, BASE: -1}
    table.release("a", cleared.append)
    assert (cleared, table.names, table.retiring, table.free) == ([], [], [0], 2)
    table.end_lease(first.values())
    assert cleared == []
    table.end_lease(second.values())
    assert (cleared, table.retiring, table.free) == ([0], [], 3)


def test_a_new_version_takes_the_name_while_calls_end_with_the_old_one():
    table, cleared = table_with("a"), []
    running = table.lease(["a"])
    table.occupy("a", table.reserve(), cleared.append)
    assert table.lease(["a"]) == {"a": 1}
    assert cleared == []
    table.end_lease(running.values())
    assert cleared == [0]


def test_eviction_takes_what_was_used_longest_ago_and_nothing_that_is_pinned_or_in_use():
    table, cleared = table_with("a", "b", "c"), []
    table.end_lease(table.lease(["a"]).values())
    assert list(table.evictable()) == ["b", "c", "a"]
    assert list(table.evictable(keep=["b"])) == ["c", "a"]
    table.pin("b")
    running = table.lease(["c"])
    assert (list(table.evictable()), list(table.removable())) == (["a"], ["a", "c"])
    assert not table.evict("b", cleared.append)
    assert not table.evict("c", cleared.append)
    assert table.evict("a", cleared.append)
    assert (cleared, table.names, table.resident, table.free) == ([0], ["a", "b", "c"], ["b", "c"], 1)
    assert table.lease(["a", "b"]) is None
    with pytest.raises(UnknownAdapterError, match="was evicted"):
        table.slot("a")
    table.end_lease(running.values())
    table.pin("b", False)
    assert table.evict("b", cleared.append)
    table.occupy("a", table.reserve())
    assert table.slot("a") == 0


def test_a_thread_that_waits_wakes_when_a_lease_ends():
    table = table_with("a")
    lease, version, woken = table.lease(["a"]), table.version, threading.Event()
    assert table.leased_here

    def wait():
        assert not table.leased_here
        table.wait_for_change(version)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not woken.wait(0.05)
    table.end_lease(lease.values())
    assert woken.wait(10)
    thread.join()


def test_a_copy_has_the_names_and_locks_of_its_own():
    table = table_with("a", "b")
    table.pin("a")
    table.lease(["b"])
    own = copy.deepcopy(table)
    own.release("b")
    assert (own.names, table.names, own.pinned) == (["a"], ["a", "b"], ["a"])
    assert own.loading is not table.loading
