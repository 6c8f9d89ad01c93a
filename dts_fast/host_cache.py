"""Adapters in host memory as a load writes them, so that what was evicted comes back as a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .codes import is_matrix, sizes_of, terms_of
from .nn import DTSModule
from .nn.module import Parameter
from .writes import Kept

# What a load writes: wrapper and its parameters.
Parts = list[tuple[DTSModule, Mapping[str, Parameter]]]


@dataclass(frozen=True)
class Ready:
    """An adapter to be loaded again.

    Attributes:
        parts: its parameters, of which matrices have sizes alone where `kept` has their pages.
    """

    parts: Parts
    kept: Kept

    @classmethod
    def of(cls, slot: int, parts: Parts, kept: Kept) -> Ready:
        """What has just been loaded to a slot."""
        sizes: dict[int, Parameter] = {}  # tied layers have one parameter, by which they are told

        def left(parameter: Parameter) -> Parameter:
            if isinstance(parameter, Tensor) or not is_matrix(parameter):
                return parameter
            return sizes.setdefault(id(parameter), sizes_of(parameter))

        def of(wrapper: DTSModule, own: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
            stored = wrapper.stored.get(slot)
            return {name: left(p) for name, p in own.items()} if stored is None else dict(stored)

        return cls([(wrapper, of(wrapper, own)) for wrapper, own in parts], kept)

    @property
    def nbytes(self) -> int:
        held = {id(p): p for _, own in self.parts for p in own.values()}.values()
        return self.kept.nbytes + sum(p.nbytes for p in held if not _is_sizes_alone(p))


def _is_sizes_alone(parameter: Parameter) -> bool:
    return not isinstance(parameter, Tensor) and is_matrix(parameter) and terms_of(parameter)[0].s.is_meta


class HostCache:
    """The adapters that were loaded last, in so many bytes. Not for several threads at a time.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._ready: dict[str, tuple[Ready, int]] = {}  # the latest last

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self._ready.values())

    def put(self, name: str, ready: Ready) -> None:
        self.drop(name)
        nbytes = ready.nbytes
        if not ready.kept.is_whole or nbytes > self.most:
            return
        while self._ready and self.nbytes + nbytes > self.most:
            self.drop(next(iter(self._ready)))
        self._ready[name] = ready, nbytes

    def get(self, name: str) -> Ready | None:
        found = self._ready.pop(name, None)
        if found is None:
            return None
        self._ready[name] = found
        return found[0]

    def drop(self, name: str) -> None:
        self._ready.pop(name, None)

    def clear(self) -> None:
        self._ready.clear()
