"""Fixtures shared by all tests: poisoned memory, small models, and fine-tunes of them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported, and for children as well: small tensors want no second thread, and compilers run beside the
# tests (`_compile_ahead`), which a thread that spins would wait for.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of a GPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Python; read when triton is imported

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
TARGETS = ("80", "90", "100")  # what the CUDA kernels are compiled for, and run on
CAPABILITIES = (80, 89, 90, 100)  # the same for Triton's

# `make test` tries the same calls each time, so that a failure is the change's; `make fuzz` searches for new ones.
settings.register_profile("repeatable", derandomize=True, max_examples=40, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile("repeatable")


@contextmanager
def all_at_once(commands: dict[str, list[str]], **environment: str) -> Iterator[dict[str, subprocess.Popen]]:
    """Processes that run beside each other, for there are cores to fill. Those still running at the end are killed."""
    processes = {
        name: subprocess.Popen(
            command, env=environment or None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, command in commands.items()
    }
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The emulated GPU's program (tests/native/decode.cpp), as it is compiled and run."""
    program = tmp_path_factory.mktemp("emulated") / "decode"
    # Fortified jumps go up one stack alone, and not to a fiber's.
    compiler = ["c++", "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-Wno-attributes", f"-I{CSRC}"]
    compiler += [f"-I{ROOT / 'tests' / 'native'}"]
    compiler += ["-o", str(program), str(ROOT / "tests" / "native" / "decode.cpp")]
    command = f"{shlex.join(compiler)} && {shlex.quote(str(program))} 5"
    with all_at_once({"decode": ["nice", "-n", "19", "sh", "-c", command]}) as processes:
        yield processes["decode"]


@pytest.fixture(scope="session")
def compilers(tmp_path_factory):
    """An nvcc for each target."""
    folder = tmp_path_factory.mktemp("cuda")
    command = ["nice", "-n", "19", "nvcc", "-std=c++17", "-O3", f"-I{CSRC}", "-cubin", "-Xptxas", "-v"]
    whole = folder / "all.cu"  # at once, as the parts would read the same headers again
    whole.write_text("".join(f'#include "{file}"\n' for file in sorted((CSRC / "cuda").glob("*.cu"))))
    command.append(str(whole))
    commands = {t: [*command, f"-arch=sm_{t}", "-o", str(folder / f"{t}.cubin")] for t in TARGETS}
    with all_at_once(commands) as processes:
        yield processes, folder


@pytest.fixture(scope="session")
def triton_compilers():
    """A process for each architecture that compiles every configuration."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["nice", "-n", "19", sys.executable, "-m", "dts_fast.triton.aot", "--json", "--capability"]
    with all_at_once({c: [*command, str(c)] for c in CAPABILITIES}, **environment) as processes:
        yield processes


_COMPILE_AHEAD = {"compilers": "nvcc", "emulated": "c++", "triton_compilers": "triton"}


def pytest_collection_modifyitems(items):
    """Who waits for compilers comes last: until then they have the core that the other tests leave idle."""
    items.sort(key=lambda item: not _COMPILE_AHEAD.keys().isdisjoint(getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session", autouse=True)
def _compile_ahead(request):
    """What takes minutes runs beside the tests that come before it, which leave a core idle."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name, needed in _COMPILE_AHEAD.items():
        if name in wanted and (shutil.which(needed) or find_spec(needed)):
            request.getfixturevalue(name)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """As many for what divides its work among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised memory holds NaN, so that a result that reads it fails; and every test starts from one seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A single-file checkpoint directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain_tensors(generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Parameters of every shape a checkpoint has: odd and even matrices, conv, vectors, an integer buffer."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embed_tokens.weight": randn(50, 12),
        "layers.0.proj.weight": randn(24, 12),
        "layers.0.proj.bias": randn(24),
        "layers.0.odd.weight": randn(13, 11),
        "layers.0.norm.weight": 1 + 0.1 * randn(12),
        "conv.weight": randn(6, 3, 2, 2),
        "cls_token": randn(1, 1, 12),
        "position_ids": torch.arange(8),
    }


def fine_tuned(tensors: dict[str, torch.Tensor], scale: float = 0.05, seed: int = 1) -> dict[str, torch.Tensor]:
    """Every float tensor moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + scale * torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t.clone()
        for name, t in tensors.items()
    }


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Directories of a base and a fine-tune of it."""
    base = plain_tensors(torch.Generator().manual_seed(0))
    config = {"architectures": ["Plain"], "hidden_size": 12}
    return (
        write_checkpoint(tmp_path / "base", base, config),
        write_checkpoint(tmp_path / "tuned", fine_tuned(base), config),
    )
