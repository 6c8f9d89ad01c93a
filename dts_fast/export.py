"""Ways out: the dense checkpoint that a base and an adapter stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .adapter_file import Adapter, load_adapter
from .checkpoint import Checkpoint, is_embedding
from .dense import write_like
from .endings import EOS_KEY
from .errors import BaseMismatchError, DTSError
from .fingerprint import check_fingerprint
from .growth import added_rows_of, grown_parameter, is_token_table


def export_full(
    adapter_path: str | Path, base_model: str | Path, out_path: str | Path, *, overwrite: bool = False
) -> int:
    """Write base plus adapter as a dense Hugging Face checkpoint, file by file like the base's, in the base's dtypes.

    Args:
        adapter_path: adapter directory or hub id.
        base_model: ``.safetensors`` file, directory or hub id.
        out_path: directory to write.

    Returns:
        How many tensors differ from the base's.

    Raises:
        AdapterFormatError, CheckpointError: an input cannot be read.
        BaseMismatchError: the adapter was made for another base.
        DTSError: the target exists or cannot be written; a table with more tokens than its head.
    """
    adapter, base = load_adapter(adapter_path), Checkpoint.open(base_model)
    check_base(adapter, base)
    settings, changed = _settings(adapter, base), 0

    def tensor_of(name: str) -> Tensor:
        nonlocal changed
        tensor = _personalised(adapter, base, name)
        changed += tensor is not None
        return base.get(name) if tensor is None else tensor

    added = {
        name: p for name, p in adapter.parameters.items() if name not in base.tensors and grown_parameter(name) is None
    }
    if adapter.config["model_config"].get("tie_word_embeddings") is False:  # it expects what it had tied to be there
        for name, twin in adapter.config["tied"].items():
            if name not in base.tensors:
                tensor = _personalised(adapter, base, twin) if twin in base.tensors else added[twin].clone()
                added[name] = base.get(twin) if tensor is None else tensor
    ends = {EOS_KEY: adapter.config[EOS_KEY]} if EOS_KEY in adapter.config else None
    write_like(base, out_path, tensor_of, added=added, config=settings, generation=ends, overwrite=overwrite)
    return changed + len(added)


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse a checkpoint that is not the adapter's base.

    Raises:
        BaseMismatchError: tensors are missing, have other shapes or hold other weights.
    """
    expected = str(adapter.config["base_model_name_or_path"])
    for name, parameter in adapter.deltas.items():
        info = base.tensors.get(name)
        if info is None or info.shape != tuple(parameter.shape):
            raise BaseMismatchError(
                f"{base.source} is not the adapter's base {expected}: tensor {name!r} of shape "
                f"{list(parameter.shape)} expected, got {list(info.shape) if info else 'none'}."
            )
    for name, rows in adapter.parameters.items():
        grown = grown_parameter(name)
        info = base.tensors.get(grown) if grown is not None else None
        if grown is not None and (info is None or tuple(rows.shape[1:]) != info.shape[1:]):
            raise BaseMismatchError(
                f"{base.source} is not the adapter's base {expected}: {name!r} has rows of {list(rows.shape[1:])}, the "
                f"base's {grown!r} {f'those of {list(info.shape[1:])}' if info else 'is missing'}."
            )
    fingerprint = str(adapter.config["base_fingerprint"])
    check_fingerprint(fingerprint, {name: base.get(name) for name in adapter.deltas}, expected)


def _personalised(adapter: Adapter, base: Checkpoint, name: str) -> Tensor | None:
    """A base tensor with the adapter's delta, in the base's dtype; None where the adapter leaves it as it is."""
    source = _source(adapter, name)
    parameter, rows = adapter.parameters.get(source), adapter.parameters.get(added_rows_of(source))
    if isinstance(parameter, Tensor):
        return parameter.clone()  # a tied tensor is written under two names, which must not share memory
    if parameter is None and rows is None:
        return None
    value = base.get(name)
    if parameter is not None:
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        value = (value.to(wide) + parameter.dequantize(wide)).to(value.dtype)
    return value if rows is None else torch.cat([value, rows.to(value.dtype)])


def _source(adapter: Adapter, name: str) -> str:
    """Under which name an adapter has what it changes in a base tensor: that of another which it is tied to, or its
    own."""
    twin = adapter.config["tied"].get(name, "")
    has_twin = twin in adapter.parameters or added_rows_of(twin) in adapter.parameters
    return twin if has_twin and name not in adapter.parameters else name


def _settings(adapter: Adapter, base: Checkpoint) -> dict[str, object]:
    """What the written ``config.json`` has in place of the base's: the fine-tune's settings, and as many tokens as the
    tables have that are written.

    Raises:
        DTSError: a table with more tokens than its head, which no model has.
    """
    tables = [n for n, info in base.tensors.items() if is_embedding(n, info.shape) and is_token_table(n)]
    rows: dict[int, set[int]] = {}
    for name in tables:
        rows.setdefault(base.tensors[name].shape[0], set()).add(_rows_written(adapter, base, name))
    # Of tables that had as many and have not any more (an encoder's and a decoder's) the fine-tune's settings tell.
    sizes = {before: after.pop() for before, after in rows.items() if len(after) == 1}
    for name in (name for name in base.tensors if _HEAD.search(name) is not None):
        before, whole = base.tensors[name].shape[0], adapter.parameters.get(_source(adapter, name))
        after = sizes.get(before, before)
        if not isinstance(whole, Tensor) and before != after != _rows_written(adapter, base, name):
            raise DTSError(
                f"the adapter adds tokens to the table and not to the head {name}: a model that has this cannot be "
                "written. Compress with both or neither (--include, --exclude, --whole)."
            )
    return _with_vocabulary(adapter.config["model_config"], base.config, sizes)


# A language model's, by the names that model families give it.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")


def _rows_written(adapter: Adapter, base: Checkpoint, name: str) -> int:
    source = _source(adapter, name)
    whole, more = adapter.parameters.get(source), adapter.parameters.get(added_rows_of(source))
    if isinstance(whole, Tensor):
        return len(whole)
    return base.tensors[name].shape[0] + (0 if more is None else len(more))


def _with_vocabulary(
    changed: Mapping[str, object], own: Mapping[str, object], rows: Mapping[int, int]
) -> dict[str, object]:
    """Settings whose numbers of tokens are those of tables that are written, also within nested ones."""
    settings = dict(changed)
    before = own.get("vocab_size")
    if type(before) is int and before in rows and (rows[before] != before or "vocab_size" in settings):
        settings["vocab_size"] = rows[before]
    for key, value in own.items():
        theirs = settings.get(key, value)
        if isinstance(value, Mapping) and isinstance(theirs, Mapping):
            inner = _with_vocabulary(theirs, value, rows)
            if inner != theirs:
                settings[key] = inner
    return settings
