"""Recognises a base model by a few of its weights, whatever floating-point dtype it was loaded in."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import AdapterFormatError, BaseMismatchError

# 512 bfloat16 samples are 1.4 kB of text in the config; a fine-tune moves weights by 1 % and more, so that even a
# close relative of the base differs in hundreds of them.
_MAX_SAMPLES = 512
_MAX_PER_TENSOR = 8

# The sample was rounded to bfloat16 (relative error 2^-9) and so may the live weight have been. Below float16's
# normal range an absolute error of half its smallest step, 2^-25, comes on top.
_RELATIVE_TOLERANCE = 2.0**-8
_ABSOLUTE_TOLERANCE = 2.0**-23


def take_fingerprint(get: Callable[[str], Tensor], names: Sequence[str]) -> str:
    """Sample the base's value of the parameters an adapter changes.

    Args:
        get: returns the base's tensor of a name, any floating-point dtype.
        names: the adapter's parameters.

    Returns:
        Base64 of bfloat16 samples, little-endian, in the order of the sorted names.
    """
    per_tensor = _samples_per_tensor(len(names))
    samples = [sample(get(name), per_tensor) for name in sorted(names)]
    bits = torch.cat(samples).bfloat16().view(torch.int16) if samples else torch.empty(0, dtype=torch.int16)
    return base64.b64encode(bits.numpy().astype("<i2").tobytes()).decode("ascii")


def largest_fingerprint(parameters: int) -> int:
    """Characters of the longest fingerprint of up to so many parameters: fewer may have more samples altogether."""
    samples = max((n * _samples_per_tensor(n) for n in range(1, parameters + 1)), default=0)
    return -(-2 * samples // 3) * 4


def check_fingerprint(fingerprint: str, parameters: Mapping[str, Tensor], base: str) -> None:
    """Refuse a base model whose weights are not those the adapter was made for.

    Args:
        fingerprint: as `take_fingerprint` wrote it.
        parameters: the live base's tensors under the adapter's names; all of them.
        base: what the adapter calls its base, for the message.

    Raises:
        BaseMismatchError: some samples differ by more than rounding to bfloat16 or float16 explains.
        AdapterFormatError: the fingerprint has another length than the parameters imply.
    """
    per_tensor = _samples_per_tensor(len(parameters))
    try:
        raw = base64.b64decode(fingerprint, validate=True)
    except binascii.Error as error:
        raise AdapterFormatError(f"base_fingerprint is not valid base64 ({error}).") from error
    if len(raw) != 2 * per_tensor * len(parameters):
        raise AdapterFormatError(
            f"base_fingerprint holds {len(raw)} bytes; expected {2 * per_tensor * len(parameters)} for "
            f"{len(parameters)} parameters."
        )
    stored = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16) if raw else torch.empty(0)
    stored = stored.double().reshape(len(parameters), per_tensor)
    differing = []
    for row, name in zip(stored, sorted(parameters), strict=True):
        live = sample(parameters[name], per_tensor)
        if not torch.allclose(live, row, rtol=_RELATIVE_TOLERANCE, atol=_ABSOLUTE_TOLERANCE):
            differing.append(name)
    if differing:
        raise BaseMismatchError(
            f"this is not the base the adapter was made for: expected {base}, but {len(differing)} of "
            f"{len(parameters)} parameters hold other weights (first: {differing[0]}). Attach it to that base, or "
            "compress the fine-tune against this one."
        )


def sample(tensor: Tensor, count: int) -> Tensor:
    """``count`` elements at fixed positions spread evenly over a tensor, as float64 on the CPU."""
    flat = tensor.detach().reshape(-1)
    positions = torch.arange(count, device=flat.device).mul_(2).add_(1) * flat.numel() // (2 * count)
    return flat[positions].cpu().double()


def _samples_per_tensor(tensors: int) -> int:
    return max(1, min(_MAX_PER_TENSOR, _MAX_SAMPLES // max(tensors, 1)))
