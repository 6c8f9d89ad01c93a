"""Rows that a fine-tune has added to its base's tables: tokens that the base does not have. Of these there is no delta,
so they are stored as they are, beside the delta of the rows that both have."""

from __future__ import annotations

import re
from collections.abc import Iterable

Shape = tuple[int, ...]

_SUFFIX = ".added_rows"
_OTHER_TABLES = re.compile(r"wpe|pos|type|seg")


def added_rows_of(parameter: str) -> str:
    """The name under which an adapter stores the rows that were added to a parameter."""
    return parameter + _SUFFIX


def grown_parameter(name: str) -> str | None:
    """The parameter whose added rows a name means; None for an ordinary parameter's."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def has_grown(before: Shape, after: Shape) -> bool:
    """Whether a tensor has become one with more rows, and is the same otherwise."""
    return len(before) == len(after) > 0 and after[0] > before[0] and after[1:] == before[1:]


def is_token_table(name: str) -> bool:
    """Whether an embedding is one of tokens, by its name, and not of positions, types or segments."""
    return _OTHER_TABLES.search(name) is None


def grown_like(tables: Iterable[tuple[Shape, Shape]], before: Shape, after: Shape) -> bool:
    """Whether a tensor has as many rows more as one of these tables: a head, or its bias."""
    sizes = {(old[0], new[0]) for old, new in tables if len(old) == 2 and has_grown(old, new)}
    return has_grown(before, after) and (before[0], after[0]) in sizes
