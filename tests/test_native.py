"""The extension module, and the package without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import dts_fast
from dts_fast import native, ops  # noqa: F401  (defines the ops)

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(dts_fast.__file__).parent.parent


@pytest.mark.skipif(native.MODULE is None, reason=f"extension {native.REASON}")
def test_cpu_features_agree_with_the_operating_system():
    features = native.MODULE.cpu_features()
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo of x86-64")
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    known_as = {"avx512_vbmi": "avx512vbmi"}
    for name, present in features.items():
        assert present == (known_as.get(name, name) in flags), name


@pytest.mark.skipif(native.MODULE is None, reason=f"extension {native.REASON}")
def test_build_info():
    info = native.MODULE.build_info()
    assert info["cuda"] is torch._C._dispatch_has_kernel_for_dispatch_key("dts_fast::decode_", "CUDA")
    for op in ("linear", "add_delta_", "embedding_delta", "linear_otherwise", "add_delta_otherwise_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dts_fast::{op}", "CUDA"), op
    assert info["cplusplus"] >= 201703
    assert info["torch"]


def python_without_extension(code: str) -> subprocess.CompletedProcess:
    hide = "import sys; sys.modules['dts_fast._C'] = None\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


def test_everything_works_without_the_extension():
    code = """
import torch
from dts_fast import DTSLinear, fit, native, route
from dts_fast.doctor import diagnose
layer = DTSLinear(torch.nn.Linear(8, 8))
layer.load_adapter("a", fit(torch.randn(8, 8), rank=2))
with route("a"):
    assert layer(torch.ones(2, 8)).shape == (2, 8)
assert native.MODULE is None
print(next(b for b in diagnose()["backends"] if b["name"] == "CPU C++")["reason"])
"""
    done = python_without_extension(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the extension is ")


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_a_broken_compiler_falls_back_loudly_or_fails_when_asked(tmp_path, choice):
    environment = os.environ | {"CXX": "/bin/false", "CC": "/bin/false", "DTS_FAST_BUILD": choice}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (choice == "auto")
    if choice == "auto":
        assert "was NOT built" in done.stderr
    assert not list(tmp_path.rglob("_C*"))


def test_an_unknown_build_choice_is_refused():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env=os.environ | {"DTS_FAST_BUILD": "fast"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "auto, cpu, cuda, none" in done.stderr


@pytest.mark.skipif(native.MODULE is None or not shutil.which("objdump"), reason="needs the extension and objdump")
def test_what_runs_on_import_runs_on_any_processor():
    """Initialisers of static objects run wherever the library is loaded, whatever their file is compiled for."""
    command = ["objdump", "-d", "--no-show-raw-insn", native.MODULE.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    initialisers = re.findall(r"<(_GLOBAL__sub_I_[^>]*)>:\n(.*?)(?:\n\n|\Z)", code, re.DOTALL)
    assert initialisers
    assert [name for name, body in initialisers if re.search(r"%[yz]mm|%k[0-7]", body)] == []


@pytest.mark.skipif(native.MODULE is None, reason=f"extension {native.REASON}")
def test_pairs_of_bfloat16_are_chosen_where_they_are_fast():
    cpuinfo = Path("/proc/cpuinfo")
    isas = native.MODULE.cpu_isas()
    if not cpuinfo.exists() or "avx512_bf16" not in isas:
        pytest.skip("needs a processor with avx512_bf16")
    best = "avx512_bf16" if "AuthenticAMD" in cpuinfo.read_text() else "amx" if "amx" in isas else "avx512"
    code = "from dts_fast import native; print(native.MODULE.cpu_isa())"
    environment = {name: value for name, value in os.environ.items() if name != "DTS_FAST_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == best


@pytest.mark.parametrize("isa", [*(native.MODULE.cpu_isas() if native.MODULE else []), "mmx"])
def test_the_environment_chooses_the_instruction_set(isa):
    code = """
import torch
from dts_fast import DTSLinear, fit, native, route
layer = DTSLinear(torch.nn.Linear(8, 8))
layer.load_adapter("a", fit(torch.randn(8, 8), rank=2))
with route("a"):
    layer(torch.ones(2, 8))
print(native.MODULE.cpu_isa())
"""
    environment = os.environ | {"DTS_FAST_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if isa == "mmx":
        assert done.returncode != 0
        assert "'mmx' is unknown or cannot run here" in done.stderr
    else:
        assert done.stdout.strip() == isa, done.stderr


def test_the_source_distribution_holds_every_source(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"DTS_FAST_BUILD": "none"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= held
