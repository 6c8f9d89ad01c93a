"""Mixtures of adapters and the choice among them: the paper's variant for unseen tasks.

An unseen task gets the known adapters' deltas, weighted by how similar the tasks are; or, where one must do, the
nearest adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .codes import Delta, DeltaSum, as_matrix, is_matrix, scaled, terms_of
from .errors import DTSError
from .growth import grown_parameter


def similarity_weights(characteristic: Tensor, known: Mapping[str, Tensor]) -> dict[str, float]:
    """Weights for a mixture: cosine similarities of task characteristics, normalised to sum 1 (DTS, arXiv 2512.01461,
    generalisation to unseen tasks). Opposite tasks (negative similarity) get weight 0.

    Args:
        characteristic: ``[d]`` of the unseen task.
        known: name to the characteristic ``[d]`` of each adapter.

    Raises:
        DTSError: no adapters, lengths that differ, a vector without direction, or no similarity above 0.
    """
    similarities = {name: max(0.0, value) for name, value in _similarities(characteristic, known).items()}
    total = math.fsum(similarities.values())
    if not total > 0:
        raise DTSError(
            f"no adapter's characteristic is similar to the given one (cosine above 0): {', '.join(known)}. Give "
            "weights by hand."
        )
    return {name: value / total for name, value in similarities.items()}


def select(characteristic: Tensor, known: Mapping[str, Tensor]) -> tuple[str, float]:
    """The adapter whose characteristic is nearest by cosine similarity, with that similarity; the first of equals.

    Args, Raises: see `similarity_weights`.
    """
    similarities = _similarities(characteristic, known)
    best = max(similarities, key=similarities.__getitem__)
    return best, similarities[best]


def _similarities(characteristic: Tensor, known: Mapping[str, Tensor]) -> dict[str, float]:
    if not known:
        raise DTSError("there is no adapter to choose from.")
    query = _direction(characteristic, "the given characteristic")
    similarities = {}
    for name, vector in known.items():
        other = _direction(vector, f"the characteristic of {name!r}")
        if other.shape != query.shape:
            raise DTSError(
                f"characteristics have different lengths: {len(query)} given, {len(other)} for {name!r}. Expected "
                "vectors from one encoder."
            )
        similarities[name] = float(query @ other)
    return similarities


def _direction(vector: Tensor, what: str) -> Tensor:
    vector = vector.detach().cpu().double().reshape(-1)
    norm = torch.linalg.vector_norm(vector)
    if not bool(torch.isfinite(norm)) or norm == 0:
        raise DTSError(f"{what} has no direction (all zero, NaN or Inf).")
    return vector / norm


def check_weights(members: Sequence[str], weights: Sequence[float]) -> list[float]:
    """One finite weight for each of one or more different members.

    Raises:
        DTSError: anything else.
    """
    weights = [float(weight) for weight in weights]
    if not members or len(members) != len(weights):
        raise DTSError(f"a mixture takes one weight for each adapter, got {len(weights)} for {len(members)} adapters.")
    twice = [member for member, count in Counter(members).items() if count > 1]
    if twice:
        raise DTSError(f"a mixture takes each adapter once, and {twice[0]} is given more often; add up its weights.")
    if not all(map(math.isfinite, weights)):
        raise DTSError(f"the weights of a mixture must be finite, got {weights}.")
    return weights


def mix(
    name: str, members: Sequence[tuple[float, Delta | Tensor | None]], base: Tensor | None = None
) -> Delta | Tensor | None:
    """One parameter of a mixture, ``base + sum of w_i (personalised_i - base)``.

    Deltas stay exact: the result lists all their components under weighted scales. A parameter that a member stores
    whole has no delta of its own; it is mixed densely.

    Args:
        name: of the parameter, for messages.
        members: weight and parameter of each; None where the member leaves the base's.
        base: the base's parameter, needed only where some members store it whole and others do not, or where the
            weights do not sum to 1.

    Raises:
        DTSError: whole tensors of different shapes, or such that cannot be mixed without the base; rows that several
            members have added.
    """
    present = [(weight, parameter) for weight, parameter in members if parameter is not None and weight != 0]
    whole = [(weight, parameter) for weight, parameter in present if isinstance(parameter, Tensor)]
    if not present:
        return None
    if grown_parameter(name) is not None:  # tokens that the base does not have are no one's but the member's
        first = present[0][1]
        if any(not torch.equal(other, first) for _, other in present[1:]):
            raise DTSError(
                f"{name!r} differs between the adapters: tokens that several of them have added cannot be mixed. "
                "Compress without them (--exclude), or keep all but one of them out of the mixture."
            )
        return first
    shapes = {tuple(parameter.shape) for _, parameter in present}
    if len(shapes) > 1:
        raise DTSError(
            f"{name!r} has different shapes in the adapters, {sorted(shapes)}, and cannot be mixed. Compress without "
            "it (--exclude), or keep it out of the mixture."
        )
    if not whole:
        if len({is_matrix(delta) for _, delta in present}) > 1:  # of single rows and columns there are both kinds
            present = [(weight, as_matrix(delta)) for weight, delta in present]
        if len({is_matrix(delta) for _, delta in present}) > 1:
            raise DTSError(f"{name!r} is low-rank in some of the adapters and a vector in others; it cannot be mixed.")
        terms = [term for weight, delta in present for term in terms_of(scaled(delta, weight))]
        return DeltaSum(tuple(terms)) if len(terms) > 1 else terms[0]
    first = whole[0][1]
    total = torch.zeros(first.shape, dtype=torch.float64)
    for weight, parameter in present:
        value = parameter if isinstance(parameter, Tensor) else parameter.dequantize(torch.float64)
        total += weight * value.cpu().double()
    # Whole tensors count as base plus delta: what of the base is missing (or too much) in their sum is added.
    of_base = 1.0 - math.fsum(weight for weight, _ in whole)
    if abs(of_base) > 1e-6:
        if base is None or base.shape != first.shape:
            raise DTSError(
                f"{name!r} is stored whole by adapters whose weights sum to {1 - of_base:.4g}; without "
                "the base's tensor it can be mixed only where they sum to 1. Give such weights, or compress without "
                "it (--exclude)."
            )
        total += of_base * base.detach().cpu().double()
    return total.to(first.dtype)
