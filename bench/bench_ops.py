"""What a personalised linear layer costs over the bare one: single adapters, mixed and base-only batches, switching.
And how fast codes in a cache are decoded and multiplied.

    python bench/bench_ops.py [--device cuda] [--only QUESTION] [--dtype T] [--rounds 15] [--out FILE]  (make bench)
    pytest bench/bench_ops.py                                     (a few points under pytest-benchmark)

The protocol is dts_fast/benchmark.py's. Adapters take 1 % of a 16-bit base. The file is written as results come, and a
run that finds a file of the same commit and machine goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, median

import pytest
import torch
from torch import nn

from dts_fast import DTSLinear, ops, route
from dts_fast.bank import Bank
from dts_fast.benchmark import (
    COMPOSITIONS,
    MODELS,
    Case,
    Layers,
    random_delta,
    rank_for_share,
    run_case,
)
from dts_fast.codes import PageLayout, to_pages
from dts_fast.hardware import header
from dts_fast.routing import Lease
from dts_fast.slots import SlotTable
from dts_fast.timing import Roofline, dtype_name, measure_roofline

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.01
ROWS = (1, 4, 8, 16, 32, 64, 256)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
LANGUAGE_MODELS = ("Llama-3.1-8B", "Qwen2.5-0.5B")


def cases(question: str, device: str) -> Iterator[tuple[str, str, Case]]:
    """(model, layer, case) of a question."""
    if device == "cuda":
        yield from gpu_cases(question)
    elif question == "single":
        for model, dtype, sizes in (
            *((model, dtype, ROWS) for dtype in (torch.bfloat16, torch.float32) for model in LANGUAGE_MODELS),
            ("BERT-base", torch.bfloat16, (1, 8, 32, 256)),
            ("Qwen2.5-0.5B", torch.float16, (1, 8, 32, 256)),
        ):
            for layer, (n, k) in MODELS[model].items():
                for m in sizes:
                    yield model, layer, Case(n, k, m, dtype, rank_for_share(n, k, SHARE))
    elif question == "mixed":
        for model in LANGUAGE_MODELS:
            yield from mixed_cases(model, ("q,o", "gate,up"), device)
    elif question == "base":
        for model in LANGUAGE_MODELS:
            for layer, (n, k) in MODELS[model].items():
                for m in (1, 32):
                    yield model, layer, Case(n, k, m, torch.bfloat16, rank_for_share(n, k, SHARE), 1, "base")


def gpu_cases(question: str) -> Iterator[tuple[str, str, Case]]:
    llama = MODELS["Llama-3.1-8B"]
    if question == "single":
        for m in (1, 2, 4, 8, 16, 32, 64, 256, 2048):
            for layer, (n, k) in llama.items():
                yield "Llama-3.1-8B", layer, Case(n, k, m, torch.bfloat16, rank_for_share(n, k, SHARE), device="cuda")
        for model, dtype, sizes in (
            ("Llama-3.1-8B", torch.float16, (1, 32)),
            ("Qwen2.5-0.5B", torch.bfloat16, (1, 32)),
            ("Llama-3.1-8B", torch.float32, (1,)),
        ):
            for m in sizes:
                for layer, (n, k) in MODELS[model].items():
                    yield model, layer, Case(n, k, m, dtype, rank_for_share(n, k, SHARE), device="cuda")
    elif question == "rank":
        for rank in (16, 64, 256, 416):
            for layer in ("q,o", "gate,up"):
                yield "Llama-3.1-8B", layer, Case(*llama[layer], 1, torch.bfloat16, rank, device="cuda")
    elif question == "mixed":
        yield from mixed_cases("Llama-3.1-8B", llama, "cuda")
    elif question == "base":
        for layer, (n, k) in llama.items():
            for m in (1, 32):
                rank = rank_for_share(n, k, SHARE)
                yield "Llama-3.1-8B", layer, Case(n, k, m, torch.bfloat16, rank, 1, "base", "cuda")


def mixed_cases(model: str, layers: Iterable[str], device: str) -> Iterator[tuple[str, str, Case]]:
    """32 rows: 8 adapters in every composition, and an adapter for each row."""
    for layer in layers:
        n, k = MODELS[model][layer]
        rank = rank_for_share(n, k, SHARE)
        for composition in COMPOSITIONS:
            yield model, layer, Case(n, k, 32, torch.bfloat16, rank, 8, composition, device)
        yield model, layer, Case(n, k, 32, torch.bfloat16, rank, 32, "distinct", device)


def switching(layers: int = 168) -> dict[str, object]:
    """Microseconds of ``set_adapter`` and of entering a route, for the 168 linears of a 24-layer model."""
    slots = SlotTable(2)
    model = [DTSLinear(nn.Linear(64, 64, bias=False), slots=slots) for _ in range(layers)]
    for slot, name in enumerate(("a", "b")):
        delta = random_delta(64, 64, 16)
        for layer in model:
            layer.load_slot(slot, {"weight": delta})
        slots.occupy(name, slot)
    times: dict[str, list[float]] = {"set_adapter": [], "route": []}
    for i in range(1000):
        start = time.perf_counter()
        model[0].set_adapter("ab"[i % 2])
        times["set_adapter"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with route("ab"[i % 2]):
            times["route"].append(time.perf_counter() - start)
    return {"layers": layers, **{f"{name}_us": 1e6 * median(t) for name, t in times.items()}}


@torch.inference_mode()
def decoding(seconds: float = 1.0) -> Iterator[dict[str, object]]:
    """Codes that one core decodes and multiplies in a second for one row, out of its caches: layers that are all V
    (shrink) or all U (expand). The call itself is in the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part, (n, k) in {"shrink": (16, 16384), "expand": (16384, 16)}.items():
            rank = 256
            bank = Bank(PageLayout(n, k).nbytes, 1)
            bank.load(0, to_pages(random_delta(n, k, rank)))
            x, y, ids = torch.randn(1, k), torch.zeros(1, n), torch.zeros(1, dtype=torch.int32)
            times, end = [], time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                for _ in range(20):
                    ops.add_delta_(y, x, *bank.tensors, ids)
                times.append((time.perf_counter() - start) / 20)
            codes = rank * (n + k)
            yield {
                "question": "decode",
                "key": f"decode {part}",
                "part": part,
                "codes": codes,
                "us": 1e6 * median(times),
                "codes_per_s": codes / median(times),
            }
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def calls(device: str, count: int = 2000) -> Iterator[dict[str, object]]:
    """Microseconds of a call of a layer that has next to nothing to do, as a model calls it: of a CPU all that is not
    the product, of a GPU what its host needs to launch one without a graph."""
    base = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
    layer = DTSLinear(base)
    for name in "abcdefgh":
        layer.load_adapter(name, random_delta(16, 16, 16))
    for rows, names in ((1, "a"), (64, "abcdefgh" * 8)):
        x = torch.randn(rows, 1, 16, dtype=torch.bfloat16, device=device)
        given = list(names) if rows > 1 else names
        lease = Lease(layer.slots, {name: layer.slots.slot(name) for name in names}, x.device)
        candidates = {"nn.Linear": base, "DTSLinear": layer}
        times: dict[str, list[float]] = {name: [] for name in candidates}
        with route(given, lease=lease, rows=rows):
            for _ in range(11):
                for name, run in candidates.items():
                    run(x)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(count):
                        run(x)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times[name].append(1e6 * (time.perf_counter() - start) / count)
        yield {
            "question": "call", "key": f"call {rows}", "rows": rows, "adapters": len(lease.slots),
            **{f"{name}_us": round(median(own), 2) for name, own in times.items()},
        }  # fmt: skip


QUESTIONS = {
    "cpu": ("single", "mixed", "base", "switch", "decode", "call"),
    "cuda": ("single", "mixed", "rank", "base", "call"),
}


def run(
    question: str, roofline: Roofline, done: set[str], rounds: int, dtype: str | None = None, device: str = "cpu"
) -> Iterator[dict[str, object]]:
    if question == "switch":
        if "switch" not in done:
            yield {"question": "switch", "key": "switch", **switching()}
        return
    if question == "decode":
        yield from (row for row in decoding() if row["key"] not in done)
        return
    if question == "call":
        yield from (row for row in calls(device) if row["key"] not in done)
        return
    for model, layer, case in cases(question, device):
        key = f"{question} {model} {layer} {case}"
        if key not in done and dtype in (None, dtype_name(case.dtype)):
            described = {"question": question, "key": key, "model": model, "layer": layer}
            try:
                for row in run_case(case, roofline, peers=question != "base", rounds=rounds):
                    yield {**described, **row}
            except Exception as error:  # wrong, or refused: the other cases are still worth their time
                print(f"{key}: {error}", file=sys.stderr, flush=True)
                yield {**described, "error": str(error)}
                if "CUDA error" in str(error):  # nothing works behind it
                    return


def summary(rows: list[dict]) -> str:
    """Geometric means of the ratios to F.linear over the layers of a model."""
    lines = []
    for question in ("single", "mixed", "rank", "base"):
        mine = [r for r in rows if r["question"] == question and r["candidate"] != "F.linear"]
        # Ranks differ from layer to layer, unless they are the question.
        keys = ["model", "dtype", "composition", "adapters", "m", *(["rank"] if question == "rank" else [])]
        for point in dict.fromkeys(tuple(r[key] for key in keys) for r in mine):
            at = [r for r in mine if tuple(r[key] for key in keys) == point]
            parts = []
            for candidate in dict.fromkeys(r["candidate"] for r in at):
                ratios = [r["ratio"] for r in at if r["candidate"] == candidate]
                parts.append(f"{candidate} {geometric_mean(ratios):.2f} (to {max(ratios):.2f})")
            named = " ".join(f"{key}={value}" for key, value in zip(keys, point, strict=True))
            lines.append(f"{question} {named}: " + "; ".join(parts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(QUESTIONS), default="cpu")
    parser.add_argument("--only", choices=sorted({q for questions in QUESTIONS.values() for q in questions}))
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], help="Only cases of this one.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="bench/results/ops.jsonl, or ops_cuda.jsonl, if not given.")
    options = parser.parse_args()
    if options.out is None:
        options.out = ROOT / "bench" / "results" / ("ops.jsonl" if options.device == "cpu" else "ops_cuda.jsonl")
    head = header()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    resumed = bool(known) and known[0].get("header") == head
    rows = known[1:] if resumed else []
    roofline = Roofline(**known[0]["roofline"]) if resumed else measure_roofline(DTYPES, options.device)
    with options.out.open("a" if resumed else "w", encoding="utf-8") as out:
        if not resumed:
            out.write(json.dumps({"header": head, "roofline": asdict(roofline)}) + "\n")
        done = {row["key"] for row in rows if "error" not in row}
        for question in [options.only] if options.only else QUESTIONS[options.device]:
            for row in run(question, roofline, done, options.rounds, options.dtype, options.device):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
    print(summary([row for row in rows if "candidate" in row]))
    if faults := {row["key"] for row in rows if "error" in row} - {row["key"] for row in rows if "error" not in row}:
        raise SystemExit(f"{len(faults)} cases were wrong or refused: see above")


@pytest.mark.parametrize("candidate", ["F.linear", "DTSLinear"])
@pytest.mark.parametrize("m", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear(benchmark, candidate, m, dtype):
    layers = Layers(Case(896, 896, m, dtype, rank_for_share(896, 896, SHARE)), peers=False)
    layers.check()
    runs = layers.candidates[candidate]
    benchmark.group = f"896x896 {dtype} M={m}"
    position = iter(range(10**9))
    with torch.inference_mode():
        benchmark(lambda: runs[next(position) % len(runs)]())


if __name__ == "__main__":
    main()
