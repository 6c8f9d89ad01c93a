"""What only a GPU shows: graphs that are replayed with other adapters, compilation, several devices' defaults."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dts_fast import DTSLinear, fit, gpu, ops, route
from dts_fast.codes import to_pages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def layer_of(n: int, k: int, dtype: torch.dtype, adapters: int = 3) -> tuple[DTSLinear, list[torch.Tensor]]:
    """A layer of fixed capacity with adapters "0", "1", ... and its dense weights, the base's last."""
    base = nn.Linear(k, n, bias=False, dtype=dtype, device="cuda").requires_grad_(False)
    layer, dense = DTSLinear(base, max_adapters=adapters + 1, max_rank=32), []
    for i in range(adapters):
        delta = fit(0.05 * torch.randn(n, k), rank=20)
        layer.load_adapter(str(i), delta)
        dense.append(base.weight.double() + delta.dequantize(torch.float64).cuda())
    return layer, [*dense, base.weight.double()]


def expected(x: torch.Tensor, dense: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    return torch.stack([row @ dense[slot].t() for row, slot in zip(x.double(), slots, strict=True)])


def close(y: torch.Tensor, truth: torch.Tensor) -> None:
    # One rounding of the result, and of levels and h, to the type; sums of a few hundred terms of size 1 in float32.
    eps = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=4 * eps, atol=8 * eps + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 7, 12, 25, 33, 64, 300])
def test_rows_use_their_own_adapters(dtype, m):
    layer, dense = layer_of(264, 520, dtype)
    x = torch.randn(m, 520, device="cuda").to(dtype)
    slots = [(i % 4) - 1 for i in range(m)]
    with torch.no_grad(), route(["__base__" if s < 0 else str(s) for s in slots]):
        close(layer(x), expected(x, dense, slots))


DECODE = Path(__file__).parents[1] / "csrc/cuda/decode.h"
SHAPES = re.findall(r"X\((\d+), (\d+), (\d+), (\d+)\)", DECODE.read_text())


@pytest.mark.skipif(gpu.why_not_cuda() is not None, reason=f"no CUDA kernels: {gpu.why_not_cuda()}")
@pytest.mark.parametrize("dependent", [0, 1])
@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("few", [False, True])  # rows, and then inputs: as the shrink's pieces are added up late
@pytest.mark.parametrize("shape", SHAPES, ids="-".join)
def test_every_launch_of_the_decode_kernel_computes_the_same(shape, few, slices, dependent):
    if few and shape[0] != "1":
        pytest.skip("more than a tile of rows")
    m, k = (2, 4096) if few else (8 * int(shape[0]) - 1, 4104)
    layer, dense = layer_of(264, k, torch.bfloat16)
    x = torch.randn(m, k, device="cuda").bfloat16()
    slots = [(i % 4) - 1 for i in range(m)]
    ids, y = torch.tensor(slots, dtype=torch.int32, device="cuda"), torch.empty(m, 264, device="cuda").bfloat16()
    launch = [*map(int, shape), slices, dependent]
    torch.ops.dts_fast.decode_(y, x, layer.base_layer.weight, None, *layer.bank.tensors, ids, launch)
    close(y, expected(x, dense, slots))
    for _ in range(20):  # the counters are 0 again, and sums depend neither on timing nor on what is still running
        again = torch.empty_like(y)
        x = x * 1  # by a kernel right before
        torch.ops.dts_fast.decode_(again, x, layer.base_layer.weight, None, *layer.bank.tensors, ids, launch)
        assert torch.equal(again, y)


@pytest.mark.skipif(gpu.why_not_cuda() is not None, reason=f"no CUDA kernels: {gpu.why_not_cuda()}")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids="-".join)
def test_a_kernel_that_begins_early_waits_for_what_it_reads(shape, few):
    """Each decodes what the one right before it has written: in a graph, so that nothing else lies between them."""
    if few and shape[0] != "1":
        pytest.skip("more than a tile of rows")
    torch.utils.deterministic.fill_uninitialized_memory = False  # would be a kernel between any two
    size = 2056
    layer, _ = layer_of(size, size, torch.bfloat16)
    m = 2 if few else 8 * int(shape[0]) - 1
    ids = torch.tensor([(i % 4) - 1 for i in range(m)], dtype=torch.int32, device="cuda")
    x = torch.randn(m, size, device="cuda").bfloat16()
    weight = layer.base_layer.weight

    def chain(ys: list[torch.Tensor], dependent: int) -> None:
        launch = [*map(int, shape), 1, dependent]
        for before, after in zip([x, *ys], ys):  # noqa: B905
            torch.ops.dts_fast.decode_(after, before, weight, None, *layer.bank.tensors, ids, launch)

    wanted, ys = ([torch.full_like(x, torch.nan) for _ in range(20)] for _ in range(2))
    chain(wanted, 0)
    assert wanted[-1].isfinite().all()
    assert wanted[-1].any()
    chain(ys, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(ys, 1)
    for _ in range(10):
        for y in ys:
            y.fill_(torch.nan)  # or one that is read too early would have the right values, of the time before
        graph.replay()
        for y, expected_y in zip(ys, wanted, strict=True):
            assert torch.equal(y, expected_y)


@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_more_blocks_than_the_device_holds_at_once(m):
    """Blocks that wait for others must not keep these from starting."""
    layer, dense = layer_of(28672, 1024, torch.bfloat16, adapters=2)
    x = torch.randn(m, 1024, device="cuda").bfloat16()
    slots = [(i % 3) - 1 for i in range(m)]
    weight, bank = layer.base_layer.weight, layer.bank.tensors
    ids = torch.tensor(slots, dtype=torch.int32, device="cuda")
    with torch.no_grad():
        truth = expected(x, dense, slots)
        close(ops.linear(x, weight, None, *bank, ids), truth)
        if gpu.why_not_triton() is None:
            from dts_fast.triton import linear
            from dts_fast.triton.configs import choose

            major, minor = torch.cuda.get_device_capability()
            config = choose(m, 28672, 1024, x.dtype, bank[1].shape[1], 10 * major + minor, True)
            for together in (0, 1, 48):
                y = linear(x, weight, None, *bank, ids, config=replace(config, together=together))
                close(y, truth)


@pytest.mark.skipif(gpu.why_not_triton() is not None, reason=f"no Triton kernels: {gpu.why_not_triton()}")
@pytest.mark.parametrize("m", [3, 300, 2048])
def test_base_and_delta_of_many_rows_in_one_kernel(m):
    from dts_fast.triton import linear
    from dts_fast.triton.configs import prefill

    layer, dense = layer_of(1032, 1096, torch.bfloat16)
    x = torch.randn(m, 1096, device="cuda").bfloat16()
    slots = [(i // 50 % 4) - 1 for i in range(m)]
    weight, bank = layer.base_layer.weight, layer.bank.tensors
    ids = torch.tensor(slots, dtype=torch.int32, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    config = prefill(m, 1096, x.dtype, bank[1].shape[1], 10 * major + minor)
    with torch.no_grad():
        close(linear(x, weight, None, *bank, ids, config=config), expected(x, dense, slots))


def test_graphs_are_replayed_beside_each_other():
    layer, dense = layer_of(4096, 1024, torch.bfloat16)
    x = torch.randn(8, 1024, device="cuda").bfloat16()
    weight, bank, streams = layer.base_layer.weight, layer.bank.tensors, [torch.cuda.Stream() for _ in range(2)]
    captured = []
    with torch.no_grad():
        for slots in ([0, 1, 2, -1] * 2, [2] * 8):
            ids = torch.tensor(slots, dtype=torch.int32, device="cuda")
            ops.linear(x, weight, None, *bank, ids)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    y = ops.linear(x, weight, None, *bank, ids)
            captured.append((graph, y, expected(x, dense, slots), ids))
        for _ in range(10):
            for stream, (graph, *_) in zip(streams, captured, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for _, y, truth, _ in captured:
            close(y, truth)


def test_a_graph_is_replayed_with_other_slots_and_adapters():
    layer, dense = layer_of(256, 512, torch.bfloat16)
    x = torch.randn(8, 512, device="cuda").bfloat16()
    ids = torch.zeros(8, dtype=torch.int32, device="cuda")
    weight, bank = layer.base_layer.weight, layer.bank.tensors
    with torch.no_grad():
        ops.linear(x, weight, None, *bank, ids)  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear(x, weight, None, *bank, ids)
        for slots in ([0] * 8, [2, 1, 0, -1, 2, 1, 0, -1], [-1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]):
            ids.copy_(torch.tensor(slots))
            graph.replay()
            close(y, expected(x, dense, slots))
        other = fit(0.05 * torch.randn(256, 512), rank=32)
        layer.bank.load(1, to_pages(other))
        ids.fill_(1)
        graph.replay()
        close(y, x.double() @ (weight.double() + other.dequantize(torch.float64).cuda()).t())


def test_results_repeat():
    layer, _ = layer_of(1024, 4096, torch.bfloat16)
    x = torch.randn(17, 4096, device="cuda").bfloat16()
    with torch.no_grad(), route("1"):
        first = layer(x)
        assert all(torch.equal(layer(x), first) for _ in range(20))


def test_a_layer_compiles_without_graph_breaks():
    layer, dense = layer_of(256, 512, torch.bfloat16)
    x = torch.randn(4, 512, device="cuda").bfloat16()
    layer.set_adapter("2")
    with torch.no_grad():
        close(torch.compile(layer, fullgraph=True)(x), expected(x, dense, [2] * 4))


def test_gradients_reach_the_input():
    layer, dense = layer_of(256, 512, torch.float32)
    x = torch.randn(5, 512, device="cuda", requires_grad=True)
    with route("0"):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), dense[0].sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
