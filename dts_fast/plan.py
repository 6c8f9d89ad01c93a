"""What becomes of every tensor of a checkpoint, and at which rank: all that is decided before anything is fitted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_file import Adapter, Parameter, total_size
from .card import render_card
from .checkpoint import Checkpoint, Pairing, is_embedding, pair_tensors
from .codes import PAGE_RANKS, CodedMatrix, CodedVector, LowRankDelta, matrix_shape, packed_size
from .config import DTSConfig
from .fingerprint import largest_fingerprint
from .growth import added_rows_of
from .rank import (
    Ranks,
    rank_by_energy,
    ranks_by_density,
    ranks_by_spectral_budget,
    ranks_by_uniform_budget,
    round_up,
    uniform_ranks,
)


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor: deltas as matrices or vectors, or stored whole.

    Attributes:
        first_added: of the names in ``whole`` that are added rows of a tensor (`growth`), the first of these.
        grown: the tensors that have such rows.
    """

    pairs: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, tuple[int, int]]
    vectors: frozenset[str]
    whole: Mapping[str, str]
    whole_info: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    tied: Mapping[str, str]
    skipped: Mapping[str, str]
    first_added: Mapping[str, int]
    grown: frozenset[str]


def make_plan(base: Checkpoint, fine_tune: Checkpoint, config: DTSConfig) -> Plan:
    pairing: Pairing = pair_tensors(base, fine_tune, include=config.include, exclude=config.exclude, whole=config.whole)
    matrices, vectors, whole, skipped = {}, set(), dict(pairing.added), dict(pairing.skipped)
    rows = {}  # that were added: of which tensor, and how many it had
    for name in pairing.pairs:
        shape = base.tensors[name].shape
        as_matrix = matrix_shape(shape)
        if name in pairing.grown and not (is_embedding(name, shape) and config.embeddings == "full"):
            rows[added_rows_of(name)] = pairing.pairs[name], shape[0]
        if is_embedding(name, shape) and config.embeddings != "low-rank":
            if config.embeddings == "skip":
                skipped[name] = "embedding"
            else:
                whole[name] = pairing.pairs[name]
        elif as_matrix is None or min(as_matrix) == 1:
            vectors.add(name)
        else:
            matrices[name] = as_matrix
    shapes = {name: base.tensors[name].shape for name in pairing.pairs}
    info = {name: (fine_tune.tensors[n].dtype, fine_tune.tensors[n].shape) for name, n in whole.items()}
    for name, (theirs, first) in rows.items():
        tensor = fine_tune.tensors[theirs]
        whole[name], info[name] = theirs, (tensor.dtype, (tensor.shape[0] - first, *tensor.shape[1:]))
    first_added = {name: first for name, (_, first) in rows.items()}
    return Plan(
        pairing.pairs,
        shapes,
        matrices,
        frozenset(vectors),
        whole,
        info,
        pairing.tied,
        skipped,
        first_added,
        pairing.grown,
    )


def _sketch(plan: Plan, ranks: Ranks) -> dict[str, Parameter]:
    """The parameters an adapter of these ranks would hold, with shapes and dtypes but no data."""

    def codes(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    sketch: dict[str, Parameter] = {}
    for name, (dtype, shape) in plan.whole_info.items():
        sketch[name] = torch.empty(shape, dtype=dtype, device="meta")
    for name in plan.vectors:
        shape = plan.shapes[name]
        sketch[name] = CodedVector(codes(packed_size(torch.Size(shape).numel())), floats(4), shape)
    for name, (n, k) in plan.matrices.items():
        r = ranks[name]
        if r > 0:
            u, v = (CodedMatrix(codes(r, packed_size(size)), floats(4), size) for size in (n, k))
            sketch[name] = LowRankDelta(u, floats(r), v, plan.shapes[name])
    return sketch


def assemble(
    name: str,
    described: Mapping[str, object],
    parameters: Mapping[str, Parameter],
    errors: Mapping[str, float],
    fingerprint: str,
) -> tuple[Adapter, str]:
    """The adapter and its card, parameters in the order of their names."""
    names = sorted(parameters)
    config = {**described, "base_fingerprint": fingerprint, "errors": [errors[n] for n in names]}
    return Adapter(config, {n: parameters[n] for n in names}), render_card(name, config, parameters)


def choose_ranks(
    name: str,
    described: Mapping[str, object],
    plan: Plan,
    config: DTSConfig,
    delta_of: Callable[[str], Tensor],
    spectrum_of: Callable[[str, int], Tensor],
) -> Ranks:
    """Ranks for every matrix, as the settings say.

    Args:
        name: of the adapter, for its card.
        described: its config as far as it is known, which a budget must count.
        delta_of: parameter to its delta as a matrix ``[N, K]``, checked.
        spectrum_of: parameter and count to the largest singular values of its delta.

    Raises:
        DTSError: a budget that is too small.
    """
    multiple = config.rank_multiple or 1
    if config.density is not None:
        return round_up(ranks_by_density(plan.matrices, config.density), plan.matrices, multiple)
    if config.rank is not None:
        return round_up(uniform_ranks(plan.matrices, config.rank), plan.matrices, multiple)
    if config.energy is not None:
        ranks = {n: _rank_for_energy(n, delta_of(n), spectrum_of, config.energy) for n in plan.matrices}
        return round_up(ranks, plan.matrices, multiple)

    def size_of(ranks: Ranks) -> int:
        # Never too small: every error has all its digits, and tensors that turn out unchanged are counted.
        sketch = _sketch(plan, ranks)
        fingerprint = "A" * largest_fingerprint(sum(not isinstance(p, Tensor) for p in sketch.values()))
        return total_size(*assemble(name, described, sketch, dict.fromkeys(sketch, 888.8888), fingerprint))

    budget = int(config.budget * described["base_nbytes"])
    uniform = ranks_by_uniform_budget(plan.matrices, budget, size_of, multiple)
    if config.method == "paper":
        return uniform
    if not config.rank_multiple and uniform and statistics.median(uniform.values()) >= _RANKS_WORTH_ROUNDING:
        multiple = PAGE_RANKS
    spectra = {}
    for parameter, shape in plan.matrices.items():
        # Few matrices deserve several times the rank that an even share would give them.
        count = min(*shape, _SPECTRUM_FACTOR * uniform[parameter] + _SPECTRUM_EXTRA)
        spectra[parameter] = spectrum_of(parameter, count)
    return ranks_by_spectral_budget(plan.matrices, spectra, budget, size_of, multiple)


# From this rank on (half the matrices have it or more) whole pages move the divergence by a few per cent, up or down
# (bench/results/pages.jsonl); at ranks of ten they multiply it.
_RANKS_WORTH_ROUNDING = 64

# How many singular values the ranking of a budget looks at: this many times the rank of an even share, and some more.
_SPECTRUM_FACTOR = 4
_SPECTRUM_EXTRA = 32


def _rank_for_energy(name: str, delta: Tensor, spectrum_of: Callable[[str, int], Tensor], energy: float) -> int:
    return rank_by_energy(spectrum_of(name, min(delta.shape)), energy, float(delta.double().square().sum()))
