"""Calls that a model cannot mix row by row, run once for each of their adapters instead.

Some models keep no track of rows in some layer (a table of relative positions, experts that are given tokens from
anywhere), or compute with a layer's weight without calling it. Such a layer refuses rows that differ
(`MixedBatchError`), and the whole call runs again for each adapter with its rows. What cannot be divided into rows
without a doubt is refused, as it would be without this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batch import CallRoute, main_input
from .errors import DTSError, MixedBatchError, NeverMixedError, RoutingError
from .nn.rows import map_rows
from .nn.state import has_objects
from .routing import current_route

_CACHES = (
    "past_key_values", "cache", "cache_params", "past_buckets_states", "encoder_cache", "decoder_cache",
    "padding_cache", "depth_decoder_cache", "mems", "state",
)  # fmt: skip
# Arguments that are of the whole batch, or count its rows.
_OF_THE_BATCH = (
    *_CACHES, "labels", "return_loss", "streamer", "prefix_allowed_tokens_fn", "assistant_model", "logits_processor",
    "stopping_criteria",
)  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))
_MOST_KNOWN = 64


class NoCache:
    """In the place of the cache of a call that ran once for each adapter: to go on from it is an error, not a call
    without context."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise MixedBatchError(
            "a batch of these adapters runs once for each of them, which keeps no cache. Give whole sequences "
            "(use_cache=False), or use generate()."
        )


class Apart:
    """Runs the calls of a model, and remembers which adapters can never be mixed."""

    def __init__(self) -> None:
        # What was said, by the adapters' names.
        self._refused: dict[frozenset[str], str] = {}
        # Those of calls that were mixed: layers that they change get rows, and not tokens, as first dimension.
        self._rows_first: set[str] = set()

    def forget(self, name: str) -> None:
        """An adapter has changed: try again to mix it."""
        self._rows_first.discard(name)
        for names in [names for names in list(self._refused) if name in names]:
            self._refused.pop(names, None)

    def forward(self, call: Callable, args: tuple, kwargs: dict):
        """A call of a model within a route.

        Raises:
            MixedBatchError: the call cannot be divided either (a cache or labels are passed in, tensors whose first
                dimension is not the batch), or what comes back is not of rows.
        """
        main, objects = main_input(args, kwargs), has_objects((args, kwargs))
        return self._run(call, args, kwargs, main, _merge, objects, _unless_compiled(call, {}), level=6)

    def generate(self, call: Callable, args: tuple, kwargs: dict, model: object):
        """``generate`` of a model within a route. Sequences of adapters that end before others are padded.

        Raises:
            MixedBatchError: see `forward`.
        """

        def merge(results: list, taken: list[list[int]]):
            return _merge_generated(results, taken, lambda: _pad_token(model, kwargs))

        objects = has_objects((args, {name: value for name, value in kwargs.items() if name != "generation_config"}))
        main = main_input((*args, kwargs.get("inputs")), kwargs)
        briefly = _unless_compiled(model, {"stopping_criteria": [_after_one_step]})
        return self._run(call, args, kwargs, main, merge, objects, briefly, level=5)

    def _run(
        self,
        call: Callable,
        args,
        kwargs,
        main: Tensor | None,
        merge: Callable,
        objects: bool,
        briefly: Mapping[str, object] | None,
        level: int,
    ):
        """
        Args:
            briefly: arguments with which the call tells as soon as it can whether rows are mixed up; None where that is
                not to be tried.
        """
        current = current_route()
        names = current.adapter_names
        if isinstance(names, str) or len(set(names)) == 1 or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        if main is None or objects or not _can_divide(args, kwargs, main.shape[0]):
            return call(*args, **kwargs)
        key = frozenset(names)
        # Rows that cannot be mixed cannot be mixed with others either.
        refusal = next((said for known, said in list(self._refused.items()) if known <= key), None)
        if refusal is not None:
            return self._run_apart(call, args, kwargs, main, merge, refusal)
        failed: Exception | None = None
        try:
            if briefly is not None and not key <= self._rows_first and _is_square(args, kwargs, main.shape[0]):
                self._try_one_more_row(call, args, {**kwargs, **briefly}, main)
            # Containers are copied: what a model writes to them is not for the call that comes after.
            given = map_rows(lambda t: t, main.shape[0], args, kwargs)
            result = call(*given[0], **given[1])
            self._rows_first |= key
            return result
        except MixedBatchError as error:
            refusal, lasting = str(error), isinstance(error, NeverMixedError)
        except DTSError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            # It may be the model's, which does not take what wrappers make of rows that differ, or the call's.
            refusal, lasting, failed = f"so it fails ({type(error).__name__}: {error})", False, error
        try:
            result = self._run_apart(call, args, kwargs, main, merge, refusal)
        except Exception:
            if failed is not None:
                raise failed from None
            raise
        if lasting:
            if len(self._refused) >= _MOST_KNOWN:
                self._refused.clear()
            self._refused[key] = refusal
        warnings.warn(
            f"a batch of these adapters runs once for each of them, and returns no cache: {refusal}",
            stacklevel=level,
        )
        return result

    def _try_one_more_row(self, call: Callable, args, kwargs, main: Tensor) -> None:
        """Where a batch has as many rows as tokens, layers of a model that puts time first would take one for the
        other. One more row tells, once.

        Raises:
            MixedBatchError: so it is.
        """
        current, rows = current_route(), main.shape[0]
        names = current.names_for(rows)
        index = torch.tensor([*range(rows), 0])
        given = map_rows(lambda t: t[index.to(t.device)], rows, args, kwargs)
        devices = [main.device] if main.is_cuda else []
        with (
            torch.random.fork_rng(devices),  # what is drawn here is not to be missed later
            CallRoute([*names, names[0]], expandable=current.expandable, lease=current.lease),
            torch.no_grad(),
        ):
            call(*given[0], **given[1])

    def _run_apart(self, call: Callable, args, kwargs, main: Tensor, merge: Callable, refusal: str):
        current, rows = current_route(), main.shape[0]
        members: dict[str, list[int]] = {}
        for row, name in enumerate(current.names_for(rows)):
            members.setdefault(name, []).append(row)
        results = []
        for name, of_name in members.items():
            index = torch.tensor(of_name)
            part = map_rows(lambda t, index=index: t[index.to(t.device)], rows, args, kwargs)
            with CallRoute(name, lease=current.lease, rows=len(of_name)):
                results.append(call(*part[0], **part[1]))
        try:
            return merge(results, list(members.values()))
        except DTSError as error:
            raise MixedBatchError(f"{refusal} (It was run once for each adapter, but: {error})") from error


def _is_square(args, kwargs, rows: int) -> bool:
    """Whether a call has as many rows as tokens, which may so be taken for each other."""
    tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return any(t.dim() in (2, 3) and t.shape[0] == t.shape[1] == rows for t in tensors)


def _unless_compiled(model: object, briefly: dict[str, object]) -> dict[str, object] | None:
    """One more row would be another graph."""
    return None if getattr(model, "_compiled_call_impl", None) is not None else briefly


def _after_one_step(sequences: Tensor, scores: object, **kwargs: object) -> Tensor:
    """A criterion of ``generate``: stop at once."""
    return torch.ones(sequences.shape[0], dtype=torch.bool, device=sequences.device)


def _can_divide(args: tuple, kwargs: Mapping[str, object], rows: int) -> bool:
    """Whether all that a call is given is of rows, or the same for all of them, beyond doubt."""

    def fits(value: object) -> bool:
        if isinstance(value, Tensor):
            # A vector may be as long as the batch by chance: positions, ids of tokens.
            return value.dim() == 0 or value.shape[0] == 1 or (value.dim() > 1 and value.shape[0] == rows)
        if isinstance(value, Mapping):
            return all(map(fits, value.values()))
        if isinstance(value, (list, tuple)):
            one_each = len(value) == rows and all(isinstance(each, (list, *_PLAIN)) for each in value)
            return not one_each and all(map(fits, value))
        return True

    given = {name: value for name, value in kwargs.items() if name in _OF_THE_BATCH}
    return all(value is None or value is False for value in given.values()) and fits(args) and fits(kwargs)


def _pad_token(model: object, kwargs: Mapping[str, object]) -> int | None:
    """What ``generate`` of transformers fills finished sequences with."""
    given = kwargs, kwargs.get("generation_config"), getattr(model, "generation_config", None)
    for name in ("pad_token_id", "eos_token_id"):
        for settings in given:
            value = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
            value = value.flatten().tolist() if isinstance(value, Tensor) else value
            if isinstance(value, Sequence):
                value = value[0] if value else None
            if value is not None:
                return int(value)
    return None


def _merge(results: list, taken: list[list[int]], several: bool = False):
    """What parts of a batch have returned, with the rows in their order. Stricter than what joins a layer's outputs
    (`nn.rows.merge_rows`), which knows what layers return; a model may return anything.

    Args:
        several: whether there may be several neighbouring entries of each row (beams).

    Raises:
        RoutingError: something that is not of rows.
    """
    first = results[0]
    if all(isinstance(each, Tensor) for each in results):
        entries = first.shape[0] // len(taken[0]) if several and first.dim() else 1
        of_rows = all(t.dim() and t.shape[0] == entries * len(part) for t, part in zip(results, taken, strict=True))
        if not of_rows or entries == 0 or len({t.shape[1:] for t in results}) > 1:
            raise RoutingError(
                f"shapes {[list(t.shape) for t in results]} come back for {[len(part) for part in taken]} rows, and it "
                "cannot be told what of it is whose."
            )
        order = torch.tensor([row for part in taken for row in part]).argsort().to(first.device)
        return torch.cat(results).unflatten(0, (-1, entries))[order].flatten(0, 1)
    if all(isinstance(each, Mapping) and each.keys() == first.keys() for each in results):
        for name in first:
            if not isinstance(name, str) or name.startswith("logits_per_"):
                raise RoutingError(f"{name!r} is of the whole batch.")
        merged = {
            name: NoCache() if name in _CACHES else _merge([each[name] for each in results], taken, several)
            for name in first
        }
        return type(first)(**merged)
    if all(type(each) is tuple and len(each) == len(first) for each in results):
        return tuple(_merge(list(each), taken, several) for each in zip(*results, strict=True))
    if all(isinstance(each, _PLAIN) and each == first for each in results):
        return first
    kinds = ", ".join(sorted({type(each).__name__ for each in results}))
    raise RoutingError(
        f"what comes back differs in more than its rows ({kinds}; a cache in a tuple, or other numbers of steps). Ask "
        "for less: return_dict=True, use_cache=False."
    )


def _merge_generated(results: list, taken: list[list[int]], pad_token: Callable[[], int | None]):
    sequences = [each.get("sequences") if isinstance(each, Mapping) else each for each in results]
    if not all(isinstance(each, Tensor) and each.dim() == 2 and not each.is_floating_point() for each in sequences):
        raise RoutingError("what generate() returns are no sequences of tokens.")
    longest = max(each.shape[1] for each in sequences)
    pad = pad_token() if any(each.shape[1] < longest for each in sequences) else 0
    if pad is None:
        raise RoutingError("sequences of different lengths, and no pad_token_id to fill them with.")
    padded = [torch.nn.functional.pad(each, (0, longest - each.shape[1]), value=pad) for each in sequences]
    if not isinstance(results[0], Mapping):
        return _merge(padded, taken, several=True)
    # They count the beams of a part; without scores there is nothing that they are needed for.
    dropped = {"beam_indices"}
    if dropped <= results[0].keys() and {"scores", "logits"} & results[0].keys():
        raise RoutingError("'beam_indices' are of the whole batch. Ask for no scores or logits.")
    kept = [{name: value for name, value in each.items() if name not in dropped} for each in results]
    whole = [type(r)(**{**k, "sequences": own}) for r, k, own in zip(results, kept, padded, strict=True)]
    return _merge(whole, taken, several=True)
