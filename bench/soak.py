"""Random loads, evictions and mixed batches from several threads for minutes: no wrong row, no leak, no deadlock.

    python bench/soak.py [--minutes 10] [--threads 4] [--seed 0] [--out bench/results/soak.jsonl]

A small Llama with more adapters than slots and pages (eviction="lru"), half of which fit into host memory. Each thread
does at random what users' threads do: forward passes of mixed batches, greedy generation, loads under names of its own,
replacements by other versions, deletions, pins, mixtures. Every row is compared with the dense model of its adapter, as
`transformers` computes it; the memory of the process must not grow between the first fifth and the end; a thread that
makes no step for a minute counts as a deadlock. Ends with 1 where anything of this went wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import transformers

from dts_fast import DTSConfig, DTSModel, compress
from dts_fast.export import export_full
from dts_fast.hardware import header

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS, SLOTS, PROMPTS, LENGTH = 16, 6, 8, 6
STUCK_SECONDS = 60


def make_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class Truth:
    """The base, adapters of it on disk, and what the dense model of each makes of some prompts."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, base = folder, make_model()
        self.prompts = torch.randint(3, 512, (PROMPTS, LENGTH))
        base.save_pretrained(folder / "base")
        self.logits, self.tokens = {}, {}
        self.record("__base__", base)
        for i in range(ADAPTERS):
            tuned = make_model()
            tuned.load_state_dict({n: p + 0.03 * torch.randn_like(p) for n, p in base.state_dict().items()})
            tuned.tie_weights()
            tuned.save_pretrained(folder / "tuned")
            # Ranks of one to three pages, so that arenas fragment.
            config = DTSConfig(rank=(8, 24, 40)[i % 3])
            compress(folder / "base", folder / "tuned", folder / str(i), config, overwrite=True)
            export_full(folder / str(i), folder / "base", folder / "dense", overwrite=True)
            self.record(str(i), transformers.LlamaForCausalLM.from_pretrained(folder / "dense").eval())

    @torch.no_grad()
    def record(self, name: str, dense: torch.nn.Module) -> None:
        self.logits[name] = dense(self.prompts).logits
        self.tokens[name] = dense.generate(self.prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False)


class Soak:
    """Threads that use one model, and what they found."""

    def __init__(self, truth: Truth, seed: int, threads: int) -> None:
        self.truth, self.seed = truth, seed
        one = DTSModel(make_model_from(truth.folder / "base"))
        one.load_adapter(truth.folder / "2", "2")
        nbytes = one.memory_report()["adapters"]["2"]
        # Half of the adapters come back from host memory, the others from their files.
        self.model = DTSModel(
            make_model_from(truth.folder / "base"), max_adapters=SLOTS, max_bytes=SLOTS * nbytes, eviction="lru",
            host_bytes=ADAPTERS * nbytes // 2,
        )  # fmt: skip
        # The largest first: it divides the memory among the layers.
        for i in (2, *(i for i in range(ADAPTERS) if i != 2)):
            self.model.load_adapter(truth.folder / str(i), str(i))
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.steps = [time.monotonic()] * threads
        self.lock, self.stop = threading.Lock(), threading.Event()

    def worker(self, index: int) -> None:
        generator = random.Random(f"{self.seed} {index}")
        try:
            while not self.stop.is_set():
                action = generator.choices(
                    (self.forward, self.generate, self.own, self.pin, self.mixture), (60, 10, 15, 5, 2)
                )[0]
                action(index, generator)
                self.steps[index] = time.monotonic()
                with self.lock:
                    self.counts[action.__name__] += 1
        except BaseException as error:
            self.problems.append(f"thread {index}: {type(error).__name__}: {error}")
            self.stop.set()
            raise

    def batch(self, generator: random.Random) -> tuple[list[int], list[str]]:
        """Rows of the prompts, and an adapter for each, of at most two distinct ones (slots are few)."""
        few = [str(generator.randrange(ADAPTERS)) for _ in range(2)] + ["__base__"]
        rows = [generator.randrange(PROMPTS) for _ in range(generator.randint(1, 6))]
        return rows, [generator.choice(few) for _ in rows]

    def check(self, logits: torch.Tensor, rows: list[int], versions: list[str], what: str) -> None:
        for at, (row, version) in enumerate(zip(rows, versions, strict=True)):
            expected = self.truth.logits[version][row]
            # Float32 sums in another order, in three layers.
            error = float((logits[at] - expected).abs().max() / expected.abs().max())
            if error > 1e-3:
                self.problems.append(f"{what}: row {row} of adapter {version}: relative error {error:.3g}")
                self.stop.set()
        with self.lock:
            self.counts["rows"] += len(rows)

    @torch.no_grad()
    def forward(self, index: int, generator: random.Random) -> None:
        rows, names = self.batch(generator)
        self.check(self.model(self.truth.prompts[rows], adapter_names=names).logits, rows, names, "forward")

    def generate(self, index: int, generator: random.Random) -> None:
        rows, names = self.batch(generator)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        tokens = self.model.generate(self.truth.prompts[rows], adapter_names=names, **settings)
        for at, (row, name) in enumerate(zip(rows, names, strict=True)):
            if not torch.equal(tokens[at], self.truth.tokens[name][row]):
                self.problems.append(f"generate: row {row} of adapter {name}: other tokens")
                self.stop.set()

    @torch.no_grad()
    def own(self, index: int, generator: random.Random) -> None:
        """A name of this thread's: loaded, used, replaced, used, deleted."""
        name, row = f"own {index}", [generator.randrange(PROMPTS)]
        for replace in (False, True):
            version = str(generator.randrange(ADAPTERS))
            self.model.load_adapter(self.truth.folder / version, name, replace=replace)
            logits = self.model(self.truth.prompts[row], adapter_names=name).logits
            self.check(logits, row, [version], "own")
        self.model.delete_adapter(name)

    def pin(self, index: int, generator: random.Random) -> None:
        name = str(index)  # one for each thread, so that there is room for the others' calls
        self.model.pin_adapter(name)
        self.forward(index, generator)
        self.model.unpin_adapter(name)

    @torch.no_grad()
    def mixture(self, index: int, generator: random.Random) -> None:
        """All of one adapter and nothing of another: what it computes is known."""
        first, second = generator.sample(range(ADAPTERS), 2)
        name, row = f"mixture {index}", [generator.randrange(PROMPTS)]
        self.model.add_weighted_adapter([str(first), str(second)], [1.0, 0.0], name)
        logits = self.model(self.truth.prompts[row], adapter_names=name).logits
        self.check(logits, row, [str(first)], "mixture")
        self.model.delete_adapter(name)


def make_model_from(folder: Path) -> torch.nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "soak.jsonl")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Truth(Path(folder)), options.seed, options.threads)
        threads = [threading.Thread(target=soak.worker, args=(i,), daemon=True) for i in range(options.threads)]
        begin, early = time.monotonic(), None
        for thread in threads:
            thread.start()
        while time.monotonic() - begin < 60 * options.minutes and not soak.stop.wait(1):
            if time.monotonic() - min(soak.steps) > STUCK_SECONDS:
                faulthandler.dump_traceback(all_threads=True)
                soak.problems.append("deadlock: a thread made no step for a minute")
                break
            if early is None and time.monotonic() - begin > 12 * options.minutes:
                early = resident_bytes()
        soak.stop.set()
        for thread in threads:
            thread.join(STUCK_SECONDS)
            if thread.is_alive():
                soak.problems.append("deadlock: a thread did not end")
        gc.collect()
        grown = resident_bytes() - (early or resident_bytes())
        # The allocator keeps some of what threads use, and not in proportion to time.
        if grown > 64 << 20:
            soak.problems.append(f"leak: {grown >> 20} MiB more than after a fifth of the time")
        table = soak.model.slots
        if any(table._leases) or table._reserved or table._retired:
            soak.problems.append("slots are still leased, reserved or retired at the end")
    result = {
        "question": "soak", "minutes": round((time.monotonic() - begin) / 60, 2), "threads": options.threads,
        "seed": options.seed, "adapters": ADAPTERS, "slots": SLOTS, "cache": soak.model.cache_info()._asdict(),
        "host_bytes": soak.model.memory_report()["host"], "actions": dict(soak.counts),
        "grown_bytes": grown, "problems": soak.problems[:20],
    }  # fmt: skip
    options.out.write_text("".join(json.dumps(row) + "\n" for row in ({"header": header()}, result)), encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
