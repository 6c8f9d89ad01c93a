"""Clocks and ceilings: timing candidates in turns, and what a machine can do at best.

On a CPU a turn is a number of calls. On a GPU it is a replayed CUDA graph of one call on each copy of the layers, timed
with events: launches cost what they cost in a captured model, and weights come from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Runs = Sequence[Callable[[], object]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """One candidate.

    Attributes:
        ms: median time of a call.
        ratio: median over the rounds of its time over the baseline's of the same round.
        low, high: quartiles of those ratios.
        captured: whether it ran as a CUDA graph; False on a CPU, and where it cannot be captured.
    """

    candidate: str
    ms: float
    ratio: float
    low: float
    high: float
    captured: bool = False


@torch.inference_mode()
def time_in_turns(
    candidates: Mapping[str, Runs], baseline: str, rounds: int, sample_seconds: float, device: str = "cpu"
) -> list[Timing]:
    """Time candidates in turns within one run.

    Args:
        candidates: by name, the same call on each copy of the layers.
        baseline: the one that the ratios are to.
        rounds: how often each has its turn.
        sample_seconds: a turn calls the candidate as often as this lets it, and at least once.
    """
    clocks = {name: _CpuClock(runs) if device == "cpu" else _GpuClock(runs) for name, runs in candidates.items()}
    calls = {}
    for name, clock in clocks.items():
        clock.turn(1)
        calls[name] = max(1, round(sample_seconds / max(clock.turn(2), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            seconds[name].append(clock.turn(calls[name]))
    timings = []
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds[baseline], strict=True))
        quarter = len(ratios) // 4
        median = statistics.median(ratios)
        timings.append(
            Timing(
                name, 1e3 * statistics.median(own), median, ratios[quarter], ratios[-1 - quarter], clocks[name].captured
            )
        )
    return timings


class _CpuClock:
    captured = False

    def __init__(self, runs: Runs) -> None:
        self.runs, self.position = runs, 0

    def turn(self, calls: int) -> float:
        """Seconds of a call."""
        start = time.perf_counter()
        for _ in range(calls):
            self.position = (self.position + 1) % len(self.runs)
            self.runs[self.position]()
        return (time.perf_counter() - start) / calls


class _GpuClock:
    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.Stream()  # what is captured must have run before, and not on the default stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.captured = not _synchronises(runs[0])
        if self.captured:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for run in runs:
                    run()

    def turn(self, calls: int) -> float:
        """Seconds of a call."""
        passes = max(1, round(calls / len(self.runs)))
        self._replay()  # not timed: the device is busy when the clock starts, and the first launch hidden
        self.start.record()
        for _ in range(passes):
            self._replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / (passes * len(self.runs))

    def _replay(self) -> None:
        if self.captured:
            self.graph.replay()
        else:
            for run in self.runs:
                run()


def _synchronises(run: Callable[[], object]) -> bool:
    """Whether a call waits for the device, which no graph can capture. To find out by trying would leave torch's
    allocator in the dead graph's pool."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at best, measured.

    Attributes:
        bytes_per_s: reading memory.
        flops: multiplying matrices, operations per second by dtype name.
    """

    bytes_per_s: float
    flops: dict[str, float]


def measure_roofline(dtypes: Sequence[torch.dtype], device: str = "cpu") -> Roofline:
    """Best of several attempts: sums and matrix-vector products over more than the cache holds; square products."""
    large = torch.ones(max(2 * last_level_cache(device), 1 << (32 if device == "cuda" else 28)) // 4, device=device)
    matrix, vector = large[: large.numel() // 4096 * 4096].view(-1, 4096), torch.ones(4096, device=device)
    fastest = min(_best(lambda: large.sum(), device), _best(lambda: matrix @ vector, device))
    size, flops = 8192 if device == "cuda" else 2048, {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))  # zeros and ones run faster
        # As a linear layer multiplies: half precision the other way round takes minutes where a processor has none.
        flops[dtype_name(dtype)] = 2 * size**3 / _best(lambda a=a, b=b: torch.nn.functional.linear(a, b), device)
    if device == "cpu":
        # 16-bit products may be slower than float32 ones, where the processor has no instructions for them; what can
        # be computed in float32 is no slower in fewer bits.
        flops = {name: max(flops.values()) for name in flops}
    return Roofline(large.nbytes / fastest, flops)


def _best(run: Callable[[], object], device: str, repeats: int = 7) -> float:
    clock = _CpuClock([run]) if device == "cpu" else _GpuClock([run])
    return min(clock.turn(1) for _ in range(repeats))


def last_level_cache(device: str = "cpu") -> int:
    """Bytes; 64 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    except (OSError, ValueError):
        return 64 * 2**20
