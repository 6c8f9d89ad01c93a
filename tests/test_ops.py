"""Every backend of the ops against the float64 reference: odd shapes, empty batches, rank 0, strides, all dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from conftest import threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dts_fast import gpu, native, ops, reference
from dts_fast.bank import Bank
from dts_fast.codes import CodedMatrix, LowRankDelta, PageLayout, from_pages, pack, to_pages
from dts_fast.packing import pack_weight, packed_shape, unpack_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Backend:
    linear: object
    add_delta_: object = None
    # Types for which levels and h are rounded to 16 bits, each by half a unit in the last place.
    rounding: tuple[torch.dtype, ...] = ()

    def rounded(self, dtype: torch.dtype) -> float:
        """Units in the last place by which two levels and h are rounded."""
        return 1.5 if dtype in self.rounding else 0.0


def on_isa(isa: str, op):
    """An op of the native CPU backend on one of the instruction sets that run here."""

    def run(*args, **kwargs):
        before = native.MODULE.cpu_isa()
        native.MODULE._set_cpu_isa(isa)
        try:
            with threads(2):
                return op(*args, **kwargs)
        finally:
            native.MODULE._set_cpu_isa(before)

    return run


def packed(x, weight, bias, *bank):
    """`ops.packed_linear` with the arguments of `ops.linear`."""
    return ops.packed_linear(x, pack_weight(weight), bias, weight.shape[0], *bank)


def on_device(device: str, op):
    """An op on copies of its tensors; what it writes to its first argument is copied back."""

    def run(*args, **kwargs):
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
        out = op(*moved, **kwargs)
        args[0].copy_(moved[0])
        return out if out is None else out.cpu()

    return run


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, Triton's interpreter runs its kernels
TRITON = {}
if find_spec("triton"):
    from dts_fast import triton

    TRITON = {"triton": Backend(on_device(DEVICE, triton.linear), on_device(DEVICE, triton.add_delta_), HALVES)}

if torch.cuda.is_available():
    TRITON["registered on the GPU"] = Backend(on_device("cuda", ops.linear), on_device("cuda", ops.add_delta_), HALVES)

ISAS = native.MODULE.cpu_isas() if native.MODULE else []
# Instruction sets that multiply pairs of bfloat16.
PAIRS = {"avx512_bf16": (torch.bfloat16,)}
BACKENDS = {
    "plain": Backend(reference.linear, reference.add_delta_),
    "registered": Backend(ops.linear, ops.add_delta_, PAIRS.get(native.MODULE.cpu_isa(), ()) if native.MODULE else ()),
    **{f"cpu {isa}": Backend(on_isa(isa, ops.linear), on_isa(isa, ops.add_delta_), PAIRS.get(isa, ())) for isa in ISAS},
    **{f"packed cpu {isa}": Backend(on_isa(isa, packed), None, PAIRS.get(isa, ())) for isa in ISAS},
    **TRITON,
}
ADDING = [name for name, backend in BACKENDS.items() if backend.add_delta_]


def random_delta(n: int, k: int, rank: int) -> LowRankDelta:
    def factor(size: int) -> CodedMatrix:
        levels = torch.tensor([1.5, 0.5, -0.4, -1.3]) * (1 + 0.1 * torch.randn(4))
        return CodedMatrix(pack(torch.randint(0, 4, (rank, size), dtype=torch.uint8)), levels, size)

    return LowRankDelta(factor(n), torch.randn(rank) / (k * max(rank, 1)) ** 0.5, factor(k), (n, k))


def make_bank(n: int, k: int, ranks: list[int]) -> tuple[Bank, list[LowRankDelta]]:
    """One slot for each rank; two more, a weighted mixture of the first two and an empty one."""
    bank = Bank(PageLayout(n, k).nbytes, len(ranks) + 2)
    deltas = [random_delta(n, k, rank) for rank in ranks]
    for slot, delta in enumerate(deltas):
        bank.load(slot, to_pages(delta), weight=1.0 + 0.25 * slot)
    if len(ranks) > 1:
        pages = torch.cat([to_pages(deltas[0]), to_pages(deltas[1])])
        bank.load(len(ranks), pages)
        bank.slot_weights[len(ranks), : len(pages)] = torch.linspace(-0.5, 0.75, len(pages))
    return bank, deltas


def within_rounding(y: Tensor, truth: Tensor, base: Tensor, magnitude: Tensor, rounded: Tensor | float = 0.0) -> None:
    """Float32 sums, and one rounding to the output dtype for the base and one for the whole.

    The sums' error is bounded by a small multiple of 2^-24 sqrt(K) of the sum of magnitudes; 1e-5 leaves room for
    the K of a thousand used here and for sums in any order. ``rounded`` is a backend's own multiple of eps, times the
    sum of magnitudes of the delta (`delta_magnitude`).
    """
    eps = torch.finfo(y.dtype).eps
    allowed = eps * (base.abs() + truth.abs() + rounded) + 1e-5 * magnitude + torch.finfo(y.dtype).tiny
    excess = (y.double() - truth).abs() - allowed
    assert bool((excess <= 0).all()), f"largest excess over the allowed error: {excess.max().item():.3g}"


def delta_magnitude(layout: PageLayout, bank: Bank, x: Tensor, slot_ids: Tensor, transpose: bool = False) -> Tensor:
    """The sum of the magnitudes of all products that make up a delta, float64 ``[M, N]``."""
    pages = bank.pages.clone()
    for part in (layout.s(pages), layout.u_levels(pages), layout.v_levels(pages)):
        part.abs_()
    out = torch.zeros(x.shape[0], layout.k if transpose else layout.n, dtype=torch.float64)
    absolute = pages, bank.slot_pages, bank.slot_weights.abs(), slot_ids
    reference.add_delta_(out, x.double().abs(), *absolute, transpose=transpose)
    return out


SHAPES = [
    # M, K, N, ranks of the slots
    (1, 64, 48, [16]),
    (5, 33, 17, [3, 20]),
    (8, 128, 96, [16, 0, 40]),
    (7, 1, 1, [1]),
    (32, 1000, 130, [48, 5, 17]),
    (0, 40, 24, [8]),
    (1, 100, 70, [35]),  # one row: lookups of pairs
    (3, 1100, 20, [17]),
    (70, 65, 33, [20, 16]),  # more rows than are in flight together
    (9, 2600, 130, [33, 200]),  # ranges of K; tasks of some pages
    (1, 300, 700, [300, 70]),  # one row: blocks of outputs, four pages at a time, more than 16
    (64, 1700, 40, [150]),
    (23, 1024, 33, [20]),  # rows a power of two apart, groups of rows of several sizes
]


def skip_what_takes_long(backend: str, shape: tuple, once: bool) -> None:
    """Triton's interpreter takes seconds for the larger shapes; for them it is enough to compute the same `once`."""
    m, k, n, ranks = shape
    if backend == "triton" and DEVICE == "cpu" and m * sum(ranks) * (n + k) > 1e6 and not once:
        pytest.skip("interpreted")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_against_the_reference(backend, dtype, shape, with_bias):
    skip_what_takes_long(backend, shape, dtype == torch.bfloat16 and with_bias)
    m, k, n, ranks = shape
    bank, _ = make_bank(n, k, ranks)
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    slot_ids = torch.randint(-1, len(ranks) + 2, (m,), dtype=torch.int32)
    y = BACKENDS[backend].linear(x, weight, bias, *bank.tensors, slot_ids)
    assert y.dtype == dtype
    wide = None if bias is None else bias.double()
    truth = reference.linear(x.double(), weight.double(), wide, *bank.tensors, slot_ids)
    base = torch.nn.functional.linear(x.double(), weight.double(), wide)
    magnitude = x.double().abs() @ weight.double().abs().t() + (truth - base).abs() + x.double().abs().sum(1)[:, None]
    rounded = BACKENDS[backend].rounded(dtype) * delta_magnitude(PageLayout(n, k), bank, x, slot_ids)
    within_rounding(y, truth, base, magnitude, rounded)


@pytest.mark.parametrize("backend", ADDING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_add_delta_against_the_reference(backend, dtype, shape, transpose):
    skip_what_takes_long(backend, shape, dtype == torch.bfloat16)
    m, k, n, ranks = shape
    bank, _ = make_bank(n, k, ranks)
    x, y = torch.randn(m, n if transpose else k).to(dtype), torch.randn(m, k if transpose else n).to(dtype)
    slot_ids = torch.randint(-1, len(ranks) + 2, (m,), dtype=torch.int32)
    truth, base = y.double(), y.double()
    reference.add_delta_(truth, x.double(), *bank.tensors, slot_ids, transpose=transpose)
    BACKENDS[backend].add_delta_(y, x, *bank.tensors, slot_ids, transpose=transpose)
    rounded = BACKENDS[backend].rounded(dtype) * delta_magnitude(PageLayout(n, k), bank, x, slot_ids, transpose)
    within_rounding(y, truth, base, (truth - base).abs() + x.double().abs().sum(1)[:, None], rounded)


def test_reference_is_the_textbook_formula():
    """The truth itself, against dequantised factors: y = x (W + weight * U diag(s) V^T)^T."""
    m, k, n = 6, 21, 34
    bank, deltas = make_bank(n, k, [5, 19])
    x, weight = torch.randn(m, k, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    slot_ids = torch.tensor([0, 1, -1, 2, 0, 3], dtype=torch.int32)
    # Slot 2 mixes one page of the first delta and two of the second (its ranks 0-15 and 16-18).
    first, second = deltas[0].dequantize(torch.float64), deltas[1]
    head, tail = (
        (second.u.dequantize(torch.float64)[:, part] * second.s.double()[part])
        @ second.v.dequantize(torch.float64)[:, part].t()
        for part in (slice(0, 16), slice(16, None))
    )
    mix = torch.linspace(-0.5, 0.75, 3).double()
    personal = [
        weight + first,
        weight + 1.25 * (head + tail),
        weight,
        weight + mix[0] * first + mix[1] * head + mix[2] * tail,
        weight + first,
        weight,
    ]
    y = reference.linear(x, weight, None, *bank.tensors, slot_ids)
    torch.testing.assert_close(y, torch.stack([w @ row for w, row in zip(personal, x, strict=True)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    bank, _ = make_bank(24, 20, [7, 18])
    x, weight, slot_ids = torch.randn(20, 12).t()[::2], torch.randn(24, 20), torch.tensor([0, 1, -1, 2, 0, 1]).int()
    strided = BACKENDS[backend].linear(x, weight.t().contiguous().t(), None, *bank.tensors, slot_ids)
    dense = BACKENDS[backend].linear(x.contiguous(), weight, None, *bank.tensors, slot_ids)
    torch.testing.assert_close(strided, dense)
    if backend in ADDING:
        y = torch.zeros(24, 6).t()
        BACKENDS[backend].add_delta_(y, x, *bank.tensors, slot_ids)
        torch.testing.assert_close(y, dense - x @ weight.t())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_rows_are_the_plain_linear(backend, dtype):
    bank, _ = make_bank(24, 20, [7])
    x, weight = torch.randn(5, 20).to(dtype), torch.randn(24, 20).to(dtype)
    slot_ids = torch.full((5,), -1, dtype=torch.int32)
    y = BACKENDS[backend].linear(x, weight, None, *bank.tensors, slot_ids)
    mixed = BACKENDS[backend].linear(x, weight, None, *bank.tensors, torch.tensor([-1, 0, 0, 0, -1]).int())
    assert torch.equal(y[[0, 4]], mixed[[0, 4]])
    # Float32 sums over 20 terms in another order, and one rounding.
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_and_rows_do_not_depend_on_their_neighbours_slots(backend, dtype):
    bank, _ = make_bank(130, 200, [33, 16, 5])
    x, weight = torch.randn(9, 200).to(dtype), torch.randn(130, 200).to(dtype)
    run = BACKENDS[backend].linear
    alone = run(x, weight, None, *bank.tensors, torch.full((9,), 1, dtype=torch.int32))
    for slots in ([1, 0, 2, -1, 1, 3, 4, 0, 1], [1, 2, 2, 2, 1, -1, -1, -1, 1]):
        mixed = run(x, weight, None, *bank.tensors, torch.tensor(slots, dtype=torch.int32))
        for row in (0, 4, 8):
            assert torch.equal(mixed[row], alone[row])
    again = run(x, weight, None, *bank.tensors, torch.full((9,), 1, dtype=torch.int32))
    assert torch.equal(alone, again)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "plain"])
def test_rows_of_a_real_layer_do_not_depend_on_their_neighbours_slots(backend):
    bank, _ = make_bank(70, 2600, [33, 16])
    x, weight = torch.randn(40, 2600).bfloat16(), torch.randn(70, 2600).bfloat16()
    alone = BACKENDS[backend].linear(x, weight, None, *bank.tensors, torch.full((40,), 1, dtype=torch.int32))
    slots = torch.randint(-1, 4, (40,), dtype=torch.int32)
    slots[::7] = 1
    mixed = BACKENDS[backend].linear(x, weight, None, *bank.tensors, slots)
    assert torch.equal(mixed[::7], alone[::7])


EMBEDDINGS = {
    "plain": reference.embedding_delta,
    "registered": ops.embedding_delta,
    **{f"cpu {isa}": on_isa(isa, ops.embedding_delta) for isa in ISAS},
    "as on a GPU, in plain torch": gpu._plain_embedding_delta,
    **({"triton": on_device(DEVICE, triton.embedding_delta)} if TRITON else {}),
}


@pytest.mark.parametrize("backend", EMBEDDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_embedding_delta_against_the_reference(backend, shape, ids_dtype):
    skip_what_takes_long(backend, shape, ids_dtype == torch.int64)
    m, k, n, ranks = shape
    bank, _ = make_bank(n, k, ranks)
    layout = PageLayout(n, k)
    ids, slot_ids = torch.randint(0, n, (m,), dtype=ids_dtype), torch.randint(-1, len(ranks) + 2, (m,)).int()
    delta = EMBEDDINGS[backend](ids, layout, *bank.tensors, slot_ids)
    assert (delta.shape, delta.dtype) == ((m, k), torch.float32)
    truth = reference.embedding_delta(ids, layout, *bank.tensors, slot_ids, torch.float64)
    one_hot = torch.nn.functional.one_hot(ids.long(), n).double()
    by_matrix = torch.zeros(m, k, dtype=torch.float64)
    reference.add_delta_(by_matrix, one_hot, *bank.tensors, slot_ids, transpose=True)
    torch.testing.assert_close(truth, by_matrix)
    # Float32 sums over up to 300 ranks.
    torch.testing.assert_close(delta.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max() if m else 0))
    assert bool((delta[slot_ids < 0] == 0).all())


def test_embedding_delta_refuses_what_does_not_fit():
    bank, _ = make_bank(10, 12, [3])
    ids, slot_ids, layout = torch.tensor([1, 9]), torch.tensor([0, -1]).int(), PageLayout(10, 12)
    torch.library.opcheck(torch.ops.dts_fast.embedding_delta.default, (ids, 10, 12, *bank.tensors, slot_ids))
    for run in (torch.ops.dts_fast.embedding_delta, ops._embedding_delta_plain):
        for wrong, message in (
            ((torch.tensor([1, 10]), slot_ids), r"ids: expected 0\.\.9, got 1\.\.10"),
            ((torch.tensor([-1, 1]), slot_ids), r"ids: expected 0\.\.9"),
            ((torch.tensor([1.0, 2.0]), slot_ids), "ids: expected int64 or int32"),
            ((ids[None], slot_ids), "ids: expected int64 or int32"),
            ((ids, slot_ids[:1]), "one slot for each row"),
            ((ids, torch.tensor([0, 7]).int()), "expected -1"),
        ):
            with pytest.raises(ValueError, match=message):
                run(wrong[0], layout.n, layout.k, *bank.tensors, wrong[1])
        with pytest.raises(ValueError, match="rank pages of a layer"):
            run(ids, 100, 12, *bank.tensors, slot_ids)


def op_arguments(dtype=torch.float32, requires_grad=False):
    bank, _ = make_bank(10, 12, [3, 17])
    x = torch.randn(4, 12, dtype=dtype, requires_grad=requires_grad)
    weight, bias = torch.randn(10, 12, dtype=dtype), torch.randn(10, dtype=dtype)
    return x, weight, bias, *bank.tensors, torch.tensor([0, -1, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    x, weight, bias, *bank = op_arguments(dtype, requires_grad)
    torch.library.opcheck(torch.ops.dts_fast.linear.default, (x, weight, bias, *bank))
    torch.library.opcheck(torch.ops.dts_fast.packed_linear.default, (x, pack_weight(weight), bias, 10, *bank))
    y = torch.zeros(4, 10, dtype=dtype)
    torch.library.opcheck(torch.ops.dts_fast.add_delta_.default, (y, x, *bank))


def dense_delta(layout, pages, page_list, weights):
    listed = page_list >= 0
    return from_pages(layout, pages[page_list[listed].long()], weights[listed]).dequantize()


def test_gradients_equal_those_of_the_dense_weight():
    x, weight, bias, pages, slot_pages, slot_weights, slot_ids = op_arguments(requires_grad=True)
    weight.requires_grad_()
    bias.requires_grad_()
    layout = PageLayout(10, 12)
    dense = [
        weight.detach() + dense_delta(layout, pages, slot_pages[s], slot_weights[s]) if s >= 0 else weight
        for s in slot_ids.tolist()
    ]
    upstream = torch.randn(4, 10)
    expected_x = torch.stack([g @ w for g, w in zip(upstream, dense, strict=True)])
    y = ops.linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids)
    grads = torch.autograd.grad((y * upstream).sum(), (x, weight, bias))
    # Float32 sums over 12 and 48 terms.
    torch.testing.assert_close(grads[0], expected_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1], upstream.t() @ x)
    torch.testing.assert_close(grads[2], upstream.sum(0))
    y = packed(x, weight.detach(), bias, pages, slot_pages, slot_weights, slot_ids)
    torch.testing.assert_close(torch.autograd.grad((y * upstream).sum(), x)[0], expected_x, rtol=1e-5, atol=1e-5)
    y = torch.nn.functional.linear(x, weight, bias)
    ops.add_delta_(y, x, pages, slot_pages, slot_weights, slot_ids)
    torch.testing.assert_close(torch.autograd.grad((y * upstream).sum(), x)[0], expected_x, rtol=1e-5, atol=1e-5)


def test_compiles_without_graph_breaks_forward_and_backward():
    x, weight, bias, *bank = op_arguments(requires_grad=True)

    def both(x):
        y = ops.linear(x, weight, bias, *bank).relu()
        z = torch.nn.functional.linear(x, weight)
        ops.add_delta_(z, x, *bank)
        return y + z

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    expected = torch.autograd.grad(both(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


REFUSED = {
    "x of another width": (lambda a: a | {"x": torch.randn(4, 70)}, "x: expected"),
    "x with three dimensions": (lambda a: a | {"x": torch.randn(2, 2, 12)}, "x: expected"),
    "float64": (lambda a: a | {"x": a["x"].double(), "weight": a["weight"].double(), "bias": None}, "float32, float16"),
    "weight of another dtype": (lambda a: a | {"weight": a["weight"].half()}, "weight: expected dtype of x"),
    "bias of another size": (lambda a: a | {"bias": torch.randn(9)}, "bias: expected"),
    "pages of another layer": (lambda a: a | {"pages": a["pages"][:, :-128].contiguous()}, "rank pages of a layer"),
    "pages not uint8": (lambda a: a | {"pages": a["pages"].int()}, "pages: expected contiguous uint8"),
    "slots not int32": (lambda a: a | {"slot_ids": a["slot_ids"].long()}, "slot_ids: expected contiguous int32"),
    "too few slots": (lambda a: a | {"slot_ids": a["slot_ids"][:3]}, "one slot for each row"),
    "slot out of range": (lambda a: a | {"slot_ids": torch.tensor([0, 4, 0, 0]).int()}, r"expected -1\.\.3"),
    "slot below -1": (lambda a: a | {"slot_ids": torch.tensor([0, -2, 0, 0]).int()}, r"expected -1\.\.3"),
    "page out of range": (lambda a: a | {"slot_pages": a["slot_pages"] + 9}, r"slot_pages: expected pages below 6"),
    "weights of another shape": (lambda a: a | {"slot_weights": a["slot_weights"][:1]}, "slot_weights: expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    names = ("x", "weight", "bias", "pages", "slot_pages", "slot_weights", "slot_ids")
    change, message = REFUSED[case]
    arguments = change(dict(zip(names, op_arguments(), strict=True)))
    with pytest.raises(ValueError, match=message):
        ops.linear(**arguments)
    if "weight" not in case and "bias" not in case:
        y = torch.zeros(4, 10, dtype=arguments["x"].dtype)
        del arguments["weight"], arguments["bias"]
        if arguments["x"].dim() == 2:
            with pytest.raises(ValueError, match=r"expected"):
                ops.add_delta_(y, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (32, 2), (33, 5), (70, 64)], ids=str)
def test_packing_a_weight_loses_nothing(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    packed_weight = pack_weight(weight.t().contiguous().t())
    assert packed_weight.shape == packed_shape(*shape, dtype)
    assert torch.equal(unpack_weight(packed_weight, *shape), weight)


@pytest.mark.parametrize("build", ["native", "plain"])
def test_a_weight_packed_from_another_shape_is_refused(build):
    x, weight, bias, *bank = op_arguments()
    run = ops.packed_linear if build == "native" else ops._packed_linear_plain
    for wrong in (pack_weight(torch.randn(40, 12)), pack_weight(torch.randn(10, 13)), pack_weight(weight.bfloat16())):
        with pytest.raises(
            ValueError, match=r"weight: expected contiguous torch.float32 \[1, 12, 32, 1\], packed from"
        ):
            run(x, wrong, bias, 10, *bank)


@st.composite
def calls(draw):
    """Arguments of any legal call: shapes, dtypes, strides, ranks and compositions."""
    m, n, k = draw(st.integers(0, 70)), draw(st.integers(1, 90)), draw(st.integers(1, 150))
    ranks = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    slots = draw(st.lists(st.integers(-1, len(ranks) + 1), min_size=m, max_size=m))
    return m, n, k, ranks, slots, draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "plain"])
@given(call=calls())
def test_any_legal_call(backend, call):
    m, n, k, ranks, slots, dtype, strided, seed = call
    torch.manual_seed(seed)
    bank, _ = make_bank(n, k, ranks)
    x = torch.randn(k, m).t() if strided else torch.randn(m, 2 * k)[:, :k]
    weight = torch.randn(n, k + 3)[:, 3:] / k**0.5
    x, weight, slot_ids = x.to(dtype), weight.to(dtype), torch.tensor(slots, dtype=torch.int32)
    y = BACKENDS[backend].linear(x, weight, None, *bank.tensors, slot_ids)
    truth = reference.linear(x.double(), weight.double(), None, *bank.tensors, slot_ids)
    base = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t() + (truth - base).abs() + x.double().abs().sum(1)[:, None]
    rounded = BACKENDS[backend].rounded(dtype) * delta_magnitude(PageLayout(n, k), bank, x, slot_ids)
    within_rounding(y, truth, base, magnitude, rounded)
