"""The CUDA kernels without a GPU: machine code of every instance for every target, and their logic run on the CPU."""

from __future__ import annotations

import re
import shutil

import pytest
from conftest import CSRC, TARGETS

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_every_instance_compiles_without_spills_and_leaves_room_for_enough_warps(compilers, target):
    processes, folder = compilers
    out = "".join(processes[target].communicate())
    assert processes[target].returncode == 0, out
    assert "warning" not in out
    entries = re.findall(
        r"Compiling entry function '\w+?Li(\d)ELi(\d)ELi(\d)ELi(\d+)E\w+'.*?"
        r"(\d+) bytes stack frame.*?Used (\d+) registers",
        out,
        re.DOTALL,
    )
    shapes = re.findall(r"X\((\d+), (\d+), (\d+), (\d+)\)", (CSRC / "cuda" / "decode.h").read_text())
    assert len(entries) == 2 * 2 * len(shapes)  # types, with and without a base
    for *shape, stack, registers in entries:
        assert stack == "0", f"{shape} spills"
        rows, outputs, groups, warps = map(int, shape)
        # As csrc/cuda/decode.h has it; a quarter of a multiprocessor has 16384 registers, in blocks of 8 a thread.
        resident = 2 if warps < 8 and rows * outputs <= 4 else 1
        beside = 1 if groups == 1 else groups if rows > 4 else 2 * groups
        warps_of_quarter = -((warps + beside) * resident // -4)
        assert -(-int(registers) // 8) * 8 * 32 * warps_of_quarter <= 16384, shape

    pytest.importorskip("triton")  # whose package brings a disassembler
    from dts_fast.triton.aot import disassemble

    code = disassemble((folder / f"{target}.cubin").read_bytes())[1]
    for name, sass in code.items():
        if not name.endswith("Lb1EEEvNS0_13DecodeProblemE"):  # without a base
            continue
        # Weights are copied ahead, and the loop's wait leaves some of them under way.
        assert "LDGSTS" in sass, name
        assert re.search(r"DEPBAR\.LE SB\d, 0x[1-9]", sass), name


@needs_nvcc
def test_kernel_files_do_not_include_torch():
    for file in CSRC.glob("cuda/*.cu*"):
        assert not re.search(r"#include.*(torch|ATen|c10)", file.read_text()), file


@needs_compiler
def test_kernels_compute_the_reference_on_an_emulated_gpu(emulated):
    out, errors = emulated.communicate()
    assert emulated.returncode == 0, out + errors
    assert out == "no errors\n"
