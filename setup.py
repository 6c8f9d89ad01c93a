"""Builds the optional native extension; everything else stands in pyproject.toml.

DTS_FAST_BUILD=auto   (default) build what can be built; without a compiler, install the pure-Python package and say so
              =cpu    build the CPU extension or fail
              =cuda   build it with the CUDA kernels or fail (TORCH_CUDA_ARCH_LIST: targets, MAX_JOBS: processes)
              =none   pure Python
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CHOICE = os.environ.get("DTS_FAST_BUILD", "auto")
CHOICES = ("auto", "cpu", "cuda", "none")
# Where no GPU is seen and none is named: what the kernels were written for, and PTX for newer ones.
TARGETS = "8.0;9.0+PTX"


def say(message: str) -> None:
    print(f"dts_fast: {message}", file=sys.stderr)


def openmp() -> list[str]:
    """The flag where the compiler's OpenMP is the one that torch's Linux wheels carry."""
    try:
        version = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    except OSError:
        version = ""
    if sys.platform == "linux" and "Free Software Foundation" in version:
        return ["-fopenmp"]
    say("OpenMP of this compiler is not torch's; the CPU kernels will run on one thread. Set CXX=g++ for all of them.")
    return []


def why_not_cuda(torch, cuda_home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built; None if they can. A GPU need not be here: it may be where this is used."""
    if not torch.version.cuda:
        return "this torch was built without CUDA"
    if cuda_home is None:
        return "no CUDA toolkit was found (CUDA_HOME, nvcc)"
    if not is_cuda_home(cuda_home):
        return f"{cuda_home} has no include/cuda_runtime_api.h; set CUDA_HOME to the toolkit's directory"
    return None


def is_cuda_home(folder: str | Path) -> bool:
    return (Path(folder) / "include" / "cuda_runtime_api.h").is_file()


def find_cuda_home() -> None:
    """Torch takes the toolkit to be where the `nvcc` of the path is, which may be a script that calls another one."""
    nvcc, usual = shutil.which("nvcc"), "/usr/local/cuda"
    if nvcc and not is_cuda_home(Path(nvcc).parent.parent) and is_cuda_home(usual):
        os.environ.setdefault("CUDA_HOME", usual)


def native_build() -> dict:
    """Arguments of setup() for the extension, or nothing where it is not built."""
    if CHOICE not in CHOICES:
        raise SystemExit(f"DTS_FAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}.")
    if CHOICE == "none":
        return {}
    find_cuda_home()
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        if CHOICE != "auto":
            raise
        say("torch is not visible to the build, so the package is installed WITHOUT its native kernels.")
        say("For those: pip install torch, then pip install --no-build-isolation dts_fast.")
        return {}

    no_cuda = why_not_cuda(torch, CUDA_HOME)
    if CHOICE == "cuda" and no_cuda:
        raise SystemExit(f"DTS_FAST_BUILD=cuda: {no_cuda}.")
    with_cuda = CHOICE != "cpu" and no_cuda is None
    if CHOICE == "auto" and torch.version.cuda and no_cuda:
        say(f"the CUDA kernels are NOT built: {no_cuda}. GPUs are served by Triton's.")
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", TARGETS)

    # at::parallel_for is inline and runs on threads only where OpenMP is on. The runtime is not linked: torch has
    # loaded one (its own copy, in wheels), and a second one would bring threads of its own.
    cxx = ["-O3", "-fvisibility=hidden", *openmp()]

    def extension(cuda: bool):
        sources = sorted(path for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".cu"))
        return (CUDAExtension if cuda else CppExtension)(
            "dts_fast._C",
            [str(path) for path in sources if cuda or path.parent.name != "cuda"],
            include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
            define_macros=[("DTS_FAST_WITH_CUDA", None)] if cuda else [],
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]} if cuda else cxx,
            extra_link_args=["-Wl,--strip-debug"] if sys.platform == "linux" else [],  # three quarters of the file
        )

    class BuildOrFallBack(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if CHOICE != "auto":
                    raise
                self.fall_back(error, with_cuda)

        def fall_back(self, error: Exception, without_cuda: bool) -> None:
            """Do without the CUDA kernels, and then without any."""
            if not without_cuda:
                self.extensions = []
                say(f"the native extension was NOT built: {error}")
                say("The package works without it, slower; DTS_FAST_BUILD=cpu makes this an error: dts-fast doctor.")
                return
            say(f"the CUDA kernels were NOT built: {error}")
            say("GPUs are served by Triton's kernels; DTS_FAST_BUILD=cuda makes this an error. See dts-fast doctor.")
            self.distribution.ext_modules = [extension(False)]
            again = type(self)(self.distribution)
            for option in ("inplace", "editable_mode", "build_lib", "build_temp", "force", "debug"):
                setattr(again, option, getattr(self, option))
            again.ensure_finalized()
            try:
                BuildExtension.run(again)
                self.extensions = again.extensions
            except Exception as second:
                self.fall_back(second, False)

    return {"ext_modules": [extension(with_cuda)], "cmdclass": {"build_ext": BuildOrFallBack}}


setup(license="Apache-2.0", **native_build())
