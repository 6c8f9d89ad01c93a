"""What is in an adapter, and how near it comes to the fine-tune it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter_file import Parameter, directory_size, load_adapter, locate_adapter
from .checkpoint import Checkpoint, common_prefix
from .codes import is_matrix
from .errors import AdapterFormatError, CheckpointError
from .export import check_base
from .fit import relative_error
from .growth import grown_parameter, has_grown
from .lora import open_fine_tune


@dataclass(frozen=True)
class ParameterReport:
    """One parameter of an adapter.

    Attributes:
        kind: ``"low-rank"``, ``"vector"`` or ``"whole"``.
        rank: 0 where the kind has none.
        nbytes: bytes of its tensors in the file, without headers.
        error: relative Frobenius error of the delta; 0 for whole tensors, None where there is no fine-tune to compare
            with (`fuse`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    nbytes: int
    error: float | None


@dataclass(frozen=True)
class AdapterReport:
    """An adapter as a whole.

    Attributes:
        config: ``adapter_config.json``.
        nbytes: bytes of all its files.
        payload_nbytes: bytes of codes, levels, scales and whole tensors, without headers, config and card.
        covered_nbytes: 16-bit bytes of the parameters it holds deltas for.
        base_nbytes: bytes of the base checkpoint as stored.
    """

    config: dict[str, object]
    parameters: list[ParameterReport]
    nbytes: int
    payload_nbytes: int
    covered_nbytes: int
    base_nbytes: int

    @property
    def share_of_base(self) -> float:
        """Bytes of the files over bytes of the base as stored: what a budget limits."""
        return self.nbytes / self.base_nbytes

    @property
    def share_of_covered(self) -> float:
        """Bytes of the deltas over the 16-bit bytes of the parameters they cover: the paper's way of counting."""
        deltas = sum(p.nbytes for p in self.parameters if p.kind != "whole")
        return deltas / self.covered_nbytes if self.covered_nbytes else 0.0


@dataclass(frozen=True)
class VerifyReport:
    """An adapter against its fine-tune.

    Attributes:
        parameters: with errors measured now, not those recorded.
        worst_deviation: largest difference between a measured and the recorded error.
        total_error: relative Frobenius error over all deltas together.
        uncovered: relative size of what the adapter leaves out altogether (skipped tensors), over all deltas.
        matches: whether every measured error is the recorded one, to rounding: this is the adapter's fine-tune.
    """

    parameters: list[ParameterReport]
    worst_deviation: float
    total_error: float
    uncovered: float
    matches: bool


# Errors are recorded with four decimals; fits on another device or thread count may differ in the last of them.
_TOLERANCE = 2e-4


def inspect_adapter(path: str | Path) -> AdapterReport:
    """Read an adapter and report what it holds.

    Raises:
        AdapterFormatError: it is damaged or of an unknown version.
    """
    adapter = load_adapter(path)
    errors = dict(zip(sorted(adapter.parameters), adapter.config["errors"], strict=True))
    reports = [_report(name, p, errors[name]) for name, p in sorted(adapter.parameters.items())]
    covered = sum(2 * torch.Size(p.shape).numel() for p in adapter.deltas.values())
    return AdapterReport(
        config=dict(adapter.config),
        parameters=reports,
        nbytes=directory_size(locate_adapter(path)),
        payload_nbytes=adapter.nbytes,
        covered_nbytes=covered,
        base_nbytes=adapter.config["base_nbytes"],
    )


def verify(path: str | Path, base_model: str | Path, model: str | Path) -> VerifyReport:
    """Compare what an adapter reconstructs with the fine-tune it was made from.

    Args:
        path: adapter directory.
        base_model: the base (or the reference) the adapter is added to.
        model: the fine-tune; also the directory of a PEFT LoRA of the base.

    Raises:
        AdapterFormatError, CheckpointError: an input cannot be read, or the fine-tune lacks tensors.
        BaseMismatchError: not the adapter's base.
    """
    adapter = load_adapter(path)
    if None in adapter.config["errors"]:
        raise AdapterFormatError(f"{path} is a mixture of adapters: there is no fine-tune to compare it with.")
    base = Checkpoint.open(base_model)
    fine_tune = open_fine_tune(model, base_model)
    check_base(adapter, base)
    strip, add = common_prefix(fine_tune.tensors, base.tensors)
    theirs = {add + name.removeprefix(strip): name for name in fine_tune.tensors}
    missing = [name for name in adapter.parameters if (grown_parameter(name) or name) not in theirs]
    if missing:
        raise CheckpointError(f"{model} lacks {len(missing)} tensors of the adapter (first: {missing[0]}).")
    recorded = dict(zip(sorted(adapter.parameters), adapter.config["errors"], strict=True))
    reports, worst, lost, left_out, total = [], 0.0, 0.0, 0.0, 0.0
    for name in sorted(base.tensors.keys() | adapter.parameters.keys()):
        parameter = adapter.parameters.get(name)
        grown = grown_parameter(name)
        if isinstance(parameter, Tensor):
            whole = fine_tune.get(theirs[grown or name])
            whole = whole[base.tensors[grown].shape[0] :] if grown in base.tensors else whole
            error = 0.0 if torch.equal(parameter, whole) else 1.0
        elif (
            name not in theirs
            or not base.tensors[name].dtype.is_floating_point
            or name in adapter.config["tied"]
            or not _have_equal_rows(base.tensors[name].shape, fine_tune.tensors[theirs[name]].shape)
        ):
            continue
        else:
            before, after = base.get(name).double(), fine_tune.get(theirs[name]).double()
            delta = (after[: len(before)] if before.dim() else after) - before
            norm = float(delta.square().sum())
            total += norm
            if parameter is None:
                left_out += norm
                lost += norm
                continue
            error = relative_error(delta, parameter)
            lost += error**2 * norm
        reports.append(_report(name, parameter, error))
        worst = max(worst, abs(error - recorded[name]))
    total = total or 1.0
    return VerifyReport(reports, worst, (lost / total) ** 0.5, (left_out / total) ** 0.5, worst <= _TOLERANCE)


def _have_equal_rows(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a tensor is as large as it was, or has rows that were added."""
    return before == after or has_grown(before, after)


def _report(name: str, parameter: Parameter, error: float | None) -> ParameterReport:
    if isinstance(parameter, Tensor):
        kind, rank = "whole", 0
    else:
        kind, rank = ("low-rank", parameter.rank) if is_matrix(parameter) else ("vector", 0)
    return ParameterReport(name, kind, tuple(parameter.shape), rank, parameter.nbytes, error)
