"""The offline loop: a base and a fine-tune go in, an adapter directory comes out, one tensor pair at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import adapter_file
from .adapter_file import Adapter, Parameter
from .atomic import check_target
from .card import render_card
from .checkpoint import Checkpoint, Pairing, is_embedding, pair_tensors
from .codes import CodedMatrix, CodedVector, LowRankDelta, matrix_shape, packed_size
from .decompose import singular_values
from .errors import DTSError
from .fingerprint import largest_fingerprint, take_fingerprint
from .fit import METHODS, checked, fit, fit_vector, relative_error
from .rank import (
    Ranks,
    rank_by_energy,
    ranks_by_density,
    ranks_by_spectral_budget,
    ranks_by_uniform_budget,
    uniform_ranks,
)
from .version import __version__

Progress = Callable[[str, int, int], None]

EMBEDDING_CHOICES = ("low-rank", "skip", "full")


@dataclass(frozen=True)
class DTSConfig:
    """How to compress. Exactly one of ``budget``, ``density``, ``rank`` and ``energy``; a budget of 1 % if none is
    given.

    Attributes:
        budget: bytes of the adapter's files over bytes of the base checkpoint as stored; the files obey it. With the
            method ``"paper"`` every matrix gets the same density, else ranks go where they buy most
            (`rank.ranks_by_spectral_budget`).
        density: rank of a matrix over ``min(N, K)``, truncated to an integer (paper).
        rank: rank of every matrix.
        energy: share of each delta's squared Frobenius norm that its rank must hold.
        method: how factors are fitted, see `fit.fit`.
        include, exclude: regular expressions on parameter names.
        whole: regular expression of parameters stored whole, not as a delta.
        embeddings: token, position and type tables ``"low-rank"`` like any matrix, ``"skip"`` (stay the base's), or
            ``"full"`` (stored whole).
        reference: checkpoint whose weights the deltas are taken from and added to, in place of the base (the
            paper's DTS-D: a merged model).
        device: where deltas are fitted.
    """

    budget: float | None = None
    density: float | None = None
    rank: int | None = None
    energy: float | None = None
    method: str = "refined"
    include: str | None = None
    exclude: str | None = None
    whole: str | None = None
    embeddings: str = "low-rank"
    reference: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "density", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DTSError(f"give one of budget, density, rank and energy, not {' and '.join(given)}.")
        if not given:
            object.__setattr__(self, "budget", 0.01)
        for name in ("budget", "density", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise DTSError(f"{name} must lie above 0 and up to 1 (1 % is 0.01), got {value}.")
        if self.rank is not None and self.rank < 0:
            raise DTSError(f"rank must not be negative, got {self.rank}.")
        if self.method not in METHODS:
            raise DTSError(f"unknown method {self.method!r}; known: {', '.join(sorted(METHODS))}.")
        for name in ("include", "exclude", "whole"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise DTSError(f"{name} is not a regular expression ({error}): {getattr(self, name)!r}.") from error
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise DTSError(f"device {self.device!r} cannot be used here ({error}).") from error
        if self.embeddings not in EMBEDDING_CHOICES:
            raise DTSError(f"embeddings must be one of {', '.join(EMBEDDING_CHOICES)}, got {self.embeddings!r}.")


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did.

    Attributes:
        path: the adapter directory.
        nbytes: bytes of its files.
        base_nbytes: bytes of the base checkpoint's files.
        skipped: parameter to reason, for all that is not in the adapter.
    """

    path: Path
    nbytes: int
    base_nbytes: int
    skipped: Mapping[str, str]

    @property
    def share(self) -> float:
        """Bytes of the adapter over bytes of the base."""
        return self.nbytes / self.base_nbytes


def compress(
    base_model: str | Path,
    model: str | Path,
    out_path: str | Path,
    config: DTSConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a fine-tune of a base model to an adapter directory.

    Args:
        base_model, model: a ``.safetensors`` file, a directory (sharded or not), or a hub id.
        out_path: the directory to write; it must not exist unless ``overwrite``.
        progress: called as ``progress(parameter, done, total)`` before each parameter.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two do not belong together.
        DTSError: NaN or Inf in a delta, a budget too small, a target that exists or cannot be written.
    """
    config = config or DTSConfig()
    out_path = Path(out_path)
    check_target(out_path, overwrite=overwrite, marker=adapter_file.CONFIG_NAME)
    base, fine_tune = Checkpoint.open(config.reference or base_model), Checkpoint.open(model)
    base_nbytes = base.nbytes if config.reference is None else Checkpoint.open(base_model).nbytes
    plan = _make_plan(base, fine_tune, config)
    described = _describe(config, base, base_model, base_nbytes, fine_tune, plan.tied)
    ranks = _choose_ranks(out_path.name, described, plan, config, base, fine_tune)

    parameters: dict[str, Parameter] = {}
    errors: dict[str, float] = {}
    skipped = dict(plan.skipped)
    names = sorted(plan.matrices.keys() | plan.vectors | plan.whole.keys())
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        if name in plan.whole:
            checked(whole := fine_tune.get(plan.whole[name]), name)
            parameters[name] = whole
            errors[name] = 0.0
            continue
        before, after = base.get(name), fine_tune.get(plan.pairs[name])
        delta = _difference(after, before, config.device)
        if not bool((delta != 0).any()):  # NaN differs from 0: it is refused below, not skipped
            skipped[name] = "unchanged"
        elif name in plan.vectors:
            parameters[name] = fit_vector(delta, name=name)
        elif ranks[name] == 0:
            checked(delta, name)  # NaN and Inf are refused in these as well
            skipped[name] = "rank 0"
        else:
            parameters[name] = fit(delta, ranks[name], method=config.method, name=name)
        if name in parameters:
            errors[name] = round(relative_error(delta, parameters[name]), 4)
    if progress is not None:
        progress("writing", len(names), len(names))

    fingerprint = take_fingerprint(base.get, [n for n, p in parameters.items() if not isinstance(p, Tensor)])
    adapter, card = _assemble(out_path.name, described, parameters, errors, fingerprint)
    adapter_file.save_adapter(out_path, adapter, card, overwrite=overwrite)
    return CompressReport(out_path, adapter_file.directory_size(out_path), base_nbytes, skipped)


def _assemble(
    name: str,
    described: Mapping[str, object],
    parameters: Mapping[str, Parameter],
    errors: Mapping[str, float],
    fingerprint: str,
) -> tuple[Adapter, str]:
    """The adapter and its card, parameters in the order of their names."""
    names = sorted(parameters)
    config = {**described, "base_fingerprint": fingerprint, "errors": [errors[n] for n in names]}
    rows = []
    for n in names:
        parameter = parameters[n]
        rank = parameter.rank if isinstance(parameter, LowRankDelta) else 0
        rows.append((n, "x".join(map(str, parameter.shape)), rank, parameter.nbytes, errors[n]))
    return Adapter(config, {n: parameters[n] for n in names}), render_card(name, config, rows)


@dataclass(frozen=True)
class _Plan:
    """What becomes of every tensor: deltas as matrices or vectors, or stored whole."""

    pairs: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, tuple[int, int]]
    vectors: frozenset[str]
    whole: Mapping[str, str]
    whole_info: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    tied: Mapping[str, str]
    skipped: Mapping[str, str]


def _make_plan(base: Checkpoint, fine_tune: Checkpoint, config: DTSConfig) -> _Plan:
    pairing: Pairing = pair_tensors(base, fine_tune, include=config.include, exclude=config.exclude, whole=config.whole)
    matrices, vectors, whole, skipped = {}, set(), dict(pairing.added), dict(pairing.skipped)
    for name in pairing.pairs:
        shape = base.tensors[name].shape
        as_matrix = matrix_shape(shape)
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
    return _Plan(pairing.pairs, shapes, matrices, frozenset(vectors), whole, info, pairing.tied, skipped)


def _sketch(plan: _Plan, ranks: Ranks) -> dict[str, Parameter]:
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


def _choose_ranks(
    name: str,
    described: Mapping[str, object],
    plan: _Plan,
    config: DTSConfig,
    base: Checkpoint,
    fine_tune: Checkpoint,
) -> Ranks:
    if config.density is not None:
        return ranks_by_density(plan.matrices, config.density)
    if config.rank is not None:
        return uniform_ranks(plan.matrices, config.rank)

    def delta_of(parameter: str) -> Tensor:
        return _difference(fine_tune.get(plan.pairs[parameter]), base.get(parameter), config.device)

    if config.energy is not None:
        return {n: _rank_for_energy(delta_of(n), shape, config.energy, n) for n, shape in plan.matrices.items()}

    def size_of(ranks: Ranks) -> int:
        # Never too small: every error has all its digits, and tensors that turn out unchanged are counted.
        sketch = _sketch(plan, ranks)
        fingerprint = "A" * largest_fingerprint(sum(not isinstance(p, Tensor) for p in sketch.values()))
        errors = dict.fromkeys(sketch, 888.8888)
        return adapter_file.total_size(*_assemble(name, described, sketch, errors, fingerprint))

    budget = int(config.budget * described["base_nbytes"])
    uniform = ranks_by_uniform_budget(plan.matrices, budget, size_of)
    if config.method == "paper":
        return uniform
    spectra = {}
    for parameter, shape in plan.matrices.items():
        # Few matrices deserve several times the rank that an even share would give them.
        count = min(*shape, _SPECTRUM_FACTOR * uniform[parameter] + _SPECTRUM_EXTRA)
        spectra[parameter] = singular_values(checked(delta_of(parameter), parameter).reshape(shape), count).cpu()
    return ranks_by_spectral_budget(plan.matrices, spectra, budget, size_of)


# How many singular values the ranking of a budget looks at: this many times the rank of an even share, and some more.
_SPECTRUM_FACTOR = 4
_SPECTRUM_EXTRA = 32


def _rank_for_energy(delta: Tensor, shape: tuple[int, int], energy: float, name: str) -> int:
    matrix = checked(delta, name).reshape(shape)
    return rank_by_energy(singular_values(matrix, min(shape)), energy, float(matrix.double().square().sum()))


def _describe(
    config: DTSConfig,
    base: Checkpoint,
    base_model: str | Path,
    base_nbytes: int,
    fine_tune: Checkpoint,
    tied: Mapping[str, str],
) -> dict[str, object]:
    """The part of adapter_config.json that is known before the fit."""
    settings = {key: value for key, value in asdict(config).items() if value is not None and key != "device"}
    # Keys that say where or by which release a config was written describe the file, not the model.
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "model_type"}
    changed = {
        key: value
        for key, value in fine_tune.config.items()
        if key not in ignored and base.config.get(key) != value and base.config
    }
    return {
        "base_model_name_or_path": str(config.reference or base_model),
        "base_nbytes": base_nbytes,
        "compression": settings,
        "tied": dict(tied),
        "model_config": json.loads(json.dumps(changed)),
        "versions": {"dts_fast": __version__, "torch": str(torch.__version__)},
    }


def _difference(after: Tensor, before: Tensor, device: str) -> Tensor:
    """Fine-tune minus base, float32 (float64 where either is float64)."""
    dtype = torch.float64 if torch.float64 in (after.dtype, before.dtype) else torch.float32
    return after.to(device, dtype) - before.to(device, dtype)
