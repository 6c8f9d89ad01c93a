"""The import directions of the house: lower layers never import higher ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dts_fast

PACKAGE = Path(dts_fast.__file__).parent

# module -> the modules of the package it may import; a new file must find its place here.
ALLOWED = {
    "version": set(),
    "errors": set(),
    "native": set(),
    "descent": {"codes", "native"},
    "codes": {"errors"},
    "atomic": {"errors"},
    "decompose": set(),
    "fit": {"codes", "decompose", "descent", "errors"},
    "config": {"errors", "fit"},
    "journal": {"errors"},
    "endings": {"checkpoint", "errors"},
    "growth": set(),
    "mixture": {"codes", "errors", "growth"},
    "characteristic": {"errors"},
    "rank": {"codes", "errors", "fit"},
    "checkpoint": {"errors", "growth", "pieces"},
    "fingerprint": {"errors"},
    "card": set(),
    "adapter_file": {"atomic", "checkpoint", "codes", "errors"},
    "plan": {"adapter_file", "card", "checkpoint", "codes", "config", "fingerprint", "growth", "rank"},
    "compress": {
        "adapter_file", "atomic", "characteristic", "checkpoint", "codes", "config", "decompose",
        "endings", "errors", "fingerprint", "fit", "journal", "lora", "plan", "version",
    },
    "fuse": {
        "adapter_file", "atomic", "card", "characteristic", "endings", "errors", "fingerprint", "mixture",
        "settings", "version",
    },
    "dense": {"atomic", "checkpoint", "errors", "pieces", "settings"},
    "export": {"adapter_file", "checkpoint", "dense", "endings", "errors", "fingerprint", "growth"},
    "pieces": set(),
    "merging": {"errors", "nn.parameters"},
    "settings": {"errors"},
    "base": {"checkpoint", "endings", "errors", "settings"},
    "renaming": {"checkpoint", "nn.parameters", "pieces"},
    "lora": {"adapter_file", "atomic", "checkpoint", "codes", "errors", "export", "renaming"},
    "verify": {"adapter_file", "checkpoint", "codes", "errors", "export", "fit", "growth", "lora"},
    "reference": {"codes"},
    "packing": set(),
    "triton.configs": set(),
    "triton.kernels": set(),
    "triton.counters": set(),
    "triton.launch": {"codes", "triton.configs", "triton.counters", "triton.kernels"},
    "triton.aot": {"triton.configs", "triton.kernels", "triton.launch"},
    "triton": {"triton.launch"},
    "gpu": {"codes", "native", "reference", "triton"},
    "ops": {"codes", "gpu", "native", "packing", "reference"},
    "paging": {"codes", "native"},
    "writes": {"codes", "paging"},
    "bank": {"codes", "errors", "mixture", "paging", "writes"},
    "host_cache": {"codes", "nn", "nn.module", "writes"},
    "slots": {"errors"},
    "routing": {"errors", "slots"},
    "prepack": {"codes", "errors", "native", "ops", "packing", "routing"},
    "nn.rows": {"errors", "routing"},
    "nn.parameters": {"errors", "routing", "slots"},
    "nn.state": {"errors"},
    "nn.module": {
        "codes", "errors", "growth", "mixture", "nn.parameters", "nn.rows", "nn.state", "pieces", "routing",
        "slots", "writes",
    },
    "nn.banked": {"bank", "codes", "growth", "mixture", "nn.module", "routing", "slots", "writes"},
    "nn.linear": {"bank", "errors", "nn.banked", "nn.module", "nn.rows", "ops", "prepack", "routing", "slots"},
    "nn.embedding": {"bank", "codes", "nn.banked", "ops", "routing", "slots"},
    "nn.experts": {"bank", "codes", "nn.module", "ops", "pieces", "routing", "slots", "writes"},
    "nn.router": {
        "bank", "nn.banked", "nn.module", "nn.parameters", "nn.rows", "nn.state", "ops", "routing", "slots", "writes",
    },
    "nn.conv": {"bank", "codes", "nn.banked", "nn.rows", "ops", "routing", "slots"},
    "nn.norm": {"bank", "codes", "nn.module", "nn.parameters", "nn.rows", "routing", "slots", "writes"},
    "nn": {
        "bank", "nn.banked", "nn.conv", "nn.embedding", "nn.experts", "nn.linear", "nn.module", "nn.norm", "nn.router",
        "pieces", "prepack", "slots",
    },
    "attach": {
        "adapter_file", "checkpoint", "errors", "fingerprint", "growth", "nn.module", "nn.parameters", "pieces",
        "prepack",
        "renaming",
    },
    "arenas": {"adapter_file", "bank", "codes", "errors", "pieces"},
    "residency": {"bank", "codes", "errors", "host_cache", "nn", "nn.module", "prepack", "slots", "writes"},
    "wrapping": {"arenas", "attach", "bank", "nn", "slots"},
    "batch": {"routing"},
    "calls": {"attach", "batch", "errors", "nn", "routing", "slots"},
    "apart": {"batch", "errors", "nn.rows", "nn.state", "routing"},
    "hub": {"adapter_file", "errors"},
    "timing": set(),
    "benchmark": {"codes", "errors", "gpu", "native", "nn", "reference", "routing", "timing"},
    "shapes": {"checkpoint", "errors", "pieces"},
    "bench_report": {"atomic", "errors"},
    "model": {
        "adapter_file", "apart", "arenas", "atomic", "attach", "base", "batch", "calls", "characteristic",
        "endings", "errors", "hub", "merging", "mixture", "nn", "prepack", "residency", "routing", "settings", "slots",
        "wrapping",
    },
    "trainable": {"codes"},
    "divergence": {"errors"},
    "distill": {
        "adapter_file", "atomic", "attach", "base", "checkpoint", "codes", "divergence", "errors", "export", "fit",
        "growth", "lora", "model", "nn", "plan", "trainable",
    },
    "texts": {"checkpoint", "errors"},
    "generated": {"endings", "errors"},
    "doctor": {"gpu", "native", "version"},
    "hardware": {"version"},
    "demo_lm": {"errors"},
    "demo": {"adapter_file", "compress", "config", "demo_lm", "distill", "errors", "hardware", "model", "texts"},
    "cli": {
        "atomic", "bench_report", "benchmark", "characteristic", "compress", "config", "demo", "dense", "distill",
        "doctor", "errors", "export", "fuse", "generated", "hardware", "hub", "lora", "shapes", "texts", "timing",
        "verify", "version",
    },
    "__init__": {
        "adapter_file", "characteristic", "codes", "compress", "config", "distill", "errors", "fit", "fuse", "model",
        "nn", "routing", "version",
    },
}  # fmt: skip


def name_of(file: Path) -> str:
    """A module's name within the package: ``ops``, ``triton`` (its __init__), ``triton.kernels``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """(modules of this package, top-level packages) that a file imports, anywhere in it."""
    own, others = set(), set()
    folder = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            within = folder[: len(folder) + 1 - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {".".join([*within, name]) for name in names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own - {"_C", "__version__"}, others


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_modules_import_only_what_lies_below_them(file):
    own, _ = imports_of(file)
    assert name_of(file) in ALLOWED, f"{file.name} has no place in the import directions yet"
    assert own <= ALLOWED[name_of(file)]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_transformers_stays_where_models_are(file):
    _, others = imports_of(file)
    assert ("transformers" in others) <= (
        file.stem in {"base", "generated", "renaming", "shapes", "texts", "demo", "demo_lm"}
    )
    assert "dts_fast" not in others, "imports within the package are relative"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_triton_is_needed_by_its_kernels_alone(file):
    _, others = imports_of(file)
    assert ("triton" in others) <= (name_of(file).split(".")[0] == "triton")


def test_the_directions_have_no_cycle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [name for name, needs in ALLOWED.items() if name not in order and needs <= set(order)]
        assert ready, f"cycle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


def test_the_command_line_answers_without_torch():
    code = "import sys, dts_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_keep_their_names_beside_modules_of_the_same_name():
    code = "import dts_fast.compress, dts_fast.distill, dts_fast.fit, dts_fast.fuse; "
    code += "from dts_fast import compress, distill, fit, fuse; "
    code += "compress.__code__, distill.__code__, fit.__code__, fuse.__code__"
    subprocess.run([sys.executable, "-c", code], check=True)
