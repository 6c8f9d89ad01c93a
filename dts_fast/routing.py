"""Which adapter each row of a batch uses: `route`, and how a layer asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .bank import SlotTable
from .errors import RoutingError


class _Routes(threading.local):
    """One stack per thread, so that threads serve different batches through the same model. (A thread-local rather
    than a context variable because torch.compile can trace the former.)"""

    def __init__(self) -> None:
        self.current: route | None = None


_ROUTES = _Routes()


class route:  # noqa: N801 (used like a function)
    """Context manager: within it, DTS layers use these adapters.

    Args:
        adapter_names: one name for all rows, or one name for each row of the input (its first dimension);
            ``"__base__"`` is the base alone.
        expandable: an input may have a multiple of ``len(adapter_names)`` rows, each name then stands for that many
            neighbouring rows (what ``generate`` does to a batch for beams and several return sequences).

    Raises:
        RoutingError: within, a layer's input has another number of rows.
        UnknownAdapterError: within, a layer meets a name that is not loaded.
    """

    def __init__(self, adapter_names: str | Sequence[str], *, expandable: bool = False) -> None:
        if not isinstance(adapter_names, str):
            adapter_names = tuple(adapter_names)
            if not adapter_names or not all(isinstance(name, str) for name in adapter_names):
                raise RoutingError(
                    f"adapter_names must be one name or a non-empty list with one name for each row, got "
                    f"{adapter_names!r}."
                )
        self.adapter_names = adapter_names
        self.expandable = expandable

    def __enter__(self) -> route:
        self._outer = _ROUTES.current
        _ROUTES.current = self
        return self

    def __exit__(self, *exception: object) -> None:
        _ROUTES.current = self._outer

    def names_for(self, rows: int) -> str | tuple[str, ...]:
        """One name for each of ``rows`` rows, or one for all.

        Raises:
            RoutingError: the route names another number of rows.
        """
        names = self.adapter_names
        if isinstance(names, str) or rows == len(names):
            return names
        if self.expandable and rows % len(names) == 0:
            return tuple(name for name in names for _ in range(rows // len(names)))
        raise RoutingError(
            f"{len(names)} adapter names for a batch of {rows} rows; expected one name for each row, or a single name "
            "for all."
        )


def current_route() -> route | None:
    """The innermost route of this thread."""
    return _ROUTES.current


def current_slots(table: SlotTable, rows: int) -> int | list[int]:
    """The slots that the current route, or else the table's active adapter, gives to an input of ``rows`` rows.

    An input of one row may be shared by all rows of the batch; then the slots are those of the batch.
    """
    current = _ROUTES.current
    names = table.active if current is None else current.adapter_names if rows == 1 else current.names_for(rows)
    if isinstance(names, str):
        return table.slot(names)
    slots = [table.slot(name) for name in names]
    return slots[0] if len(set(slots)) == 1 else slots


def narrowed(rows: Iterable[int], total: int) -> route:
    """A route for some rows of the current batch of ``total`` rows, for layers inside a part of it."""
    names = _ROUTES.current.adapter_names
    repeats = total // len(names)
    return route([names[row // repeats] for row in rows])


def slot_ids(slots: int | list[int], rows: int, device: torch.device) -> Tensor:
    """int32 ``[rows]`` for the ops; each of the slots stands for ``rows / len(slots)`` neighbouring rows."""
    if isinstance(slots, int):
        return torch.full((rows,), slots, dtype=torch.int32, device=device)
    ids = torch.tensor(slots, dtype=torch.int32)
    return ids.repeat_interleave(rows // len(slots)).to(device)
