"""Models on a GPU: loads on streams of their own beside running calls, eviction, and graphs that serve all adapters."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import write_checkpoint
from test_nn_experts import Experts, inputs, with_deltas
from torch import nn

from dts_fast import DTSConfig, DTSModel, compress, ops, reference, route, writes
from dts_fast.bank import Bank
from dts_fast.codes import PageLayout, to_pages
from dts_fast.fit import fit
from dts_fast.nn import wrap
from dts_fast.slots import SlotTable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NAMES = "abcd"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 128), nn.LayerNorm(128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(self.norm(x)).relu()
        return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("gpu"), Net()
    write_checkpoint(folder / "base", base.state_dict())
    torch.save(base.state_dict(), folder / "base.pt")
    for name in NAMES:
        tuned = {n: p + 0.1 * torch.randn_like(p) for n, p in base.state_dict().items()}
        write_checkpoint(folder / f"tuned_{name}", tuned)
        compress(folder / "base", folder / f"tuned_{name}", folder / name, DTSConfig(rank=20))
    return folder


def make_model(folder, device: str = "cuda", **settings) -> DTSModel:
    base = Net()
    base.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
    return DTSModel(base.eval().to(device), **settings)


IDS = torch.arange(24).reshape(4, 6)


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, torch.Tensor]:
    """What the CPU computes."""
    model = make_model(folder, "cpu")
    for name in NAMES:
        model.load_adapter(folder / name, name)
    with torch.no_grad():
        return {name: model(IDS, adapter_names=name) for name in [*NAMES, "__base__"]}


def close(y: torch.Tensor, truth: torch.Tensor) -> None:
    # Float32 products through six layers; TF32 is off by default, and the delta's factors are exact in it.
    torch.testing.assert_close(y.cpu(), truth, rtol=2e-3, atol=2e-3 * float(truth.abs().max()))


def test_rows_of_embedding_deltas():
    layout, bank = PageLayout(300, 70), Bank(PageLayout(300, 70).nbytes, 3)
    for slot, rank in enumerate((20, 5)):
        bank.load(slot, to_pages(fit(torch.randn(300, 70), rank=rank)))
    ids, slot_ids = torch.randint(0, 300, (40,)), torch.randint(-1, 3, (40,), dtype=torch.int32)
    truth = reference.embedding_delta(ids, layout, *bank.tensors, slot_ids, torch.float64)
    moved = [t.cuda() for t in bank.tensors]
    delta = ops.embedding_delta(ids.cuda(), layout, *moved, slot_ids.cuda())
    torch.testing.assert_close(delta.cpu().double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@torch.no_grad()
def test_loading_evicting_and_mixing(folder, expected):
    model = make_model(folder, max_adapters=2, max_rank=20, eviction="lru")
    for name in NAMES:
        model.load_adapter(folder / name, name)
    for names in (["a", "b", "__base__", "a"], ["c", "d", "d", "c"], ["b"] * 4):
        close(model(IDS.cuda(), adapter_names=names), torch.stack([expected[n][i] for i, n in enumerate(names)]))


def test_loads_beside_running_calls(folder, expected):
    """One thread computes without a pause on a stream of its own while another loads, replaces and deletes."""
    model = make_model(folder, max_adapters=4, max_rank=20)
    for name in "ab":
        model.load_adapter(folder / name, name)
    stop, wrong = threading.Event(), []

    @torch.no_grad()
    def serve():
        names = ["a", "b", "b", "a"]
        truth = torch.stack([expected[name][i] for i, name in enumerate(names)])
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                y = model(IDS.cuda(), adapter_names=names).cpu()
                if not torch.allclose(y, truth, rtol=2e-3, atol=2e-3 * float(truth.abs().max())):
                    wrong.append(float((y - truth).abs().max()))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for i in range(40):
            model.load_adapter(folder / "cd"[i % 2], "other")
            with torch.no_grad():
                close(model(IDS.cuda(), adapter_names="other"), expected["cd"[i % 2]])
            model.load_adapter(folder / "cd"[1 - i % 2], "other", replace=True)
            model.delete_adapter("other")
    finally:
        stop.set()
        thread.join(60)
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize("staged", [1, 1 << 30])
def test_what_was_evicted_comes_back_from_pinned_memory(folder, expected, monkeypatch, staged):
    monkeypatch.setattr(writes, "_STAGED", staged)
    model = make_model(folder, max_adapters=1, eviction="lru", host_bytes=1 << 24)
    for name in "abcd":
        model.load_adapter(folder / name, name)
    monkeypatch.setattr("dts_fast.model.open_adapter", None)
    assert all(pages.is_pinned() for ready, _ in model._residency.host._ready.values() for _, pages in blocks(ready))
    for name in "abcddbca":
        close(model(IDS.cuda(), adapter_names=name), expected[name])


def blocks(ready) -> list:
    return list(ready.kept._blocks.values())


@torch.no_grad()
def test_captured_graphs_serve_adapters_that_are_loaded_later(folder, expected):
    from torch._inductor.cudagraph_trees import get_container

    torch._dynamo.reset()
    model = make_model(folder, max_adapters=2, max_rank=20, eviction="lru")
    model.load_adapter(folder / "a", "a")
    model.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    ids = IDS.cuda()
    for _ in range(4):  # compiled, warmed up, captured
        model(ids, adapter_names=["a", "__base__", "a", "a"])
    graphs = get_container(0).tree_manager.new_graph_id().id
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for name in "bcd":
            model.load_adapter(folder / name, name)
        for names in (["b", "__base__", "c", "b"], ["d", "a", "a", "d"], ["c"] * 4):
            truth = torch.stack([expected[name][i] for i, name in enumerate(names)])
            close(model(ids, adapter_names=names).clone(), truth)
        assert get_container(0).tree_manager.new_graph_id().id == graphs + 1, "a graph was captured again"
    finally:
        torch.compiler.set_stance("default")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_on_a_gpu(dtype):
    layer = Experts(6, 128, 96, True).to("cuda", dtype)
    wrapper = wrap(layer, SlotTable(3))
    dense = {"a": with_deltas(layer, wrapper, "a", range(6)), "b": with_deltas(layer, wrapper, "b", range(2, 5))}
    dense["__base__"] = layer
    x, index, weights = inputs(4, 6, 128)
    x, index, weights = x.to("cuda", dtype), index.cuda(), weights.to("cuda", dtype)
    names = ["a", "__base__", "b", "a"]
    expected = torch.cat([
        copy.deepcopy(dense[name]).float()(x[i : i + 1].float(), index[i : i + 1], weights[i : i + 1].float())
        for i, name in enumerate(names)
    ])  # fmt: skip
    with route(names):
        y = wrapper(x, index, weights)
        # The activations between, base and delta are rounded, and so are the dense weights of the one compared with.
        tolerance = 1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
        close = {"rtol": tolerance, "atol": tolerance * float(expected.abs().max())}
        torch.testing.assert_close(y.float(), expected, **close)
        if dtype == torch.bfloat16:  # nothing in it waits for the GPU
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = wrapper(x, index, weights)
            x.copy_(x.flip(0)), index.copy_(index.flip(0)), weights.copy_(weights.flip(0))
            graph.replay()
            torch.testing.assert_close(captured, wrapper(x, index, weights), **close)
