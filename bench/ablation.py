"""What each ingredient of the refined fit is worth, and what other numbers of groups would give, at equal bytes.

    python bench/ablation.py --minilm DIR [--demo DIR] [--densities 0.02 0.06] [--out bench/results/ablation.jsonl]
    python bench/ablation.py ... --densities 0.17 --variants refined "ranks in multiples of 16" --out .../pages.jsonl

For each density the codes and scales of the paper's adapter set the bytes; every variant gets the same (headers are not
counted here: other numbers of groups are no file format). Biases and norms are the same in all. Each row: KL divergence
of the compressed model's predictions from the fine-tune's on held-out inputs, and its ratio to that of the refined
method. Folders as in bench/fidelity.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

import torch
from fidelity import ROOT, Task, encoder_tasks, language_tasks
from torch import Tensor

from dts_fast.checkpoint import is_embedding
from dts_fast.codes import matrix_shape
from dts_fast.decompose import singular_values
from dts_fast.fit import Refinement, fit, fit_vector, refine
from dts_fast.hardware import header
from dts_fast.rank import Ranks, ranks_by_density, ranks_by_spectral_budget, ranks_by_uniform_budget

# Lloyd-Max levels of a standard normal variable for 2 and 8 groups.
TWO = (0.7979, -0.7979)
EIGHT = (2.1520, 1.3439, 0.7560, 0.2451, -0.2451, -0.7560, -1.3439, -2.1520)


@dataclass(frozen=True)
class Variant:
    """A way to fit and to choose ranks.

    Attributes:
        options: of `refine`; None is the paper's fit.
        ranks: "energy" (squared singular value per byte), "density" (one for all), or the measure that stands for the
            squared singular value: "singular value", "share of the delta" or "share of the weight".
        multiple: of the ranks.
    """

    options: Refinement | None
    ranks: str = "energy"
    multiple: int = 1


FULL = Refinement()
VARIANTS: dict[str, Variant] = {
    "refined": Variant(FULL),
    "paper": Variant(None, "density"),
    "paper's fit, ranks by energy": Variant(None),
    "one density": Variant(FULL, ranks="density"),
    "ranks by singular value": Variant(FULL, "singular value"),
    "ranks by energy over the delta's": Variant(FULL, ranks="share of the delta"),
    "ranks by energy over the weight's": Variant(FULL, ranks="share of the weight"),
    "ranks in multiples of 16": Variant(FULL, multiple=16),
    "no descent": Variant(replace(FULL, rounds=0)),
    "1 round": Variant(replace(FULL, rounds=1)),
    "2 rounds": Variant(replace(FULL, rounds=2)),
    "2 rounds of 4 sweeps": Variant(replace(FULL, rounds=2, sweeps=4)),
    "8 rounds": Variant(replace(FULL, rounds=8)),
    "1 sweep": Variant(replace(FULL, sweeps=1)),
    "8 sweeps": Variant(replace(FULL, sweeps=8)),
    "levels stay": Variant(replace(FULL, refit_levels=False)),
    "no stretch": Variant(replace(FULL, stretch="none")),
    "stretch: unbiased": Variant(replace(FULL, stretch="unbiased")),
    "stretch: norm": Variant(replace(FULL, stretch="norm")),
    "2 groups (1 bit)": Variant(replace(FULL, levels=TWO)),
    "8 groups (3 bits)": Variant(replace(FULL, levels=EIGHT)),
}


class Bench:
    """The deltas of one fine-tune, and models made of fits of them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.matrices: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        for name, base in task.base_state.items():
            delta, shape = task.tuned_state[name] - base, matrix_shape(tuple(base.shape))
            if (task.embeddings == "skip" and is_embedding(name, tuple(base.shape))) or not bool(delta.any()):
                continue
            if shape is None or min(shape) == 1:
                self.vectors[name] = fit_vector(delta).dequantize()
            else:
                self.matrices[name] = delta.reshape(shape)
        self.shapes = {name: tuple(delta.shape) for name, delta in self.matrices.items()}
        self.spectra = {name: singular_values(delta, min(delta.shape)) for name, delta in self.matrices.items()}

    def size_of(self, levels: int) -> Callable[[Ranks], int]:
        """Bytes of codes, scales and levels of both factors."""
        bits = math.ceil(math.log2(levels))

        def size(ranks: Ranks) -> int:
            return sum(
                r * (sum(-(-bits * n // 8) for n in self.shapes[name]) + 4) + 2 * 4 * levels
                for name, r in ranks.items()
                if r
            )

        return size

    def ranks(self, variant: Variant, budget: int) -> Ranks:
        size_of = self.size_of(len(variant.options.levels) if variant.options else 4)
        if variant.ranks == "density":
            return ranks_by_uniform_budget(self.shapes, budget, size_of, variant.multiple)
        spectra = self.spectra
        if variant.ranks == "singular value":
            spectra = {name: s.sqrt() for name, s in spectra.items()}
        if variant.ranks == "share of the delta":
            spectra = {name: s / torch.linalg.vector_norm(s) for name, s in spectra.items()}
        if variant.ranks == "share of the weight":
            spectra = {name: s / self.task.base_state[name].norm() for name, s in spectra.items()}
        return ranks_by_spectral_budget(self.shapes, spectra, budget, size_of, variant.multiple)

    def kl(self, variant: Variant, budget: int) -> float:
        deltas = dict(self.vectors)
        for name, rank in self.ranks(variant, budget).items():
            delta = self.matrices[name]
            if variant.options is None:
                deltas[name] = fit(delta, rank, method="paper").dequantize()
            elif rank:
                u, s, v = refine(delta, rank, variant.options)
                deltas[name] = (u.rows.t() * s) @ v.rows
        state = {name: delta.reshape(self.task.base_state[name].shape) for name, delta in deltas.items()}
        return self.task.score(self.task.plus(state))["kl"]


def measure(task: Task, densities: list[float], variants: list[str]) -> Iterator[dict[str, object]]:
    bench = Bench(task)
    covered = 2 * sum(delta.numel() for delta in bench.matrices.values())
    for density in densities:
        budget = bench.size_of(4)(ranks_by_density(bench.shapes, density))
        kls = {name: bench.kl(VARIANTS[name], budget) for name in variants}
        for name, kl in kls.items():
            yield {
                "task": task.name, "share": budget / covered, "variant": name, "kl": kl,
                "over_refined": kl / kls["refined"],
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.02, 0.06])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ablation.jsonl")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    rows = []
    with options.out.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"header": header()}) + "\n")
        tasks = [*(encoder_tasks(options.minilm) if options.minilm else ())]
        tasks += language_tasks(options.demo) if options.demo else ()
        for task in tasks:
            for row in measure(task, options.densities, options.variants):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
    print("KL over the refined method's: geometric mean, least, most")
    for name in options.variants:
        ratios = [row["over_refined"] for row in rows if row["variant"] == name]
        print(f"{name:36} {geometric_mean(ratios):6.3f} {min(ratios):6.3f} {max(ratios):6.3f}")


if __name__ == "__main__":
    main()
