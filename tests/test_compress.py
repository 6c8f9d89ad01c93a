"""The offline loop as a whole: compress, inspect, verify, export."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import fine_tuned, plain_tensors, write_checkpoint
from safetensors.torch import load_file

import dts_fast.compress  # noqa: F401  (the module, which the function of its name hides)
from dts_fast import DTSConfig, compress, fit, load_adapter
from dts_fast.adapter_file import directory_size
from dts_fast.codes import CodedVector, LowRankDelta
from dts_fast.errors import BaseMismatchError, CheckpointError, DTSError
from dts_fast.export import export_full
from dts_fast.verify import inspect_adapter, verify

compress_module = sys.modules["dts_fast.compress"]


def test_every_parameter_finds_its_form(tmp_path, checkpoints):
    base, tuned = checkpoints
    steps = []
    report = compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5), progress=lambda *step: steps.append(step))
    parameters = load_adapter(tmp_path / "a").parameters
    kinds = {name: type(p) for name, p in parameters.items()}
    assert kinds == {
        "cls_token": CodedVector,
        "conv.weight": LowRankDelta,
        "embed_tokens.weight": LowRankDelta,
        "layers.0.norm.weight": CodedVector,
        "layers.0.odd.weight": LowRankDelta,
        "layers.0.proj.bias": CodedVector,
        "layers.0.proj.weight": LowRankDelta,
    }
    assert {name: p.rank for name, p in parameters.items() if isinstance(p, LowRankDelta)} == {
        "conv.weight": 3,
        "embed_tokens.weight": 6,
        "layers.0.odd.weight": 5,
        "layers.0.proj.weight": 6,
    }
    assert parameters["conv.weight"].shape == (6, 3, 2, 2)
    assert report.skipped == {"position_ids": "integer"}
    assert steps[0] == ("cls_token", 0, 7)
    assert steps[-1] == ("writing", 7, 7)


def test_full_rank_recovers_most_of_the_delta(tmp_path, checkpoints):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(density=1.0))
    report = verify(tmp_path / "a", base, tuned)
    # The paper's thresholding loses about 0.6 of a full-rank delta's norm, whatever the rank.
    assert report.matches
    assert 0.3 < report.total_error < 0.75
    assert report.uncovered == 0.0


def test_unchanged_tensors_are_skipped(tmp_path):
    base = plain_tensors()
    tuned = base | {"conv.weight": base["conv.weight"] + 0.1}
    report = compress(
        write_checkpoint(tmp_path / "b", base),
        write_checkpoint(tmp_path / "t", tuned),
        tmp_path / "a",
        DTSConfig(rank=2),
    )
    assert list(load_adapter(tmp_path / "a").parameters) == ["conv.weight"]
    assert sum(reason == "unchanged" for reason in report.skipped.values()) == 6


@pytest.mark.parametrize("name", ["conv.weight", "layers.0.norm.weight"])
@pytest.mark.parametrize("settings", [{"density": 0.5}, {"rank": 0}])
def test_nan_in_a_delta_names_the_tensor_and_writes_nothing(tmp_path, name, settings):
    base, tuned = plain_tensors(), fine_tuned(plain_tensors())
    tuned[name].view(-1)[3] = float("nan")
    with pytest.raises(DTSError, match=f"{name}: 1 of"):
        compress(
            write_checkpoint(tmp_path / "b", base),
            write_checkpoint(tmp_path / "t", tuned),
            tmp_path / "a",
            DTSConfig(**settings),
        )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("budget", [0.17, 0.19, 0.2])
def test_the_files_obey_the_budget_and_use_it(tmp_path, budget):
    generator = torch.Generator().manual_seed(0)
    base = plain_tensors(generator) | {f"big.{i}.weight": torch.randn(90, 70, generator=generator) for i in range(2)}
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", fine_tuned(base))
    config = DTSConfig(budget=budget)
    report = compress(b, t, tmp_path / "a", config)
    limit = config.budget * (b / "model.safetensors").stat().st_size
    assert report.nbytes == directory_size(tmp_path / "a")
    assert limit * 0.9 < report.nbytes <= limit
    assert report.share <= config.budget


def test_a_budget_below_the_headers_is_an_error(tmp_path, checkpoints):
    with pytest.raises(DTSError, match="Raise the budget"):
        compress(*checkpoints, tmp_path / "a", DTSConfig(budget=0.001))
    assert not (tmp_path / "a").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path, checkpoints):
    for run in ("first", "second"):
        compress(*checkpoints, tmp_path / run / "a", DTSConfig(density=0.4))
    for file in (tmp_path / "first" / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / "a" / file.name).read_bytes()


@pytest.mark.parametrize(("choice", "form"), [("low-rank", LowRankDelta), ("skip", type(None)), ("full", torch.Tensor)])
def test_embeddings(tmp_path, checkpoints, choice, form):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5, embeddings=choice))
    stored = load_adapter(tmp_path / "a").parameters.get("embed_tokens.weight")
    assert isinstance(stored, form)
    if choice == "full":
        assert torch.equal(stored, load_file(tuned / "model.safetensors")["embed_tokens.weight"])


def test_include_exclude_and_whole(tmp_path, checkpoints):
    config = DTSConfig(density=0.5, include="layers|conv", exclude="bias", whole="odd")
    compress(*checkpoints, tmp_path / "a", config)
    parameters = load_adapter(tmp_path / "a").parameters
    assert list(parameters) == ["conv.weight", "layers.0.norm.weight", "layers.0.odd.weight", "layers.0.proj.weight"]
    assert isinstance(parameters["layers.0.odd.weight"], torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_any_dtype(tmp_path, dtype):
    base = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain_tensors().items()}
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", fine_tuned(base))
    compress(b, t, tmp_path / "a", DTSConfig(density=0.5))
    assert verify(tmp_path / "a", b, t).matches
    export_full(tmp_path / "a", b, tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(dense[name].dtype == tensor.dtype for name, tensor in base.items())


def test_a_reference_other_than_the_base(tmp_path, checkpoints):
    """DTS-D: deltas are taken from, and added to, a merged model."""
    base, tuned = checkpoints
    mean = {
        name: (t + load_file(tuned / "model.safetensors")[name]) / 2 if t.is_floating_point() else t
        for name, t in load_file(base / "model.safetensors").items()
    }
    merged = write_checkpoint(tmp_path / "merged", mean)
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5, reference=str(merged)))
    assert verify(tmp_path / "a", merged, tuned).matches
    with pytest.raises(BaseMismatchError, match="not the base"):
        verify(tmp_path / "a", base, tuned)


def test_inspect_counts_what_is_there(tmp_path, checkpoints):
    compress(*checkpoints, tmp_path / "a", DTSConfig(density=0.5))
    report = inspect_adapter(tmp_path / "a")
    proj = next(p for p in report.parameters if p.name == "layers.0.proj.weight")
    assert (proj.kind, proj.shape, proj.rank) == ("low-rank", (24, 12), 6)
    assert proj.nbytes == 6 * (6 + 3) + 4 * 6 + 2 * 16
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert report.covered_nbytes == 2 * (50 * 12 + 24 * 12 + 24 + 13 * 11 + 12 + 72 + 12)
    assert report.share_of_covered == sum(p.nbytes for p in report.parameters) / report.covered_nbytes
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"|layers.0.proj.weight|24x12|6|{proj.nbytes}|{proj.error:.4f}|" in card


def test_verify_refuses_another_fine_tune(tmp_path, checkpoints):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5))
    other = write_checkpoint(tmp_path / "other", fine_tuned(load_file(base / "model.safetensors"), seed=7))
    assert verify(tmp_path / "a", base, tuned).matches
    assert not verify(tmp_path / "a", base, other).matches


def test_export_is_base_plus_dequantised_deltas(tmp_path, checkpoints):
    base, tuned = checkpoints
    head = {"head.weight": torch.randn(2, 12)}
    tuned = write_checkpoint(
        tmp_path / "with_head",
        {f"net.{n}": t for n, t in load_file(tuned / "model.safetensors").items()} | head,
        {"architectures": ["Other"], "hidden_size": 12},
    )
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5))
    assert export_full(tmp_path / "a", base, tmp_path / "dense") == 8
    before, dense = (load_file(d / "model.safetensors") for d in (base, tmp_path / "dense"))
    parameters = load_adapter(tmp_path / "a").parameters
    assert dense.keys() == before.keys() | head.keys()
    for name, tensor in before.items():
        expected = tensor + parameters[name].dequantize() if name in parameters else tensor
        assert torch.equal(dense[name], expected)
    assert torch.equal(dense["head.weight"], head["head.weight"])
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["Other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_is_recognised_in_any_dtype(tmp_path, checkpoints, dtype):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5))
    tensors = load_file(base / "model.safetensors")
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    assert export_full(tmp_path / "a", write_checkpoint(tmp_path / "cast", cast), tmp_path / "dense")


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_another_base_is_refused(tmp_path, checkpoints, scale):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5))
    tensors = fine_tuned(load_file(base / "model.safetensors"), scale=scale, seed=3)
    with pytest.raises(BaseMismatchError, match="not the base the adapter was made for"):
        export_full(tmp_path / "a", write_checkpoint(tmp_path / "o", tensors), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    smaller = {name: t for name, t in tensors.items() if name != "conv.weight"}
    with pytest.raises(BaseMismatchError, match=r"conv\.weight"):
        export_full(tmp_path / "a", write_checkpoint(tmp_path / "s", smaller), tmp_path / "dense")


def test_checkpoints_that_do_not_belong_together_write_nothing(tmp_path, checkpoints):
    base, _ = checkpoints
    stranger = write_checkpoint(tmp_path / "x", {"other.weight": torch.randn(4, 4)})
    with pytest.raises(CheckpointError, match="lacks 7 tensors"):
        compress(base, stranger, tmp_path / "a", DTSConfig(density=0.5))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.1, "rank": 3}, "one of budget, density, rank and energy"),
        ({"budget": 1.5}, "budget must lie"),
        ({"density": 0.0}, "density must lie"),
        ({"rank": -2}, "not negative"),
        ({"method": "magic"}, "known: "),
        ({"embeddings": "some"}, "embeddings must be one of"),
        ({"encoder": "some"}, "without a characteristic"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(DTSError, match=message):
        DTSConfig(**settings)


def test_a_base_in_float8_is_recognised(tmp_path):
    base = {"m.weight": torch.randn(24, 16).to(torch.float8_e4m3fn)}
    tuned = {"m.weight": base["m.weight"].float() + 0.1 * torch.randn(24, 16)}
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", tuned)
    compress(b, t, tmp_path / "a", DTSConfig(rank=4))
    assert verify(tmp_path / "a", b, t).matches


@pytest.mark.parametrize("option", ["include", "whole"])
def test_a_selection_of_nothing_is_refused(tmp_path, checkpoints, option):
    with pytest.raises(CheckpointError, match=f"--{option} 'zzz' matches no tensor of .*; its names are like"):
        compress(*checkpoints, tmp_path / "a", DTSConfig(density=0.5, **{option: "zzz"}))


def test_targets_that_are_something_else(tmp_path, checkpoints):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for name in ("file", "full"):
        for overwrite in (False, True):
            with pytest.raises(DTSError, match="something else, which is not overwritten; nothing was changed"):
                compress(*checkpoints, tmp_path / name, DTSConfig(rank=1), overwrite=overwrite)
    compress(*checkpoints, tmp_path / "empty", DTSConfig(rank=1))  # nothing is lost there
    with pytest.raises(DTSError, match=r"exists already; nothing was changed.*--overwrite"):
        compress(*checkpoints, tmp_path / "empty", DTSConfig(rank=2))


@pytest.mark.parametrize("unchanged", [0, 1, 2])
def test_the_budget_holds_where_tensors_turn_out_unchanged(tmp_path, unchanged):
    """256 and 257 parameters take different numbers of fingerprint samples."""
    base = {f"v{i:03}.bias": torch.randn(40) for i in range(256)} | {"m.weight": torch.randn(300, 300)}
    tuned = fine_tuned(base) | {f"v{i:03}.bias": base[f"v{i:03}.bias"] for i in range(unchanged)}
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", tuned)
    for budget in (0.2, 0.21):
        report = compress(b, t, tmp_path / f"a{budget}", DTSConfig(budget=budget))
        assert report.nbytes <= budget * (b / "model.safetensors").stat().st_size


def test_scalars_survive(tmp_path):
    base = plain_tensors() | {"logit_scale": torch.tensor(2.5)}
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", fine_tuned(base))
    compress(b, t, tmp_path / "a", DTSConfig(density=0.5))
    assert verify(tmp_path / "a", b, t).matches
    assert load_adapter(tmp_path / "a").parameters["logit_scale"].shape == ()


def test_whole_tensors_must_be_finite_and_not_named_like_codes(tmp_path):
    base = plain_tensors()
    b = write_checkpoint(tmp_path / "b", base)
    for name, tensor, message in (
        ("head.weight", torch.full((2, 2), float("inf")), "NaN or Inf"),
        ("head.levels", torch.zeros(2, 2), "reserves names"),
    ):
        t = write_checkpoint(tmp_path / name, fine_tuned(base) | {name: tensor})
        with pytest.raises(DTSError, match=message):
            compress(b, t, tmp_path / "a", DTSConfig(density=0.5))
        assert not (tmp_path / "a").exists()


def test_export_of_tied_weights_written_twice(tmp_path):
    base, tuned = plain_tensors(), fine_tuned(plain_tensors())
    for tensors in (base, tuned):
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    b, t = write_checkpoint(tmp_path / "b", base), write_checkpoint(tmp_path / "t", tuned)
    for choice in ("full", "low-rank"):
        compress(b, t, tmp_path / choice, DTSConfig(density=0.5, embeddings=choice))
        export_full(tmp_path / choice, b, tmp_path / f"dense_{choice}")
        dense = load_file(tmp_path / f"dense_{choice}" / "model.safetensors")
        assert torch.equal(dense["lm_head.weight"], dense["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("setting", "message"), [({"include": "("}, "regular expression"), ({"device": "warp"}, "warp")]
)
def test_settings_that_torch_or_re_refuse(setting, message):
    with pytest.raises(DTSError, match=message):
        DTSConfig(**setting)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, checkpoints, monkeypatch):
    base, tuned = checkpoints
    fitted = []

    def counting_fit(delta, rank, *, method, name):
        fitted.append(name)
        return fit(delta, rank, method=method, name=name)

    monkeypatch.setattr(compress_module, "fit", counting_fit)

    def interrupt(name, done, total):
        if name == "layers.0.proj.weight":
            raise KeyboardInterrupt

    compress(base, tuned, tmp_path / "whole", DTSConfig(budget=0.9))
    assert fitted == ["conv.weight", "embed_tokens.weight", "layers.0.odd.weight", "layers.0.proj.weight"]
    fitted.clear()
    with pytest.raises(KeyboardInterrupt):
        compress(base, tuned, tmp_path / "a", DTSConfig(budget=0.9), progress=interrupt)
    compress(base, tuned, tmp_path / "a", DTSConfig(budget=0.9))
    assert fitted == ["conv.weight", "embed_tokens.weight", "layers.0.odd.weight", "layers.0.proj.weight"]
    for file in (tmp_path / "a").iterdir():
        # The card's title is the folder's name, which has another length; all else is the same to the byte.
        if file.name != "README.md":
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "tuned", "whole"]


def test_a_changed_fine_tune_is_not_resumed(tmp_path, checkpoints):
    base, tuned = checkpoints

    def interrupt(name, done, total):
        if name == "layers.0.proj.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base, tuned, tmp_path / "a", DTSConfig(rank=2), progress=interrupt)
    write_checkpoint(tuned, fine_tuned(load_file(base / "model.safetensors"), seed=7))
    compress(base, tuned, tmp_path / "a", DTSConfig(rank=2))
    assert verify(tmp_path / "a", base, tuned).matches


def test_ranks_are_multiples_where_asked(tmp_path, checkpoints):
    base, tuned = checkpoints
    for config in (DTSConfig(budget=0.5, rank_multiple=4), DTSConfig(budget=0.5, rank_multiple=4, method="paper"),
                   DTSConfig(density=0.3, rank_multiple=4), DTSConfig(energy=0.5, rank_multiple=4)):  # fmt: skip
        report = compress(base, tuned, tmp_path / "a", config, overwrite=True)
        assert config.budget is None or report.share <= config.budget
        for name, p in load_adapter(tmp_path / "a").deltas.items():
            if isinstance(p, LowRankDelta):
                assert p.rank % 4 == 0 or p.rank == min(p.u.n, p.v.n), name
    with pytest.raises(DTSError, match="rank_multiple"):
        DTSConfig(rank_multiple=-1)


def test_paths_are_welcome_in_the_config(tmp_path, checkpoints):
    base, tuned = checkpoints
    (tmp_path / "v.json").write_text("[1.0, 2.0]")
    compress(base, tuned, tmp_path / "a", DTSConfig(rank=1, characteristic=tmp_path / "v.json", reference=base))
    assert "v.json" not in (tmp_path / "a" / "README.md").read_text()
    assert load_adapter(tmp_path / "a").config["characteristic"]


def test_runs_for_one_target_at_a_time_leave_one_whole_adapter(tmp_path, checkpoints):
    base, tuned = checkpoints
    options = ["--base-model", base, "--model", tuned, "--density", "0.5", "--out-path", tmp_path / "a"]
    code = "from dts_fast.cli import main; main(prog_name='dts-fast')"
    command = [sys.executable, "-c", code, "compress", *map(str, options)]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes[0] == 0, errors
    assert all(run.returncode == 0 or "error: " in error for run, error in zip(runs, errors, strict=True))
    assert len(load_adapter(tmp_path / "a").parameters) == 7
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".a", "a"))) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"budget": 0.01}}, "config: expected a DTSConfig, got dict"),
        ({"model": None}, "model: expected a path or a hub id, got NoneType"),
        ({"base_model": torch.nn.Linear(2, 2)}, "base_model: expected a path or a hub id, got Linear"),
    ],
    ids=["config", "none", "module"],
)
def test_arguments_of_another_type_are_refused(tmp_path, checkpoints, arguments, message):
    given = dict(zip(("base_model", "model"), checkpoints, strict=True)) | {"config": DTSConfig(rank=2)} | arguments
    with pytest.raises(DTSError, match=message):
        compress(out_path=tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "1%"}, r"budget must be a number \(1 % is 0.01\), got '1%'"),
        ({"rank": "4"}, "rank must be an integer, not negative, got '4'"),
        ({"rank": 4.0}, "rank must be an integer, not negative, got 4.0"),
        ({"rank": -1}, "rank must be an integer, not negative, got -1"),
        ({"rank_multiple": 1.5}, "rank_multiple must be an integer"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused(settings, message):
    with pytest.raises(DTSError, match=message):
        DTSConfig(**settings)


def test_the_report_tells_the_error_and_how_far_the_fine_tune_is(tmp_path, checkpoints):
    base, tuned = checkpoints
    report = compress(base, tuned, tmp_path / "a", DTSConfig(rank=2))
    measured = verify(tmp_path / "a", base, tuned)
    # Recorded errors have four decimals.
    assert report.error == pytest.approx(measured.total_error, abs=2e-4)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    floats = [name for name, t in before.items() if t.is_floating_point()]
    squares = [(float((after[n] - before[n]).square().sum()), float(before[n].square().sum())) for n in floats]
    expected = (sum(delta for delta, _ in squares) / sum(own for _, own in squares)) ** 0.5
    assert report.distance == pytest.approx(expected, rel=1e-5)
    other = write_checkpoint(
        tmp_path / "other", {n: torch.randn_like(t) if n in floats else t for n, t in before.items()}
    )
    assert compress(base, other, tmp_path / "b", DTSConfig(rank=2)).distance > 1
    with pytest.warns(UserWarning, match="the adapter is empty"):
        nothing = compress(base, base, tmp_path / "c", DTSConfig(rank=2))
    assert (nothing.error, nothing.distance) == (0.0, 0.0)
