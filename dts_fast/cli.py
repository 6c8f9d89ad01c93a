"""The command line ``dts-fast``. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import traceback
import warnings
from contextlib import contextmanager

import click

# Everything that loads torch is imported within the commands: `dts-fast --help` answers at once.
from .version import __version__

# Norm of all deltas over the base's, from which on two checkpoints look unrelated; such have 1.4, fine-tunes up to some
# tenths.
_FAR = 1.0


class Share(click.ParamType):
    """A share such as ``1%`` or ``0.01``."""

    name = "share"

    def convert(self, value, param, ctx):
        try:
            percent = isinstance(value, str) and value.endswith("%")
            share = float(value[:-1]) / 100 if percent else float(value)
        except ValueError:
            self.fail(f"expected a share such as 1% or 0.01, got {value!r}", param, ctx)
        if not 0 < share <= 1:
            self.fail(f"expected a share above 0 and up to 100%, got {value!r}", param, ctx)
        return share


class Commands(click.Group):
    """Turns the errors a user can meet into a message and exit code 1."""

    def invoke(self, ctx):
        from .errors import DTSError

        try:
            return super().invoke(ctx)
        except DTSError as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dts-fast")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on stderr, errors and warnings alone.")
@click.option("-v", "--verbose", is_flag=True, help="All warnings, and where an error comes from.")
def main(quiet, verbose) -> None:
    """Many fine-tuned variants of one model, each about 1 % of it, served from one resident base."""
    from .errors import DTSWarning

    warnings.simplefilter("default" if verbose else "ignore")
    if not verbose:  # ours, without the line of code that they come from
        warnings.filterwarnings("always", category=DTSWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
    if quiet:
        logging.disable(logging.WARNING)  # other libraries'


def _remark(text: str) -> None:
    """What a person may want to know and a program does not, on stderr."""
    if not click.get_current_context().find_root().params["quiet"]:
        click.echo(text, err=True)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell) -> None:
    """Print a script for tab completion; for bash: eval "$(dts-fast completion bash)"."""
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(main, {}, "dts-fast", "_DTS_FAST_COMPLETE").source())


@main.command()
@click.option("--base-model", required=True, metavar="B", help=".safetensors file, directory or hub id of the base.")
@click.option("--model", required=True, metavar="F", help="The fine-tune, likewise.")
@click.option("--out-path", required=True, metavar="D", help="Adapter directory to write.")
@click.option("--budget", type=Share(), help="Bytes of the adapter over bytes of the base, such as 1% (the default).")
@click.option("--density", type=Share(), help="Rank over min(N, K) of each matrix, as in the paper.")
@click.option("--rank", type=int, help="The same rank for every matrix.")
@click.option("--energy", type=Share(), help="Share of each delta's squared norm that its rank must hold.")
@click.option("--method", default="refined", show_default=True, help="How factors are fitted: refined or paper.")
@click.option("--reference", metavar="R", help="Take deltas from this checkpoint instead of the base (DTS-D).")
@click.option("--include", metavar="RE", help="Only parameters whose name matches.")
@click.option("--exclude", metavar="RE", help="Not parameters whose name matches.")
@click.option("--whole", metavar="RE", help="Store parameters whose name matches whole.")
@click.option(
    "--embeddings", type=click.Choice(["low-rank", "skip", "full"]), default="low-rank", show_default=True,
    help="Compress embedding tables, leave them the base's, or store them whole.",
)  # fmt: skip
@click.option(
    "--rank-multiple",
    type=int,
    default=0,
    metavar="R",
    help="Ranks are multiples of R; by default whole pages of 16 where the budget is large enough.",
)
@click.option("--characteristic", metavar="X", help="What the task is like: a vector file, or a description.")
@click.option("--encoder", metavar="E", help="Sentence encoder for a description (extra: text).")
@click.option("--device", default="cpu", show_default=True, help="Where to fit.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that stands at the target.")
def compress(base_model, model, out_path, overwrite, **settings) -> None:
    """Compress a fine-tune F of a base B to an adapter D."""
    from .compress import compress as run
    from .config import DTSConfig

    with _progress() as progress:
        report = run(base_model, model, out_path, DTSConfig(**settings), overwrite=overwrite, progress=progress)
    click.echo(
        f"{report.path}: {report.nbytes:,} bytes, {report.share:.3%} of the base's {report.base_nbytes:,}; relative "
        f"error of the deltas {report.error:.3f}"
    )
    if report.distance > _FAR:
        click.echo(
            f"warning: the fine-tune is {report.distance:.2f} times the base's own norm away from it, as unrelated "
            "weights are. Is it a fine-tune of this base?",
            err=True,
        )
    for reason, names in _by_reason(report.skipped).items():
        _remark(f"  not in it ({reason}): {len(names)} tensors, e.g. {names[0]}")


@main.command()
@click.argument("adapter", metavar="D")
@click.option("--base-model", required=True, metavar="B", help="The base the adapter belongs to.")
@click.option("--model", required=True, metavar="F", help="The fine-tune it was made from, with its tokenizer.")
@click.option("--data", metavar="T", help="Texts like those it will see: a text file, or .jsonl.")
@click.option(
    "--generate", type=click.IntRange(2), metavar="N", help="No data: N rows that the fine-tune writes itself."
)
@click.option("--prefix", metavar="TEXT", help="What these begin with, special tokens included (of a chat template).")
@click.option("--out-path", required=True, metavar="O", help="Adapter directory to write.")
@click.option("--field", default="text", show_default=True, help="Where a line of .jsonl has its text.")
@click.option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a row.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows of a step.")
@click.option("--steps", type=int, default=200, show_default=True, help="Steps of the optimiser.")
@click.option("--learning-rate", type=float, default=0.03, show_default=True, help="Of factor elements, relative.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of rows.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run.")
@click.option("--dtype", default="float32", show_default=True, help="Of both models.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that stands at the target.")
def distill(
    adapter, base_model, model, data, generate, prefix, out_path, field, max_length, batch_size, seed, overwrite,
    **settings,
) -> None:  # fmt: skip
    """Bring the predictions of an adapter D nearer to its fine-tune's, at the same size, by texts."""
    from .distill import DistillConfig
    from .distill import distill as run
    from .errors import DTSError
    from .generated import generated_batches
    from .lora import is_lora
    from .texts import load_tokenizer, read_texts, text_batches

    if (data is None) == (generate is None):
        raise DTSError(
            "distill takes either --data, a file of texts, or --generate, how many rows the model is to write."
        )
    if prefix is not None and data is not None:
        raise DTSError("--prefix is for --generate.")
    config = DistillConfig(seed=seed, **settings)
    if is_lora(model):
        raise DTSError(f"{model} is a PEFT LoRA; distill runs whole models. Merge it (merge_and_unload of PEFT).")
    if data is not None:
        batches = text_batches(read_texts(data, field), load_tokenizer(model), batch_size, max_length)
    else:
        first = load_tokenizer(model)(prefix, add_special_tokens=False)["input_ids"] if prefix else ()
        batches = generated_batches(generate, batch_size=batch_size, max_length=max_length, prefix=first, seed=seed)
    with _progress() as progress:
        report = run(adapter, base_model, model, batches, out_path, config, overwrite=overwrite, progress=progress)
    click.echo(
        f"{report.path}: {report.nbytes:,} bytes; divergence from the fine-tune {report.after:.4g}, before "
        f"{report.before:.4g} (on texts that were held out)"
    )
    if report.kept:
        _remark(f"  as they were: {len(report.kept)} parameters, e.g. {report.kept[0]}")


@main.command()
@click.argument("adapter", metavar="D")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(adapter, as_json) -> None:
    """Show what an adapter D holds, what it costs and what it loses."""
    from .verify import inspect_adapter

    report = inspect_adapter(adapter)
    if as_json:
        extra = {"share_of_base": report.share_of_base, "share_of_covered": report.share_of_covered}
        click.echo(json.dumps(dataclasses.asdict(report) | extra, indent=2))
        return
    _print_parameters(report.parameters)
    method = report.config["compression"].get("method", "unknown")
    click.echo(f"base: {report.config['base_model_name_or_path']}, method {method}")
    click.echo(
        f"files: {report.nbytes:,} bytes, {report.share_of_base:.3%} of the base's {report.base_nbytes:,} as stored"
    )
    click.echo(
        f"codes, levels, scales, whole tensors: {report.payload_nbytes:,} bytes; the deltas are "
        f"{report.share_of_covered:.3%} of the 16-bit bytes of the parameters they cover"
    )


@main.command()
@click.argument("adapter", metavar="D")
@click.option("--base-model", required=True, metavar="B", help="The base the adapter belongs to.")
@click.option("--model", required=True, metavar="F", help="The fine-tune it was made from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(adapter, base_model, model, as_json) -> None:
    """Compare what an adapter D reconstructs with the fine-tune F; exits with 1 if they do not belong together."""
    from .verify import verify as run

    report = run(adapter, base_model, model)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print_parameters(report.parameters)
        click.echo(
            f"relative error over all deltas {report.total_error:.4f}, of which left out altogether "
            f"{report.uncovered:.4f}; largest deviation from the recorded errors {report.worst_deviation:.4f}"
        )
        click.echo("matches its fine-tune" if report.matches else "DOES NOT match this fine-tune")
    if not report.matches:
        sys.exit(1)


@main.group()
def export() -> None:
    """Turn an adapter into other formats."""


@export.command("full")
@click.argument("adapter", metavar="D")
@click.option("--base-model", required=True, metavar="B", help="The base the adapter belongs to.")
@click.option("--out-path", required=True, metavar="O", help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at the target.")
def export_full(adapter, base_model, out_path, overwrite) -> None:
    """Write base plus adapter as a dense checkpoint."""
    from .export import export_full as run

    changed = run(adapter, base_model, out_path, overwrite=overwrite)
    click.echo(f"{out_path}: {changed} tensors personalised")


@export.command("lora")
@click.argument("adapter", metavar="D")
@click.option("--base-model", required=True, metavar="B", help="The base the adapter belongs to.")
@click.option("--out-path", required=True, metavar="O", help="Directory to write.")
@click.option("--drop", is_flag=True, help="Leave out what PEFT cannot hold, instead of refusing.")
@click.option("--overwrite", is_flag=True, help="Replace what stands at the target.")
def export_lora(adapter, base_model, out_path, drop, overwrite) -> None:
    """Write the adapter as a PEFT LoRA of equal rank."""
    from .lora import export_lora as run

    left_out = run(adapter, base_model, out_path, drop=drop, overwrite=overwrite)
    for name in left_out:
        _remark(f"left out: {name}")
    click.echo(f"{out_path}: a LoRA for PEFT")


@main.command()
@click.argument("adapter", metavar="D")
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private/--public", default=None, help="Of a new repository; the account's default if not given.")
@click.option("--revision", metavar="BRANCH", help="The main one if not given.")
@click.option("--message", default="Upload adapter", show_default=True, help="Of the commit.")
def push(adapter, repo_id, private, revision, message) -> None:
    """Upload an adapter to the Hugging Face hub."""
    from .hub import push_adapter

    click.echo(push_adapter(adapter, repo_id, private=private, revision=revision, commit_message=message))


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="A B ...")
@click.option("--out-path", required=True, metavar="O", help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at the target.")
def average(models, out_path, overwrite) -> None:
    """Write the mean of checkpoints A B ..., a --reference for compress."""
    from .dense import average as run

    run(models, out_path, overwrite=overwrite)
    click.echo(f"{out_path}: the mean of {len(models)} checkpoints")


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="D1 D2 ...")
@click.option("--weights", metavar="W1,W2,...", help="One weight for each adapter.")
@click.option(
    "--characteristic", metavar="X", help="Weights from the similarity to this task: vector file or description."
)
@click.option("--encoder", metavar="E", help="Sentence encoder for a description (extra: text).")
@click.option("--out-path", required=True, metavar="D", help="Adapter directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that stands at the target.")
def fuse(adapters, weights, characteristic, encoder, out_path, overwrite) -> None:
    """Mix adapters D1 D2 ... of one base into one, for a task that none of them was made for."""
    from .characteristic import read_characteristic
    from .fuse import fuse as run

    try:
        given = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 0.3,0.7, got {weights!r}", param_hint="--weights") from None
    vector = None if characteristic is None else read_characteristic(characteristic, encoder)
    chosen = run(adapters, out_path, given, characteristic=vector, overwrite=overwrite)
    click.echo(f"{out_path}: " + ", ".join(f"{weight:.4g} x {name}" for name, weight in chosen.items()))


@main.command()
@click.argument("adapters", nargs=-1, required=True, metavar="D1 D2 ...")
@click.option("--characteristic", required=True, metavar="X", help="The task: a vector file or a description.")
@click.option("--encoder", metavar="E", help="Sentence encoder for a description (extra: text).")
def select(adapters, characteristic, encoder) -> None:
    """Print which of the adapters D1 D2 ... was made for the nearest task."""
    from .characteristic import read_characteristic
    from .fuse import nearest

    name, similarity = nearest(adapters, read_characteristic(characteristic, encoder))
    click.echo(name)
    _remark(f"cosine similarity {similarity:.4f}")


@main.command()
@click.option("--out", default="demo_out", show_default=True, help="Folder for models, adapters, table and plot.")
@click.option("--steps", type=click.IntRange(1), help="Training steps of the base model; fewer are faster and worse.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out, steps, seed) -> None:
    """Train a small model and three fine-tunes on text at hand, compress them, and serve them in one batch."""
    from .demo import run

    run(out, steps=steps, seed=seed)


@main.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="Its layers: a known name, config.json, checkpoint or hub id.",
)
@click.option("--rows", "rows", type=click.IntRange(1), multiple=True, metavar="M", help="Rows of a batch; repeatable.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--share", type=Share(), default=0.01, show_default=True, help="Adapter's bytes over a 16-bit base's.")
@click.option("--adapters", type=click.IntRange(1), default=1, show_default=True, help="How many are loaded.")
@click.option(
    "--composition", type=click.Choice(["base", "identical", "uniform", "zipf", "distinct"]), default="identical",
    show_default=True, help="How the rows of a batch use them.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Turns of each candidate.")
@click.option("--out", metavar="FILE", help="Write JSON lines, the header first.")
@click.option("--plot", "plot_path", metavar="FILE", help="Write a plot (.png, .svg, .pdf).")
@click.option("--compare", metavar="FILE", help="Beside the ratios of an earlier run's --out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, the header first.")
def bench(models, rows, dtype, share, adapters, composition, device, rounds, out, plot_path, compare, as_json) -> None:
    """Time layers with adapters on this machine, beside the bare linear and other ways to do the same."""
    import torch

    from . import bench_report
    from .atomic import check_file, write_text
    from .benchmark import MODELS, Case, rank_for_share, run_case
    from .errors import DTSError
    from .hardware import header
    from .shapes import layers_of
    from .timing import measure_roofline

    if device == "cuda" and not torch.cuda.is_available():
        raise DTSError("--device cuda: no CUDA device here; see dts-fast doctor.")
    if out is not None:
        check_file(out)
    if plot_path is not None:
        bench_report.check_plot(plot_path)
    before = None if compare is None else bench_report.read_rows(compare)[1]
    chosen = {model: layers_of(model, MODELS) for model in models or ["Qwen2.5-0.5B"]}
    cases = [
        (model, layer, Case(n, k, m, getattr(torch, dtype), rank_for_share(n, k, share), adapters, composition, device))
        for model, layers in chosen.items() for layer, (n, k) in layers.items() for m in rows or [1, 8, 32]
    ]  # fmt: skip
    roofline = measure_roofline([getattr(torch, dtype)], device)
    head = {"header": header(), "roofline": dataclasses.asdict(roofline)}
    found = []
    if as_json:
        click.echo(json.dumps(head))
    with _progress() as progress:
        for done, (model, layer, case) in enumerate(cases):
            if progress is not None:
                progress(f"{model} {layer}, {case.m} rows", done, len(cases))
            for row in run_case(case, roofline, rounds=rounds):
                found.append({"model": model, "layer": layer, **row})
                if as_json:
                    click.echo(json.dumps(found[-1]))
    if out is not None:
        write_text(out, "".join(json.dumps(row) + "\n" for row in (head, *found)))
    if plot_path is not None:
        bench_report.plot(found, plot_path)
    if not as_json:
        _console().print(bench_report.table(found, before))
        products = max(roofline.flops.values()) / 1e9
        _remark(f"memory {roofline.bytes_per_s / 1e9:.1f} GB/s, products {products:.0f} GF/s")
        if before is not None:
            click.echo(bench_report.summary_of_change(found, before))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json) -> None:
    """Say which backends are used, why the others are not, and the mend."""
    from .doctor import diagnose, render

    report = diagnose()
    click.echo(json.dumps(report, indent=2) if as_json else render(report))


def _print_parameters(parameters) -> None:
    from rich.table import Table

    table = Table("parameter", "kind", "shape", box=None, pad_edge=False)
    for column in ("rank", "bytes", "error"):
        table.add_column(column, justify="right")
    for p in parameters:
        shape = "x".join(map(str, p.shape))
        table.add_row(
            p.name, p.kind, shape, str(p.rank or ""), f"{p.nbytes:,}", "" if p.error is None else f"{p.error:.4f}"
        )
    _console().print(table)


def _console():
    """Standard output; where it is piped, to programs, it is not folded to the width of a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _by_reason(skipped) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        grouped.setdefault(reason.split(" to ")[0], []).append(name)
    return grouped


@contextmanager
def _progress():
    """A progress bar on stderr where that is a terminal, else silence."""
    if not sys.stderr.isatty() or click.get_current_context().find_root().params["quiet"]:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
