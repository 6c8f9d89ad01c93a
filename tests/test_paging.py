"""What loading writes, by native kernels, against the layout in plain torch."""

from __future__ import annotations

import pytest
import torch

from dts_fast import native
from dts_fast.benchmark import random_delta
from dts_fast.codes import CodedMatrix, CodedVector, DeltaSum, LowRankDelta, PageLayout, num_pages, pack, to_pages
from dts_fast.mixture import mix
from dts_fast.paging import pages_of, write_vector

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def delta_of(n: int, k: int, rank: int) -> LowRankDelta:
    full = random_delta(n, k, rank + 1)
    u, v = (CodedMatrix(f.codes[:rank], f.levels, f.n) for f in (full.u, full.v))
    return LowRankDelta(u, full.s[:rank], v, (n, k))


@pytest.mark.parametrize("rank", [0, 1, 16, 19])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 33), (64, 16), (67, 130), (100, 127), (130, 61), (4099, 48)])
def test_pages_are_those_of_the_layout_bit_by_bit(n, k, rank):
    delta = delta_of(n, k, rank)
    poisoned = torch.full((num_pages(rank), PageLayout(n, k).nbytes), 0xFF, dtype=torch.uint8)
    assert torch.equal(pages_of(delta, out=poisoned), to_pages(delta))


def test_terms_of_a_sum_have_pages_of_their_own():
    delta = DeltaSum((random_delta(70, 33, 5), random_delta(70, 33, 17)))
    assert torch.equal(pages_of(delta), to_pages(delta))


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
