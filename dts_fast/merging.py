"""An adapter's parameters in a bare model, in place of the base's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import DTSError
from .nn.parameters import tensor_of


def check_tokens(model: nn.Module, merged: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Refuse a language model whose table would have more tokens than its head: it could not be read again.

    Args:
        merged: parameters by the id of the model's layer.

    Raises:
        DTSError: it would.
    """
    rows = []
    for get in (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")):
        try:
            layer = get() if callable(get) else None
        except NotImplementedError:  # models without tokens
            return
        before = getattr(getattr(layer, "base_layer", layer), "weight", None)
        if not isinstance(before, Tensor):
            return
        rows.append((before.shape[0], merged.get(id(layer), {}).get("weight", before).shape[0]))
    (table, grown), (head, after) = rows
    if grown > table == head == after:
        raise DTSError(
            f"the adapter adds {grown - table} tokens to the table and none to the head: a merged model could not be "
            "read again. Compress with both or neither (--include, --exclude)."
        )


def write_merged(model: nn.Module, layers: Sequence[nn.Module], merged: Sequence[Mapping[str, Tensor]]) -> None:
    """Put merged parameters into bare layers. A parameter that layers share stays shared where it is to be the same in
    all of them; otherwise each gets its own."""
    uses = Counter(id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    values: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    for layer, parameters in zip(layers, merged, strict=True):
        for name, value in parameters.items():
            values.setdefault(id(tensor_of(layer, name)), []).append((layer, name, value))
    for layer, parameters in zip(layers, merged, strict=True):
        for name, value in parameters.items():
            _resize(model, layer, name, len(value) if value.dim() else 0)
    untied = False
    for shared, places in values.items():
        first = places[0][2]
        if len(places) == uses[shared] and all(value is first or torch.equal(value, first) for *_, value in places):
            tensor_of(*places[0][:2]).data = first
            continue
        for layer, name, value in places:
            path, _, leaf = name.rpartition(".")
            module, old = layer.get_submodule(path), tensor_of(layer, name)
            own = nn.Parameter(value, old.requires_grad) if leaf in module._parameters else value
            setattr(module, leaf, own)
        untied = True
    if untied:
        _untie(model)


def _resize(model: nn.Module, layer: nn.Module, name: str, rows: int) -> None:
    """Let a layer, and a language model whose table it is, say how many rows there will be."""
    old = tensor_of(layer, name)
    before = old.shape[0] if old.dim() else 0
    if rows == before:
        return
    for attribute in ("num_embeddings", "out_features"):
        if getattr(layer, attribute, None) == before:
            setattr(layer, attribute, rows)
    if not isinstance(layer, nn.Embedding):
        return
    for module in model.modules():
        config = getattr(module, "config", None)
        for holder in (module, config, getattr(config, "text_config", None)):
            for name in ("vocab_size", "decoder_vocab_size"):
                if getattr(holder, name, None) == before:
                    setattr(holder, name, rows)


def _untie(model: nn.Module) -> None:
    """Let no parameters be shared any more, as a model's configuration knows only one switch for all of them."""
    seen: set[int] = set()
    for module in model.modules():
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[leaf] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
