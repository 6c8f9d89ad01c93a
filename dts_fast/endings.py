"""Where generated sequences end: each row at the end tokens of its own fine-tune, as its generation_config.json or
config.json names them (a chat model's are others than its base's)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import MixedBatchError

EOS_KEY = "eos_token_id"  # of adapter_config.json, as of the configurations of transformers

Ends = tuple[int, ...]

# What transformers does with the end tokens of a whole call besides ending it.
_OF_ALL_ROWS = ("exponential_decay_length_penalty", "forced_eos_token_id")


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """The tokens at which a model's generated sequences end; none where its files name none."""
    file = checkpoint.folder / "generation_config.json" if checkpoint.folder is not None else None
    if file is not None and file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError):  # then transformers goes by the other file, too
            settings = None
        if isinstance(settings, Mapping):
            return list(as_ends(settings.get(EOS_KEY)))
    for source in (checkpoint.config, checkpoint.config.get("text_config")):
        found = as_ends(source.get(EOS_KEY)) if isinstance(source, Mapping) else ()
        if found:
            return list(found)
    return []


def as_ends(value: object) -> Ends:
    """One token, several, or none, as a configuration has them."""
    values = value.flatten().tolist() if isinstance(value, Tensor) else value
    values = values if isinstance(values, (list, tuple)) else [values]
    return tuple(dict.fromkeys(each for each in values if type(each) is int and each >= 0))


def by_name(function: Callable, args: tuple, kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a call, all by their names."""
    signature = inspect.signature(function)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


class Endings:
    """Of one call of ``generate``: where the rows of each of its adapters end, as it is when the call begins.

    Args:
        names: of the adapters of the call.
        ends_of: an adapter's end tokens; None for the base's.
        settings: the model's ``generation_config``.
    """

    def __init__(self, names: str | Sequence[str], ends_of: Callable[[str], Ends | None], settings: object) -> None:
        self.settings = settings
        self.base = as_ends(getattr(settings, EOS_KEY, None))
        self._own = {name: ends_of(name) or self.base for name in ([names] if isinstance(names, str) else names)}

    @property
    def needed(self) -> bool:
        """Whether any row ends elsewhere than the base's."""
        return any(set(own) != set(self.base) for own in self._own.values())

    def said(self, kwargs: Mapping[str, object], name: str) -> object:
        """A setting of the call: the first that the arguments, their configuration and the model's have."""
        for source in (kwargs.get("generation_config"), self.settings):
            value = kwargs[name] if kwargs.get(name) is not None else getattr(source, name, None)
            if value is not None:
                return value
        return None

    def padded(self, kwargs: Mapping[str, object]) -> dict[str, object]:
        """Arguments with what finished rows are filled with, where neither they nor the model say it."""
        if not self.needed or self.base or self.said(kwargs, "pad_token_id") is not None or EOS_KEY in kwargs:
            return dict(kwargs)
        return {**kwargs, "pad_token_id": next(own for own in self._own.values() if own)[0]}

    def put_in(self, kwargs: Mapping[str, object], names: str | Sequence[str], ids: object) -> dict[str, object]:
        """Arguments with which each row ends where its adapter's fine-tune does. What the caller says of it stands.

        Args:
            names: one for all rows or one for each.
            ids: the prompts ``[B, T]``, if the call has them as tokens.

        Raises:
            MixedBatchError: rows end at different tokens, in a kind of search that knows one set of them.
        """
        if EOS_KEY in kwargs or getattr(kwargs.get("generation_config"), EOS_KEY, None) is not None:
            return dict(kwargs)
        ends = [self._own[name] for name in ([names] if isinstance(names, str) else names)]
        if all(set(own) == set(self.base) for own in ends):
            return dict(kwargs)
        if len({frozenset(own) for own in ends}) == 1:
            return {**kwargs, EOS_KEY: list(ends[0])}
        least, least_new = self.said(kwargs, "min_length") or 0, self.said(kwargs, "min_new_tokens") or 0
        of_all = any(self.said(kwargs, name) is not None for name in _OF_ALL_ROWS)
        if (self.said(kwargs, "num_beams") or 1) > 1 or of_all or (least and kwargs.get("inputs_embeds") is not None):
            raise MixedBatchError(
                "the adapters of this batch end at different tokens, and this kind of search knows one set of them. "
                "Run them in separate batches, or give eos_token_id for all."
            )
        padding = self.said(kwargs, "pad_token_id")
        changed: dict[str, object] = {EOS_KEY: None}
        tokens = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        if tokens and kwargs.get("attention_mask") is None:
            changed["attention_mask"] = _mask(ids, ends, padding)
        changed["pad_token_id"] = padding if padding is not None else (self.base or max(ends))[0]
        changed["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), _EndOfRows(ends)]
        if least or least_new:
            earlier = kwargs.get("logits_processor") or ()
            changed["logits_processor"] = [*earlier, _NotYet(ends, 0 if least_new else least, least_new)]
        return {**kwargs, **changed}


def _mask(ids: Tensor, ends: Sequence[Ends], padding: object) -> Tensor:
    """What transformers takes for padding where no mask is given: a token for it that is not an end token as well."""
    mask = torch.ones_like(ids)
    for row, own in enumerate(ends):
        pad = own[0] if padding is None and own else padding
        if isinstance(pad, int) and pad not in own:
            mask[row] = ids[row] != pad
    return mask


class _Rows:
    def __init__(self, ends: Sequence[Ends]) -> None:
        most = max(map(len, ends))
        self._table = torch.tensor([[*own, *[-1] * (most - len(own))] for own in ends])

    def table(self, sequences: Tensor) -> Tensor:
        """``[rows, most]``: the end tokens of each sequence, -1 where there are no more; those of a prompt are
        neighbours."""
        self._table = self._table.to(sequences.device)
        return self._table.repeat_interleave(sequences.shape[0] // self._table.shape[0], 0)


class _EndOfRows(_Rows):
    """A stopping criterion: the last token is one of the row's end tokens."""

    def __init__(self, ends: Sequence[Ends]) -> None:
        super().__init__(ends)
        # By this attribute transformers knows that rows end, and that others have to be filled.
        self.eos_token_id = torch.tensor(sorted({token for own in ends for token in own}))

    def __call__(self, sequences: Tensor, scores: object, **kwargs: object) -> Tensor:
        return (self.table(sequences) == sequences[:, -1:]).any(1)


class _NotYet(_Rows):
    """A logits processor: no row's end token before there are as many tokens as were asked for."""

    def __init__(self, ends: Sequence[Ends], least: int, least_new: int) -> None:
        super().__init__(ends)
        self.least, self.least_new = least, least_new
        self._prompt: int | None = None

    def __call__(self, sequences: Tensor, scores: Tensor) -> Tensor:
        length = sequences.shape[1]
        self._prompt = length if self._prompt is None else self._prompt
        if length >= max(self.least, self._prompt + self.least_new):
            return scores
        for tokens in self.table(sequences).unbind(1):
            there = (tokens >= 0) & (tokens < scores.shape[1])
            at = torch.where(there, tokens, 0)[:, None]
            scores = scores.scatter(1, at, torch.where(there[:, None], float("-inf"), scores.gather(1, at)))
        return scores
