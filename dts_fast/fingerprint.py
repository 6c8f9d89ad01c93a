"""Recognises a base model by a few of its weights, whatever floating-point dtype it was loaded in."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .errors import AdapterFormatError, BaseMismatchError

# 512 bfloat16 samples are 1.4 kB of text in the config; a fine-tune moves weights by 1 % and more, so that even a
# close relative of the base differs in hundreds of them.
_MAX_SAMPLES = 512
# Where samples lie, in sixteenths of a tensor, in this order: fewer samples are the first of more, so that fingerprints
# with different numbers of parameters can be compared and merged.
_POSITIONS = (8, 4, 12, 2, 10, 6, 14, 1)

# The sample was rounded to bfloat16 (relative error 2^-9) and so may the live weight have been. Below float16's
# normal range an absolute error of half its smallest step, 2^-25, comes on top.
_RELATIVE_TOLERANCE = 2.0**-8
_ABSOLUTE_TOLERANCE = 2.0**-23
# Of the samples of all quantised weights together: 4 bits in groups leave a relative error of about 0.1, 2 bits of 0.4,
# and another model's weights one of 1.4. A close relative of the base cannot be told from it through such a veil.
_QUANTISED_TOLERANCE = 0.6


@torch.no_grad()
def take_fingerprint(get: Callable[[str], Tensor], names: Sequence[str]) -> str:
    """Sample the base's value of the parameters an adapter changes.

    Args:
        get: returns the base's tensor of a name, any floating-point dtype.
        names: the adapter's parameters.

    Returns:
        Base64 of bfloat16 samples, little-endian, in the order of the sorted names.
    """
    per_tensor = _samples_per_tensor(len(names))
    return _encode([sample(get(name), per_tensor).cpu().double() for name in sorted(names)])


def largest_fingerprint(parameters: int) -> int:
    """Characters of the longest fingerprint of up to so many parameters: fewer may have more samples altogether."""
    samples = max((n * _samples_per_tensor(n) for n in range(1, parameters + 1)), default=0)
    return -(-2 * samples // 3) * 4


@torch.no_grad()
def check_fingerprint(fingerprint: str, parameters: Mapping[str, Tensor | Elements], base: str) -> None:
    """Refuse a base model whose weights are not those the adapter was made for.

    Args:
        fingerprint: as `take_fingerprint` wrote it.
        parameters: the live base's tensors under the adapter's names; all of them.
        base: what the adapter calls its base, for the message.

    Raises:
        BaseMismatchError: some samples differ by more than rounding to bfloat16 or float16 explains.
        AdapterFormatError: the fingerprint has another length than the parameters imply.
    """
    expected = _samples_of(fingerprint, parameters.keys())
    found = {name: parameters[name] for name in expected}
    differing = []
    inexact = {name for name, p in found.items() if not (isinstance(p, Tensor) or getattr(p, "exact", True))}
    for exact in (True, False):
        names = [name for name in found if (name in inexact) != exact]
        if not names:
            continue
        rows = torch.stack([expected[name] for name in names])
        live = _together([sample(found[name], rows.shape[1]) for name in names])
        if exact:
            close = torch.isclose(live, rows, rtol=_RELATIVE_TOLERANCE, atol=_ABSOLUTE_TOLERANCE).all(1)
            differing += [name for name, same in zip(names, close.tolist(), strict=True) if not same]
        elif torch.linalg.vector_norm(live - rows) > _QUANTISED_TOLERANCE * torch.linalg.vector_norm(rows):
            differing += names
    if differing:
        raise BaseMismatchError(
            f"this is not the base the adapter was made for: expected {base}, but {len(differing)} of "
            f"{len(parameters)} parameters hold other weights (first: {differing[0]}). Attach it to that base, or "
            "compress the fine-tune against this one."
        )


def merge_fingerprints(members: Sequence[tuple[str, Collection[str]]]) -> str:
    """The fingerprint over all parameters of several adapters of one base.

    Args:
        members: each adapter's fingerprint and the names it is of.

    Raises:
        BaseMismatchError: two of them disagree about a parameter.
        AdapterFormatError: see `check_fingerprint`.
    """
    merged: dict[str, Tensor] = {}
    for fingerprint, names in members:
        for name, row in _samples_of(fingerprint, names).items():
            known = merged.setdefault(name, row)
            count = min(len(known), len(row))
            # Both were rounded to bfloat16, perhaps after another rounding: they may be neighbours.
            if not torch.allclose(known[:count], row[:count], rtol=2 * _RELATIVE_TOLERANCE, atol=_ABSOLUTE_TOLERANCE):
                raise BaseMismatchError(
                    f"the adapters were made for different bases: their fingerprints disagree about {name!r}. Expected "
                    "adapters of one base."
                )
    per_tensor = _samples_per_tensor(len(merged))  # more parameters, so no more samples of each than any member has
    return _encode([merged[name][:per_tensor] for name in sorted(merged)])


class Elements(Protocol):
    """A parameter that is not there as a tensor, but can be asked for elements (a packed weight); ``exact = False``
    says that they are those of a quantised form."""

    def numel(self) -> int: ...

    def elements(self, positions: Tensor) -> Tensor: ...


def sample(parameter: Tensor | Elements, count: int) -> Tensor:
    """``count`` elements at fixed positions spread over a parameter, where and as it has them."""
    if not isinstance(parameter, Tensor):
        return parameter.elements(_positions(parameter.numel(), count, torch.device("cpu")))
    positions = _positions(parameter.numel(), count, parameter.device)
    if parameter.element_size() == 1 or type(parameter) not in (Tensor, torch.nn.Parameter):  # have few operations
        return parameter.detach().reshape(-1).index_select(0, positions)
    return torch.take(parameter, positions)


def _together(samples: Sequence[Tensor]) -> Tensor:
    """float64 ``[tensors, count]`` on the CPU; in one copy where they lie on one device, which each would wait for."""
    if len({(each.dtype, each.device) for each in samples}) > 1:
        samples = [each.cpu().double() for each in samples]
    return torch.stack(list(samples)).cpu().double()


@lru_cache(maxsize=256)
def _positions(numel: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # others may ask in other modes
        return (torch.tensor(_POSITIONS[:count]) * numel // (2 * len(_POSITIONS))).to(device)


def _encode(samples: Sequence[Tensor]) -> str:
    bits = torch.cat(samples).bfloat16().view(torch.int16) if samples else torch.empty(0, dtype=torch.int16)
    return base64.b64encode(bits.numpy().astype("<i2").tobytes()).decode("ascii")


def _samples_of(fingerprint: str, names: Collection[str]) -> dict[str, Tensor]:
    """Parameter to its samples ``[c]`` as float64.

    Raises:
        AdapterFormatError: not base64, or of another length than the number of names implies.
    """
    per_tensor = _samples_per_tensor(len(names))
    try:
        raw = base64.b64decode(fingerprint, validate=True)
    except ValueError as error:
        raise AdapterFormatError(f"base_fingerprint is not valid base64 ({error}).") from error
    if len(raw) != 2 * per_tensor * len(names):
        raise AdapterFormatError(
            f"base_fingerprint holds {len(raw)} bytes; expected {2 * per_tensor * len(names)} for "
            f"{len(names)} parameters."
        )
    stored = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16) if raw else torch.empty(0)
    return dict(zip(sorted(names), stored.double().reshape(len(names), per_tensor), strict=True))


def _samples_per_tensor(tensors: int) -> int:
    return max(1, min(len(_POSITIONS), _MAX_SAMPLES // max(tensors, 1)))
