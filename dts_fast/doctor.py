"""`dts-fast doctor`: what is used here, why the rest is not, and what would mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch

from . import gpu, native
from .version import __version__

_REBUILD = "in a clone of the project: pip install --no-build-isolation --force-reinstall --no-deps ."


def diagnose() -> dict[str, object]:
    """A JSON-ready report: versions, hardware, and for each backend whether it is used, the reason and the mend."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return {
        "dts_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "compiler": compiler,
        "cpu_isa": native.MODULE.cpu_isa() if native.MODULE else None,
        "cpu_features": native.MODULE.cpu_features() if native.MODULE else None,
        "extension": native.MODULE.build_info() if native.MODULE else None,
        "backends": _backends(compiler),
    }


def _backends(compiler: str | None) -> list[dict[str, object]]:
    if native.MODULE is None:
        cpu_reason, mend = (
            f"the extension is {native.REASON}",
            _REBUILD if compiler else f"install a C++ compiler, then {_REBUILD}",
        )
    else:
        cpu_reason, mend = f"{native.MODULE.cpu_isa()}; for CPU tensors", None
    no_cuda, no_triton = gpu.why_not_cuda(), gpu.why_not_triton()
    cuda_mend = (
        f"install nvcc, then DTS_FAST_BUILD=cuda and {_REBUILD}" if torch.cuda.is_available() and no_cuda else None
    )
    triton_mend = "pip install triton" if torch.cuda.is_available() and _version("triton") is None else None
    return [
        _backend("plain torch", True, "serves every device that no kernel below serves", None),
        _backend("CPU C++", native.MODULE is not None, cpu_reason, mend),
        _backend("CUDA C++", no_cuda is None, no_cuda or "for up to 64 rows of CUDA tensors", cuda_mend),
        _backend("Triton", no_triton is None, no_triton or "for CUDA tensors", triton_mend),
    ]


def _backend(name: str, used: bool, reason: str | None, mend: str | None) -> dict[str, object]:
    return {"name": name, "used": used, "reason": reason, "mend": mend}


def _version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def render(report: dict[str, object]) -> str:
    """The report as text."""
    lines = []
    for key, value in report.items():
        if key == "backends":
            continue
        if key == "cpu_features" and value is not None:
            value = " ".join(name for name, present in value.items() if present) or "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        lines.append(f"{key:14} {'no' if value is None else value}")
    lines.append("backends")
    for backend in report["backends"]:
        line = f"  {backend['name']:12} {'used' if backend['used'] else 'not used'}"
        line += f": {backend['reason']}" if backend["reason"] else ""
        line += f". Mend: {backend['mend']}" if backend["mend"] else ""
        lines.append(line)
    return "\n".join(lines)
