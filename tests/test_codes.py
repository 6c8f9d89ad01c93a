import pytest
import torch

from dts_fast import fit_vector
from dts_fast.codes import (
    CodedMatrix,
    LowRankDelta,
    PageLayout,
    as_matrix,
    dequantize,
    from_pages,
    matrix_shape,
    num_pages,
    pack,
    packed_size,
    to_pages,
    unpack,
)


def random_matrix(n: int, rank: int) -> CodedMatrix:
    codes = torch.randint(0, 4, (rank, n), dtype=torch.uint8)
    return CodedMatrix(pack(codes), torch.randn(4), n)


def test_pack_by_hand():
    # Code of element i in bits 2 * (i % 4): 1 + 2*4 + 3*16 + 0*64 = 57, then 2 + padding = 2.
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8)).tolist() == [57, 2]


@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (5, 7), (3, 0), (0, 6), (2, 3, 9)])
def test_unpack_inverts_pack(shape):
    codes = torch.randint(0, 4, shape, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1]))
    assert torch.equal(unpack(packed, shape[-1]), codes)


@pytest.mark.parametrize("n", [1, 3, 8, 13])
def test_dequantize_takes_the_level_of_each_code(n):
    codes = torch.randint(0, 4, (5, n), dtype=torch.uint8)
    levels = torch.tensor([3.0, 1.0, -1.0, -2.0])
    assert torch.equal(dequantize(pack(codes), levels, n), levels[codes.long()])


def test_dequantize_reads_strided_codes():
    codes = torch.randint(0, 256, (6, 10), dtype=torch.uint8)
    levels = torch.randn(4)
    assert torch.equal(dequantize(codes[::2, 1:9], levels, 30), dequantize(codes[::2, 1:9].contiguous(), levels, 30))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((5,), None),
        ((1, 1, 8), None),
        ((3, 4), (3, 4)),
        ((1, 4), (1, 4)),
        ((1, 7, 8), (7, 8)),
        ((6, 3, 2, 2), (6, 12)),
        ((6, 3, 1, 1), (6, 3)),
    ],
)
def test_matrix_shape(shape, expected):
    assert matrix_shape(shape) == expected


def test_low_rank_delta_is_the_sum_of_its_components():
    u, v, s = random_matrix(7, 3), random_matrix(5, 3), torch.randn(3)
    delta = LowRankDelta(u, s, v, (7, 5))
    expected = sum(
        s[r].double() * torch.outer(u.dequantize(torch.float64)[:, r], v.dequantize(torch.float64)[:, r])
        for r in range(3)
    )
    torch.testing.assert_close(delta.dequantize(torch.float64), expected)
    torch.testing.assert_close(delta.transpose().dequantize(torch.float64), expected.t())
    assert delta.nbytes == 3 * 2 + 3 * 2 + 3 * 4 + 2 * 16


@pytest.mark.parametrize(("n", "k", "rank"), [(7, 5, 3), (64, 33, 16), (130, 9, 17), (4, 4, 0)])
def test_pages_hold_the_delta(n, k, rank):
    delta = LowRankDelta(random_matrix(n, rank), torch.randn(rank), random_matrix(k, rank), (n, k))
    layout, pages = PageLayout(n, k), to_pages(delta)
    assert pages.shape == (num_pages(rank), layout.nbytes)
    assert layout.nbytes % 128 == layout.u_offset % 64 == 0
    s = layout.s(pages).flatten()
    assert torch.equal(s[:rank], delta.s)
    assert torch.equal(s[rank:], torch.zeros(len(s) - rank))
    assert torch.equal(layout.u(pages, torch.float32)[:rank], delta.u.dequantize().t())
    assert torch.equal(layout.v(pages, torch.float32)[:rank], delta.v.dequantize().t())
    if rank:
        back = from_pages(layout, pages, torch.full((len(pages),), 2.0))
        assert torch.equal(torch.cat([term.u.codes for term in back.terms])[:rank], delta.u.codes)
        assert torch.equal(torch.cat([term.v.codes for term in back.terms])[:rank], delta.v.codes)
        torch.testing.assert_close(back.dequantize(), 2 * delta.dequantize())
    for page in range(num_pages(rank)):
        assert torch.equal(layout.u_levels(pages)[page], delta.u.levels)
        assert torch.equal(layout.v_levels(pages)[page], delta.v.levels)


def test_page_layout_by_hand():
    # N = 100 takes 7 tiles of 16 outputs, K = 33 takes 3 of 16 inputs.
    layout = PageLayout(100, 33)
    assert (layout.u_count, layout.v_count, layout.u_offset) == (7, 3, 128 + 3 * 64)
    assert layout.nbytes == 768  # 128 + 3 * 64 + 7 * 64, in steps of 128


def test_a_tile_by_hand():
    """Word of lane r in V's tile t: codes of inputs 16 t to 16 t + 15 of rank r, two bits each; U's likewise, with
    outputs as lanes and ranks along the word."""
    n, k, rank = 20, 33, 18
    u, v = (torch.randint(0, 4, (rank, size), dtype=torch.uint8) for size in (n, k))
    levels = torch.randn(4)
    delta = LowRankDelta(CodedMatrix(pack(u), levels, n), torch.randn(rank), CodedMatrix(pack(v), levels, k), (n, k))
    layout, pages = PageLayout(n, k), to_pages(delta)
    v_words = layout.v_tiles(pages).contiguous().view(torch.int32)[..., 0].long() & 0xFFFFFFFF
    u_words = layout.u_tiles(pages).contiguous().view(torch.int32)[..., 0].long() & 0xFFFFFFFF
    for r in range(rank):
        assert [int(v_words[r // 16, i // 16, r % 16]) >> 2 * (i % 16) & 3 for i in range(k)] == v[r].tolist()
        assert [int(u_words[r // 16, j // 16, j % 16]) >> 2 * (r % 16) & 3 for j in range(n)] == u[r].tolist()


@pytest.mark.parametrize("shape", [(1, 13), (13, 1), (1, 1)])
def test_a_single_row_or_column_is_one_component_exactly(shape):
    vector = fit_vector(torch.randn(shape))
    matrix = as_matrix(vector)
    assert matrix.shape == shape
    assert torch.equal(matrix.dequantize(), vector.dequantize())
    assert torch.equal(
        from_pages(PageLayout(*shape), to_pages(matrix), torch.ones(1)).dequantize(), vector.dequantize()
    )
    assert as_matrix(matrix) is matrix
    flat = fit_vector(torch.randn(6))
    assert as_matrix(flat) is flat
