"""The rows of a layer's inputs and outputs: which they are, some of them, and all together again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import MixedBatchError
from ..routing import Slots


def for_each(slots: Slots, input: Tensor) -> Tensor:
    """An input that all rows share (position ids, say), once for each of them, where slots come as a tensor."""
    if isinstance(slots, Tensor) and input.shape[0] == 1 and slots.shape[0] > 1:
        return input.expand(slots.shape[0], *input.shape[1:])
    return input


def batch_shape(args, kwargs) -> torch.Size | None:
    """The shape of the first tensor among a layer's arguments; None where a layer is given none."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape
    return None


def map_rows(function, rows: int, args, kwargs, least_dim: int = 1):
    """Apply ``function`` to every tensor of the arguments whose first dimension is the batch."""

    def on_leaf(leaf):
        has_rows = isinstance(leaf, Tensor) and leaf.dim() >= least_dim and leaf.shape[0] == rows
        return function(leaf) if has_rows else leaf

    return pytree.tree_map(on_leaf, (tuple(args), dict(kwargs)))


def merge_rows(results: list, members: list[list[int]]):
    """Outputs of parts of a batch, back in the order of its rows; also where a layer makes several entries of each row,
    one behind the other (a router, which flattens tokens).

    Raises:
        MixedBatchError: outputs that differ in more than their rows, or have none.
    """
    order = torch.tensor([row for part in members for row in part]).argsort()

    def merge(*leaves):
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            raise MixedBatchError(
                f"the adapters of this batch give outputs of different shapes, {[list(t.shape[1:]) for t in leaves]} "
                "a row (heads of different sizes); run them in separate batches."
            )
        if all(leaf.dim() and leaf.shape[0] == 1 for leaf in leaves):  # the same for all rows of a part
            leaves = [leaf.expand(len(part), *leaf.shape[1:]) for leaf, part in zip(leaves, members, strict=True)]
        sizes = {leaf.shape[0] / len(part) if leaf.dim() else 0.0 for leaf, part in zip(leaves, members, strict=True)}
        entries = int(min(sizes))
        # A vector of several elements for each row may be a layer's bias that it returns.
        if sizes != {entries} or entries == 0 or (leaves[0].dim() == 1 and entries > 1):
            raise MixedBatchError(
                f"a layer gives outputs of shapes {[list(leaf.shape) for leaf in leaves]} for "
                f"{[len(part) for part in members]} rows: it cannot be told which part of them is whose. Run these "
                "adapters in separate batches, or compress without this layer's own parameters (--exclude)."
            )
        joined = torch.cat(leaves)
        apart = joined.view(len(order), entries, *joined.shape[1:])[order.to(joined.device)]
        return apart.flatten(0, 1)

    return pytree.tree_map(merge, *results)
