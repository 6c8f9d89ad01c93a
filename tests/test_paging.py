"""What loading writes, by native kernels, against the layout in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dts_fast import native, paging, writes
from dts_fast.bank import Bank, VectorTable
from dts_fast.benchmark import random_delta
from dts_fast.codes import (
    CodedMatrix,
    CodedVector,
    DeltaSum,
    LowRankDelta,
    PageLayout,
    num_pages,
    pack,
    sizes_of,
    to_pages,
)
from dts_fast.mixture import mix
from dts_fast.writes import Kept, NotKeptError, Writes, send_pages, send_vectors

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def delta_of(n: int, k: int, rank: int) -> LowRankDelta:
    full = random_delta(n, k, rank + 1)
    u, v = (CodedMatrix(f.codes[:rank], f.levels, f.n) for f in (full.u, full.v))
    return LowRankDelta(u, full.s[:rank], v, (n, k))


@pytest.mark.parametrize("rank", [0, 1, 16, 19])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 33), (64, 16), (67, 130), (100, 127), (130, 61), (4099, 48)])
def test_pages_are_those_of_the_layout_bit_by_bit(n, k, rank):
    delta = delta_of(n, k, rank)
    arena = torch.full((num_pages(rank) + 3, PageLayout(n, k).nbytes), 0xFF, dtype=torch.uint8)  # poisoned
    numbers, all_of_it = torch.randperm(len(arena))[: num_pages(rank)].tolist(), Writes()
    all_of_it.add_pages(bank_of(arena), numbers, delta)
    assert (arena == 0xFF).all()
    all_of_it.write()
    assert torch.equal(arena[numbers], to_pages(delta))
    others = [i for i in range(len(arena)) if i not in numbers]
    assert (arena[others] == 0xFF).all()


def test_deltas_of_many_banks_are_written_together():
    """Also with several threads, whose shares begin and end within any of them."""
    all_of_it, banks, shapes = Writes(), [], [(67, 130, 19), (5, 3, 0), (4099, 48, 33), (1, 1, 1), (130, 2050, 70)]
    for n, k, rank in shapes:
        delta = delta_of(n, k, rank)
        bank = bank_of(torch.empty(0, PageLayout(n, k).nbytes, dtype=torch.uint8))
        all_of_it.add_pages(bank, range(1, num_pages(rank) + 1), delta)
        bank.tensors = torch.full((num_pages(rank) + 2, PageLayout(n, k).nbytes), 0xFF, dtype=torch.uint8), None, None
        banks.append((bank, delta))  # its arena has grown
    all_of_it.write()
    for bank, delta in banks:
        assert torch.equal(bank.tensors[0][1:-1], to_pages(delta))
        assert (bank.tensors[0][[0, -1]] == 0xFF).all()


@pytest.mark.parametrize("staged", [1, 1000, 1 << 30])
def test_pages_for_another_device_go_there_in_parts(monkeypatch, staged):
    """What is done for GPUs, on a CPU."""
    monkeypatch.setattr(writes, "_STAGED", staged)
    monkeypatch.setattr(writes, "_LEAST_STAGED", min(staged, 1 << 20))
    deltas = [delta_of(70, 33, rank) for rank in (0, 20, 1, 50)]
    banks = [bank_of(torch.zeros(5, PageLayout(70, 33).nbytes, dtype=torch.uint8)) for _ in deltas]
    numbers = [[], [3, 4], [0], [0, 2, 3, 4]]
    send_pages([writes._Pages(*each, place) for place, each in enumerate(zip(banks, numbers, deltas, strict=True))])
    for bank, own, delta in zip(banks, numbers, deltas, strict=True):
        assert torch.equal(bank.tensors[0][own], to_pages(delta))


def bank_of(arena: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(tensors=(arena, None, None), page_nbytes=arena.shape[1])


@pytest.mark.parametrize("staged", [1, 1000, 1 << 30])
def test_pages_that_were_kept_are_written_again(monkeypatch, staged):
    monkeypatch.setattr(writes, "_STAGED", staged)
    monkeypatch.setattr(writes, "_LEAST_STAGED", min(staged, 1 << 20))
    deltas = [delta_of(70, 33, 20), delta_of(70, 33, 0), DeltaSum((delta_of(5, 9, 3), delta_of(5, 9, 17)))]
    shapes = [(70, 33), (70, 33), (5, 9)]
    banks = [bank_of(torch.zeros(6, PageLayout(*shape).nbytes, dtype=torch.uint8)) for shape in shapes]
    keeping = Kept(1 << 20)
    first = Writes(keeping)
    for bank, delta, numbers in zip(banks, deltas, ([1, 5], [], [0, 3, 2]), strict=True):
        first.add_pages(bank, numbers, delta)
    first.write()
    assert keeping.is_whole
    assert keeping.nbytes == sum(
        len(to_pages(d)) * bank.tensors[0].shape[1] for d, bank in zip(deltas, banks, strict=True)
    )
    for bank in banks:
        bank.tensors = torch.full_like(bank.tensors[0], 0xFF), None, None
    again = Writes(kept=keeping)
    for bank, delta, numbers in zip(banks, map(sizes_of, deltas), ([4, 2], [], [5, 4, 0]), strict=True):
        again.add_pages(bank, numbers, delta)
    again.write()
    for bank, delta, numbers in zip(banks, deltas, ([4, 2], [], [5, 4, 0]), strict=True):
        assert torch.equal(bank.tensors[0][numbers], to_pages(delta))
        others = [i for i in range(6) if i not in numbers]
        assert (bank.tensors[0][others] == 0xFF).all()
    for other in (bank_of(banks[0].tensors[0]), banks[2]):
        with pytest.raises(NotKeptError):
            Writes(kept=keeping).add_pages(other, [0, 1], deltas[0])


@pytest.mark.parametrize("sizes", [[], [0, 0], [5], [70] * 3, [1] * 40, [3, 9, 2, 30, 1, 1, 1, 17, 64]])
def test_parts_fill_powers_of_two(monkeypatch, sizes):
    monkeypatch.setattr(writes, "_STAGED", 64)
    monkeypatch.setattr(writes, "_LEAST_STAGED", 4)
    bank = SimpleNamespace(page_nbytes=1)
    pages = [writes._Pages(bank, range(size), None, i) for i, size in enumerate(sizes)]
    parts = list(writes._in_parts(pages))
    assert [page for part in parts for page in part] == pages
    assert all(len(part) == 1 or sum(page.nbytes for page in part) <= 64 for part in parts)
    if sizes == [1] * 40:
        assert [len(part) for part in parts] == [32, 8]


def test_more_pages_than_may_be_kept_are_not():
    bank = bank_of(torch.zeros(6, PageLayout(70, 33).nbytes, dtype=torch.uint8))
    keeping = Kept(3 * PageLayout(70, 33).nbytes - 1)
    for numbers in ([1, 2], [3]):
        some = Writes(keeping)
        some.add_pages(bank, numbers, delta_of(70, 33, 16 * len(numbers)))
        some.write()
        assert keeping.is_whole == (numbers == [1, 2])
    with pytest.raises(NotKeptError):
        keeping.take(0, bank, 2)


def test_vectors_for_another_device_are_the_same():
    """What is done for GPUs, on a CPU."""
    bases = [torch.randn(n).to(dtype) for n, dtype in ((9, torch.bfloat16), (1, torch.float32), (130, torch.float16))]
    deltas, outs = [vector(len(base)) for base in bases], [torch.empty_like(base) for base in bases]
    send_vectors([writes._Vector(*each) for each in zip(outs, bases, deltas, strict=True)])
    for out, base, delta in zip(outs, bases, deltas, strict=True):
        assert torch.equal(out, (base.float() + delta.dequantize()).to(base.dtype))


def test_without_the_extension_pages_are_the_same():
    deltas, numbers = [delta_of(70, 33, 20), delta_of(5, 9, 3)], [4, 1, 0]
    arenas = [torch.full((5, PageLayout(*d.shape).nbytes), 0xFF, dtype=torch.uint8) for d in deltas]
    parts = [(d.u.codes, d.u.levels, d.s, d.v.codes, d.v.levels, *d.shape) for d in deltas]
    paging._write_pages_plain(arenas, *map(list, zip(*parts, strict=True)), numbers)
    assert torch.equal(arenas[0][[4, 1]], to_pages(deltas[0]))
    assert torch.equal(arenas[1][[0]], to_pages(deltas[1]))
    assert (arenas[0][[0, 2, 3]] == 0xFF).all()


def test_terms_of_a_sum_have_pages_of_their_own():
    delta = DeltaSum((random_delta(70, 33, 5), random_delta(70, 33, 17)))
    bank = Bank(PageLayout(70, 33).nbytes, 2)
    bank.load_deltas(1, {0: delta})
    assert torch.equal(bank.listed(1)[0], to_pages(delta))


def vector(n: int) -> CodedVector:
    return CodedVector(pack(torch.randint(0, 4, (n,), dtype=torch.uint8)), torch.randn(4), (n,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 4, 129])
def test_a_vector_is_added_in_float32_and_rounded_once(n, dtype):
    base, delta = torch.randn(n, dtype=dtype), vector(n)
    wide = torch.promote_types(dtype, torch.float32)
    table = VectorTable(base, 2)
    table.values[:2] = float("nan")
    table.load(0, delta)
    gathered = Writes()
    table.load(1, delta, gathered)
    assert table.values[1].isnan().all()
    gathered.write()
    for slot in (0, 1):
        assert torch.equal(table.values[slot], (base.to(wide) + delta.dequantize(wide)).to(dtype))


def test_what_the_native_op_does_not_take_is_added_all_the_same():
    base, delta, deltas = torch.randn(9), vector(9), [vector(9), vector(9)]
    table, gathered = VectorTable(base, 2), Writes()
    table.load(0, CodedVector(delta.codes, delta.levels.double(), delta.shape), gathered)
    table.load(1, mix("bias", [(0.5, deltas[0]), (2.0, deltas[1])]), gathered)
    torch.testing.assert_close(table.values[0], base + delta.dequantize())
    torch.testing.assert_close(table.values[1], base + 0.5 * deltas[0].dequantize() + 2.0 * deltas[1].dequantize())


def test_without_the_extension_all_else_is_the_same():
    table, pages = [torch.full((3, 4), 9, dtype=torch.int32)] * 2, torch.full((6, 128), 0xFF, dtype=torch.uint8)
    weights, source = [torch.zeros(3, 4)] * 2, torch.randint(0, 99, (3, 128), dtype=torch.uint8)
    paging._write_lists_plain(table, weights, [1, 2], [2, 1], [7, 5, 3], [0.5, 2.0])
    assert (table[0].tolist(), weights[0].tolist()) == (
        [[9] * 4, [7, 5, -1, -1], [3, -1, -1, -1]],
        [[0.0] * 4, [0.5, 0.5, 0, 0], [2.0, 0, 0, 0]],
    )
    paging._copy_pages_plain([pages], [source], [4, 0, 1])
    assert torch.equal(pages[[4, 0, 1]], source)
    assert (pages[[2, 3, 5]] == 0xFF).all()
    base, delta, out = torch.randn(9), vector(9), torch.empty(9)
    paging._write_vectors_plain([out], [base], [delta.codes], [delta.levels])
    assert torch.equal(out, base + delta.dequantize())


@pytest.mark.skipif(native.MODULE is None, reason="no extension here")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("s", {3: [torch.ones(20).double()]}),
        ("u_codes", {1: [torch.zeros(20, 17, dtype=torch.uint8)]}),
        ("v_codes", {4: [torch.zeros(19, 9, dtype=torch.uint8)]}),
        ("v_levels", {5: [torch.zeros(3)]}),
        ("pages", {0: [torch.zeros(2, 128, dtype=torch.uint8)]}),
        ("numbers", {8: [0]}),
        ("numbers", {8: [0, 1, 1]}),
        ("numbers", {8: [0, 2]}),
        ("numbers", {8: [-1, 0]}),
        ("write_pages_", {6: [70, 70]}),
    ],
)
def test_pages_that_do_not_fit_are_refused(name, change):
    delta = delta_of(70, 33, 20)
    pages = torch.zeros(2, PageLayout(70, 33).nbytes, dtype=torch.uint8)
    u, v = delta.u, delta.v
    arguments = [[pages], [u.codes], [u.levels], [delta.s], [v.codes], [v.levels], [70], [33], [0, 1]]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=f"dts_fast: {name}: expected .*, got |dts_fast: {name}: expected lists"):
        torch.ops.dts_fast.write_pages_(*arguments)
    assert (pages == 0).all()


TABLE, NUMBERS = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 4)
CODES, PAGES = torch.zeros(3, dtype=torch.uint8), torch.zeros(3, 128, dtype=torch.uint8)


@pytest.mark.parametrize(
    "op", [torch.ops.dts_fast.copy_pages_, torch.ops.dts_fast.send_pages_, paging._copy_pages_plain]
)
def test_pages_are_copied_to_their_places(op):
    """On a CPU, as to a GPU, and in plain torch; neighbours together, of several arenas."""
    sources = [torch.randint(0, 255, (n, 128), dtype=torch.uint8) for n in (5, 0, 1)]
    arenas = [torch.full((8, 128), 0xFF, dtype=torch.uint8) for _ in sources]
    numbers = [[2, 3, 7, 0, 1], [], [6]]
    op(arenas, sources, [number for own in numbers for number in own])
    for arena, source, own in zip(arenas, sources, numbers, strict=True):
        assert torch.equal(arena[own], source)
        assert (arena[[i for i in range(8) if i not in own]] == 0xFF).all()


@pytest.mark.skipif(native.MODULE is None, reason="no extension here")
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("op", "name", "arguments"),
    [
        ("write_vectors_", "out", ([torch.empty(8)], [torch.zeros(9)], [CODES], [torch.zeros(4)])),
        ("write_vectors_", "codes", ([torch.empty(9)], [torch.zeros(9)], [CODES[:2]], [torch.zeros(4)])),
        ("write_vectors_", "levels", ([torch.empty(9)], [torch.zeros(9)], [CODES], [torch.zeros(4).double()])),
        ("write_vectors_", "base", ([torch.empty(9).int()], [torch.zeros(9).int()], [CODES], [torch.zeros(4)])),
        ("write_vectors_", "write_vectors_", ([torch.empty(9)], [torch.zeros(9)], [], [torch.zeros(4)])),
        ("copy_pages_", "sources", ([PAGES], [torch.zeros(1, 64, dtype=torch.uint8)], [0])),
        ("copy_pages_", "pages", ([PAGES.int()], [PAGES], [0, 1, 2])),
        ("copy_pages_", "numbers", ([PAGES], [PAGES[:1]], [3])),
        ("copy_pages_", "numbers", ([PAGES], [PAGES[:1]], [-1])),
        ("copy_pages_", "numbers", ([PAGES], [PAGES[:1]], [])),
        ("copy_pages_", "numbers", ([PAGES], [PAGES[:1]], [0, 1])),
        ("copy_pages_", "copy_pages_", ([PAGES], [], [])),
        ("write_lists_", "slot_pages", ([TABLE.long()], [NUMBERS], [0], [1], [0], [1.0])),
        ("write_lists_", "slot_weights", ([TABLE], [NUMBERS[:2]], [0], [1], [0], [1.0])),
        ("write_lists_", "write_lists_", ([TABLE], [NUMBERS], [3], [1], [0], [1.0])),
        ("write_lists_", "write_lists_", ([TABLE], [NUMBERS], [0], [5], [0] * 5, [1.0])),
        ("write_lists_", "write_lists_", ([TABLE], [NUMBERS], [0], [2], [0], [1.0])),
        ("write_lists_", "write_lists_", ([TABLE], [NUMBERS], [0], [2], [0, 1], [])),
    ],
)
def test_the_native_ops_refuse_what_does_not_fit(op, name, arguments, other):
    """Also those that write to other devices."""
    if other:
        op = {"copy_pages_": "send_pages_", "write_lists_": "send_lists_"}.get(op, op)
    with pytest.raises(ValueError, match=f"dts_fast: {name}: expected .*, got |dts_fast: {name}: expected lists"):
        getattr(torch.ops.dts_fast, op)(*arguments)
