"""Layers that serve many adapters on one resident base.

A wrapper holds the original layer as ``base_layer`` and answers for its attributes, so that code which reads
``layer.weight`` goes on working. `wrap` chooses among them:

    linear.py     `DTSLinear`: linear layers, GPT-2's Conv1D, and what acts like them
    embedding.py  `DTSEmbedding`
    norm.py       `DTSNorm`: layer and RMS norms
    conv.py       `DTSConv`
    experts.py    `DTSExperts`: the experts of a mixture
    router.py     `DTSRouter`: their router, and other modules that multiply with a weight of their own
    module.py     `DTSModule`: anything else, run once for each distinct adapter of a batch
    parameters.py a layer with an adapter's parameters, for runs, reads and methods
    rows.py       rows of inputs and outputs
    banked.py     what linear, embedding, conv and router share
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from ..bank import Arena
from ..pieces import Piece
from ..prepack import why_not_packable
from ..slots import SlotTable
from .banked import BankedModule
from .conv import DTSConv, why_not_conv
from .embedding import DTSEmbedding
from .experts import DTSExperts, why_not_experts
from .linear import DTSLinear, acts_like_linear
from .module import DTSModule
from .norm import DTSNorm, why_not_norm
from .router import DTSRouter, why_not_router

__all__ = [
    "BankedModule",
    "DTSConv",
    "DTSEmbedding",
    "DTSExperts",
    "DTSLinear",
    "DTSModule",
    "DTSNorm",
    "DTSRouter",
    "wrap",
]

# Tables that are looked up with [query, key] distances: their input has no batch dimension, whatever its size. Nor has
# that of parametrizations (weight_norm), which make a layer's weight.
_RELATIVE_POSITIONS = (
    "relative_attention_bias", "relative_position_bias", "rel_embeddings", "distance_embedding", "pe_k",
)  # fmt: skip

# Layers of experts, in the field's usual names: experts.0.up_proj, experts.expert_0.wi.
_OF_EXPERTS = re.compile(r"(^|\.)experts?[._]")


def wrap(
    layer: nn.Module,
    slots: SlotTable,
    path: str = "",
    parameters: Collection[str] = (),
    *,
    arenas: Mapping[str, Arena] | None = None,
    prepack: bool = False,
) -> DTSModule:
    """The wrapper that serves a layer best.

    Args:
        path: the layer's name in its model.
        parameters: names of those that adapters change: of which pieces stacked experts consist.
        arenas: fixed capacities of its banks: of its ``weight``, or of those that `Piece.bank` names.
        prepack: `DTSLinear`'s, where the layer allows it.
    """
    arena = (arenas or {}).get("weight")
    time_first = isinstance(layer, nn.RNNBase) and not layer.batch_first
    if path.endswith(_RELATIVE_POSITIONS) or ".parametrizations." in f".{path}." or time_first:
        wrapper = DTSModule(layer, slots=slots)
        wrapper.batch_first = False
    elif type(layer) is nn.Embedding:
        wrapper = DTSEmbedding(layer, arena=arena, slots=slots)
    elif acts_like_linear(layer):
        prepack = prepack and why_not_packable(layer) is None
        wrapper = DTSLinear(layer, arena=arena, prepack=prepack, slots=slots)
    elif why_not_conv(layer) is None:
        wrapper = DTSConv(layer, arena=arena, slots=slots)
    elif why_not_norm(layer) is None:
        wrapper = DTSNorm(layer, slots=slots)
    elif why_not_experts(layer) is None:
        pieces = [piece for name in parameters if (piece := Piece.named(name)) is not None]
        wrapper = DTSExperts(layer, parts={p.parameter: p.parts for p in pieces}, arenas=arenas, slots=slots)
    elif why_not_router(layer) is None:
        wrapper = DTSRouter(layer, arena=arena, slots=slots)
    else:
        wrapper = DTSModule(layer, slots=slots)
    # Stacks of another library's, or of one expert: what comes in is sorted by expert, as far as one can tell.
    own_sorting = type(wrapper) is DTSModule and _has_stacks(layer) and not hasattr(layer, "has_gate")
    wrapper.gathers = own_sorting or _OF_EXPERTS.search(path) is not None
    return wrapper


def _has_stacks(layer: nn.Module) -> bool:
    experts = getattr(layer, "num_experts", None)
    return any(p is not None and p.dim() == 3 and p.shape[0] == experts for p in layer._parameters.values())
