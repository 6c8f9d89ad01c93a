"""Which launch of the CUDA decode kernel is fastest where: every instance, slices of k, dependent launches.

    python bench/tune_cuda.py [--model Llama-3.1-8B] [--rows 1 8 16 32 64] [--minutes 4] [--out decode_shapes.jsonl]

What csrc/cuda/decode.h, `choose_shape`, is to be made from. Writes as it goes.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from tune_triton import Point

from dts_fast import native
from dts_fast.benchmark import MODELS
from dts_fast.gpu import why_not_cuda
from dts_fast.hardware import header
from dts_fast.timing import last_level_cache, time_in_turns

ROOT = Path(__file__).resolve().parent.parent
SLICES = (1, 2, 4, 8)


def instances() -> list[tuple[int, int, int, int]]:
    """(row tiles, output tiles, groups, warps) of what is compiled."""
    text = (ROOT / "csrc" / "cuda" / "decode.h").read_text(encoding="utf-8")
    return [tuple(map(int, found)) for found in re.findall(r"X\((\d+), (\d+), (\d+), (\d+)\)", text)]


def runs(point: Point, shape: list[int]) -> list:
    def run(weight: torch.Tensor, bank: list[torch.Tensor]) -> torch.Tensor:
        y = torch.empty(point.m, point.n, dtype=point.dtype, device="cuda")
        torch.ops.dts_fast.decode_(y, point.x, weight, None, *bank, point.ids, shape)
        return y

    return [lambda w=w, b=b: run(w, b) for w, b in zip(point.weights, point.banks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--out", type=Path, default=Path("decode_shapes.jsonl"))
    options = parser.parse_args()
    if (reason := why_not_cuda()) is not None:
        parser.exit(1, f"the CUDA kernels do not run: {reason} ({native.REASON})\n")
    until, faults = time.monotonic() + 60 * options.minutes, 0
    with options.out.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"header": header() | {"l2_bytes": last_level_cache("cuda")}}) + "\n")
        for m in options.rows:
            for layer, (n, k) in MODELS[options.model].items():
                if time.monotonic() > until:
                    break
                point = Point(n, k, m, torch.bfloat16)
                candidates = {
                    "F.linear": [lambda w=w, x=point.x: torch.nn.functional.linear(x, w) for w in point.weights]
                }
                candidates["chosen"] = runs(point, [])
                for shape in instances():
                    # One size of rows more than needed may pay with its other blocks.
                    if m <= 8 * shape[0] <= 2 * max(m, 8):
                        for launch in ([*shape, slices, dependent] for slices in SLICES for dependent in (0, 1)):
                            candidates[str(launch)] = runs(point, launch)
                for name in [name for name in candidates if name != "F.linear"]:
                    try:
                        point.check(candidates[name][0]())
                    except RuntimeError as error:  # wrong, or refused: the others are still worth their time
                        faults += 1
                        del candidates[name]
                        out.write(json.dumps({"layer": layer, "m": m, "shape": name, "error": str(error)}) + "\n")
                        print(f"{layer}, {m} rows, {name}: {error}", flush=True)
                for timing in time_in_turns(candidates, "F.linear", 7, 2e-3, "cuda"):
                    row = {"layer": layer, "n": n, "k": k, "m": m, "shape": timing.candidate}
                    row |= {"microseconds": round(1e3 * timing.ms, 3), "ratio": round(timing.ratio, 4)}
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(row, flush=True)
    if faults:
        raise SystemExit(f"{faults} launches were wrong or refused: see above")


if __name__ == "__main__":
    main()
