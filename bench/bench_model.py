"""What adapters cost a whole language model that decodes: tokens a second, memory, loading; beside the base and PEFT.

    python bench/bench_model.py [--device cuda] [--model Qwen2.5-0.5B] [--rounds 5] [--steps 4] [--only base|...]
                                [--out FILE]

Random weights in bfloat16 (times do not depend on them), adapters at 1 % of every matrix, from files, through
`DTSModel`. "linear layers": adapters change the linear layers of the blocks, as PEFT's LoRAs beside them do; "all
parameters": also embeddings, the (tied) head, biases and norms, as full fine-tunes do. A step is one token for each row
of a batch, behind a prompt of 16. Candidates take turns within a round; what counts are ratios within rounds. PEFT has
LoRAs of equal rank, and of equal bytes (16 bits an element, an eighth of the rank). On a GPU each candidate that can be
captured is also replayed as a CUDA graph of one step; a step then takes what its kernels take. Needs Linux.

Loads of Llama-3.1-8B on a CPU are into a model whose layers have one layer's memory.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from synthetic import MODELS, SCOPES, base_model, linears, write_adapter
from torch import nn

from dts_fast import DTSModel, adapter_file, writes
from dts_fast.benchmark import Case, rank_for_share
from dts_fast.hardware import header

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.01
PROMPT = 16
FILES = 8  # distinct adapters on disk; more names load them again
MOST_OF_PEFT = 8  # its mixed batch takes seconds a step with more

# (adapters loaded, composition, batch)
POINTS = {
    "cpu": (
        (1, "base", 1), (1, "base", 8), (1, "identical", 1), (1, "identical", 8), (1, "identical", 64),
        (8, "distinct", 8), (8, "zipf", 8), (64, "uniform", 32), (64, "distinct", 64),
    ),
    "cuda": (
        (1, "base", 1), (1, "base", 8), (1, "identical", 1), (1, "identical", 8), (1, "identical", 64),
        (8, "distinct", 8), (32, "distinct", 32), (32, "zipf", 32),
    ),
}  # fmt: skip
LARGE = "Llama-3.1-8B"
SHAPES = {"cpu": [name for name in MODELS if name != LARGE], "cuda": [LARGE]}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's modules on the same parameters: where weights lie in memory must not make a difference."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def with_adapters(model: nn.Module, folder: Path, count: int, prepack: bool) -> DTSModel:
    personalised = DTSModel(model, max_adapters=count, prepack=prepack)
    for i in range(count):
        personalised.load_adapter(folder / str(i % FILES), f"a{i}")
    return personalised


def with_peft(model: nn.Module, count: int, bytes_of_one: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    ranks = {name: rank_for_share(*layer.weight.shape, SHARE) for name, layer in linears(model).items()}
    ranks = {name: max(rank // 8, 1) if bytes_of_one else rank for name, rank in ranks.items()}
    usual = min(ranks.values())
    patterns = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(ranks), rank_pattern=patterns, alpha_pattern=patterns
    )
    peft = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, count):
        peft.add_adapter(f"a{i}", config)
    return peft.to(torch.bfloat16).eval().requires_grad_(False)


def prompt_of(model: nn.Module, batch: int) -> tuple[object, torch.Tensor]:
    """The cache of a prompt and the tokens behind it. The base's serves all: times do not depend on what is in it."""
    torch.manual_seed(1)
    ids = torch.randint(0, 1000, (batch, PROMPT), device=model.device)
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits.argmax(-1)


def decoder(model: nn.Module, prompt: tuple[object, torch.Tensor], names: list[str] | str | None) -> Callable:
    """A function that decodes some tokens behind a prompt and returns the seconds of one step."""
    extra = {} if names is None else {"adapter_names": names}

    def run(steps: int) -> float:
        cache, token = copy.deepcopy(prompt[0]), prompt[1]
        with torch.inference_mode():
            wait(token)
            begin = time.perf_counter()
            for _ in range(steps):
                out = model(input_ids=token, past_key_values=cache, use_cache=True, **extra)
                token = out.logits[:, -1:].argmax(-1)
            wait(token)
            return (time.perf_counter() - begin) / steps

    return run


def wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def replayed(model: nn.Module, token: torch.Tensor, names: list[str] | str | None) -> Callable | None:
    """`decoder` with one step behind a prompt in a CUDA graph; None where it cannot be captured."""
    from transformers import StaticCache

    extra = {} if names is None else {"adapter_names": names}
    cache = StaticCache(config=model.config, max_cache_len=4 * PROMPT)

    def step() -> torch.Tensor:
        out = model(input_ids=token, past_key_values=cache, use_cache=True, **extra)
        return out.logits[:, -1:].argmax(-1)

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        try:
            with torch.cuda.stream(side):  # what is captured must have run before, and not on the default stream
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:  # it waits for the device somewhere
            print("not captured:", str(error).splitlines()[0], flush=True)
            torch.cuda.synchronize()
            return None

    def run(steps: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # not timed: the device is busy when the clock starts
        begin.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    return run


def names_of(batch: int, composition: str, adapters: int) -> list[str] | str:
    if composition in ("base", "identical"):
        return "__base__" if composition == "base" else "a0"
    slots = Case(1, 1, batch, torch.bfloat16, 16, adapters, composition).slots()
    return [f"a{slot}" for slot in slots]


def decoding(
    name: str, plain: nn.Module, folder: Path, rounds: int, steps: int, points: Sequence[tuple[int, str, int]]
) -> Iterator[dict[str, object]]:
    """Tokens a second of every candidate at every point."""
    for adapters in sorted({point[0] for point in points}):
        own = {
            "linear layers": with_adapters(sharing(plain), folder / SCOPES[0], adapters, False),
            "all parameters": with_adapters(sharing(plain), folder / SCOPES[1], adapters, False),
        }
        if plain.device.type == "cpu":
            packed = with_adapters(copy.deepcopy(plain), folder / SCOPES[0], adapters, True)
            own = {"linear layers": own.pop("linear layers"), "linear layers, prepacked": packed, **own}
        peft = {}
        # Its LoRAs of stacked experts are of another kind, and take no names for each row.
        if adapters <= MOST_OF_PEFT and not hasattr(plain.config, "num_experts"):
            for label, equal_bytes in (("PEFT LoRA, equal rank", False), ("PEFT LoRA, equal bytes", True)):
                peft[label] = with_peft(sharing(plain), adapters, equal_bytes)
        for _, composition, batch in (point for point in points if point[0] == adapters):
            names, prompt = names_of(batch, composition, adapters), prompt_of(plain, batch)
            candidates = {"base": decoder(plain, prompt, None)}
            candidates |= {label: decoder(model, prompt, names) for label, model in own.items()}
            if composition == "base":  # what two equal models differ by in this measurement
                candidates["base again"] = decoder(sharing(plain), prompt, None)
            else:  # PEFT takes names for mixed batches only; one adapter is its active one
                peft_names = names if isinstance(names, list) else None
                candidates |= {label: decoder(model, prompt, peft_names) for label, model in peft.items()}
            if plain.device.type == "cuda":
                graphs = {"base": replayed(plain, prompt[1], None)}
                graphs |= {label: replayed(model, prompt[1], names) for label, model in own.items()}
                candidates |= {f"{label}, graph": run for label, run in graphs.items() if run is not None}
            for run in candidates.values():
                run(1)
            seconds: dict[str, list[float]] = {label: [] for label in candidates}
            # What is told apart there is 1 %, of times that scatter by 5 %.
            for _ in range(rounds * (8 if composition == "base" else 1)):
                # In another order each time: who runs behind the same weights finds some of them in the cache.
                for label in random.sample(list(candidates), len(candidates)):
                    seconds[label].append(candidates[label](steps))
            for label, times in seconds.items():
                beside = "base, graph" if label.endswith(", graph") and "base, graph" in seconds else "base"
                ratios = [a / b for a, b in zip(times, seconds[beside], strict=True)]
                yield {
                    "question": "decode", "model": name, "composition": composition, "batch": batch,
                    "adapters": adapters, "candidate": label, "tokens_per_s": round(batch / median(times), 2),
                    "ms_per_token": round(1000 * median(times), 2), "ratio": round(median(ratios), 4),
                    "low": round(min(ratios), 4), "high": round(max(ratios), 4),
                }  # fmt: skip
        del own, peft, candidates, run  # the decoders hold their models
        gc.collect()


# first: with checksum and comparison with the base; again: as what was evicted, from its file; ready: from host memory;
# ready, uncopied: without the copies themselves, which is what the host does while a GPU copies.
KINDS = ("first", "again", "ready", "ready, uncopied")


def loading(
    name: str, plain: nn.Module, folder: Path, file_bytes: dict[str, int], dense_too: bool
) -> Iterator[dict[str, object]]:
    """Hot loads (files in the page cache), beside what one would do without adapters: load a dense checkpoint."""
    for scope, kind in itertools.product(SCOPES, KINDS):
        ready = 1 << 34 if kind.startswith("ready") else 0
        model = DTSModel(sharing(plain), max_adapters=1, eviction="lru", host_bytes=ready)
        model.load_adapter(folder / scope / "0", "a0")
        model.delete_adapter("a0")
        times, copies = [], writes.copy_pages
        for i in range(16):
            path = folder / scope / str(i % FILES)
            if kind == "first":  # these have equal headers; others' differ with their ranks
                adapter_file._layouts.clear()
            else:
                model.load_adapter(path, "x")
                model.slots.evict("x", model._residency.clear)
            if kind == "ready, uncopied":
                writes.copy_pages = lambda pages: None
            wait(plain.get_output_embeddings().weight)
            begin = time.perf_counter()
            model.load_adapter(path, "x") if kind == "first" else model._load_again("x", ())
            wait(plain.get_output_embeddings().weight)
            times.append(time.perf_counter() - begin)
            writes.copy_pages = copies
            model.delete_adapter("x")
        yield {
            "question": "hot load", "model": name, "scope": scope, "kind": kind, "bytes": file_bytes[scope],
            "ms": round(1000 * median(times), 2), "low": round(1000 * min(times), 2),
            "high": round(1000 * max(times), 2),
        }  # fmt: skip
    if not dense_too:
        return
    dense = folder / "dense.safetensors"
    save_file({n: p.detach().clone() for n, p in plain.state_dict().items() if n != "lm_head.weight"}, dense)
    target, times = copy.deepcopy(plain), []
    for _ in range(5):
        begin = time.perf_counter()
        target.load_state_dict(load_file(dense), strict=False)
        times.append(time.perf_counter() - begin)
    yield {
        "question": "hot load", "model": name, "scope": "a dense checkpoint", "kind": "swap",
        "bytes": dense.stat().st_size, "ms": round(1000 * median(times), 2), "low": round(1000 * min(times), 2),
        "high": round(1000 * max(times), 2),
    }  # fmt: skip


def held_bytes(device: torch.device) -> int:
    """What the process has of a GPU's memory, or the system's, apart from mapped files and what is free in it."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def memory(name: str, plain: nn.Module, folder: Path, file_bytes: dict[str, int]) -> Iterator[dict[str, object]]:
    """Bytes of adapters in memory over those of their files; a dense model for each is what they replace."""
    for scope in SCOPES:
        before = held_bytes(plain.device)
        model = with_adapters(sharing(plain), folder / scope, 64, False)
        report, grown = model.memory_report(), held_bytes(plain.device) - before
        yield {
            "question": "memory", "model": name, "scope": scope, "adapters": 64, "base_bytes": report["base"],
            "file_bytes": file_bytes[scope], "resident_bytes": report["reserved"],
            "over_files": round(report["reserved"] / (64 * file_bytes[scope]), 4),
            "process_over_files": round(grown / (64 * file_bytes[scope]), 4),
            "over_dense": round((report["base"] + report["reserved"]) / (64 * report["base"]), 5),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="All that the device is for if not given.")
    parser.add_argument("--device", choices=list(POINTS), default="cpu")
    parser.add_argument("--only", choices=["decode", "base", "loading", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path = options.out or ROOT / "bench" / "results" / (
        "model.jsonl" if options.device == "cpu" else "model_cuda.jsonl"
    )
    with path.open("w", encoding="utf-8") as out, tempfile.TemporaryDirectory() as scratch:

        def write(row: dict[str, object]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(row, flush=True)

        write({"header": header()})
        names = [options.model] if options.model else SHAPES[options.device]
        if options.device == "cpu" and not options.model and options.only in (None, "loading"):
            names = [*names, LARGE]
        for name in names:
            in_part = options.device == "cpu" and name == LARGE  # its weights are more than a machine for benches has
            plain, folder = base_model(name, options.device, distinct=int(in_part)), Path(scratch) / name
            file_bytes = {}
            for scope in SCOPES:
                sizes = [write_adapter(folder / scope / str(i), plain, scope, SHARE, i) for i in range(FILES)]
                file_bytes[scope] = round(statistics.mean(sizes))
            if options.only in (None, "loading"):
                for row in loading(name, plain, folder, file_bytes, dense_too=name != LARGE):
                    write(row)
            if options.only in (None, "memory") and not in_part:
                for row in memory(name, plain, folder, file_bytes):
                    write(row)
            if options.only in (None, "decode", "base") and not in_part:
                points = [p for p in POINTS[options.device] if options.only != "base" or p[1] == "base"]
                if hasattr(plain.config, "num_experts"):  # thrice 64 adapters of it, in 24 GB
                    points = [point for point in points if point != (64, "distinct", 64)]
                for row in decoding(name, plain, folder, options.rounds, options.steps, points):
                    write(row)
            del plain
            shutil.rmtree(folder)
            gc.collect()


if __name__ == "__main__":
    main()
