"""How much of a fine-tune's behaviour an adapter keeps for its bytes: the paper's method, ours, and their rivals.

    python bench/fidelity.py --minilm DIR [--demo DIR] [--densities 0.02 0.04] [--out bench/results/fidelity.jsonl]
    python bench/fidelity.py --demo DIR --densities 0.02 0.04 --methods generated \
        --out bench/results/fidelity_generated.jsonl

For each density the paper's adapter sets the bytes (of its files); every other method gets the same. Each row:
Kullback-Leibler divergence of the compressed model's predictions from the fine-tune's on held-out inputs (nats, lower
is better), agreement of the most likely class, accuracy. Distillation learns from inputs that are not among these: of
the language models' training texts, and of the encoders' the first half of what is held out, for which all methods are
then measured on the second. Or, with --methods generated, from text that the language models have written themselves.

--minilm takes a folder with base.safetensors, config.json, and for each fine-tune TASK.safetensors and
TASK.eval.safetensors; --demo the folder that `dts-fast demo` wrote.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dts_fast import DistillConfig, DTSConfig, compress, distill, load_adapter
from dts_fast.adapter_file import directory_size
from dts_fast.codes import CodedVector, matrix_shape
from dts_fast.divergence import Loss, divergence
from dts_fast.generated import generated_batches
from dts_fast.hardware import header
from dts_fast.texts import text_batches

ROOT = Path(__file__).resolve().parent.parent
DENSITIES = (0.006, 0.02, 0.04, 0.08, 0.16, 0.5)
DISTILLED = (0.02, 0.04)  # below and around 1 %
ROWS = 2400  # of text that distillation sees
METHODS = ("distilled", "svd", "sign")  # beside the paper's and the refined one


@dataclass
class Task:
    """A fine-tune, its base, and how to run a model of either on held-out inputs."""

    name: str
    base: Path
    tuned: Path
    embeddings: str
    predict: object  # state dict -> (logits [n, classes], labels [n])
    batches: list[dict[str, Tensor]]  # inputs to distill with
    loss: Loss | None = None

    def __post_init__(self) -> None:
        self.base_state = {n: t.float() for n, t in load_file(_file(self.base)).items() if t.is_floating_point()}
        self.tuned_state = {n: t.float() for n, t in load_file(_file(self.tuned)).items() if t.is_floating_point()}
        self.reference, self.labels = self.predict(self.tuned_state)

    def score(self, state: dict[str, Tensor]) -> dict[str, float]:
        logits, _ = self.predict(state)
        return {
            "kl": float(divergence(logits, self.reference)),
            "agreement": float((logits.argmax(-1) == self.reference.argmax(-1)).double().mean()),
            "accuracy": float((logits.argmax(-1) == self.labels).double().mean()),
        }

    def plus(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.base_state | {name: self.base_state[name] + delta for name, delta in deltas.items()}


def _file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def encoder_tasks(folder: Path) -> Iterator[Task]:
    """Sentence encoders with a linear head on the mean of the last hidden state."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_json_file(folder / "config.json")).eval()
    for file in sorted(folder.glob("*.eval.safetensors")):
        held_out = load_file(file)

        half = len(held_out["labels"]) // 2
        seen = {name: t[:half] for name, t in held_out.items() if not name.startswith("head.")}
        held_out |= {name: held_out[name][half:] for name in seen}
        head = held_out["head.weight"].float(), held_out["head.bias"].float()

        def classes(hidden: Tensor, mask: Tensor, head: tuple[Tensor, Tensor] = head) -> Tensor:
            weight = mask[..., None].float()
            return torch.nn.functional.linear((hidden * weight).sum(1) / weight.sum(1), *head)

        def predict(
            state: dict[str, Tensor], held_out: dict[str, Tensor] = held_out, classes: Callable = classes
        ) -> tuple[Tensor, Tensor]:
            model.load_state_dict(state, strict=False)
            logits = []
            with torch.inference_mode():
                for ids, mask in zip(
                    held_out["input_ids"].split(250), held_out["attention_mask"].split(250), strict=True
                ):
                    hidden = model(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
                    logits.append(classes(hidden, mask))
            return torch.cat(logits), held_out["labels"]

        def loss(student, teacher, batch, classes: Callable = classes) -> tuple[Tensor, int]:
            ours, theirs = (classes(m.last_hidden_state, batch["attention_mask"]) for m in (student, teacher))
            return divergence(ours, theirs), len(ours)

        batches = [
            {"input_ids": ids.long(), "attention_mask": mask.long()}
            for ids, mask in zip(seen["input_ids"].split(32), seen["attention_mask"].split(32), strict=True)
        ]
        name = file.name.removesuffix(".eval.safetensors")
        yield Task(name, folder / "base.safetensors", folder / f"{name}.safetensors", "skip", predict, batches, loss)


def language_tasks(folder: Path) -> Iterator[Task]:
    """The demo's language models on held-out text of each kind; a token is an input."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dts_fast import demo_lm

    corpus, tokenizer = demo_lm.collect_corpus(), AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    for kind in demo_lm.KINDS:
        text = "".join(corpus.held_out[kind])[:60_000]
        ids = torch.tensor(tokenizer(text)["input_ids"])
        rows = ids[: len(ids) // demo_lm.CONTEXT * demo_lm.CONTEXT].view(-1, demo_lm.CONTEXT)

        def predict(state: dict[str, Tensor], rows: Tensor = rows) -> tuple[Tensor, Tensor]:
            model.load_state_dict(state, strict=False)
            with torch.inference_mode():
                logits = torch.cat([model(input_ids=part).logits[:, :-1] for part in rows.split(16)])
            return logits.flatten(0, 1), rows[:, 1:].flatten()

        known = text_batches(["".join(corpus.train[kind])], tokenizer, 16, demo_lm.CONTEXT)
        chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: ROWS // 16]
        batches = [known[i] for i in chosen]
        yield Task(kind, folder / "base", folder / "tuned" / kind, "low-rank", predict, batches)


def measure(
    task: Task, densities: tuple[float, ...], folder: Path, methods: tuple[str, ...]
) -> Iterator[dict[str, object]]:
    base_bytes = _file(task.base).stat().st_size
    yield {"method": "base", **task.score(task.base_state)}
    yield {"method": "fine-tune", **task.score(task.tuned_state)}
    svd: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for density in densities:
        where = folder / f"{task.name}-{density}"
        settings = {"embeddings": task.embeddings}
        compress(task.base, task.tuned, where / "paper", DTSConfig(density=density, method="paper", **settings))
        paper = load_adapter(where / "paper")
        size = directory_size(where / "paper")
        budget = DTSConfig(budget=size / base_bytes, method="refined", **settings)
        compress(task.base, task.tuned, where / "refined", budget)
        refined = load_adapter(where / "refined")

        vectors = {n: p.dequantize() for n, p in paper.deltas.items() if isinstance(p, CodedVector)}
        matrices = {n: p for n, p in paper.deltas.items() if n not in vectors}
        covered = sum(2 * torch.Size(p.shape).numel() for p in paper.deltas.values())
        common = {"density": density, "share_of_covered": paper.nbytes / covered}

        def row(method: str, nbytes: int, deltas: dict[str, Tensor], common: dict = common) -> dict[str, object]:
            return {"method": method, "nbytes": nbytes, **common, **task.score(task.plus(deltas))}

        yield row("paper", size, {n: p.dequantize() for n, p in paper.deltas.items()})
        yield row("refined", directory_size(where / "refined"), {n: p.dequantize() for n, p in refined.deltas.items()})
        own = generated_batches(ROWS, batch_size=16, max_length=128)
        for method, batches in {"distilled": task.batches, "generated": own}.items():
            if density in DISTILLED and method in methods:
                found = distill(
                    where / "refined", task.base, task.tuned, batches, where / method, DistillConfig(), loss=task.loss
                )
                distilled = load_adapter(where / method)
                yield row(method, found.nbytes, {n: p.dequantize() for n, p in distilled.deltas.items()})
        if "svd" not in methods:
            continue
        for name in matrices:
            if name not in svd:
                delta = (task.tuned_state[name] - task.base_state[name]).double()
                u, s, vh = torch.linalg.svd(delta.reshape(matrix_shape(tuple(delta.shape))), full_matrices=False)
                svd[name] = u.float(), s.float(), vh.float()

        def truncated(ranks: dict[str, int], vectors: dict = vectors) -> dict[str, Tensor]:
            return vectors | {n: (svd[n][0][:, :r] * svd[n][1][:r]) @ svd[n][2][:r] for n, r in ranks.items()}

        yield row("exact SVD, equal rank", size, truncated({n: p.rank for n, p in matrices.items()}))
        # Factors in 16 bits take eight times the bytes of 2-bit codes: what a LoRA extracted from the delta can hold.
        sixteen = {n: p.nbytes // (2 * (p.u.n + p.v.n)) for n, p in matrices.items()}
        yield row("exact SVD in 16 bit, equal bytes (LoRA)", size, truncated(sixteen))
    if "sign" not in methods:
        return
    signs = {}
    for name in {n for n in task.base_state if n in task.tuned_state and task.base_state[n].dim() > 1}:
        if task.embeddings == "skip" and "embeddings" in name:
            continue
        delta = task.tuned_state[name] - task.base_state[name]
        signs[name] = delta.sign() * delta.abs().mean()
    yield {
        "method": "dense 1-bit (sign x mean magnitude)",
        "nbytes": sum(d.numel() // 8 for d in signs.values()),
        **task.score(task.plus(vectors | signs)),
    }


def summary(rows: list[dict]) -> str:
    """KL of every method over the paper's at equal bytes."""
    lines = ["task        share   paper KL   others' over it"]
    for task in dict.fromkeys(r["task"] for r in rows):
        for density in dict.fromkeys(r["density"] for r in rows if r["task"] == task and "density" in r):
            at = {r["method"]: r for r in rows if r["task"] == task and r.get("density") == density}
            paper = at["paper"]
            ratios = (f"{m}: {r['kl'] / paper['kl']:.2f}" for m, r in at.items() if m != "paper")
            lines.append(f"{task:10} {paper['share_of_covered']:7.2%} {paper['kl']:9.4f}   " + ", ".join(ratios))
    return "\n".join(lines)


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(3.6 * len(tasks), 3.6), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        mine = [r for r in rows if r["task"] == task and "density" in r]
        for method in dict.fromkeys(r["method"] for r in mine):
            curve = [(100 * r["share_of_covered"], r["kl"]) for r in mine if r["method"] == method]
            axes.loglog(*zip(*curve, strict=True), marker="o", markersize=3, label=method)
        axes.set(title=task, xlabel="% of the 16-bit bytes covered")
    panels[0][0].set_ylabel("KL from the fine-tune (nats)")
    panels[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "generated"], default=METHODS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fidelity.jsonl")
    options = parser.parse_args()
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out, tempfile.TemporaryDirectory() as scratch:
        out.write(json.dumps({"header": header()}) + "\n")
        tasks = [*(encoder_tasks(options.minilm) if options.minilm else ())]
        tasks += language_tasks(options.demo) if options.demo else ()
        for task in tasks:
            for result in measure(task, tuple(options.densities), Path(scratch), tuple(options.methods)):
                rows.append({"task": task.name, **result})
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
    print(summary(rows))
    if tuple(options.methods) == METHODS:
        plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
