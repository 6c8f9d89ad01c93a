"""What `dts-fast bench` shows and writes, without a clock: rows are made up or of layers of a few numbers."""

from __future__ import annotations

import json

import pytest
import transformers
from click.testing import CliRunner
from conftest import write_checkpoint
from rich.console import Console

from dts_fast import bench_report, benchmark, timing
from dts_fast.cli import main
from dts_fast.errors import DTSError
from dts_fast.shapes import layers_of


def row(candidate: str, m: int, ratio: float, layer: str = "q") -> dict[str, object]:
    return {
        "model": "tiny", "layer": layer, "n": 8, "k": 4, "m": m, "dtype": "float32", "rank": 2, "adapters": 1,
        "composition": "identical", "device": "cpu", "candidate": candidate, "ms": 0.5 * ratio, "ratio": ratio,
        "low": ratio, "high": ratio, "of_floor": 0.25, "bound": "memory",
    }  # fmt: skip


ROWS = [row(candidate, m, ratio) for m in (1, 8) for candidate, ratio in (("F.linear", 1.0), ("DTSLinear", 0.8))]


def rendered(table) -> list[list[str]]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines() if line.strip()]


def test_the_table_has_a_line_for_each_candidate_with_its_share_of_the_floor():
    lines = rendered(bench_report.table(ROWS))
    assert lines[1] == ["tiny", "q", "8", "x", "4", "1", "F.linear", "0.5000", "1.00", "1.00-1.00", "25%", "(memory)"]
    assert lines[2] == ["DTSLinear", "0.4000", "0.80", "0.80-0.80", "25%", "(memory)"]
    assert len(lines) == 5


def test_an_earlier_run_stands_beside_this_one(tmp_path):
    earlier = [row("DTSLinear", 1, 1.6), row("DTSLinear", 8, 0.4), row("F.linear", 1, 1.0)]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"header": {"cpu": "x"}}, *earlier)))
    header, before = bench_report.read_rows(path)
    assert header == {"cpu": "x"}
    lines = rendered(bench_report.table(ROWS, before))
    assert lines[2][-2:] == ["1.60", "0.50"]
    assert lines[3][-2:] == ["-", "-"]  # the earlier run has no F.linear at 8 rows
    assert bench_report.summary_of_change(ROWS, before) == (
        "DTSLinear: 1.000 x its earlier ratio (geometric mean of 2 points)"
    )
    assert "no point" in bench_report.summary_of_change([row("DTSLinear", 99, 1.0)], before)


@pytest.mark.parametrize("text", [None, "", "no", "[]", '{"header": {}}', '{"header": {}}\n{"ratio": 1}'])
def test_what_is_no_earlier_run_is_said(tmp_path, text):
    path = tmp_path / "old.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DTSError, match=r"old\.jsonl: .*dts-fast bench --out"):
        bench_report.read_rows(path)


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_the_plot_is_written(tmp_path, name):
    bench_report.plot(ROWS, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(DTSError, match="cannot be written"):
        bench_report.plot(ROWS, tmp_path / "none" / name)


LLAMA = {(24, 24): "o q", (12, 24): "k v", (40, 24): "gate up", (24, 40): "down"}


def short(layers: dict[str, tuple[int, int]]) -> dict[tuple[int, int], str]:
    """By shape; a checkpoint has its tensors in another order than a model its layers."""
    return {shape: " ".join(sorted(names.replace("_proj", "").split(","))) for names, shape in layers.items()}


def llama_config():
    return transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def test_layers_of_a_configuration_and_of_a_checkpoint(tmp_path):
    config = llama_config()
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert short(layers_of(str(path), {})) == LLAMA
    write_checkpoint(tmp_path / "weights", transformers.LlamaModel(config).state_dict())
    assert short(layers_of(str(tmp_path / "weights"), {})) == LLAMA
    assert layers_of("known", {"known": {"a": (1, 2)}}) == {"a": (1, 2)}
    gpt2 = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=2)
    gpt2.save_pretrained(tmp_path / "gpt2")
    assert layers_of(str(tmp_path / "gpt2"), {})["c_fc"] == (96, 24)


def test_models_that_cannot_be_found_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DTSError, match=r"--model no-such: expected one of BERT-base.*hub id"):
        layers_of("no-such", benchmark.MODELS)
    write_checkpoint(tmp_path / "vectors", {"x": transformers.LlamaModel(llama_config()).norm.weight})
    with pytest.raises(DTSError, match="no linear layers"):
        layers_of(str(tmp_path / "vectors"), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DTSError, match="--model"):
        layers_of(str(tmp_path / "empty"), {})


def test_the_command_writes_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "last_level_cache", lambda device: 1)
    monkeypatch.setattr(timing, "measure_roofline", lambda dtypes, device: timing.Roofline(1e9, {"float32": 1e9}))
    monkeypatch.setitem(benchmark.MODELS, "tiny", {"q": (24, 16)})
    out, plot = tmp_path / "run.jsonl", tmp_path / "run.png"
    arguments = ["bench", "--model", "tiny", "--rows", "2", "--dtype", "float32", "--rounds", "2"]
    first = CliRunner().invoke(main, [*arguments, "--out", str(out), "--plot", str(plot)])
    assert first.exit_code == 0, first.output
    assert "tiny q" in first.stdout
    assert "GB/s" in first.stderr
    assert plot.stat().st_size > 1000
    header, rows = bench_report.read_rows(out)
    assert "cpu" in header
    assert {r["candidate"] for r in rows.values()} >= {"F.linear", "DTSLinear"}
    second = CliRunner().invoke(main, [*arguments, "--compare", str(out)])
    assert "x its earlier ratio" in second.stdout
    lines = CliRunner().invoke(main, [*arguments, "--json"]).stdout.splitlines()
    assert all(json.loads(line) for line in lines)
    assert "header" in json.loads(lines[0])
    missing = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "none" / "x")])
    assert (missing.exit_code, "cannot be written" in missing.stderr) == (1, True)
