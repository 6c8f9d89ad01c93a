"""Where generated sequences end: each row at the end tokens of its own fine-tune, as their generation_config.json or
config.json name them (a chat model's are others than its base's)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .checkpoint import Checkpoint

KEY = "eos_token_id"  # of adapter_config.json, as of the configurations of transformers

Ends = tuple[int, ...]


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """The tokens at which a model's generated sequences end, sorted; none where its files name none."""
    folder = next((info.file.parent for info in checkpoint.tensors.values()), None)
    file = folder / "generation_config.json" if folder is not None else None
    settings: Mapping[str, object] = {}
    if file is not None and file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # what transformers would not read either
            settings = {}
    nested = checkpoint.config.get("text_config")
    for source in (settings, checkpoint.config, nested):
        found = as_ends(source.get(KEY)) if isinstance(source, Mapping) else ()
        if found:
            return list(found)
    return []


def as_ends(value: object) -> Ends:
    """One token, several, or none, as a configuration has them."""
    values = value.flatten().tolist() if isinstance(value, Tensor) else value
    values = values if isinstance(values, (list, tuple)) else [values]
    return tuple(sorted({each for each in values if type(each) is int and each >= 0}))


def with_endings(
    kwargs: Mapping[str, object], names: str | Sequence[str], ends_of: Callable[[str], Ends | None], settings: object
) -> dict[str, object]:
    """Arguments of transformers' ``generate`` with which each row ends where its adapter's fine-tune does. What the
    caller says of it (``eos_token_id``, ``generation_config``) stands.

    Args:
        names: of adapters, one for all rows or one for each.
        ends_of: an adapter's end tokens; None for the base's.
        settings: the model's ``generation_config``.
    """
    if KEY in kwargs or kwargs.get("generation_config") is not None:
        return dict(kwargs)
    base = as_ends(getattr(settings, KEY, None))
    ends = [ends_of(name) or base for name in ([names] if isinstance(names, str) else names)]
    if set(ends) == {base}:
        return dict(kwargs)
    if len(set(ends)) == 1:
        return {**kwargs, KEY: list(ends[0])}

    def said(name: str) -> int | None:
        return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)

    padding = said("pad_token_id")
    if padding is None:
        padding = (base or max(ends))[0]
    changed = {KEY: None, "pad_token_id": padding}
    changed["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), _EndOfRows(ends)]
    least, least_new = said("min_length") or 0, said("min_new_tokens") or 0
    if least or least_new:
        changed["logits_processor"] = [*(kwargs.get("logits_processor") or ()), _NotYet(ends, least, least_new)]
    return {**kwargs, **changed}


class _Rows:
    def __init__(self, ends: Sequence[Ends]) -> None:
        most = max(map(len, ends))
        self._table = torch.tensor([[*own, *[-1] * (most - len(own))] for own in ends])

    def table(self, sequences: Tensor) -> Tensor:
        """``[rows, most]``: the end tokens of each sequence, -1 where there are no more; beams are neighbours."""
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
        table = self.table(sequences)
        # Where a row has fewer than the most, its first one stands in the place of those that are missing.
        table = torch.where(table < 0, table[:, :1], table)
        filled = torch.where(table < 0, scores.gather(1, table.clamp_min(0)), float("-inf"))
        return scores.scatter(1, table.clamp_min(0), filled)
