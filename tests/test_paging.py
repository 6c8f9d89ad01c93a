"""What loading writes, by native kernels, against the layout in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dts_fast import native, paging
from dts_fast.bank import Bank
from dts_fast.benchmark import random_delta
from dts_fast.codes import CodedMatrix, CodedVector, DeltaSum, LowRankDelta, PageLayout, num_pages, pack, to_pages
from dts_fast.mixture import mix
from dts_fast.paging import Writes, send_pages, write_vector

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
    numbers, writes = torch.randperm(len(arena))[: num_pages(rank)].tolist(), Writes()
    writes.add_pages(SimpleNamespace(tensors=(arena, None, None)), numbers, delta)
    assert (arena == 0xFF).all()
    writes.write()
    assert torch.equal(arena[numbers], to_pages(delta))
    others = [i for i in range(len(arena)) if i not in numbers]
    assert (arena[others] == 0xFF).all()


def test_deltas_of_many_banks_are_written_together():
    """Also with several threads, whose shares begin and end within any of them."""
    writes, banks, shapes = Writes(), [], [(67, 130, 19), (5, 3, 0), (4099, 48, 33), (1, 1, 1), (130, 2050, 70)]
    for n, k, rank in shapes:
        delta = delta_of(n, k, rank)
        bank = SimpleNamespace(tensors=(torch.empty(0, PageLayout(n, k).nbytes, dtype=torch.uint8), None, None))
        writes.add_pages(bank, range(1, num_pages(rank) + 1), delta)
        bank.tensors = torch.full((num_pages(rank) + 2, PageLayout(n, k).nbytes), 0xFF, dtype=torch.uint8), None, None
        banks.append((bank, delta))  # its arena has grown
    writes.write()
    for bank, delta in banks:
        assert torch.equal(bank.tensors[0][1:-1], to_pages(delta))
        assert (bank.tensors[0][[0, -1]] == 0xFF).all()


@pytest.mark.parametrize("staged", [1, 1000, 1 << 30])
def test_pages_for_another_device_go_there_in_parts(monkeypatch, staged):
    """What is done for GPUs, on a CPU."""
    monkeypatch.setattr(paging, "_STAGED", staged)
    deltas = [delta_of(70, 33, rank) for rank in (0, 20, 1, 50)]
    arenas = [torch.zeros(5, PageLayout(70, 33).nbytes, dtype=torch.uint8) for _ in deltas]
    numbers = [[], [3, 4], [0], [0, 2, 3, 4]]
    send_pages(list(zip(arenas, numbers, deltas, strict=True)))
    for arena, own, delta in zip(arenas, numbers, deltas, strict=True):
        assert torch.equal(arena[own], to_pages(delta))


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
    out = torch.full_like(base, float("nan"))
    write_vector(out, base, delta)
    assert torch.equal(out, (base.to(wide) + delta.dequantize(wide)).to(dtype))


def test_what_the_native_op_does_not_take_is_added_all_the_same():
    base, delta = torch.randn(18)[::2], vector(9)
    out = torch.empty(18)[::2]
    write_vector(out, base, CodedVector(delta.codes, delta.levels.double(), delta.shape))
    torch.testing.assert_close(out, base + delta.dequantize())


def test_a_sum_of_vectors_is_added_too():
    base, deltas = torch.randn(9), [vector(9), vector(9)]
    out = torch.empty(9)
    write_vector(out, base, mix("bias", [(0.5, deltas[0]), (2.0, deltas[1])]))
    torch.testing.assert_close(out, base + 0.5 * deltas[0].dequantize() + 2.0 * deltas[1].dequantize())


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


@pytest.mark.skipif(native.MODULE is None, reason="no extension here")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("out", (torch.empty(8), torch.zeros(9), torch.zeros(3, dtype=torch.uint8), torch.zeros(4))),
        ("codes", (torch.empty(9), torch.zeros(9), torch.zeros(2, dtype=torch.uint8), torch.zeros(4))),
        ("levels", (torch.empty(9), torch.zeros(9), torch.zeros(3, dtype=torch.uint8), torch.zeros(4).double())),
        ("base", (torch.empty(9).int(), torch.zeros(9).int(), torch.zeros(3, dtype=torch.uint8), torch.zeros(4))),
    ],
)
def test_the_native_op_refuses_what_does_not_fit(name, arguments):
    with pytest.raises(ValueError, match=f"dts_fast: {name}: expected .*, got "):
        torch.ops.dts_fast.write_vector_(*arguments)
