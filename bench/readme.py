"""Fill the tables of README.md and of pages in docs/ from committed results; with --check, fail where they differ.

python bench/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

from dts_fast.benchmark import MODELS, Case, floor_seconds, rank_for_share
from dts_fast.timing import Roofline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def hardware(header: dict) -> str:
    return f"{header['cpu']}, {header['threads']} threads, torch {header['torch']}, commit {header['commit']}"


KINDS = ("adapters", "distilled")  # of adapters, in the demo


def demo() -> str:
    """The demo's table, transposed to fit a page, and its mixed batch."""
    results = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    variants = results["variants"]
    budgets, distilled = list(variants[0]["adapters"]), list(variants[0].get("distilled", {}))
    lines = [
        "| variant | base | average of the fine-tunes | fine-tune |"
        + "".join(f" adapter {name} | gain kept |" for name in [*budgets, *(f"{b}, distilled" for b in distilled)]),
        "|---" * (4 + 2 * len(budgets) + 2 * len(distilled)) + "|",
    ]
    for v in variants:
        bits = v["bits_per_byte"]
        cells = [v["kind"], *(f"{bits[key]:.3f}" for key in ("base", "average", "fine_tune"))]
        for adapter in (*(v["adapters"][b] for b in budgets), *(v["distilled"][b] for b in distilled)):
            cells += [f"{adapter['bits_per_byte']:.3f}", f"{adapter['gain_kept']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    largest = {b: max(v.get(key, {}).get(b, {}).get("nbytes", 0) for v in variants for key in KINDS) for b in budgets}
    sizes = ", ".join(f"{nbytes:,} at {budget}" for budget, nbytes in largest.items())
    lines += [
        "",
        "Bits per byte of held-out text of the variant's kind; *gain kept* is the share of the fine-tune's gain over "
        f"the base. A variant is {variants[0]['dense_nbytes']:,} bytes dense; adapters, all files counted, are at most "
        f"{sizes} of the base's bytes. Which adapter a text gets is known (an oracle, not a router). "
        f"({hardware(results['header'])}; "
        "[bench/results/demo.json](bench/results/demo.json))",
        "",
        "One prompt, one mixed batch, adapters at " + budgets[-1] + ":",
        "",
        "```",
    ]
    for name, text in results["texts"].items():
        shown = [line for line in text.splitlines() if line.strip()]
        lines += [f"--- {name}", *shown[:5]]
    return "\n".join([*lines, "```"])


def kept() -> str:
    """What adapters of each size keep in the demo, at least."""
    variants = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["variants"]
    compressed, distilled = (
        ", ".join(f"{min(v[key][b]['gain_kept'] for v in variants):.0%} at {b}" for b in variants[0].get(key, {}))
        for key in KINDS
    )
    shown = f", and {distilled} where `distill` has shown it some text" if distilled else ""
    return (
        "How much of a fine-tune an adapter keeps depends on its size: in the [demo](#what-an-adapter-keeps) at least "
        f"{compressed} of the base's bytes{shown}."
    )


def fidelity() -> str:
    """KL of the refined method and of the exact SVD over the paper's, at equal bytes."""
    lines = (RESULTS / "fidelity.jsonl").read_text(encoding="utf-8").splitlines()
    head, rows = json.loads(lines[0])["header"], [json.loads(line) for line in lines[1:]]
    own_head, own = _read("fidelity_generated.jsonl")
    rows += [row for row in own if row["method"] == "generated"]
    out = [
        "| fine-tune | bytes of what is covered | paper: KL | refined / paper | distilled / paper "
        "| distilled from its own text / paper | exact SVD, same rank / paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        for density in dict.fromkeys(row.get("density") for row in rows if row["task"] == task):
            at = {row["method"]: row for row in rows if row["task"] == task and row.get("density") == density}
            if density is None:
                continue
            paper = at["paper"]
            methods = ("refined", "distilled", "generated", "exact SVD, equal rank")
            ratios = (f"{at[m]['kl'] / paper['kl']:.2f}" if m in at else "" for m in methods)
            out.append(f"| {task} | {paper['share_of_covered']:.2%} | {paper['kl']:.4f} | {' | '.join(ratios)} |")
    out += [
        "",
        "KL: divergence (nats) of the compressed model's predictions from the fine-tune's, held-out inputs. *section* "
        "and *interface* are full fine-tunes of all-MiniLM-L6-v2 (embeddings left at the base), the others the demo's "
        "language models. *Distilled* adapters have seen other inputs of the same kind: 2,400 rows of 128 tokens, or "
        "half of the encoders' held-out sentences, on the other half of which all methods are compared; or, without "
        "any data, as many rows as the fine-tune writes itself. The exact SVD keeps its factors in float32, at 16 "
        "times the bytes. "
        f"({hardware(head)}; [bench/results/fidelity.jsonl](bench/results/fidelity.jsonl); own text: "
        f"{hardware(own_head['header'])}; "
        "[bench/results/fidelity_generated.jsonl](bench/results/fidelity_generated.jsonl))",
        "",
        "![KL against bytes](bench/results/fidelity.png)",
    ]
    return "\n".join(out)


def distilled() -> str:
    """What distillation is worth, in a sentence."""
    _, rows = _read("fidelity.jsonl")
    density = max(row["density"] for row in rows if row["method"] == "distilled")
    kl = {(row["task"], row["method"], row.get("density")): row["kl"] for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    over = {m: [kl[t, m, density] / kl[t, "paper", density] for t in tasks] for m in ("refined", "distilled")}
    share = [row["share_of_covered"] for row in rows if row["method"] == "distilled" and row["density"] == density]
    most = max(row["density"] for row in rows if row["method"] == "paper")
    paper = [row["share_of_covered"] for row in rows if row["method"] == "paper" and row["density"] == most]
    better = sum(kl[t, "distilled", density] < kl[t, "paper", most] for t in tasks)
    count = "all" if better == len(tasks) else better
    _, own = _read("fidelity_generated.jsonl")
    own = {(row["task"], row["method"]): row["kl"] for row in own if row.get("density") == density}
    over["generated"] = [kl / own[task, "paper"] for (task, method), kl in own.items() if method == "generated"]
    ranges = {method: f"{min(ratios):.2f} to {max(ratios):.2f}" for method, ratios in over.items()}
    return (
        f"On {len(tasks)} fine-tunes, distilled adapters of {min(share):.1%} to {max(share):.1%} of the bytes they "
        f"cover are at {ranges['distilled']} of the divergence of the paper's of equal bytes ({ranges['refined']} "
        f"before); {count} are nearer to the fine-tune than the paper's at {min(paper):.1%} to {max(paper):.1%}. The "
        f"{len(over['generated'])} language models reach {ranges['generated']} from text that they wrote themselves "
        "([table](docs/measurements.md#fidelity-for-the-bytes)):"
    )


def ablation() -> str:
    """KL of each variant over the refined method's at equal bytes: geometric mean and range over tasks and budgets."""
    head, rows = _read("ablation.jsonl")
    cells = len({(row["task"], row["share"]) for row in rows})
    out = [
        "| variant | KL over the refined method's | least | most |",
        "|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        ratios = [row["over_refined"] for row in rows if row["variant"] == variant]
        if variant != "refined":
            out.append(f"| {variant} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    out += [
        "",
        f"Geometric mean and range over {cells} points (fine-tune, budget). ({hardware(head['header'])}; "
        "[bench/results/ablation.jsonl](bench/results/ablation.jsonl))",
    ]
    return "\n".join(out)


_CANDIDATES = {
    "DTSLinear": "DTSLinear",
    "DTSLinear, prepacked": "DTSLinear, prepacked",
    "prepacked oneDNN, base alone": "prepacked oneDNN, base alone",
    "two products, factors in the base's dtype": "two products",
    "PEFT LoRA, equal rank": "PEFT LoRA, equal rank",
    "PEFT LoRA, equal bytes": "PEFT LoRA, equal bytes",
    "delta materialised": "delta materialised",
}


_OVERHEADS_OF = "Llama-3.1-8B"
# Processors that the layers were timed on.
_OPS = {"Emerald Rapids": "ops.jsonl", "Zen 4": "ops_zen4.jsonl"}


def overheads() -> str:
    """The first look at `ops`: base and delta in one layer, beside PEFT's LoRA of equal rank."""
    out, measured = [], []
    for cpu, file in _OPS.items():
        head, rows = _read(file)
        measured.append(f"{cpu}: {hardware(head['header'])}; [bench/results/{file}](bench/results/{file})")
        mine = [row for row in rows if row["question"] == "single" and row["dtype"] == "bfloat16"]
        sizes = sorted({row["m"] for row in mine})
        if not out:
            out = ["| rows of a batch |" + "".join(f" {m} |" for m in sizes), "|---" * (len(sizes) + 1) + "|"]
        for candidate in (
            "DTSLinear", "DTSLinear, prepacked", "PEFT LoRA, equal rank", "prepacked oneDNN, base alone",
        ):  # fmt: skip
            cells = []
            for m in sizes:
                of_m = [r for r in mine if (r["model"], r["candidate"], r["m"]) == (_OVERHEADS_OF, candidate, m)]
                cells.append(f"{geometric_mean(r['ratio'] for r in of_m):.2f}")
            label = f"**{candidate}**" if candidate.startswith("DTS") else candidate
            out.append(f"| {cpu}: {label} | " + " | ".join(cells) + " |")
    out += [
        "",
        f"Linear layers of {_OVERHEADS_OF} in bfloat16, an adapter at 1 % of the base, geometric mean over the layers. "
        "*Prepacked* keeps the base's weight in the kernels' order (`prepack=True`); the last row of each processor is "
        "what oneDNN makes of such a weight without any adapter. Other models, dtypes and mixed batches: "
        f"[docs/measurements.md](docs/measurements.md). ({'. '.join(measured)})",
    ]
    return "\n".join(out)


def ops(file: str) -> str:
    """Time over the bare linear's, one adapter: geometric means over the linears of each model."""
    head, rows = _read(file)
    single = [row for row in rows if row["question"] == "single"]
    out = []
    for dtype in ("bfloat16", "float32", "float16"):
        mine = [row for row in single if row["dtype"] == dtype]
        sizes = sorted({row["m"] for row in mine})
        out += [f"| {dtype}, rows |" + "".join(f" {m} |" for m in sizes), "|---" * (len(sizes) + 1) + "|"]
        for model in dict.fromkeys(row["model"] for row in mine):
            for candidate, label in _CANDIDATES.items():
                cells = []
                for m in sizes:
                    at = [r for r in mine if (r["model"], r["candidate"], r["m"]) == (model, candidate, m)]
                    cells.append("")
                    if at:
                        mean = geometric_mean(r["ratio"] for r in at)
                        worst = f" ({max(r['ratio'] for r in at):.2f})" if label.startswith("DTS") else ""
                        cells[-1] = f"{mean:.2f}{worst}"
                if any(cells):
                    label = f"**{label}**" if label.startswith("DTS") else label
                    out.append(f"| {model}: {label} | " + " | ".join(cells) + " |")
        out.append("")
    flops = max(head["roofline"]["flops"].values()) / 1e9
    out.append(
        "Time over that of `F.linear`, medians of interleaved ratios, geometric mean over the model's linears (in "
        "brackets the worst); adapters at 1 % of a 16-bit base; weights and codes come from memory, "
        f"which reads {head['roofline']['bytes_per_s'] / 1e9:.0f} GB/s here; products reach {flops:.0f} GF/s. "
        f"({hardware(head['header'])}; [bench/results/{file}](bench/results/{file}), where the share of the roofline "
        "stands beside each figure)"
    )
    return "\n".join(out)


def pairs() -> str:
    """What multiplying bfloat16 in pairs, and asking for weights far ahead, is worth where both are fast."""
    measured = {"avx512_bf16": _OPS["Zen 4"], "avx512": "ops_zen4_avx512.jsonl"}
    out = []
    for isa, file in measured.items():
        head, rows = _read(file)
        mine = [row for row in rows if row["question"] == "single" and row["dtype"] == "bfloat16"]
        sizes = sorted({row["m"] for row in mine})
        out = out or ["| rows |" + "".join(f" {m} |" for m in sizes), "|---" * (len(sizes) + 1) + "|"]
        for name in ("Llama-3.1-8B", "Qwen2.5-0.5B"):
            for candidate in ("DTSLinear", "DTSLinear, prepacked"):
                cells = [
                    [r["ratio"] for r in mine if (r["model"], r["candidate"], r["m"]) == (name, candidate, m)]
                    for m in sizes
                ]
                means = " | ".join(f"{geometric_mean(at):.2f}" for at in cells)
                out.append(f"| {name}: {candidate}, `{isa}` | {means} |")
    files = " and ".join(f"[bench/results/{file}](bench/results/{file})" for file in measured.values())
    out += [
        "",
        "The same layers, one after the other on one machine, with `DTS_FAST_CPU_ISA=avx512` for the second: time over "
        f"that of `F.linear`. ({hardware(head['header'])}; {files})",
    ]
    return "\n".join(out)


# Results of bench/bench_model.py by the processor they are of, the README's first; loads are measured by themselves.
_MODEL = {"model.jsonl": "Emerald Rapids", "model_zen4.jsonl": "Zen 4"}
_LOADS = "model_loading.jsonl"
_KINDS = ("first", "again", "ready", "ready, uncopied")


def model_in_short() -> str:
    """A few lines of `model` and `loads`."""
    head, rows = _read(next(iter(_MODEL)))
    shapes, columns = "Qwen2.5-0.5B", ("base", "linear layers", "all parameters", "PEFT LoRA, equal rank")
    mine = [row for row in rows if row["question"] == "decode" and row["model"] == shapes]
    out = ["| rows of the batch |" + "".join(f" {name} |" for name in columns), "|---" * (len(columns) + 1) + "|"]
    for composition, adapters, batch, label in (
        ("base", 1, 8, "8, none with an adapter"),
        ("identical", 1, 1, "1, one adapter"),
        ("identical", 1, 8, "8, one adapter"),
        ("distinct", 8, 8, "8, an adapter each"),
        ("distinct", 64, 64, "64, an adapter each"),
    ):
        at = {
            r["candidate"]: r
            for r in mine
            if (r["composition"], r["adapters"], r["batch"]) == (composition, adapters, batch)
        }
        cells = [f"{at[n]['tokens_per_s']:.1f} ({1 / at[n]['ratio']:.2f})" if n in at else "" for n in columns]
        out.append(f"| {label} | " + " | ".join(cells) + " |")
    own = next(r for r in rows if (r["question"], r["model"], r["scope"]) == ("memory", shapes, "all parameters"))
    loads_head, loads = _read(_LOADS)
    loaded = {r["kind"]: r["ms"] for r in loads if (r["model"], r["scope"]) == (shapes, "all parameters")}
    swap = next(r["ms"] for r in loads if (r["model"], r["kind"]) == (shapes, "swap"))
    out += [
        "",
        f"Tokens a second (in brackets: over the bare base's) of {shapes} in bfloat16, adapters at 1 % of every "
        "matrix. *Linear layers*: adapters change those of the blocks, as the LoRAs do; *all parameters*: also "
        f"embeddings, head, biases and norms. Such an adapter's file has {own['file_bytes'] / 1e6:.1f} MB; 64 of them "
        f"in memory take {own['over_files']:.3f} times their files. One is loaded in {loaded['first']:.0f} ms, after "
        f"an eviction in {loaded['again']:.0f} ms, from host memory in {loaded['ready']:.0f} ms (a dense checkpoint "
        f"is swapped in {swap:.0f} ms). ({hardware(head['header'])}; "
        f"[bench/results/model.jsonl](bench/results/model.jsonl); loads: {hardware(loads_head['header'])}, "
        f"[bench/results/{_LOADS}](bench/results/{_LOADS}))",
    ]
    return "\n".join(out)


def model(file: str) -> str:
    """Tokens a second of whole models that decode."""
    head, rows = _read(file)
    mine = [row for row in rows if row["question"] == "decode" and row["candidate"] != "base again"]
    names = list(dict.fromkeys(row["candidate"] for row in mine))
    out = [
        "| tokens a second (over the base's) |" + "".join(f" {name} |" for name in names),
        "|---" * (len(names) + 1) + "|",
    ]
    for point in dict.fromkeys((row["model"], row["adapters"], row["composition"], row["batch"]) for row in mine):
        cells = []
        for name in names:
            at = [
                r
                for r in mine
                if (r["model"], r["adapters"], r["composition"], r["batch"], r["candidate"]) == (*point, name)
            ]
            cells.append(f"{at[0]['tokens_per_s']:.1f} ({1 / at[0]['ratio']:.2f})" if at else "")
        shapes, adapters, composition, batch = point
        label = {"base": "no adapter used", "identical": "one adapter"}.get(
            composition, f"{composition} rows of {adapters} adapters"
        )
        out.append(f"| {shapes}: {label}, batch {batch} | " + " | ".join(cells) + " |")
    out += [
        "",
        "bfloat16, adapters at 1 % of every matrix. *Linear layers*: those of the blocks, as the LoRAs have them; *all "
        "parameters*: also embeddings, head, biases and norms. OLMoE is a mixture of 64 experts, here with 4 of its 16 "
        "layers; experts count as linear layers, and are never prepacked. In brackets are speeds over the base's. "
        f"({hardware(head['header'])}; [bench/results/{file}](bench/results/{file}))",
    ]
    return "\n".join(out)


def loads() -> str:
    """The memory of many adapters, and how fast one is loaded."""
    memory_head, rows = _read(next(iter(_MODEL)))
    head, timed = _read(_LOADS)  # measured alone: a load lasts milliseconds
    out = [
        "| | adapter file | loaded hot | after eviction | from host memory | but for the copies | 64 in memory, over "
        "their files | over 64 dense models |",
        "|---" * 8 + "|",
    ]
    held = {(row["model"], row["scope"]): row for row in rows if row["question"] == "memory"}
    for point in dict.fromkeys((r["model"], r["scope"]) for r in timed if r["kind"] != "swap"):
        own = {r["kind"]: r for r in timed if (r["model"], r["scope"]) == point}
        times = [f"{own[kind]['ms']:.{0 if own[kind]['ms'] >= 10 else 1}f} ms" for kind in _KINDS]
        cells = [f"{own['first']['bytes'] / 1e6:.1f} MB", *times]
        cells += [f"{held[point][of]:.3f}" for of in ("over_files", "over_dense")] if point in held else ["", ""]
        out.append(f"| {', '.join(point)} | {' | '.join(cells)} |")
    swaps = ", ".join(f"{r['model']} {r['ms']:.0f} ms" for r in timed if r["kind"] == "swap")
    out += [
        "",
        "Adapters at 1 %, from the page cache: a first time, with checksum and comparison with the base; after an "
        "eviction; and from host memory (`host_bytes`), also without the copies themselves, which is what the host "
        f"does while a GPU copies. A dense checkpoint, swapped in likewise, takes: {swaps}. "
        f"Of Llama-3.1-8B all layers are on one layer's memory. ({hardware(head['header'])}; "
        f"[bench/results/{_LOADS}](bench/results/{_LOADS}); memory: commit {memory_head['header']['commit']})",
    ]
    return "\n".join(out)


def calls() -> str:
    """What a call of a layer takes besides its product."""
    head, rows = _read("calls.jsonl")
    times = [
        f"{row['DTSLinear_us']:.0f} microseconds for {row['rows']} row{'s' if row['rows'] > 1 else ''} of "
        f"{row['adapters']} adapter{'s' if row['adapters'] > 1 else ''} (`nn.Linear`: {row['nn.Linear_us']:.0f})"
        for row in rows
    ]
    return (
        f"A call of a layer [16, 16], which has next to nothing to do: {', '.join(times)}. "
        f"({hardware(head['header'])}; [bench/results/calls.jsonl](bench/results/calls.jsonl))"
    )


def mixed(file: str) -> str:
    """32 rows that use several adapters, over the bare linear and over PEFT's mixed batch."""
    head, rows = _read(file)
    out = [
        "| layer | composition | adapters | over `F.linear` | prepacked | PEFT, equal rank, over it | equal bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    mine = [row for row in rows if row["question"] == "mixed"]
    for key in dict.fromkeys(row["key"] for row in mine):
        at = {row["candidate"]: row for row in mine if row["key"] == key}
        own = at["DTSLinear"]
        peft = [
            f"{at[name]['ms'] / own['ms']:.1f}" if name in at else ""
            for name in ("PEFT LoRA, equal rank", "PEFT LoRA, equal bytes")
        ]
        out.append(
            f"| {own['model']} {own['layer']} | {own['composition']} | {own['adapters']} | {own['ratio']:.2f} | "
            f"{at['DTSLinear, prepacked']['ratio']:.2f} | "
            f"{peft[0]} | {peft[1]} |"
        )
    base = [r["ratio"] for r in rows if r["question"] == "base" and r["candidate"] == "DTSLinear"]
    switch = next(row for row in rows if row["question"] == "switch")
    decode = {row["part"]: row["codes_per_s"] / 1e9 for row in rows if row["question"] == "decode"}
    out += [
        "",
        "32 rows, bfloat16, adapters at 1 %. A batch without adapters through a layer that has some loaded: "
        f"{geometric_mean(base):.2f} x the bare linear (up to {max(base):.2f}). Switching the adapter of "
        f"{switch['layers']} layers: {switch['set_adapter_us']:.1f} microseconds. Codes decoded and multiplied in a "
        f"second for one row, by one core out of its cache: {decode['shrink']:.0f} G in the shrink, "
        f"{decode['expand']:.0f} G in the expand. "
        f"({hardware(head['header'])})",
    ]
    return "\n".join(out)


# The vendor's datasheet: bytes and dense bfloat16 operations a second.
_H200 = Roofline(4.8e12, {"bfloat16": 989e12})


def floors() -> str:
    """The least times on an H200, one adapter and one for each row."""
    out = [
        "| layer | rank | M | adapters | MB | GFLOP | floor, microseconds | over the bare linear's |",
        "|---" * 8 + "|",
    ]
    for layer, (n, k) in MODELS["Llama-3.1-8B"].items():
        rank = rank_for_share(n, k, 0.01)
        for m, adapters in ((1, 1), (32, 1), (32, 32), (2048, 1)):
            case = Case(n, k, m, torch.bfloat16, rank, adapters, "distinct" if adapters > 1 else "identical")
            bare = Case(n, k, m, torch.bfloat16, rank, 1, "base")
            seconds, mega, giga = floor_seconds(case, _H200), case.floor_bytes / 1e6, case.floor_operations / 1e9
            out.append(
                f"| {layer} | {rank} | {m} | {adapters} | {mega:.1f} | {giga:.1f} | "
                f"{1e6 * seconds:.1f} | {seconds / floor_seconds(bare, _H200):.3f} |"
            )
    out += [
        "",
        "Linears of Llama-3.1-8B, bfloat16, adapters at 1 %; 4.8 TB/s and 989 TFLOP/s, by the H200's datasheet.",
    ]
    return "\n".join(out)


def machine_code() -> str:
    """Registers, memory and instructions of the kernels for one row and for a tile, on Hopper."""
    head, rows = _read("machine_code.jsonl")
    out = [
        "| kernel | block | registers | shared | local | matrix instructions | instructions |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        if row["capability"] != 90 or row["dtype"] != "bf16":
            continue
        if row["kernel"] == "decode_kernel":
            tiles, outputs, groups, warps = row["shape"]
            beside = 1 if groups == 1 else groups if tiles > 4 else 2 * groups  # `warps_beside` of csrc/cuda/decode.h
            block = f"{8 * tiles} rows, {16 * outputs * groups} outputs, {warps} + {beside} warps"
            block += "" if row["base"] else ", no base"
            shared = "<= 99 KiB, dynamic"
        else:
            shared = row["shared"]
            c = row["config"]
            block = f"{c['block_m']} x {c['block_n']} x {c['block_k']}, {c['pages']} pages, {c['warps']} warps"
            if row["kernel"] == "shrink_kernel":
                block = f"{c['block_m']} x {c['shrink_block_k']}, {c['shrink_pages']} pages, {c['splits']} splits"
        name = "CUDA decode" if row["kernel"] == "decode_kernel" else f"Triton {row['kernel'].removesuffix('_kernel')}"
        out.append(
            f"| {name} | {block} | {row['registers']} | {shared} | {row['local']} | {row['mma']} | "
            f"{row['instructions']} |"
        )
    worst = max(row["local"] for row in rows)
    targets = ", ".join(f"sm_{c}" for c in dict.fromkeys(row["capability"] for row in rows))
    out += [
        "",
        f"sm_90, bfloat16. All of {targets} and every dtype, {len(rows)} kernels with at most {worst} bytes of local "
        "memory, are in [bench/results/machine_code.jsonl](../bench/results/machine_code.jsonl) "
        f"(triton {head['header']['triton']}, nvcc {head['header']['nvcc']}, commit {head['header']['commit']}).",
    ]
    return "\n".join(out)


def _read(name: str) -> tuple[dict, list[dict]]:
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0]), [json.loads(line) for line in lines[1:]]


BLOCKS = {
    "README.md": {
        "overheads": overheads,
        "kept": kept,
        "model": model_in_short,
        "demo": demo,
        "distilled": distilled,
    },
    "docs/measurements.md": {
        "fidelity": fidelity,
        "ablation": ablation,
        **{f"ops, {cpu}": partial(ops, file) for cpu, file in _OPS.items()},
        "pairs": pairs,
        **{f"model, {cpu}": partial(model, file) for file, cpu in _MODEL.items()},
        "loads": loads,
        "calls": calls,
        **{f"mixed, {cpu}": partial(mixed, file) for cpu, file in _OPS.items()},
    },
    "docs/kernels.md": {"floors": floors, "machine-code": machine_code},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, blocks in BLOCKS.items():
        page = ROOT / name
        text = old = page.read_text(encoding="utf-8")
        for block, render in blocks.items():
            # Links are relative to the page.
            text_of_block = render() if page.parent == ROOT else render().replace("](bench/", "](../bench/")
            new = f"<!-- {block} -->\n{text_of_block}\n<!-- /{block} -->"
            text = re.sub(rf"<!-- {block} -->.*?<!-- /{block} -->", lambda _, new=new: new, text, flags=re.DOTALL)
        if check and text != old:
            sys.exit(f"{name} differs from the committed results; run python bench/readme.py")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
