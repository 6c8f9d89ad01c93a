"""Mixtures as files: what a fused adapter holds, and what cannot be fused."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import fine_tuned, write_checkpoint
from safetensors.torch import load_file, save_file

from dts_fast import DeltaSum, DTSConfig, compress, fuse, load_adapter, nearest
from dts_fast.cli import main
from dts_fast.errors import AdapterFormatError, BaseMismatchError, DTSError
from dts_fast.export import export_full
from dts_fast.verify import inspect_adapter, verify


@pytest.fixture
def members(tmp_path, checkpoints):
    """Two adapters of one base that differ in ranks and in the parameters they change, with characteristics."""
    base, tuned = checkpoints
    save_file({"v": torch.tensor([1.0, 0.0])}, tmp_path / "one.safetensors")
    save_file({"v": torch.tensor([1.0, 1.0])}, tmp_path / "two.safetensors")
    state = load_file(base / "model.safetensors")
    other = fine_tuned(state, seed=2) | {"layers.0.norm.weight": state["layers.0.norm.weight"]}
    write_checkpoint(tmp_path / "tuned2", other, json.loads((base / "config.json").read_text()))
    compress(base, tuned, tmp_path / "a", DTSConfig(rank=3, characteristic=str(tmp_path / "one.safetensors")))
    compress(
        base, tmp_path / "tuned2", tmp_path / "b",
        DTSConfig(rank=5, exclude="conv", characteristic=str(tmp_path / "two.safetensors")),
    )  # fmt: skip
    return base, tmp_path / "a", tmp_path / "b"


def dequantized(path) -> dict[str, torch.Tensor]:
    return {name: p.dequantize(torch.float64) for name, p in load_adapter(path).deltas.items()}


def test_a_mixture_is_exact(tmp_path, members):
    base, a, b = members
    assert fuse([a, b], tmp_path / "mixed", [0.3, 0.7]) == {str(a): 0.3, str(b): 0.7}
    mixed, first, second = dequantized(tmp_path / "mixed"), dequantized(a), dequantized(b)
    assert mixed.keys() == first.keys() | second.keys()
    for name, delta in mixed.items():
        expected = 0.3 * first.get(name, 0 * delta) + 0.7 * second.get(name, 0 * delta)
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-7)
    parameters = load_adapter(tmp_path / "mixed").parameters
    assert isinstance(parameters["layers.0.proj.weight"], DeltaSum)
    assert parameters["layers.0.proj.weight"].rank == 8

    export_full(tmp_path / "mixed", base, tmp_path / "dense")
    dense, state = load_file(tmp_path / "dense" / "model.safetensors"), load_file(base / "model.safetensors")
    for name, delta in mixed.items():
        torch.testing.assert_close(dense[name], (state[name] + delta).float(), rtol=1e-6, atol=1e-6)


def test_a_mixture_can_be_mixed_again(tmp_path, members):
    _, a, b = members
    fuse([a, b], tmp_path / "mixed", [0.5, 0.5])
    fuse([tmp_path / "mixed", a], tmp_path / "again", [2.0, -1.0])
    again, second = dequantized(tmp_path / "again"), dequantized(b)
    for name, delta in second.items():
        torch.testing.assert_close(again[name], delta, rtol=1e-5, atol=1e-6)


def test_inspect_and_verify_know_a_mixture(tmp_path, members):
    base, a, b = members
    fuse([a, b], tmp_path / "mixed", [0.5, 0.5])
    report = inspect_adapter(tmp_path / "mixed")
    assert {p.kind for p in report.parameters} == {"low-rank", "vector"}
    assert all(p.error is None for p in report.parameters)
    assert "0.5 x a, 0.5 x b" in (tmp_path / "mixed" / "README.md").read_text()
    with pytest.raises(AdapterFormatError, match="no fine-tune to compare"):
        verify(tmp_path / "mixed", base, base)


def test_weights_from_characteristics(tmp_path, members):
    _, a, b = members
    chosen = fuse([a, b], tmp_path / "mixed", characteristic=torch.tensor([0.0, 1.0]))
    assert chosen == {str(a): 0.0, str(b): pytest.approx(1.0)}
    assert dequantized(tmp_path / "mixed").keys() == dequantized(b).keys()
    assert nearest([a, b], torch.tensor([1.0, 0.1]))[0] == str(a)
    assert nearest([a, b], torch.tensor([1.0, 0.9]))[0] == str(b)


def test_the_command_line(tmp_path, members):
    _, a, b = members
    arguments = ["fuse", str(a), str(b), "--out-path", str(tmp_path / "mixed")]
    done = CliRunner().invoke(main, [*arguments, "--weights", "0.3,0.7"])
    assert done.exit_code == 0, done.output
    assert f"0.3 x {a}, 0.7 x {b}" in done.stdout
    done = CliRunner().invoke(main, [*arguments, "--overwrite", "--characteristic", str(tmp_path / "two.safetensors")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["select", str(a), str(b), "--characteristic", str(tmp_path / "two.safetensors")])
    assert done.stdout == f"{b}\n"
    assert "1.0000" in done.stderr
    done = CliRunner().invoke(main, [*arguments, "--weights", "0.3,much"])
    assert done.exit_code == 2
    assert "expected numbers such as 0.3,0.7" in done.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "one weight for each"), ([0.0, 0.0], "the base itself"), (None, "either weights")],
)
def test_weights_that_do_not_fit(tmp_path, members, weights, message):
    _, a, b = members
    with pytest.raises(DTSError, match=message):
        fuse([a, b], tmp_path / "mixed", weights)
    assert not (tmp_path / "mixed").exists()


def test_adapters_of_different_bases_are_refused(tmp_path, members):
    base, a, _ = members
    state = fine_tuned(load_file(base / "model.safetensors"), seed=5)
    write_checkpoint(tmp_path / "base2", state)
    write_checkpoint(tmp_path / "tuned3", fine_tuned(state, seed=6))
    compress(tmp_path / "base2", tmp_path / "tuned3", tmp_path / "c", DTSConfig(rank=1))
    with pytest.raises(BaseMismatchError, match="different bases"):
        fuse([a, tmp_path / "c"], tmp_path / "mixed", [0.5, 0.5])


def test_a_parameter_that_is_whole_in_one_and_a_delta_in_the_other(tmp_path, checkpoints):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(rank=1, whole="conv"))
    compress(base, tuned, tmp_path / "b", DTSConfig(rank=1))
    with pytest.raises(DTSError, match=r"'conv\.weight' is stored whole by some"):
        fuse([tmp_path / "a", tmp_path / "b"], tmp_path / "mixed", [0.5, 0.5])
    compress(base, tuned, tmp_path / "c", DTSConfig(rank=2, whole="conv"))
    fuse([tmp_path / "a", tmp_path / "c"], tmp_path / "mixed", [0.5, 0.5])
    conv = load_adapter(tmp_path / "mixed").parameters["conv.weight"]
    torch.testing.assert_close(conv, load_file(tuned / "model.safetensors")["conv.weight"])


def test_damaged_sums_are_refused(tmp_path, members):
    _, a, b = members
    fuse([a, b], tmp_path / "mixed", [0.5, 0.5])
    weights = load_file(tmp_path / "mixed" / "adapter_model.safetensors")
    first = {n: t for n, t in weights.items() if not n.startswith("layers.0.proj.weight.")}
    kinds = {n: t for n, t in weights.items() if not n.startswith("layers.0.proj.weight+1")}
    kinds |= {"layers.0.proj.weight+1": torch.ones(24, 12)}
    for tensors, message in ((first, "earlier terms are missing"), (kinds, "different kinds, or whole")):
        save_file(tensors, tmp_path / "mixed" / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterFormatError, match=message):
            load_adapter(tmp_path / "mixed", verify_checksum=False)


def test_members_may_differ_in_what_they_leave_out_of_a_tied_base(tmp_path):
    embedding = torch.randn(30, 12)
    base = {"embed_tokens.weight": embedding, "lm_head.weight": embedding.clone(), "proj.weight": torch.randn(16, 12)}
    write_checkpoint(tmp_path / "base", base)
    for name, config in (("a", DTSConfig(rank=2)), ("b", DTSConfig(rank=2, exclude="embed|lm_head"))):
        tuned = fine_tuned(base, seed=len(name))
        tuned["lm_head.weight"] = tuned["embed_tokens.weight"].clone()
        write_checkpoint(tmp_path / f"tuned_{name}", tuned)
        compress(tmp_path / "base", tmp_path / f"tuned_{name}", tmp_path / name, config)
    fuse([tmp_path / "a", tmp_path / "b"], tmp_path / "mixed", [0.5, 0.5])
    assert load_adapter(tmp_path / "mixed").config["tied"] == load_adapter(tmp_path / "a").config["tied"] != {}
