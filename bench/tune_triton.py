"""Block sizes of the Triton kernels for the GPU that is here, found by measuring; what users then need not tune.

    python bench/tune_triton.py [--model Llama-3.1-8B] [--rows 1 16 32 64 2048] [--minutes 8] [--user]

From the rules' configuration (dts_fast/triton/configs.py) one setting after another is changed, and what is faster is
kept. Writes dts_fast/triton/tables/sm_<capability>.json after each point, or the user's own table with --user; goes on
where it ended. Candidates are compiled in processes of their own, while others are timed in this one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dts_fast import reference
from dts_fast.bank import Bank
from dts_fast.benchmark import MODELS, random_delta, rank_for_share
from dts_fast.codes import PageLayout, to_pages
from dts_fast.hardware import header
from dts_fast.timing import last_level_cache, time_in_turns
from dts_fast.triton import linear
from dts_fast.triton.configs import (
    COPY_ENGINE,
    PREFILL_ROWS,
    TABLES,
    Config,
    default,
    key,
    prefill,
    shared_memory,
    user_tables,
    write_table,
)

# In this order: what moves most comes first.
CHOICES = {
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "neighbours": (1, 4, 8, 16),
    "stages": (3, 4, 5, 6, 8),
    "together": (0, 16, 32, 64),
    "splits": (1, 2, 4, 8, 16, 32),
    "pages": (1, 2, 4, 8, 16),
    "warps": (2, 4, 8),
    "shrink_block_k": (32, 64, 128, 256),
    "shrink_pages": (1, 2, 4, 8),
    "shrink_warps": (1, 2, 4, 8),
}


FUSED_ONLY = dict.fromkeys(("block_k", "stages", "together", "neighbours"), True)


class Point:
    """A layer and a number of rows, on enough copies to exceed the cache."""

    def __init__(self, n: int, k: int, m: int, dtype: torch.dtype, copies: int | None = None) -> None:
        torch.manual_seed(0)
        self.n, self.k, self.m, self.dtype = n, k, m, dtype
        bank = Bank(PageLayout(n, k).nbytes, 1, device="cuda")
        bank.load(0, to_pages(random_delta(n, k, rank_for_share(n, k, 0.01))))
        floor = n * k * dtype.itemsize
        copies = copies or max(2, min(256, -(-4 * last_level_cache("cuda") // floor)))
        weight = torch.randn(n, k, device="cuda", dtype=dtype) * k**-0.5
        self.weights = [weight.clone() for _ in range(copies)]
        self.banks = [[t.clone() for t in bank.tensors] for _ in range(copies)]
        self.x = torch.randn(m, k, device="cuda").to(dtype)
        self.ids = torch.zeros(m, dtype=torch.int32, device="cuda")

    def runs(self, config: Config) -> list:
        return [
            lambda w=w, b=b: linear(self.x, w, None, *b, self.ids, config=config)
            for w, b in zip(self.weights, self.banks, strict=True)
        ]

    def check(self, y: Tensor) -> None:
        bank = self.banks[0]
        truth = reference.linear(self.x.double(), self.weights[0].double(), None, *bank, self.ids)
        # Two roundings of a result, as base and delta may be added in 16 bits; and of levels and h.
        excess = (y.double() - truth).abs() - 2 * torch.finfo(y.dtype).eps * truth.abs()
        if not excess.max().item() < 0.03:
            raise RuntimeError(f"wrong by {excess.max().item()}")


def compile_one(arguments: tuple[int, int, int, torch.dtype, Config]) -> str | None:
    """Compile, by running once; the compiled kernel lands in Triton's cache on disk. Why it does not work, or None."""
    n, k, m, dtype, config = arguments
    try:
        point = Point(n, k, m, dtype, copies=1)
        point.check(point.runs(config)[0]())
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, too many registers, or a wrong result
        return f"{type(error).__name__}: {error}"
    return None


def neighbours(best: Config, name: str, dtype: torch.dtype, capability: int) -> Iterator[Config]:
    many = best.block_m >= PREFILL_ROWS
    unused = {"together": many, "neighbours": not many} if best.fused else FUSED_ONLY
    for value in CHOICES[name] if not unused.get(name) else ():
        if name == "block_n" and value > 128 and not many:
            continue
        config = replace(best, **{name: value})
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        if value != getattr(best, name) and stage * config.stages <= shared_memory(capability):
            yield config


def tune(point: Point, start: Config, capability: int, pool: ProcessPoolExecutor, until: float) -> tuple[Config, float]:
    """(the best configuration found, its time over F.linear's)"""
    plain = [lambda w=w: torch.nn.functional.linear(point.x, w) for w in point.weights]
    best, ratio = start, float("inf")
    for name in CHOICES:
        candidates = [best, *neighbours(best, name, point.dtype, capability)]
        work = [(point.n, point.k, point.m, point.dtype, config) for config in candidates]
        faults = dict(zip(candidates, pool.map(compile_one, work), strict=True))
        for config, fault in faults.items():
            if fault is not None:
                print(f"{config}: {fault}", flush=True)
        if any("wrong by" in fault or "CUDA error" in fault for fault in faults.values() if fault):
            raise SystemExit("a kernel computes something else, or fails: see above; nothing more is tuned")
        works = [config for config, fault in faults.items() if fault is None]
        runs = {"F.linear": plain} | {repr(config): point.runs(config) for config in works}
        timings = {t.candidate: t.ratio for t in time_in_turns(runs, "F.linear", 7, 2e-3, "cuda")}
        ratio = timings.get(repr(best), float("inf"))  # of this round: others had other neighbours
        for config in works:
            if timings[repr(config)] < 0.995 * ratio:
                best, ratio = config, timings[repr(config)]
        if time.monotonic() > until:
            break
    return best, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 64, 2048])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--user", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    file = (options.out or (user_tables() if options.user else TABLES)) / f"sm_{capability}.json"
    known = json.loads(file.read_text(encoding="utf-8"))["configs"] if file.exists() else {}
    found = {name: Config(**config) for name, config in known.items()}
    until = time.monotonic() + 60 * options.minutes
    head = header() | {"l2_bytes": last_level_cache("cuda")}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        for m in options.rows:
            for n, k in MODELS[options.model].values():
                name = key(m, n, k, torch.bfloat16, True)
                if name in found or time.monotonic() > until:
                    continue
                length = -(-rank_for_share(n, k, 0.01) // 16)
                starts = [default(m, n, k, torch.bfloat16, length, capability, True)]
                if m > 64:  # torch's product of the base, and one kernel of both
                    starts += [prefill(m, k, torch.bfloat16, length, capability)] * (capability >= COPY_ENGINE)
                point = Point(n, k, m, torch.bfloat16)
                tuned = [tune(point, start, capability, pool, until) for start in starts]
                best, ratio = min(tuned, key=lambda t: t[1])
                if ratio == float("inf"):
                    print(f"{name}: nothing works", flush=True)
                    continue
                found[name] = best
                write_table(file, head, found)
                print(f"{name}: {ratio:.3f} x F.linear, {asdict(found[name])}", flush=True)


if __name__ == "__main__":
    main()
