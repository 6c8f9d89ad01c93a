"""The header of every committed result: what it was measured on and with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from .version import __version__


def header() -> dict[str, object]:
    """Hardware, versions, threads and commit, ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({"cuda": torch.version.cuda, "triton": version("triton")} if torch.cuda.is_available() else {}),
        "dts_fast": __version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of this source tree, marked where it has changes; None for an installed package. Results are no
    changes: a run writes them as it goes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=True)
        changes = [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)bench/results"]
        return run.stdout.strip() + ("-dirty" if subprocess.run(changes, check=False).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None
