"""The kernels compiled for GPUs that are not here: registers, shared memory, spills and instructions of each.

    python -m dts_fast.triton.aot [--capability 90] [--json]

Triton compiles for any target without a device, and its package brings the assembler and the disassembler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import COPY_ENGINE, PREFILL_ROWS, Config, default, prefill, shared_memory, tables
from .kernels import expand_kernel, linear_kernel, prefill_kernel, shrink_kernel, together_kernel
from .launch import PDL_CAPABILITY

CAPABILITIES = (80, 89, 90, 100)
_SHRINKERS = 32  # of kernels in one launch, which the rules do not choose and a bench may
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What a layer's sizes and strides are multiples of, in every model that is worth a kernel; the launcher finds the same.
_ALIGNED = ("x", "x_stride", "weight", "weight_stride", "bias", "y", "y_stride", "words", "floats", "page_words", "h",
            "partial", "counters", "agreement", "slot_pages", "slot_weights", "slot_ids", "N", "K",
            "u_offset")  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        registers: of a thread. shared: bytes of a block. local: bytes of a thread's stack, where spills go.
        mma: matrix instructions. loads: of the disassembly, from global memory to registers. copies: asynchronous,
            from global to shared memory. waits: whether it waits for, or lets go ahead, the kernel beside it.
    """

    kernel: str
    capability: int
    dtype: str
    config: Config
    registers: int
    shared: int
    local: int
    mma: int
    loads: int
    copies: int
    waits: bool
    instructions: int


def configs(capability: int) -> Iterator[tuple[torch.dtype, bool, Config]]:
    """(dtype, whether of `linear`, configuration): what is shipped for an architecture, and what the rules give."""
    seen = set()
    for name, config in tables(capability).items():
        op, dtype, *_ = name.split()
        seen.add((getattr(torch, dtype), op == "linear", config))
    for dtype in _DTYPES:
        for m in (1, 16, 32, 64, 2048):
            for n in (1024, 4096, 28672) if dtype == torch.bfloat16 else (4096,):
                for dense in (True, False):
                    config = default(m, n, 4096, dtype, 10, capability, dense)
                    if config.fused == dense:
                        seen.add((dtype, dense, config))
                        if config.fused and dtype == torch.bfloat16:
                            seen.add((dtype, True, replace(config, together=_SHRINKERS)))
    for dtype in (torch.bfloat16, torch.float16) if capability >= COPY_ENGINE else ():
        seen.add((dtype, True, prefill(2048, 4096, dtype, 10, capability)))
    yield from sorted(seen, key=repr)


def compile_all(capability: int) -> Iterator[Compiled]:
    """Every kernel of every configuration."""
    done = set()
    for dtype, dense, config in configs(capability):
        fused = prefill_kernel if config.block_m >= PREFILL_ROWS else linear_kernel
        linear = [(shrink_kernel, False), (fused, False)]
        add_delta = [(shrink_kernel, False), (expand_kernel, False), (expand_kernel, True)]
        for kernel, transpose in [(together_kernel, False)] if config.together else linear if dense else add_delta:
            constants, options = _settings(kernel, config, dtype, capability, transpose)
            key = kernel.__name__, dtype, tuple(constants.items()), tuple(options.items())
            if key not in done:
                done.add(key)
                yield _compile(kernel, dtype, config, constants, options, capability)


def faults(row: Compiled) -> list[str]:
    """What a compiled kernel must not have: spills, more shared memory than there is, products without matrix units."""
    found = []
    if row.local:
        found.append(f"{row.local} bytes of local memory")
    if row.shared > shared_memory(row.capability):
        found.append(f"{row.shared} bytes of shared memory")
    if row.dtype != "fp32" and not row.mma:
        found.append("no matrix instructions")
    if row.kernel in ("linear_kernel", "together_kernel", "prefill_kernel") and not row.copies:
        found.append("weights are not copied ahead")
    if row.waits != (row.capability >= PDL_CAPABILITY and row.kernel != "together_kernel"):
        found.append("dependent launch is not what the architecture has")
    return found


def _settings(kernel, config: Config, dtype: torch.dtype, capability: int, transpose: bool) -> tuple[dict, dict]:
    """Compile-time constants and options, as launch.py passes them."""
    known = {
        "TRANSPOSE": transpose, "WIDE": dtype == torch.float32, "PDL": capability >= PDL_CAPABILITY, "HAS_BIAS": True,
        "EVEN_K": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PAGES": config.pages, "SPLITS": config.splits, "SHRINK_BLOCK_K": config.shrink_block_k,
        "SHRINK_PAGES": config.shrink_pages, "SHRINKERS": config.together, "NEIGHBOURS": config.neighbours,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if kernel is shrink_kernel:
        known |= {"BLOCK_K": config.shrink_block_k, "PAGES": config.shrink_pages}
        options = {"num_warps": config.shrink_warps}
    if kernel is expand_kernel:
        options = {"num_warps": config.warps}
    if known["PDL"] and kernel in (linear_kernel, prefill_kernel, expand_kernel):
        options["launch_pdl"] = True
    return {name: known[name] for name in kernel.arg_names if name in known}, options


def _compile(kernel, dtype, config, constants, options, capability) -> Compiled:
    element = _DTYPES[dtype]
    pointers = dict.fromkeys(("x", "weight", "bias", "y"), f"*{element}")
    pointers |= {"words": "*i32", "floats": "*fp32", "slot_pages": "*i32", "slot_weights": "*fp32", "slot_ids": "*i32"}
    pointers |= {"h": f"*{element}", "partial": "*fp32", "counters": "*i32", "agreement": "*i32"}
    if kernel is prefill_kernel:
        pointers["x"] = f"tensordesc<{element}[{config.block_m}, {config.block_k}]>"
        pointers["weight"] = f"tensordesc<{element}[{config.block_n}, {config.block_k}]>"
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in _ALIGNED and "<" not in signature[name]
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = disassemble(compiled.asm["cubin"])
    sass = code[kernel.__name__]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass, re.MULTILINE))

    return Compiled(
        kernel.__name__,
        capability,
        element,
        config,
        **usage[kernel.__name__] | {"shared": compiled.metadata.shared},
        mma=count(r"\b(?:HMMA|HGMMA|UTCHMMA)\b"),
        loads=count(r"\bLDG\b"),
        copies=count(r"\b(?:LDGSTS|UTMALDG)\b"),
        waits=count(r"\b(?:ACQBULK|PREEXIT)\b") > 0,
        instructions=count(r"^\s+/\*[0-9a-f]{4,}\*/"),
    )


def disassemble(cubin: bytes) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """By kernel, what a cubin's kernels use (registers, shared and local bytes), and their machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(tool: str, *arguments: str) -> str:
        return subprocess.run([tools / tool, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = run("cuobjdump", "-res-usage", file.name), run("nvdisasm", "-c", file.name)
    used = {}
    for name, text in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        used[name] = {
            "registers": found["REG"],
            "local": found["STACK"] + found["LOCAL"],
            "shared": found["SHARED"],
        }
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", sass, flags=re.MULTILINE)
    return used, dict(zip(parts[1::2], parts[2::2], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for capability in options.capability or CAPABILITIES:
        for row in compile_all(capability):
            if options.json:
                print(json.dumps(asdict(row) | {"faults": faults(row)}), flush=True)
                continue
            c = row.config
            print(
                f"sm_{capability} {row.dtype} {row.kernel:14} {c.block_m}x{c.block_n}x{c.block_k} pages {c.pages} "
                f"splits {c.splits:2} warps {c.warps} stages {c.stages}: {row.registers:3} registers, {row.shared:6} B "
                f"shared, {row.local} B local, {row.mma} mma, {row.loads} loads, {row.copies} copies, "
                f"{row.instructions} instructions" + "".join(f"; {fault}" for fault in faults(row)),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
