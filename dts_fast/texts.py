"""Text files as batches for a language model or a classifier."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import hub_id
from .errors import DTSError

_NOT_TEXT = {".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip"}


def read_texts(path: str | Path, field: str = "text") -> list[str]:
    """The texts of a file: of ``.jsonl`` or ``.ndjson`` one for each line, under a key; any other is one running text.

    Raises:
        DTSError: it cannot be read, is not UTF-8, has no text, is of another kind (``.json``, ``.csv``, ...), or
            a line is not as expected.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in _NOT_TEXT:
        raise DTSError(f"{path}: expected a text file, or .jsonl with an object in each line; got {kind}.")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DTSError(f"{path}: expected a text file in UTF-8 ({error}).") from error
    if kind not in (".jsonl", ".ndjson"):
        texts = [content]
    else:
        texts = [_text_of(line, field, f"{path}, line {i}") for i, line in _lines(content)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DTSError(f"{path} has no text.")
    return texts


def _lines(content: str) -> Iterator[tuple[int, str]]:
    return ((i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip())


def _text_of(line: str, field: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DTSError(f"{where}: expected JSON ({error}).") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        raise DTSError(f"{where}: expected an object with a text under {field!r}, got {line[:80]!r}.")
    return entry[field]


def load_tokenizer(model: str | Path):
    """The tokenizer that stands beside a model: of a directory or hub id.

    Raises:
        DTSError: there is none, or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DTSError("a tokenizer needs transformers: pip install 'dts_fast[hf]'.") from error
    if Path(model).is_file():
        raise DTSError(f"{model}: expected a directory or hub id with a tokenizer, got a file.")
    repo_id, revision = (str(model), None) if Path(model).exists() else (hub_id(model) or (str(model), None))
    try:
        return AutoTokenizer.from_pretrained(repo_id, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise DTSError(f"{model}: expected a model with its tokenizer ({error}).") from error


def text_batches(texts: list[str], tokenizer, batch_size: int, max_length: int) -> list[dict[str, Tensor]]:
    """Batches of token ids: a single text is cut into rows of ``max_length`` tokens, of several each is a row.

    Args:
        tokenizer: of transformers, the fine-tune's; rows are no longer than it says its model takes.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the right to the longest of their batch.

    Raises:
        DTSError: sizes below 1; a single text, and a tokenizer in Python alone, which cannot cut it.
    """
    if batch_size < 1 or max_length < 1:
        raise DTSError(f"batch_size and max_length must be 1 or more, got {batch_size} and {max_length}.")
    if len(texts) == 1 and not tokenizer.is_fast:
        raise DTSError(f"{type(tokenizer).__name__} cannot cut a running text into rows: give a text a line (.jsonl).")
    tokenizer = copy.deepcopy(tokenizer)  # truncation is kept in it, for whoever uses it next
    max_length = min(max_length, tokenizer.model_max_length)
    settings = {"truncation": True, "max_length": max_length}
    if len(texts) == 1:
        # Each row gets its own special tokens; a short rest is none.
        rows = tokenizer(texts, return_overflowing_tokens=True, **settings)["input_ids"]
        rows = rows[:-1] if len(rows) > 1 and len(rows[-1]) < max_length // 2 else rows
    else:
        rows = tokenizer(texts, **settings)["input_ids"]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    rows = [row for row in rows if row]
    return [_padded(rows[i : i + batch_size], padding) for i in range(0, len(rows), batch_size)]


def _padded(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
