"""How long one matrix takes to compress, against a full SVD of it.

    python bench/bench_fit.py [--size 4096] [--rank 160] [--repeats 3] [--out bench/results/fit.jsonl]

The candidates run in turn within each repeat; ratios are taken within a repeat and their median is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dts_fast import fit
from dts_fast.decompose import decompose
from dts_fast.hardware import header

ROOT = Path(__file__).resolve().parent.parent


def delta_like(size: int) -> torch.Tensor:
    """float32 ``[size, size]`` with a power-law spectrum, as deltas of fine-tunes have."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size // 2, generator=generator) for _ in range(2))
    spectrum = (1.0 + torch.arange(size // 2)) ** -0.6
    return (left * spectrum) @ right.t() / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fit.jsonl")
    options = parser.parse_args()
    delta, rank = delta_like(options.size), options.rank
    candidates: dict[str, Callable[[], object]] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(delta, full_matrices=False),
        f"torch.svd_lowrank(q={rank + 10})": lambda: torch.svd_lowrank(delta, q=rank + 10),
        "decompose": lambda: decompose(delta, rank),
        "fit paper": lambda: fit(delta, rank, method="paper"),
        "fit refined": lambda: fit(delta, rank, method="refined"),
    }
    small = torch.randn(600, 500)  # threads and allocator warm up on this
    fit(small, 8)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    exact = torch.linalg.svdvals(delta)[:rank].square().sum().sqrt()
    found = decompose(delta, rank)[1].square().sum().sqrt()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"header": header(), "size": options.size, "rank": rank}) + "\n")
        for name, times in seconds.items():
            ratios = [full / own for full, own in zip(seconds["torch.linalg.svd"], times, strict=True)]
            row = {
                "candidate": name,
                "seconds": statistics.median(times),
                "spread": max(times) - min(times),
                "times_faster_than_full_svd": statistics.median(ratios),
            }
            out.write(json.dumps(row) + "\n")
            faster = row["times_faster_than_full_svd"]
            print(f"{name:28} {row['seconds']:8.3f} s, {faster:6.1f} x faster than the full SVD")
        out.write(json.dumps({"energy_found_over_exact": float(found / exact)}) + "\n")
        print(f"norm of the rank-{rank} part found by decompose: {float(found / exact):.6f} of the exact one")


if __name__ == "__main__":
    main()
