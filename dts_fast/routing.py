"""Which adapter each row of a batch uses: `route`, and how a layer asks for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import is_grad_enabled as _is_grad_enabled
from torch.compiler import is_compiling as _is_compiling
from torch.compiler import is_dynamo_compiling as _is_dynamo_compiling

from .errors import MixedBatchError, RoutingError
from .slots import BASE, SlotTable

# One slot for all rows of a batch, or one for each; as a tensor (int32 [1] or [rows]) in graphs that are compiled once
# for all adapters.
Slots = int | list[int] | Tensor


class RowSlots(list):
    """The slots of rows, as all layers of a call have them: what each of these would ask is answered once.

    Attributes:
        key: the slots, hashable.
        distinct: without repetitions.
    """

    __slots__ = ("distinct", "key")

    def __init__(self, slots: Iterable[int]) -> None:
        super().__init__(slots)
        self.key = tuple(self)
        self.distinct = tuple(dict.fromkeys(self))


@dataclass(frozen=True)
class Lease:
    """The slots that names have while a call runs (`SlotTable.lease`), and where its model computes."""

    table: SlotTable
    slots: Mapping[str, int]
    device: torch.device


class _Routes(threading.local):
    """One stack per thread, so that threads serve different batches through the same model. (A thread-local rather
    than a context variable alone because torch.compile can trace the former; of what tasks of one event loop have
    entered, `_ENTERED` tells whose it is.)"""

    def __init__(self) -> None:
        self.stack: list[route] = []
        # Whether the innermost one is of the base alone. Kept beside it for `all_base`: while weights stream through
        # the caches every object that a layer looks at comes from memory.
        self.base_only = False


ROUTES = _Routes()
# What the current task has entered, or those that have started it.
_ENTERED: ContextVar[tuple[route, ...]] = ContextVar("dts_fast_routes", default=())


class route:  # noqa: N801 (used like a function)
    """Context manager: within it, DTS layers use these adapters.

    Args:
        adapter_names: one name for all rows, or one name for each row of the input (its first dimension);
            ``"__base__"`` is the base alone.
        expandable: generate() may call its model with several neighbouring rows (beams) for each name.
        flattened: numbers of tokens a row, for models that flatten them before their linear layers: a matrix
            ``[B * T, features]`` counts as B rows of T neighbouring entries each, B being the number of names and T
            one of these.
        lease: the names' slots, where a model has looked them up for all its layers.
        rows: of the batch, where it is known: a single name then means so many, and graphs that are compiled for one
            serve the other.

    Raises:
        RoutingError: within, a layer's input has another number of rows.
        UnknownAdapterError: within, a layer meets a name that is not loaded.
    """

    # Whether a model has found as many rows in its own input as there are names.
    of_model = False
    # Whether it is one call's, within which no other task can run.
    of_call = False
    # The table of a model whose calls within use the base, whatever names they are given.
    disables: SlotTable | None = None
    # Whether it was entered in a task of an event loop: others that run meanwhile are not to see it.
    in_task = False

    def __init__(
        self,
        adapter_names: str | Sequence[str],
        *,
        expandable: bool = False,
        flattened: Collection[int] = (),
        lease: Lease | None = None,
        rows: int | None = None,
    ) -> None:
        adapter_names = check_names(adapter_names)
        self.adapter_names = adapter_names
        self.expandable, self.flattened = expandable, flattened
        self.lease = lease
        # A list is compared with the rows of each layer's input, unless a model has done so.
        self.base_only = adapter_names == BASE or (self.of_model and set(adapter_names) == {BASE})
        # What layers were told whose input has so many rows, and two dimensions or not; as long as a lease holds slots.
        self.told: dict[tuple[int, bool], int | list[int]] = {}
        # For compiled graphs, to which names would be constants.
        self.ids: Tensor | None = None
        if lease is not None:
            single = isinstance(adapter_names, str)
            slots = [lease.slots[name] for name in ([adapter_names] if single else adapter_names)]
            self.ids = slot_ids(slots, rows if single and rows else len(slots), lease.device)

    def __enter__(self) -> route:
        ROUTES.base_only = False  # first: an interrupt must not leave it true
        if not self.of_call and not _is_dynamo_compiling():
            self.in_task = asyncio._get_running_loop() is not None
            if self.in_task:
                _ENTERED.set((*_ENTERED.get(), self))
        ROUTES.stack.append(self)
        ROUTES.base_only = _is_base_only(ROUTES.stack)
        return self

    def __exit__(self, *exception: object) -> None:
        # What was entered within and not left (an interrupt between a model's hooks) goes too; not what other tasks
        # have entered meanwhile.
        stack = ROUTES.stack
        if not any(entered is self for entered in stack):
            return  # it went with one that was entered before
        ROUTES.base_only = False
        popped, others = [], []
        own = _ENTERED.get() if self.in_task else ()
        while not popped or popped[-1] is not self:
            entered = stack.pop()
            mine = entered is self or not entered.in_task or any(entered is each for each in own)
            (popped if mine else others).append(entered)
        stack.extend(reversed(others))
        if self.in_task:
            _ENTERED.set(tuple(each for each in own if not any(each is gone for gone in popped)))
        ROUTES.base_only = _is_base_only(stack)
        if len(popped) == 1:
            self.left()
            return
        with ExitStack() as leaving:  # all of them, whatever one raises
            for each in reversed(popped):
                leaving.callback(each.left)

    def left(self) -> None:
        """Called once, when it is no longer in force, also where that comes without its own `__exit__`."""

    def names_for(self, rows: int, *, in_model: bool = False) -> str | tuple[str, ...]:
        """One name for each of ``rows`` rows, or one for all.

        Args:
            in_model: the rows are a model's own input, in which generate() has put its beams.

        Raises:
            RoutingError: the route names another number of rows.
            MixedBatchError: so it does for a layer within a model (or generate()) whose own input fits.
        """
        names = self.adapter_names
        if isinstance(names, str) or rows == len(names):
            return names
        if self.expandable and in_model and rows % len(names) == 0:
            return tuple(name for name in names for _ in range(rows // len(names)))
        if self.of_model or self.expandable:
            raise MixedBatchError(
                f"a layer is given {rows} rows in a batch of {len(names)}, so that it cannot be told which of them use "
                "which adapter. Run these adapters in separate batches, or compress without that layer (--exclude)."
            )
        raise RoutingError(
            f"{len(names)} adapter names for a batch of {rows} rows; expected one name for each row, or a single name "
            "for all."
        )


def check_names(adapter_names: str | Sequence[str]) -> str | tuple[str, ...]:
    """One name, or a tuple of names.

    Raises:
        RoutingError: something else, or none at all.
    """
    if isinstance(adapter_names, str):
        return adapter_names
    # Not a set, say, whose order is none.
    names = tuple(adapter_names) if isinstance(adapter_names, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise RoutingError(
            f"adapter_names must be one name or a non-empty list with one name for each row, got {adapter_names!r}."
        )
    return names


def current_route() -> route | None:
    """The innermost route of this thread, or of its current task."""
    stack = ROUTES.stack
    if not stack or not stack[-1].in_task or _is_dynamo_compiling():
        return stack[-1] if stack else None
    own = _ENTERED.get()
    mine = (entered for entered in reversed(stack) if not entered.in_task or any(entered is each for each in own))
    return next(mine, None)


def _is_base_only(stack: Sequence[route]) -> bool:
    return bool(stack) and not stack[-1].in_task and stack[-1].base_only


def all_base() -> bool:
    """Whether the current route is that of the base alone, and `current_slots` has nothing else to note or refuse: the
    answer that has to come at once."""
    # Compilation is asked for first: to a graph the rest would be a constant.
    return not _is_dynamo_compiling() and ROUTES.base_only and not _is_grad_enabled()


def current_slots(table: SlotTable, shape: Sequence[int], *, traceable: bool = False) -> Slots:
    """The slots that the current route, or else the table's active adapter, gives to an input of this shape.

    Args:
        traceable: whether the caller can do with a tensor, which it then gets where a model is compiled.

    Returns:
        One slot for all rows, or one for each row of the *batch*. An input of one row may be shared by all rows, and a
        flattened one has several entries for each.

    Raises:
        RoutingError: the shape does not fit the route, or a layer runs again during backward after its route has ended
            (gradient checkpointing), where it would get another adapter than in forward.
    """
    current = current_route()
    if current is None:
        if table.routed_with_grad and torch._C._current_graph_task_id() != -1:
            raise RoutingError(
                "a DTS layer runs again during backward, outside the route that its forward pass had. Turn gradient "
                "checkpointing off."
            )
        return table.slot(table.active)
    table.routed_with_grad = torch.is_grad_enabled()
    lease = current.lease
    if lease is None or lease.table is not table:
        return _slots_of(current, shape, table.slot)
    if _is_compiling():
        return current.ids if traceable else _slots_of(current, shape, lease.slots.__getitem__)
    key = shape[0], len(shape) == 2
    slots = current.told.get(key)
    if slots is None:
        slots = current.told[key] = _slots_of(current, shape, lease.slots.__getitem__)
    return slots


def _slots_of(current: route, shape: Sequence[int], slot_of: Callable[[str], int]) -> int | list[int]:
    names, rows = current.adapter_names, shape[0]
    if isinstance(names, str):
        return slot_of(names)
    if current.of_model and len(set(names)) == 1:
        return slot_of(names[0])  # the model's own input had the right number of rows; inner shapes do not matter
    if rows != 1 and not (len(shape) == 2 and rows in {len(names) * tokens for tokens in current.flattened}):
        names = current.names_for(rows)
    slots = [slot_of(name) for name in names]
    if len(set(slots)) == 1:
        return slots[0]
    return slots if _is_compiling() else RowSlots(slots)  # compilers know the lists of the language alone


def distinct(slots: list[int]) -> Sequence[int]:
    """Each of the slots of rows once."""
    return slots.distinct if type(slots) is RowSlots else tuple(dict.fromkeys(slots))


def narrowed(rows: Sequence[int], batch: int) -> route:
    """A route for some rows of the current batch, for layers inside a part of it."""
    current = current_route()
    of_all = current.names_for(batch)
    names = [of_all[row] for row in rows]
    part = route(names, flattened=current.flattened, lease=current.lease)
    part.of_model, part.of_call = current.of_model, True
    return part


def named_slots(table: SlotTable) -> set[int]:
    """The slots of all rows of the current route, or of the active adapter."""
    current = current_route()
    names = table.active if current is None else current.adapter_names
    own = current is not None and current.lease is not None and current.lease.table is table
    slot_of = current.lease.slots.__getitem__ if own else table.slot
    return {slot_of(name) for name in ([names] if isinstance(names, str) else names)}


def slot_ids(slots: Slots, rows: int, device: torch.device) -> Tensor:
    """int32 ``[rows]`` for the ops; each of the slots stands for ``rows / len(slots)`` neighbouring rows. Not to be
    written to: the layers of a model share it."""
    if _is_compiling() or rows > _MOST_CACHED_ROWS:
        return _make_slot_ids(slots, rows, device)
    hashable = slots if isinstance(slots, int) else slots.key if type(slots) is RowSlots else tuple(slots)
    key = hashable, rows, device
    ids = _SLOT_IDS.get(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if ids is None:
            return _make_captured(slots, rows, device)
        _CAPTURED[id(ids)] = ids  # the graph reads it as long as it lives
        return ids
    if ids is None:
        if len(_SLOT_IDS) >= _MOST_SLOT_IDS:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # streams may still read what is dropped
            _SLOT_IDS.clear()
        # Not an inference tensor, whatever the caller is in: the next one may want gradients.
        with torch.inference_mode(False):
            ids = _make_slot_ids(slots, rows, device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the next one to ask may be on another stream
        if type(ids) is Tensor:  # and not a fake one
            _SLOT_IDS[key] = ids
    return ids


# All layers of a forward pass ask for the same, and so do the steps of a generation.
_SLOT_IDS: dict[tuple, Tensor] = {}
_CAPTURED: dict[int, Tensor] = {}  # never dropped
_MOST_SLOT_IDS = 256
_MOST_CACHED_ROWS = 4096


def _make_captured(slots: Slots, rows: int, device: torch.device) -> Tensor:
    """Within a graph, for which nothing has been made before: it has values when the graph is replayed, and not before,
    so that no one else may have it."""
    if isinstance(slots, int):
        return _make_slot_ids(slots, rows, device)
    host = _make_slot_ids(slots, rows, torch.device("cpu")).pin_memory()  # copied from at every replay
    _CAPTURED[id(host)] = host
    return host.to(device, non_blocking=True)


def _make_slot_ids(slots: Slots, rows: int, device: torch.device) -> Tensor:
    if isinstance(slots, int):
        return torch.full((rows,), slots, dtype=torch.int32, device=device)
    if isinstance(slots, Tensor):
        names = slots.shape[0]
        if rows % names:
            raise RoutingError(f"{names} adapter names for a batch of {rows} rows; expected one for each row, or one.")
        return slots.to(device)[:, None].expand(names, rows // names).contiguous().view(rows)
    ids = torch.tensor(slots, dtype=torch.int32)
    return ids.repeat_interleave(rows // len(slots)).to(device)
