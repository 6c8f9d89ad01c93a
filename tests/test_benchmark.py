"""The protocol's parts that need no clock: cases, floors, and that the check before timing can fail."""

from __future__ import annotations

import pytest
import torch

from dts_fast import benchmark
from dts_fast.benchmark import BASELINE, Case, Layers, floor_seconds, rank_for_share, run_case
from dts_fast.errors import DTSError
from dts_fast.timing import Roofline, dtype_name, time_in_turns


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(benchmark, "last_level_cache", lambda device: 1)


def test_compositions():
    def slots(composition: str) -> list[int]:
        return Case(8, 8, 64, torch.float32, 4, adapters=8, composition=composition).slots()

    assert slots("base") == [-1] * 64
    assert slots("identical") == [0] * 64
    assert slots("distinct") == [*range(8)] * 8
    assert set(slots("uniform")) == set(range(8))
    zipf = slots("zipf")
    assert zipf.count(0) > zipf.count(7)
    assert zipf == slots("zipf")


def test_floors_by_hand():
    case = Case(64, 32, 4, torch.bfloat16, 16, adapters=2, composition="distinct")
    adapter = 16 * (16 + 8 + 4)
    assert (case.adapter_bytes, case.floor_bytes) == (adapter, 2 * 64 * 32 + 2 * adapter)
    assert case.floor_operations == 2 * 4 * 64 * 32 + 2 * 4 * 16 * 96
    roofline = Roofline(1e9, {"bfloat16": 1e12})
    assert floor_seconds(case, roofline) == pytest.approx(case.floor_bytes / 1e9)
    assert floor_seconds(case, Roofline(1e15, {"bfloat16": 1e6})) == pytest.approx(case.floor_operations / 1e6)


def test_the_rank_of_a_share():
    # 1 % of a bfloat16 4096 x 4096: 335,544 bytes; a rank takes 2 * 1024 codes' bytes and a scale.
    assert rank_for_share(4096, 4096, 0.01) == 160
    assert rank_for_share(64, 64, 0.01) == 8


@pytest.mark.parametrize("composition", ["base", "identical", "uniform", "zipf", "distinct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_composition_is_timed_beside_the_linear(composition, dtype):
    case = Case(48, 40, 6, dtype, 16, adapters=3, composition=composition)
    rows = list(run_case(case, Roofline(1e9, {dtype_name(dtype): 1e9}), rounds=2))
    names = [row["candidate"] for row in rows]
    assert names[:2] == ["F.linear", "DTSLinear"]
    assert ("delta materialised" in names) == (composition == "identical")
    assert all(row["ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_a_wrong_result_is_not_timed():
    layers = Layers(Case(48, 40, 6, torch.float32, 16), peers=False)
    layers.check()
    right = layers.candidates["DTSLinear"][0]
    layers.candidates["DTSLinear"][0] = lambda: right() + 1e-3
    with pytest.raises(DTSError, match="is wrong by"):
        layers.check()


def test_candidates_rotate_through_all_copies():
    layers = Layers(Case(16, 16, 1, torch.float32, 8), peers=False)
    calls = []
    layers.candidates = {
        name: [lambda name=name, i=i: calls.append((name, i)) for i in range(3)] for name in ("F.linear", "other")
    }
    time_in_turns(layers.candidates, BASELINE, rounds=1, sample_seconds=1e-9)
    assert {i for name, i in calls if name == "other"} == {0, 1, 2}
