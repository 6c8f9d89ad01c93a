"""Batches that a model cannot mix row by row, run once for each of their adapters instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batch import main_input
from .errors import DTSError, MixedBatchError, RoutingError
from .nn.rows import map_rows, merge_rows
from .nn.state import has_objects
from .routing import current_route, route

# What generate() takes that is of the whole batch, or counts its rows.
_OF_THE_BATCH = ("past_key_values", "cache", "cache_params", "streamer", "prefix_allowed_tokens_fn", "assistant_model")
# What a model returns besides rows: a cache is of no use to a batch that cannot be run with one.
_CACHES = ("past_key_values", "cache", "cache_params", "mems")
_MOST_KNOWN = 64


class Apart:
    """Which adapters a model could not serve in one batch, and how their batches are run.

    Some models keep no track of rows in some layer (a table of relative positions, experts that are given tokens from
    anywhere), or compute with a layer's weight without calling it. Such a layer refuses rows that differ
    (`MixedBatchError`). The whole batch then runs again, once for each adapter with its rows.
    """

    def __init__(self) -> None:
        # What was said, by the adapters' names.
        self._refused: dict[frozenset[str], str] = {}

    def forget(self) -> None:
        """Adapters may have changed: try to mix them again."""
        self._refused.clear()

    def forward(self, call: Callable, args: tuple, kwargs: dict):
        """A call of a model within a route.

        Raises:
            MixedBatchError: it cannot be divided either: a cache is passed in, or something comes back that is of the
                whole batch (a loss).
        """
        return self._run(call, args, kwargs, main_input(args, kwargs), _merge_outputs)

    def generate(self, call: Callable, args: tuple, kwargs: dict, pad: int | None):
        """``generate`` within a route; ``pad`` fills the sequences of adapters that end before others.

        Raises:
            MixedBatchError: see `forward`.
        """

        def merge(results: list, taken: list[list[int]]):
            return _merge_generated(results, taken, pad)

        return self._run(call, args, kwargs, main_input((*args, kwargs.get("inputs")), kwargs), merge)

    def _run(self, call: Callable, args: tuple, kwargs: dict, main: Tensor | None, merge: Callable):
        current = current_route()
        names = current.adapter_names
        if isinstance(names, str) or len(set(names)) == 1 or main is None or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        # A cache belongs to all rows; and the layers before the one that refuses would have written to it.
        if any(kwargs.get(name) is not None for name in _OF_THE_BATCH) or has_objects(args):
            return call(*args, **kwargs)
        key = frozenset(names)
        refusal = self._refused.get(key)
        if refusal is not None:
            return self._run_apart(call, args, kwargs, main, merge, refusal)
        try:
            return call(*args, **kwargs)
        except MixedBatchError as error:
            refusal = str(error)
        result = self._run_apart(call, args, kwargs, main, merge, refusal)
        if len(self._refused) >= _MOST_KNOWN:
            self._refused.clear()
        self._refused[key] = refusal
        warnings.warn(
            f"a batch of these adapters runs once for each of them, and returns no cache, since a layer cannot tell "
            f"its rows apart: {refusal}",
            stacklevel=4,
        )
        return result

    def _run_apart(self, call: Callable, args, kwargs, main: Tensor, merge: Callable, refusal: str):
        current, rows = current_route(), main.shape[0]
        members: dict[str, list[int]] = {}
        for row, name in enumerate(current.names_for(rows)):
            members.setdefault(name, []).append(row)
        results = []
        for name, of_name in members.items():
            index = torch.tensor(of_name)
            part = map_rows(lambda t, index=index: t[index.to(t.device)], rows, args, kwargs)
            with route(name, lease=current.lease, rows=len(of_name)):
                results.append(call(*part[0], **part[1]))
        try:
            return merge(results, list(members.values()))
        except DTSError as error:
            raise MixedBatchError(f"{refusal} (It was run once for each adapter, but: {error})") from error


def pad_token(model: object, kwargs: Mapping[str, object]) -> int | None:
    """What ``generate`` of transformers fills finished sequences with."""
    given = kwargs, kwargs.get("generation_config"), getattr(model, "generation_config", None)
    for name in ("pad_token_id", "eos_token_id"):
        for settings in given:
            value = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
            value = value[0] if isinstance(value, Sequence) and value else value
            if value is not None:
                return int(value)
    return None


def _merge_outputs(results: list, taken: list[list[int]]):
    if isinstance(results[0], Mapping):
        results = [type(r)(**{name: value for name, value in r.items() if name not in _CACHES}) for r in results]
    plain = [pytree.tree_map(lambda leaf: None if has_objects([leaf]) else leaf, result) for result in results]
    if any(pytree.tree_structure(each) != pytree.tree_structure(plain[0]) for each in plain):
        raise RoutingError(
            "what comes back for the adapters of this batch differs in more than its rows (in the number of steps that "
            "were generated, say). Ask for less, or run them in separate batches."
        )
    return merge_rows(plain, taken)


def _merge_generated(results: list, taken: list[list[int]], pad: int | None):
    sequences = [result["sequences"] if isinstance(result, Mapping) else result for result in results]
    longest = max(each.shape[1] for each in sequences)
    if pad is None and any(each.shape[1] < longest for each in sequences):
        raise RoutingError("sequences of different lengths, and no pad_token_id to fill them with.")
    padded = [torch.nn.functional.pad(each, (0, longest - each.shape[1]), value=pad or 0) for each in sequences]
    if not isinstance(results[0], Mapping):
        return _merge_outputs(padded, taken)
    return _merge_outputs([type(r)(**{**r, "sequences": each}) for r, each in zip(results, padded, strict=True)], taken)
