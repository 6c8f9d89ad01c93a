"""`dts-fast demo`: the main job on real text, from training a base to one batch that mixes all variants."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import demo_lm
from .adapter_file import directory_size
from .compress import compress
from .config import DTSConfig
from .distill import DistillConfig, distill
from .errors import DTSError
from .hardware import header
from .model import DTSModel
from .texts import text_batches

BUDGETS = (0.01, 0.02, 0.04)
DISTILLED = BUDGETS[:1]  # the smallest has most to gain
DISTILL_STEPS, DISTILL_BATCH = 100, 16
_MARKER = "results.json"


@dataclass
class Variant:
    """One fine-tune: bits per byte of held-out text of its kind, and what each adapter of it costs and keeps."""

    kind: str
    base: float
    average: float = float("nan")
    fine_tune: float = float("nan")
    dense_nbytes: int = 0
    adapters: dict[float, dict[str, float]] = field(default_factory=dict)
    distilled: dict[float, dict[str, float]] = field(default_factory=dict)

    def recovered(self, adapter: Mapping[str, float]) -> float:
        """Share of the fine-tune's gain over the base that an adapter keeps."""
        return (self.base - adapter["bits_per_byte"]) / (self.base - self.fine_tune)


def run(out: str | Path, *, steps: int | None = None, seed: int = 0, method: str | None = None) -> list[Variant]:
    """Train, fine-tune, compress, distill, measure, generate; everything is written below ``out``.

    Args:
        out: folder for models, adapters, table (``table.md``, ``results.json``) and plot (``plot.png``). A folder
            that an earlier demo wrote is replaced, any other that exists is refused.
        steps: training steps of the base; fine-tunes take a fixed share of them.
        seed: the same seed gives the same models on the same machine.

    Raises:
        DTSError: ``out`` holds something else, or an extra is not installed.
    """
    out, started = Path(out), time.monotonic()
    _prepare(out)
    torch.manual_seed(seed)
    corpus = demo_lm.collect_corpus()
    tokenizer = demo_lm.train_tokenizer(corpus)
    base_steps = steps or demo_lm.BASE_STEPS
    tune_steps = max(1, demo_lm.FINE_TUNE_STEPS * base_steps // demo_lm.BASE_STEPS)
    with _progress() as progress:
        trained = demo_lm.train_base(corpus, tokenizer, steps=base_steps, seed=seed, progress=progress("base model"))
        _store(trained, tokenizer, out / "base")
        # Fine-tunes start from the stored base, as a user's would.
        base = _load(out / "base")
        for kind in demo_lm.KINDS:
            tuned = demo_lm.fine_tune(
                base, tokenizer, corpus.train[kind], steps=tune_steps, seed=seed, progress=progress(f"fine-tune {kind}")
            )
            _store(tuned, tokenizer, out / "tuned" / kind)
        settings = {} if method is None else {"method": method}
        for kind in demo_lm.KINDS:
            for budget in BUDGETS:
                compress(
                    out / "base",
                    out / "tuned" / kind,
                    _adapter_path(out, kind, budget),
                    DTSConfig(budget=budget, **settings),
                    progress=_without_loss(progress(f"compress {kind} to {budget:.0%}")),
                )
            for budget in DISTILLED:
                _distill(out, kind, budget, corpus, tokenizer, seed, progress(f"distill {kind} at {budget:.0%}"))
        variants = _measure(out, corpus, tokenizer, progress("measure"))
    texts = _generate(out, tokenizer, seed)
    table = render_table(variants)
    _write(out, variants, table, texts)
    print(table)
    print()
    for name, text in texts.items():
        print(f"--- {name}\n{text}\n")
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    print(f"took {time.monotonic() - started:.0f} s")
    return variants


def render_table(variants: list[Variant]) -> str:
    """Markdown: sizes, bits per byte, and the share of the gain each adapter recovers."""
    heads = ["variant", "dense", "base", "average", "fine-tune"]
    heads += [f"adapter {budget:.0%}: bytes, share of base, bits/byte, gain kept" for budget in BUDGETS]
    heads += [f"{budget:.0%}, distilled" for budget in DISTILLED]
    rows = [heads, ["---"] * len(heads)]
    for v in variants:
        cells = [v.kind, f"{v.dense_nbytes:,}", f"{v.base:.4f}", f"{v.average:.4f}", f"{v.fine_tune:.4f}"]
        for a in (*v.adapters.values(), *(v.distilled.get(budget) for budget in DISTILLED)):
            if a is None:
                cells.append("")
                continue
            cells.append(f"{a['nbytes']:,}, {a['share']:.2%}, {a['bits_per_byte']:.4f}, {v.recovered(a):.1%}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _prepare(out: Path) -> None:
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).is_file()):
            raise DTSError(f"{out} exists and was not written by the demo; nothing was changed. Choose another --out.")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True)
        (out / _MARKER).write_text("{}")
    except OSError as error:
        raise DTSError(f"{out} cannot be written ({error}). Choose another --out.") from error


def _store(model, tokenizer, folder: Path) -> None:
    """As checkpoints are shared: float16 safetensors with tokenizer."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _adapter_path(out: Path, kind: str, budget: float, distilled: bool = False) -> Path:
    return out / "adapters" / (f"{kind}-{budget:.0%}".replace("%", "pct") + "-distilled" * distilled)


def _distill(out: Path, kind: str, budget: float, corpus, tokenizer, seed: int, progress) -> None:
    """Distill an adapter; one that gets no better, as after few steps of training, is left out."""
    path = _adapter_path(out, kind, budget)
    batches, config = _learned(corpus.train[kind], tokenizer, seed), DistillConfig(steps=DISTILL_STEPS, seed=seed)
    try:
        distill(
            path, out / "base", out / "tuned" / kind, batches, _adapter_path(out, kind, budget, distilled=True), config,
            progress=_without_loss(progress),
        )  # fmt: skip
    except DTSError as error:
        print(f"not distilled: {error}", file=sys.stderr)


def _learned(texts: list[str], tokenizer, seed: int) -> list[dict[str, torch.Tensor]]:
    """As many batches of a kind's training text as distillation uses, and a tenth more, which it is measured on."""
    batches = text_batches(["".join(texts)], tokenizer, DISTILL_BATCH, demo_lm.CONTEXT)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    return [batches[i] for i in order[: max(2, round(1.1 * DISTILL_STEPS))]]


def _measure(out: Path, corpus, tokenizer, progress) -> list[Variant]:
    """Bits per byte of each kind's held-out text under base, average, fine-tune and adapters."""
    kinds = list(demo_lm.KINDS)
    total_steps = len(kinds) * (3 + len(BUDGETS) + len(DISTILLED))
    steps = iter(range(1, 1 + total_steps))

    def measured(model, kind: str) -> float:
        progress("measure", next(steps), total_steps, float("nan"))
        return demo_lm.bits_per_byte(model, tokenizer, corpus.held_out[kind])

    base = _load(out / "base")
    base_nbytes = (out / "base" / "model.safetensors").stat().st_size
    variants = {kind: Variant(kind, measured(base, kind)) for kind in kinds}
    total = {name: torch.zeros_like(p) for name, p in base.state_dict().items()}
    for kind in kinds:
        tuned = _load(out / "tuned" / kind)
        variants[kind].fine_tune = measured(tuned, kind)
        variants[kind].dense_nbytes = (out / "tuned" / kind / "model.safetensors").stat().st_size
        for name, parameter in tuned.state_dict().items():
            total[name] += parameter / len(kinds)
    average = _load(out / "base")
    average.load_state_dict(total)
    for kind in kinds:
        variants[kind].average = measured(average, kind)
    model = DTSModel(base, max_adapters=1)
    for kind in kinds:
        for budget, distilled in [*((b, False) for b in BUDGETS), *((b, True) for b in DISTILLED)]:
            path = _adapter_path(out, kind, budget, distilled)
            if not path.exists():
                continue
            model.load_adapter(path, kind)
            model.set_adapter(kind)
            size = directory_size(path)
            (variants[kind].distilled if distilled else variants[kind].adapters)[budget] = {
                "nbytes": size,
                "share": size / base_nbytes,
                "bits_per_byte": measured(model, kind),
            }
            model.delete_adapter(kind)
    return list(variants.values())


def _generate(out: Path, tokenizer, seed: int) -> dict[str, str]:
    """One prompt continued by every variant and the base, in one mixed batch."""
    kinds = list(demo_lm.KINDS)
    model = DTSModel(_load(out / "base"), max_adapters=len(kinds))
    for kind in kinds:
        model.load_adapter(_adapter_path(out, kind, BUDGETS[-1]), kind)
    names = [*kinds, "__base__"]
    inputs = tokenizer([demo_lm.COMMON_PROMPT] * len(names), return_tensors="pt")
    torch.manual_seed(seed)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        adapter_names=names,
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=tokenizer.eos_token_id,
    )
    return dict(zip(names, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True))


def _write(out: Path, variants: list[Variant], table: str, texts: Mapping[str, str]) -> None:
    rows = [
        {
            "kind": v.kind,
            "bits_per_byte": {"base": v.base, "average": v.average, "fine_tune": v.fine_tune},
            "dense_nbytes": v.dense_nbytes,
            "adapters": {f"{budget:.0%}": a | {"gain_kept": v.recovered(a)} for budget, a in v.adapters.items()},
            "distilled": {f"{budget:.0%}": a | {"gain_kept": v.recovered(a)} for budget, a in v.distilled.items()},
        }
        for v in variants
    ]
    results = {"header": header(), "variants": rows, "texts": texts}
    (out / _MARKER).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(variants, out / "plot.png")


def _plot(variants: list[Variant], file: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise DTSError("the plot needs matplotlib: pip install 'dts_fast[demo]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for v in variants:
        shares = [100 * v.adapters[budget]["share"] for budget in BUDGETS]
        kept = [100 * v.recovered(v.adapters[budget]) for budget in BUDGETS]
        (line,) = axes.plot(shares, kept, marker="o", label=v.kind)
        for a in v.distilled.values():
            axes.plot(100 * a["share"], 100 * v.recovered(a), marker="*", markersize=11, color=line.get_color())
    axes.axhline(100, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="adapter, % of the base's bytes", ylabel="% of the fine-tune's gain kept", ylim=(0, 105), xlim=(0, None)
    )
    axes.set_title("Held-out bits per byte: what each adapter keeps (stars: distilled)")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


@contextmanager
def _progress() -> Iterator:
    """A bar on a terminal; elsewhere a line for each stage, so that a log shows where it is."""
    if not sys.stderr.isatty():

        def stage(title: str):
            print(title, file=sys.stderr, flush=True)
            return lambda *_: None

        yield stage
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def stage(title: str):
            def update(_description: str, done: int, total: int, loss: float) -> None:
                text = title if loss != loss else f"{title}, loss {loss:.2f}"
                bar.update(task, description=text, completed=done, total=total)

            return update

        yield stage


def _without_loss(progress):
    return lambda name, done, total: progress(name, done, total, float("nan"))
