"""What the GPU kernels compile to, for GPUs that need not be here: registers, shared and local memory, instructions.

    python bench/machine_code.py [--out bench/results/machine_code.jsonl]

Triton's kernels in every configuration (dts_fast/triton/aot.py), and with nvcc every instance of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from dts_fast.hardware import header
from dts_fast.triton.aot import CAPABILITIES, compile_all, disassemble

ROOT = Path(__file__).resolve().parent.parent
_ENTRY = re.compile(
    r"decode_kernelI(?P<type>\w+?)Li(?P<rows>\d+)ELi(?P<outputs>\d+)ELi(?P<groups>\d+)ELi(?P<warps>\d+)ELb(?P<base>[01])"
)


def cuda(capability: int) -> Iterator[dict[str, object]]:
    """Every instance of csrc/cuda."""
    usage, sass = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*float16*.cu")):
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{capability}", "-cubin"]
            subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
            own_usage, own_sass = disassemble(cubin.read_bytes())
            usage |= own_usage
            sass |= own_sass
    for name, resources in usage.items():
        entry = _ENTRY.search(name)
        code = sass[name]

        def count(pattern: str, code: str = code) -> int:
            return len(re.findall(pattern, code, re.MULTILINE))

        yield {
            "kernel": "decode_kernel",
            "capability": capability,
            "dtype": "bf16" if "bfloat" in entry["type"] else "fp16",
            "shape": [int(entry[part]) for part in ("rows", "outputs", "groups", "warps")],
            "base": entry["base"] == "1",
            **resources,
            "mma": count(r"\bHMMA\b"),
            "wide_loads": count(r"\bLDG\S*\.128\b"),
            "instructions": count(r"^\s+/\*[0-9a-f]{4,}\*/"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "machine_code.jsonl")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    versions = {"triton": version("triton"), "nvcc": None}
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        versions["nvcc"] = re.search(r"V([\d.]+)", text)[1]
    with options.out.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"header": header() | versions}) + "\n")
        for capability in CAPABILITIES:
            for row in compile_all(capability):
                out.write(json.dumps(asdict(row)) + "\n")
                out.flush()
            for row in cuda(capability) if nvcc else ():
                out.write(json.dumps(row) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
