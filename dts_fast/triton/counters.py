"""Counters for programs of one kernel that agree with each other: memory that is 0 before every launch, because every
launch leaves it so."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_SLAB = 1 << 20
_LINE = 32  # of a cache line of 128 bytes; no two callers share one
_lock = threading.Lock()
_slabs: dict[torch.device, Tensor] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """int32 ``[count]`` or more, all 0, for a launch on the device's current stream. Launches on one stream follow one
    another and share theirs; a launch that is captured gets some of its own, because its graph may be replayed beside
    anything."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            slab = _slabs.get(device)
            # Without a slab from a call before the capture, or beyond its end, the graph sets its own to 0.
            if slab is None or slab.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            return _take(count, device)
        key = device, torch.cuda.current_stream(device).cuda_stream
        slab = _slabs.get(device)
        if slab is not None and slab.numel() < _SLAB // 2:
            _slabs[device] = _new_slab(_SLAB, device)  # before captures, which cannot, have used it up
        own = _of_stream.get(key)
        if own is None or own.numel() < count:
            own = _of_stream[key] = _take(count, device)
        return own


def _take(count: int, device: torch.device) -> Tensor:
    """A part of a slab, for good: graphs may live as long as the process."""
    count = -(-count // _LINE) * _LINE
    slab = _slabs.get(device)
    if slab is None or slab.numel() < count:
        slab = _new_slab(max(_SLAB, count), device)
    _slabs[device] = slab[count:]
    return slab[:count]


def _new_slab(count: int, device: torch.device) -> Tensor:
    # In a thread of its own: what this one allocates may go to the private memory of a graph that torch.compile warms
    # up, and slabs outlive graphs.
    with ThreadPoolExecutor(1) as thread:
        slab = thread.submit(torch.zeros, count, dtype=torch.int32, device=device).result()
    torch.cuda.synchronize(device)  # set before any other stream counts
    return slab
