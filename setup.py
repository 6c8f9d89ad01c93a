"""Builds the optional native extension; everything else stands in pyproject.toml.

DTS_FAST_BUILD=auto   (default) build what can be built; without a compiler, install the pure-Python package and say so
              =cpu    build the CPU extension or fail
              =none   pure Python
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CHOICE = os.environ.get("DTS_FAST_BUILD", "auto")
CHOICES = ("auto", "cpu", "none")


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


def native_build() -> dict:
    """Arguments of setup() for the extension, or nothing where it is not built."""
    if CHOICE not in CHOICES:
        raise SystemExit(f"DTS_FAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}.")
    if CHOICE == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if CHOICE != "auto":
            raise
        say("torch is not visible to the build, so the package is installed WITHOUT its native kernels.")
        say("For those: pip install torch, then pip install --no-build-isolation dts_fast.")
        return {}

    class BuildOrFallBack(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if CHOICE != "auto":
                    raise
                say(f"the native extension was NOT built: {error}")
                say(
                    "The package works without it, slower; DTS_FAST_BUILD=cpu makes this an error. See dts-fast doctor."
                )
                self.extensions = []

    extension = CppExtension(
        "dts_fast._C",
        [str(path) for path in sorted(Path("csrc").rglob("*.cpp"))],
        include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
        # at::parallel_for is inline and runs on threads only where OpenMP is on. The runtime is not linked: torch has
        # loaded one (its own copy, in wheels), and a second one would bring threads of its own.
        extra_compile_args=["-O3", "-fvisibility=hidden", *openmp()],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOrFallBack}}


setup(**native_build())
