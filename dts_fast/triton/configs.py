"""Which kernels a call runs, and their block sizes: one function, `choose`.

What was measured on an architecture comes first (``tables/sm_<capability>.json``, written by bench/tune_triton.py, and
the same in the user's cache directory); what was not follows the rules below.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tables"

# From these rows of a tile on the base, where it is fused, is a product of large tiles (`kernels.prefill_kernel`).
PREFILL_ROWS = 128

# Compute capability from which on an engine copies tiles, without which that product would be slow.
COPY_ENGINE = 90


@dataclass(frozen=True)
class Config:
    """Block sizes of one call; see kernels.py for what they mean.

    Attributes:
        fused: base and delta in one kernel; otherwise torch's linear, and the delta added to its result.
        pages, warps, stages: of the kernel with the expand. splits, shrink_*: of the shrink.
        together: shrink and base in one launch (where ``fused``, in decoding), of these many programs that shrink, with
            the warps of the rest; 0 for two launches.
        neighbours: tiles of rows whose blocks of outputs follow one another (where ``fused``, in prefill).
    """

    fused: bool
    block_m: int
    block_n: int
    block_k: int
    pages: int
    splits: int
    warps: int = 4
    stages: int = 4
    shrink_block_k: int = 128
    shrink_pages: int = 2
    shrink_warps: int = 4
    together: int = 0
    neighbours: int = 8


def tile_of(m: int) -> int:
    """Rows of a tile: a power of two that the matrix instructions take."""
    return 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else PREFILL_ROWS


def choose(m: int, n: int, k: int, dtype: torch.dtype, length: int, capability: int, dense: bool) -> Config:
    """The configuration of a call.

    Args:
        m, n, k: rows, outputs and inputs of the product.
        length: L, the most pages a slot may list.
        capability: of the device, 90 for sm_90.
        dense: whether there is a dense base to be fused with.
    """
    measured = tables(capability).get(key(m, n, k, dtype, dense))
    return measured if measured is not None else default(m, n, k, dtype, length, capability, dense)


def shared_memory(capability: int) -> int:
    """Bytes that one block may have on an architecture (CUDA programming guide, compute capabilities)."""
    return {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}.get(capability, 99) * 1024


def default(m: int, n: int, k: int, dtype: torch.dtype, length: int, capability: int, dense: bool) -> Config:
    """The rules, for what has not been measured. None of their numbers has been, yet."""
    wide = dtype == torch.float32
    block_m = tile_of(m)
    # Decoding is bound by the weights' bytes, and needs as many programs as there are multiprocessors. Beyond, and
    # in float32 without matrix units, torch's own product is the better one.
    fused = dense and m <= (16 if wide else 64)
    if wide:
        block_m = min(block_m, 32)  # without matrix units, sums and operands are all in registers
    if fused:
        # A multiprocessor needs some 40 KiB of weights on their way to keep the memory busy.
        block_n, block_k, stages = (64, 128, 4) if n >= 16384 else (32, 128, 6) if n >= 4096 else (16, 256, 6)
        block_k = 64 if wide else block_k
        # Half of what there is, so that a second block finds its place: its loads run beside this one's last steps.
        stage = (block_m + block_n) * block_k * dtype.itemsize
        stages = max(2, min(stages, shared_memory(capability) // 2 // stage))
    else:
        block_n, block_k, stages = 64, 64, 3
    # A step takes all pages of an adapter where registers allow: its loads are waited for once.
    listed = _power_from(length)
    pages = min(listed, 2 if wide else 16 if block_m * block_n <= 512 else 8 if block_m * block_n <= 1024 else 4)
    # More pages a program where x is large: it is read once for each.
    shrink_pages = 2 if wide or m <= 64 else 8 if capability >= COPY_ENGINE else 4
    return Config(
        fused,
        block_m,
        block_n,
        block_k,
        pages,
        splits=_splits(m, k, block_m, length, shrink_pages),
        warps=4 if block_m <= 64 else 8,
        stages=stages,
        shrink_block_k=32 if wide else 64 if block_m > 16 else 128,
        shrink_pages=min(listed, shrink_pages),
        shrink_warps=4 if block_m <= 64 else 8,
    )


def prefill(m: int, k: int, dtype: torch.dtype, length: int, capability: int) -> Config:
    """Base and delta of many rows in one kernel: what bench/tune_triton.py begins with. The rules leave the base to
    torch's product until this has been measured to be faster."""
    block_n, block_k, itemsize = 128, 64, dtype.itemsize
    stage = (PREFILL_ROWS + block_n) * block_k * itemsize
    pages = min(_power_from(length), 4)
    expand = 16 * pages * (PREFILL_ROWS + block_n) * itemsize  # h and U of a step are in shared memory, too
    stages = max(2, min(4, (shared_memory(capability) - expand) // stage))
    rest = default(m, block_n, k, dtype, length, capability, False)
    return replace(
        rest, fused=True, block_m=PREFILL_ROWS, block_n=block_n, block_k=block_k, pages=pages, warps=8, stages=stages
    )


def _power_from(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def _splits(m: int, k: int, block_m: int, length: int, pages: int) -> int:
    """Parts of K, some 256 elements or more each: the shrink of one adapter has to fill the device, too."""
    most = max(1, min(32, 1 << ((k + 255) // 256).bit_length() - 1))
    if m <= 64:  # whatever m is, so that a row's sums do not depend on its neighbours
        return most
    programs = -(-m // block_m) * max(-(-length // pages), 1)  # a bank of rank 0 lists no pages
    return max(1, min(most, 16, 1 << (256 // programs).bit_length() >> 1))


def key(m: int, n: int, k: int, dtype: torch.dtype, dense: bool) -> str:
    """What a table is looked up with: rows by the size of their tile, one row apart, and many by their number."""
    rows = 1 if m == 1 else tile_of(m) if m <= 64 else 256 if m <= 512 else 2048
    return f"{'linear' if dense else 'add_delta'} {str(dtype).removeprefix('torch.')} m{rows} n{n} k{k}"


@cache
def tables(capability: int) -> dict[str, Config]:
    """What was measured on an architecture; the user's own measurements win. Empty where there are none."""
    found: dict[str, Config] = {}
    for folder in (TABLES, user_tables()):
        file = folder / f"sm_{capability}.json"
        if file.is_file():
            rows = json.loads(file.read_text(encoding="utf-8"))["configs"]
            found |= {name: Config(**config) for name, config in rows.items()}
    return found


def user_tables() -> Path:
    """Where a user's own measurements are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dts_fast" / "triton"


def write_table(file: Path, header: dict[str, object], configs: dict[str, Config]) -> None:
    """A table with the hardware it was measured on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(config) for name, config in sorted(configs.items())}
    file.write_text(json.dumps({"header": header, "configs": rows}, indent=1) + "\n", encoding="utf-8")
