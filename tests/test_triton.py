"""The Triton kernels beyond what tests/test_ops.py runs on every backend: block sizes, tables, compiled code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from conftest import CAPABILITIES
from test_ops import DEVICE, delta_magnitude, make_bank, on_device, within_rounding

from dts_fast import reference
from dts_fast.codes import PageLayout
from dts_fast.triton import add_delta_, launch, linear
from dts_fast.triton import configs as triton_configs
from dts_fast.triton.configs import COPY_ENGINE, Config, choose, default, key, write_table

# Several tiles of rows and blocks of outputs; more pages a step than a slot has, and fewer; more splits than there are
# blocks of K.
CONFIGS = [
    Config(True, 16, 16, 16, 1, 1, shrink_block_k=16, shrink_pages=1),
    Config(True, 16, 32, 64, 2, 4, shrink_block_k=32, shrink_pages=4),
    Config(True, 32, 64, 32, 8, 2, shrink_block_k=64, shrink_pages=1),
    Config(True, 64, 16, 128, 4, 16, shrink_block_k=128, shrink_pages=8),
    Config(True, 16, 32, 32, 2, 4, shrink_block_k=32, shrink_pages=2, together=3),
    Config(True, 32, 16, 64, 8, 1, shrink_block_k=16, shrink_pages=1, together=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}, {c.together} together")
@pytest.mark.parametrize("m", [1, 5, 40])
def test_any_block_sizes_compute_the_same(config, m):
    n, k = 70, 90
    bank, _ = make_bank(n, k, [20, 65, 0, 7])
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    slot_ids = torch.randint(-1, 6, (m,), dtype=torch.int32)
    truth = reference.linear(x.double(), weight.double(), bias.double(), *bank.tensors, slot_ids)
    base = torch.nn.functional.linear(x, weight, bias).double()
    magnitude = x.double().abs() @ weight.double().abs().t() + delta_magnitude(PageLayout(n, k), bank, x, slot_ids)
    y = on_device(DEVICE, linear)(x, weight, bias, *bank.tensors, slot_ids, config=config)
    within_rounding(y, truth, base, magnitude)
    y = torch.randn(m, n)
    expected = y.double()
    reference.add_delta_(expected, x.double(), *bank.tensors, slot_ids)
    start = y.double()
    on_device(DEVICE, add_delta_)(y, x, *bank.tensors, slot_ids, config=config)
    within_rounding(y, expected, start, delta_magnitude(PageLayout(n, k), bank, x, slot_ids))


@pytest.mark.parametrize("m", [3, 300])
@pytest.mark.parametrize("k", [72, 70])
def test_base_and_delta_of_many_rows_in_one_kernel(monkeypatch, m, k):
    """Tiles of rows that follow one another, the last ones fewer; with rows of 70 float32 nothing can be copied."""
    n, launched = 70, []
    monkeypatch.setattr(launch, "_tiles", lambda *a, real=launch._tiles: launched.append(a) or real(*a))
    bank, _ = make_bank(n, k, [20, 65, 0, 7])
    x, weight, bias = torch.randn(m, k + 4)[:, :k], torch.randn(n, k) / k**0.5, torch.randn(n)
    slot_ids = torch.randint(-1, 6, (m,), dtype=torch.int32)
    truth = reference.linear(x.double(), weight.double(), bias.double(), *bank.tensors, slot_ids)
    base = torch.nn.functional.linear(x, weight, bias).double()
    magnitude = x.double().abs() @ weight.double().abs().t() + delta_magnitude(PageLayout(n, k), bank, x, slot_ids)
    config = Config(True, 128, 32, 32, 2, 2, shrink_block_k=32, shrink_pages=4, neighbours=2)
    y = on_device(DEVICE, linear)(x, weight, bias, *bank.tensors, slot_ids, config=config)
    within_rounding(y, truth, base, magnitude)
    assert len(launched) == (2 if k == 72 else 0)


@pytest.mark.parametrize("fused", [False, True])
def test_block_sizes_of_a_call_that_is_not_fused_are_the_deltas(monkeypatch, fused):
    bank, _ = make_bank(20, 22, [3])
    slot_ids, seen = torch.zeros(3, dtype=torch.int32), []
    monkeypatch.setattr(launch, "add_delta_", lambda *arguments, config: seen.append(config))
    config = Config(fused, 128, 32, 32, 2, 2)
    # Rows of 22 float32 cannot be copied, so that neither is computed in one kernel.
    on_device(DEVICE, linear)(torch.randn(3, 22), torch.randn(20, 22), None, *bank.tensors, slot_ids, config=config)
    assert seen == [None if fused else config]


def test_scratch_that_was_not_written_is_never_read():
    """Tiles without adapters, ranks of empty pages and other rows' columns hold NaN."""
    bank, _ = make_bank(20, 24, [3, 33])
    x, weight = torch.randn(40, 24), torch.randn(20, 24)
    slot_ids = torch.full((40,), -1, dtype=torch.int32)
    slot_ids[:16] = torch.randint(0, 2, (16,), dtype=torch.int32)  # the second and third tile have none
    config = Config(True, 16, 16, 32, 4, 2, shrink_block_k=16)
    y = on_device(DEVICE, linear)(x, weight, None, *bank.tensors, slot_ids, config=config)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[16:], x[16:] @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 16, 17, 33, 64, 65, 5000])
def test_the_rules_give_legal_block_sizes(capability, dtype, m):
    for n, k, length in ((128, 896, 1), (4096, 4096, 10), (28672, 4096, 26), (33, 17, 300), (1, 1, 0)):
        for dense in (True, False):
            config = default(m, n, k, dtype, length, capability, dense)
            sizes = (config.block_m, config.block_n, config.block_k, config.pages, config.shrink_block_k)
            sizes += (config.splits, config.shrink_pages)
            assert all(size & (size - 1) == 0 for size in sizes), config
            assert min(config.block_m, config.block_n, config.block_k, config.shrink_block_k) >= 16
            assert config.stages >= 2


def test_measured_tables_come_before_the_rules_and_the_users_own_before_the_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_configs, "TABLES", tmp_path / "shipped")
    triton_configs.tables.cache_clear()
    shape = (16, 4096, 4096, torch.bfloat16)
    rule = choose(*shape, 10, 90, True)
    assert rule == default(*shape, 10, 90, True)
    shipped, own = replace(rule, block_n=64), replace(rule, block_n=128)
    try:
        for folder, config in ((tmp_path / "shipped", shipped), (triton_configs.user_tables(), own)):
            write_table(folder / "sm_90.json", {"gpu": "a test"}, {key(*shape, True): config})
            triton_configs.tables.cache_clear()
            assert choose(*shape, 10, 90, True) == config
            assert choose(9, *shape[1:], 10, 90, True) == config  # of the same tile of rows
        assert choose(17, *shape[1:], 10, 90, True) == default(17, *shape[1:], 10, 90, True)
        assert choose(*shape, 10, 80, True) == default(*shape, 10, 80, True)
    finally:
        triton_configs.tables.cache_clear()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_configuration_compiles_without_spills_and_with_the_instructions_meant(triton_compilers, capability):
    out, errors = triton_compilers[capability].communicate()
    assert triton_compilers[capability].returncode == 0, errors
    rows = [json.loads(line) for line in out.splitlines()]
    kernels = {"shrink_kernel", "linear_kernel", "together_kernel", "expand_kernel"}
    assert {row["kernel"] for row in rows} == kernels | ({"prefill_kernel"} if capability >= COPY_ENGINE else set())
    assert [f"{row['kernel']} {row['dtype']} {row['config']}: {row['faults']}" for row in rows if row["faults"]] == []
