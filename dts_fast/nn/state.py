"""Caches: what a layer is given that belongs to the whole batch and changes while the layer runs. Parts of it for some
rows, and all of them together again.

A cache is known by its form: a list ``layers``, of which a layer of the model uses the one that its ``layer_idx``
names, with tensors (rows first), counters, flags, and lists and dictionaries of these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import MixedBatchError

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class CacheParts:
    """One layer's part of a cache, for a layer that runs several times, each for some rows of the batch.

    Args:
        cache: of the whole batch; changed by `join` alone.
        index: which of its layers.
        rows: of the batch.
    """

    def __init__(self, cache: object, index: int, rows: int) -> None:
        self.cache, self.index, self.rows = cache, index, rows
        # For each part: its rows, the tensors it was given, and the layer's state and the cache they are in.
        self.parts: list[tuple[list[int], dict, object, object]] = []

    def part(self, members: list[int], values: tuple) -> tuple:
        """The arguments with a cache of some rows in the cache's place."""
        state = self.cache.layers[self.index]
        given = {name: _split(value, self.rows, members) for name, value in vars(state).items()}
        if isinstance(given.get("batch_size"), int):  # the one counter that is of rows
            given["batch_size"] = len(members)
        own, cache = copy.copy(state), copy.copy(self.cache)
        own.__dict__ = _containers_copied(given)
        cache.layers = list(self.cache.layers)
        cache.layers[self.index] = own
        self.parts.append((members, given, own, cache))
        return self._replace(values, self.cache, cache)

    def whole(self, result):
        """A part's result with the cache in the place of its own."""
        return self._replace(result, self.parts[-1][3], self.cache)

    def join(self) -> None:
        """Give the cache what the layer has made of its parts: all of it, or where that is refused nothing.

        Raises:
            MixedBatchError: something besides rows that is not the same for all of them.
        """
        state = self.cache.layers[self.index]
        for *_, own, cache in self.parts:
            theirs = [own if i == self.index else layer for i, layer in enumerate(self.cache.layers)]
            if [id(layer) for layer in cache.layers] != [id(layer) for layer in theirs]:
                raise _not_divided("layers")
        members = [members for members, *_ in self.parts]
        order = torch.tensor([row for part in members for row in part]).argsort()
        joiner = _Joiner([len(part) for part in members], order, self.rows)
        now, given = [vars(own) for *_, own, _ in self.parts], [given for _, given, *_ in self.parts]
        if any(each.keys() != now[0].keys() for each in now):
            raise _not_divided("attributes")
        of_rows = {"batch_size"} if isinstance(now[0].get("batch_size"), int) else set()
        joined = {
            name: joiner.join(name, vars(state).get(name), [g.get(name) for g in given], [n[name] for n in now])
            for name in now[0].keys() - of_rows
        } | dict.fromkeys(of_rows, self.rows)
        for apply in joiner.changes:
            apply()
        vars(state).update(joined)

    @staticmethod
    def _replace(values, old: object, new: object):
        return pytree.tree_map(lambda value: new if value is old else value, values, is_leaf=lambda value: value is old)


def find_cache(layer: nn.Module, values: Iterable[object], rows: int) -> CacheParts | None:
    """The cache among a layer's arguments; None if there is none.

    Raises:
        MixedBatchError: an object that is of the whole batch, and cannot be divided into rows.
    """
    found = list({id(value): value for value in _objects(values)}.values())
    if not found:
        return None
    cache, index = found[0], getattr(layer, "layer_idx", None)
    layers = getattr(cache, "layers", None)
    if len(found) == 1 and isinstance(layers, list) and isinstance(index, int) and _is_one_layer_each(cache):
        make = getattr(cache, "layer_class_to_replicate", None)
        while len(layers) <= index and make is not None:  # as the cache itself would, when it is updated
            layers.append(make())
        if index < len(layers) and _can_split(vars(layers[index])):
            return CacheParts(cache, index, rows)
    raise MixedBatchError(
        f"{type(layer).__name__} has parameters of its own that differ within this batch, and is given a "
        f"{type(cache).__name__}, which is of the whole batch and cannot be divided. Run these adapters in separate "
        "batches or without it (use_cache=False), or compress without its parameters (--exclude)."
    )


def has_objects(values: Iterable[object]) -> bool:
    """Whether something among a layer's arguments is no plain data."""
    return next(_objects(values), None) is not None


def _is_one_layer_each(cache: object) -> bool:
    """Whether all that a cache holds is in its layers, in this device's memory."""
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    return not own.get("offloading") and all(callable(v) or isinstance(v, _PLAIN) for v in own.values())


def _not_divided(name: str) -> MixedBatchError:
    return MixedBatchError(
        f"the cache's {name!r} became something else for each adapter of this batch, and has to be the same for all "
        "rows. Run these adapters in separate batches."
    )


def _objects(values: Iterable[object]) -> Iterator[object]:
    """What is no plain data, at any depth."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _objects(value)
        elif isinstance(value, dict):
            yield from _objects(value.values())
        elif not isinstance(value, (Tensor, *_PLAIN)):
            yield value


def _can_split(value: object) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_can_split, value.values() if isinstance(value, dict) else value))
    return type(value) is Tensor or isinstance(value, _PLAIN)


def _split(value: object, rows: int, members: list[int]) -> object:
    """Some rows of every tensor, copied: also what is of no rows (counters), as it may be written to."""
    if isinstance(value, Tensor):
        of_rows = value.dim() > 0 and value.shape[0] == rows
        return value[torch.tensor(members, device=value.device)] if of_rows else value.clone()
    if isinstance(value, dict):
        return {key: _split(each, rows, members) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_split(each, rows, members) for each in value)
    return value


def _containers_copied(value: object) -> object:
    if isinstance(value, dict):
        return {key: _containers_copied(each) for key, each in value.items()}
    return [_containers_copied(each) for each in value] if isinstance(value, list) else value


class _Joiner:
    """Puts parts of a state together.

    Args:
        counts: rows of each part. order: of the parts' rows, one after another, for those of the batch.
        rows: of the batch.

    Attributes:
        changes: what is still to be called, as nothing is changed before all is known to fit together.
    """

    def __init__(self, counts: list[int], order: Tensor, rows: int) -> None:
        self.counts, self.order, self.rows = counts, order, rows
        self.changes: list[Callable[[], object]] = []

    def join(self, name: str, old: object, given: list, now: list) -> object:
        """``old`` with what the parts have become, in place where the parts were changed in place."""
        if isinstance(now[0], Tensor):
            return self._join_tensors(name, old, given, now)
        if isinstance(now[0], dict):
            if any(not isinstance(each, dict) or each.keys() != now[0].keys() for each in now):
                raise _not_divided(name)
            joined = {}
            for key in now[0]:
                before = [each.get(key) if isinstance(each, dict) else None for each in given]
                was = old.get(key) if isinstance(old, dict) else None
                joined[key] = self.join(name, was, before, [each[key] for each in now])
            if not isinstance(old, dict):
                return joined
            self.changes.append(lambda: old.update(joined))
            return old
        if isinstance(now[0], list):
            if any(not isinstance(each, list) or len(each) != len(now[0]) for each in now):
                raise _not_divided(name)
            same = all(isinstance(each, list) and len(each) == len(now[0]) for each in (old, *given))
            none = None, [None] * len(given)
            before = [(old[i], [each[i] for each in given]) if same else none for i in range(len(now[0]))]
            entries = [self.join(name, was, had, [n[i] for n in now]) for i, (was, had) in enumerate(before)]
            if not isinstance(old, list):
                return entries
            self.changes.append(lambda: old.__setitem__(slice(None), entries))
            return old
        if not all(map(_is_plain, now)) or any(each != now[0] for each in now):
            raise _not_divided(name)
        return now[0]

    def _join_tensors(self, name: str, old: object, given: list, now: list) -> Tensor:
        if not all(isinstance(each, Tensor) for each in now):
            raise _not_divided(name)
        if isinstance(old, Tensor) and not any(map(_is_changed, now, given)):
            return old
        of_rows = all(t.dim() > 0 and t.shape[0] == count for t, count in zip(now, self.counts, strict=True))
        # A vector of one element for each part of one row may be a counter, where nothing tells what it was before.
        known = isinstance(old, Tensor) and old.dim() > 0 and old.shape[0] == self.rows
        of_rows = of_rows and (now[0].dim() > 1 or known or max(self.counts) > 1)
        if not of_rows and not self._is_shared(old, now):
            raise _not_divided(name)
        joined = torch.cat(now)[self.order.to(now[0].device)] if of_rows else now[0]
        in_place = isinstance(old, Tensor) and now[0] is given[0] and old.shape == joined.shape
        if in_place and 0 not in old.stride():
            self.changes.append(lambda: old.copy_(joined))  # a static address: graphs were captured with it
            return old
        return joined

    def _is_shared(self, old: object, now: list[Tensor]) -> bool:
        """Whether tensors of no rows may stand for all parts: counters, which go up by the same, and numbers that have
        stayed as they were."""
        if any(t.shape != now[0].shape for t in now):
            return False
        if not now[0].is_floating_point() or now[0].numel() == 0:
            return True
        return isinstance(old, Tensor) and all(torch.equal(t, old) for t in now)


def _is_changed(now: Tensor, given: object) -> bool:
    """Whether a part's tensor is another one than it was, or was written to, as far as that can be told."""
    return now is not given or now.is_inference() or now._version != 0


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(each, _PLAIN) for each in value))
