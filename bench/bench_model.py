"""What adapters cost a whole language model that decodes: tokens a second and memory, beside the base and PEFT.

    python bench/bench_model.py [--rounds 5] [--steps 6] [--out bench/results/model.jsonl]

Qwen2.5-0.5B's shapes with random weights (times do not depend on them), bfloat16; every linear layer of its blocks has
adapters at 1 %. A step is one token for each row of a batch, behind a prompt of 64. Candidates take turns within a
round; what counts are ratios within rounds. PEFT has LoRAs of equal rank.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from dts_fast import DTSLinear, route
from dts_fast.benchmark import random_delta, rank_for_share
from dts_fast.hardware import header
from dts_fast.slots import SlotTable

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.01
PROMPT = 64


def base_model() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model's modules on the same parameters: where weights lie in memory must not make a difference."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def with_adapters(model: nn.Module, count: int, prepack: bool) -> tuple[nn.Module, SlotTable, int]:
    """(the model with wrapped linears, their table of names, bytes of one adapter's codes and scales)"""
    slots = SlotTable(count)
    deltas: dict[tuple[int, int], list] = {}
    nbytes = 0
    for name, layer in linears(model).items():
        n, k = layer.weight.shape
        rank = rank_for_share(n, k, SHARE)
        if (n, k) not in deltas:  # a few distinct ones serve: what is timed is reading and multiplying them
            deltas[n, k] = [random_delta(n, k, rank) for _ in range(min(count, 4))]
        wrapper = DTSLinear(layer, prepack=prepack, slots=slots)
        for slot in range(count):
            wrapper.load_slot(slot, {"weight": deltas[n, k][slot % len(deltas[n, k])]})
        nbytes += deltas[n, k][0].nbytes
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper)
    for slot in range(count):
        slots.occupy(f"a{slot}", slot)
    return model, slots, nbytes


def with_peft(model: nn.Module, count: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    ranks = {name: rank_for_share(*layer.weight.shape, SHARE) for name, layer in linears(model).items()}
    patterns = {name: rank for name, rank in ranks.items() if rank != 32}
    config = LoraConfig(r=32, lora_alpha=32, target_modules=list(ranks), rank_pattern=patterns, alpha_pattern=patterns)
    peft = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, count):
        peft.add_adapter(f"a{i}", config)
    return peft.to(torch.bfloat16).eval().requires_grad_(False)


def decoder(model: nn.Module, batch: int, names: list[str] | str | None, peft: bool) -> Callable[[int], float]:
    """A function that decodes some tokens behind a prompt and returns the seconds of one step."""
    torch.manual_seed(1)
    prompt = torch.randint(0, 1000, (batch, PROMPT))
    extra = {"adapter_names": names} if peft and isinstance(names, list) else {}

    def run(steps: int) -> float:
        def forward(**inputs):
            if names is None or peft:
                return model(**inputs, **extra)
            with route(names):
                return model(**inputs)

        with torch.inference_mode():
            out = forward(input_ids=prompt, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            begin = time.perf_counter()
            for _ in range(steps):
                out = forward(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return (time.perf_counter() - begin) / steps

    return run


def names_of(batch: int, composition: str, adapters: int) -> list[str] | str:
    if composition == "base":
        return "__base__"
    if composition == "identical":
        return "a0"
    return [f"a{row % adapters}" for row in range(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "model.jsonl")
    options = parser.parse_args()
    plain = base_model()
    base_bytes = sum(p.nbytes for p in plain.parameters())
    with options.out.open("w", encoding="utf-8") as out:

        def write(row: dict[str, object]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(row, flush=True)

        write({"header": header()})
        for adapters in (1, 8):
            attached, _, adapter_bytes = with_adapters(sharing(plain), adapters, False)
            packed, _, _ = with_adapters(copy.deepcopy(plain), adapters, True)
            peft = with_peft(sharing(plain), adapters)
            points = [("base", 1), ("identical", 1), ("identical", 8)] if adapters == 1 else [("distinct", 8)]
            for composition, batch in points:
                names = names_of(batch, composition, adapters)
                candidates = {
                    "base": decoder(plain, batch, None, False),
                    "DTSLinear": decoder(attached, batch, names, False),
                    "DTSLinear, prepacked": decoder(packed, batch, names, False),
                }
                if composition != "base":
                    candidates["PEFT LoRA, equal rank"] = decoder(peft, batch, names, True)
                for run in candidates.values():
                    run(1)
                seconds = {name: [] for name in candidates}
                for _ in range(options.rounds):
                    for name, run in candidates.items():
                        seconds[name].append(run(options.steps))
                for name, own in seconds.items():
                    ratios = [a / b for a, b in zip(own, seconds["base"], strict=True)]
                    write({
                        "question": "decode", "composition": composition, "batch": batch, "adapters": adapters,
                        "candidate": name, "tokens_per_s": round(batch / median(own), 2),
                        "ratio": round(median(ratios), 4), "low": round(min(ratios), 4), "high": round(max(ratios), 4),
                    })  # fmt: skip
            del attached, packed, peft
            gc.collect()
        model, _, adapter_bytes = with_adapters(sharing(plain), 64, False)
        resident = sum(t.nbytes for m in model.modules() if isinstance(m, DTSLinear) for t in m.bank.tensors)
        write({
            "question": "memory", "adapters": 64, "base_bytes": base_bytes, "adapter_bytes": adapter_bytes,
            "resident_bytes": resident, "over_files": round(resident / (64 * adapter_bytes), 4),
        })  # fmt: skip


if __name__ == "__main__":
    main()
