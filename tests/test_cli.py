"""The commands as a user runs them: exit codes, results on stdout, errors on stderr."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import fine_tuned, write_checkpoint
from safetensors.torch import load_file

from dts_fast.cli import main
from dts_fast.doctor import diagnose, render


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that must end with ``code``."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def adapter(tmp_path, checkpoints):
    base, tuned = checkpoints
    run("compress", "--base-model", base, "--model", tuned, "--out-path", tmp_path / "a", "--density", "0.5")
    return tmp_path / "a"


def test_compress_inspect_verify_export(tmp_path, checkpoints, adapter):
    base, tuned = checkpoints
    text = run("inspect", adapter)
    assert "layers.0.proj.weight" in text
    assert "24x12" in text
    report = json.loads(run("inspect", adapter, "--json"))
    assert report["nbytes"] == sum(f.stat().st_size for f in adapter.iterdir())
    assert f"{report['share_of_base']:.3%}" in text
    assert "matches its fine-tune" in run("verify", adapter, "--base-model", base, "--model", tuned)
    assert json.loads(run("verify", adapter, "--base-model", base, "--model", tuned, "--json"))["matches"] is True
    dense = tmp_path / "dense"
    assert "7 tensors" in run("export", "full", adapter, "--base-model", base, "--out-path", dense)
    assert load_file(dense / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_what_is_hardly_meant_is_told(tmp_path, checkpoints):
    base, tuned = checkpoints
    common = ["-q", "compress", "--base-model", base, "--rank", "2", "--out-path"]
    for more, said in (
        ([tmp_path / "a", "--model", base], "warning: the adapter is empty: no tensor of"),
        ([tmp_path / "b", "--model", tuned, "--exclude", "lm_haed"], "warning: --exclude 'lm_haed' matches no tensor"),
    ):
        result = CliRunner().invoke(main, [str(a) for a in [*common, *more]])
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith(said)
        assert "warnings.warn" not in result.stderr


def test_what_looks_like_no_fine_tune_is_told(tmp_path, checkpoints):
    base, tuned = checkpoints
    tensors = load_file(base / "model.safetensors")
    other = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in tensors.items()}
    other = write_checkpoint(tmp_path / "other", other)
    for model, far in ((tuned, False), (other, True)):
        arguments = [
            "-q",
            "compress",
            "--base-model",
            base,
            "--model",
            model,
            "--out-path",
            tmp_path / "x",
            "--rank",
            2,
        ]
        result = CliRunner().invoke(main, [*map(str, arguments), "--overwrite"])
        assert result.exit_code == 0
        assert "relative error of the deltas 0." in result.stdout
        assert ("Is it a fine-tune of this base?" in result.stderr) == far


@pytest.mark.parametrize("text", ["25%", "0.25"])
def test_budgets_are_shares(tmp_path, checkpoints, text):
    base, tuned = checkpoints
    sizes = {n: torch.randn(80, 80) for n in ("x.weight", "y.weight")}
    big = write_checkpoint(tmp_path / "big", load_file(base / "model.safetensors") | sizes)
    tuned = write_checkpoint(tmp_path / "big_tuned", fine_tuned(load_file(big / "model.safetensors")))
    out = run("compress", "--base-model", big, "--model", tuned, "--out-path", tmp_path / "a", "--budget", text)
    assert "% of the base's" in out
    assert json.loads(run("inspect", tmp_path / "a", "--json"))["share_of_base"] <= 0.25


def test_verify_of_another_fine_tune_fails(tmp_path, checkpoints, adapter):
    base, _ = checkpoints
    other = write_checkpoint(tmp_path / "o", fine_tuned(load_file(base / "model.safetensors"), seed=9))
    result = CliRunner().invoke(main, ["verify", str(adapter), "--base-model", str(base), "--model", str(other)])
    assert result.exit_code == 1
    assert "DOES NOT match" in result.stdout


def test_errors_are_one_message_on_stderr_and_exit_code_1(tmp_path, checkpoints, adapter):
    base, tuned = checkpoints
    target = ("--out-path", tmp_path / "new")
    again = run("compress", "--base-model", base, "--model", tuned, "--out-path", adapter, code=1)
    assert again.startswith("error: ")
    assert "exists already" in again
    torch.save({}, tmp_path / "x.bin")
    assert "pickle" in run("compress", "--base-model", base, "--model", tmp_path / "x.bin", *target, code=1)
    assert "one of budget" in run(
        "compress", "--base-model", base, "--model", tuned, *target, "--rank", 2, "--density", "0.1", code=1
    )
    assert "expected an adapter directory" in run("inspect", tmp_path, code=1)
    assert not (tmp_path / "new").exists()


def test_usage_errors_are_exit_code_2(tmp_path):
    assert "expected a share such as 1%" in run(
        "compress", "--base-model", "b", "--model", "m", "--out-path", tmp_path / "a", "--budget", "lots", code=2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "0"], "expected a share above 0"),
        (["--share", "-1%"], "expected a share above 0"),
        (["--out", "/dev/null/x"], "expected a file in a directory that exists"),
        (["--plot", "x.foo"], "expected a plot's file to end in .png, .svg, .pdf"),
        (["--plot", "/none/x.png"], "expected a file in a directory that exists"),
    ],
)
def test_bench_refuses_before_it_times_anything(arguments, message):
    code = 2 if arguments[0] == "--share" else 1
    assert message in " ".join(run("bench", *arguments, code=code).split())


def test_the_installed_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from dts_fast.cli import main; main()", "inspect", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_doctor_reports_every_backend_with_a_reason():
    report = json.loads(run("doctor", "--json"))
    assert [backend["name"] for backend in report["backends"]] == ["plain torch", "CPU C++", "CUDA C++", "Triton"]
    for backend in report["backends"]:
        assert backend["used"] or backend["reason"]
    assert report["torch"] == torch.__version__
    assert "plain torch" in run("doctor")


def test_doctor_says_why_there_is_no_extension_and_the_mend(monkeypatch):
    from dts_fast import native

    monkeypatch.setattr(native, "MODULE", None)
    monkeypatch.setattr(native, "REASON", "not built")
    cpu = next(b for b in diagnose()["backends"] if b["name"] == "CPU C++")
    assert not cpu["used"]
    assert cpu["reason"] == "the extension is not built"
    assert "pip install --no-build-isolation" in cpu["mend"]
    assert "pip install" in render(diagnose())


def test_quiet_says_results_alone(tmp_path, checkpoints):
    base, tuned = checkpoints
    arguments = ["compress", "--base-model", base, "--model", tuned, "--density", "0.5", "--exclude", "proj"]
    loud = CliRunner().invoke(main, [*map(str, arguments), "--out-path", str(tmp_path / "a")])
    quiet = CliRunner().invoke(main, ["-q", *map(str, arguments), "--out-path", str(tmp_path / "b")])
    assert "not in it" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.replace("/b:", "/a:") == loud.stdout
    failed = CliRunner().invoke(main, ["-q", *map(str, arguments), "--out-path", str(tmp_path / "b")])
    assert (failed.exit_code, "exists already" in failed.stderr) == (1, True)


def test_verbose_says_where_an_error_comes_from(tmp_path):
    failed = CliRunner().invoke(main, ["-v", "inspect", str(tmp_path)])
    assert "Traceback" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in CliRunner().invoke(main, ["inspect", str(tmp_path)]).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    assert "_DTS_FAST_COMPLETE" in run("completion", shell)
    assert "COMP_WORDS" in run("completion", "bash")


def test_commands_complete():
    environment = {"_DTS_FAST_COMPLETE": "bash_complete", "COMP_WORDS": "dts-fast in", "COMP_CWORD": "1"}
    code = "from dts_fast.cli import main; main(prog_name='dts-fast')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plain,inspect"]
