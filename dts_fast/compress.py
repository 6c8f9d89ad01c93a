"""The offline loop: a base and a fine-tune go in, an adapter directory comes out, one tensor pair at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter_file import MARKER, Parameter, directory_size, save_adapter
from .atomic import check_target
from .characteristic import encode_characteristic, read_characteristic
from .checkpoint import Checkpoint
from .codes import CodedMatrix, LowRankDelta
from .config import DTSConfig
from .decompose import singular_values
from .endings import EOS_KEY, end_tokens
from .errors import CheckpointError, DTSError, DTSWarning
from .fingerprint import take_fingerprint
from .fit import checked, fit, fit_vector, relative_error
from .journal import Journal
from .lora import open_fine_tune
from .plan import Plan, assemble, choose_ranks, make_plan
from .version import __version__

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompressReport:
    """What `compress` did.

    Attributes:
        path: the adapter directory.
        nbytes: bytes of its files.
        base_nbytes: bytes of the base checkpoint's files.
        skipped: parameter to reason, for all that is not in the adapter.
        error: relative Frobenius error over all deltas that were to be in it, those of rank 0 among them.
        distance: norm of those deltas over that of the base's parameters. Fine-tunes are at some hundredths to tenths,
            unrelated weights at 1.4.
    """

    path: Path
    nbytes: int
    base_nbytes: int
    skipped: Mapping[str, str]
    error: float
    distance: float

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
        base_model, model: a ``.safetensors`` file, a directory (sharded or not), or a hub id. ``model`` may also be
            the directory of a PEFT LoRA of the base.
        out_path: the directory to write; it must not exist unless ``overwrite``.
        progress: called as ``progress(parameter, done, total)`` before each parameter.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two do not belong together.
        DTSError: NaN or Inf in a delta, a budget too small, a target that exists or cannot be written.
    """
    config = config or DTSConfig()
    if not isinstance(config, DTSConfig):
        raise DTSError(f"config: expected a DTSConfig, got {type(config).__name__}.")
    for name, path in (("base_model", base_model), ("model", model), ("out_path", out_path)):
        if not isinstance(path, (str, Path)):
            raise DTSError(f"{name}: expected a path or a hub id, got {type(path).__name__}.")
    out_path = Path(out_path)
    check_target(out_path, overwrite=overwrite, marker=MARKER)
    base = Checkpoint.open(config.reference or base_model)
    fine_tune = open_fine_tune(model, base_model)
    base_nbytes = base.nbytes if config.reference is None else Checkpoint.open(base_model).nbytes
    plan = make_plan(base, fine_tune, config)
    described = _describe(config, base, base_model, base_nbytes, fine_tune, plan.tied)
    if config.characteristic is not None:
        described["characteristic"] = encode_characteristic(read_characteristic(config.characteristic, config.encoder))
    with Journal(out_path, _journal_key(config, base, fine_tune)) as journal:
        work = _Work(base, fine_tune, plan, config, journal)
        ranks = choose_ranks(out_path.name, described, plan, config, work.matrix, work.spectrum)
        parameters: dict[str, Parameter] = {}
        errors: dict[str, float] = {}
        skipped = dict(plan.skipped)
        names = sorted(plan.matrices.keys() | plan.vectors | plan.whole.keys())
        for done, name in enumerate(names):
            if progress is not None:
                progress(name, done, len(names))
            found = work.fitted(name, ranks.get(name, 0))
            if isinstance(found, str):
                skipped[name] = found
            else:
                parameters[name], errors[name] = found
        if not parameters:
            reasons = ", ".join(sorted(set(skipped.values()))) or "the base has no parameters"
            said = f"the adapter is empty: no tensor of {model} is left to store ({reasons})."
            warnings.warn(said, DTSWarning, stacklevel=2)
        if progress is not None:
            progress("writing", len(names), len(names))
        fingerprint = take_fingerprint(base.get, [n for n, p in parameters.items() if not isinstance(p, Tensor)])
        adapter, card = assemble(out_path.name, described, parameters, errors, fingerprint)
        save_adapter(out_path, adapter, card, overwrite=overwrite)
    return CompressReport(out_path, directory_size(out_path), base_nbytes, skipped, *work.measured())


class _Work:
    """The steps that take time, each parameter by itself; what a journal has is not done again."""

    def __init__(
        self, base: Checkpoint, fine_tune: Checkpoint, plan: Plan, config: DTSConfig, journal: Journal
    ) -> None:
        self.base, self.fine_tune, self.plan, self.config, self.journal = base, fine_tune, plan, config, journal
        self._squares = torch.zeros(3, dtype=torch.float64)  # of deltas, of what is lost of them, of the base

    def measured(self) -> tuple[float, float]:
        """Relative error over all deltas fitted so far, and their norm over the base's."""
        delta, lost, base = self._squares.tolist()
        return (lost / delta if delta else 0.0) ** 0.5, (delta / base if base else 0.0) ** 0.5

    def _measure(self, name: str, delta: Tensor, error: float) -> Tensor:
        square = float(delta.double().square().sum())
        return torch.tensor([square, error**2 * square, float(self.base.get(name).double().square().sum())])

    def delta(self, name: str) -> Tensor:
        """Fine-tune minus base, float32 (float64 where either is float64), on the device where it is fitted."""
        before, after = self.base.get(name), self.fine_tune.get(self.plan.pairs[name])
        if name in self.plan.grown:
            after = after[: len(before)]  # what was added has no delta
        if after.shape != before.shape:
            raise CheckpointError(
                f"{name}: the header says {list(before.shape)}, the fine-tune's tensor has {list(after.shape)}."
            )
        dtype = torch.float64 if torch.float64 in (after.dtype, before.dtype) else torch.float32
        return after.to(self.config.device, dtype) - before.to(self.config.device, dtype)

    def matrix(self, name: str) -> Tensor:
        return checked(self.delta(name), name).reshape(self.plan.matrices[name])

    def spectrum(self, name: str, count: int) -> Tensor:
        """The ``count`` largest singular values of a delta, on the CPU."""
        known = self.journal.get("spectrum", name)
        if known is None or len(known["s"]) < count:
            known = {"s": singular_values(self.matrix(name), count).cpu()}
            self.journal.put("spectrum", name, known)
        return known["s"][:count]

    def fitted(self, name: str, rank: int) -> tuple[Parameter, float] | str:
        """A parameter as the adapter holds it and its relative error; or why the adapter does without."""
        if name in self.plan.whole:
            whole = self.fine_tune.get(self.plan.whole[name])
            whole = whole[self.plan.first_added[name] :].clone() if name in self.plan.first_added else whole
            checked(whole, name)
            return whole, 0.0
        if name in self.plan.matrices and rank and (known := self.journal.get("fit", name)) is not None:
            u, v = (CodedMatrix(known[f"{f}_codes"], known[f"{f}_levels"], n)
                    for f, n in zip("uv", self.plan.matrices[name], strict=True))  # fmt: skip
            if u.rank == rank:
                self._squares += known["squares"]
                return LowRankDelta(u, known["s"], v, self.plan.shapes[name]), float(known["error"])
        delta = self.delta(name)
        if not bool((delta != 0).any()):  # NaN differs from 0: it is refused below, not skipped
            return "unchanged"
        if name in self.plan.vectors:
            vector = fit_vector(delta, name=name)
            error = round(relative_error(delta, vector), 4)
            self._squares += self._measure(name, delta, error)
            return vector, error
        if rank == 0:
            checked(delta, name)  # NaN and Inf are refused in these as well
            self._squares += self._measure(name, delta, 1.0)
            return "rank 0"
        low_rank = fit(delta, rank, method=self.config.method, name=name)
        error = round(relative_error(delta, low_rank), 4)
        u, v = low_rank.u, low_rank.v
        parts = {"u_codes": u.codes, "u_levels": u.levels, "v_codes": v.codes, "v_levels": v.levels, "s": low_rank.s}
        squares = self._measure(name, delta, error)
        self._squares += squares
        self.journal.put("fit", name, parts | {"error": torch.tensor(error, dtype=torch.float64), "squares": squares})
        return low_rank, error


def _journal_key(config: DTSConfig, *checkpoints: Checkpoint) -> dict[str, object]:
    """All that the fits depend on: the settings, and the files as they are."""
    files = sorted({info.file for checkpoint in checkpoints for info in checkpoint.tensors.values()})
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"config": asdict(config), "files": states, "version": __version__, "torch": str(torch.__version__)}


def _describe(
    config: DTSConfig,
    base: Checkpoint,
    base_model: str | Path,
    base_nbytes: int,
    fine_tune: Checkpoint,
    tied: Mapping[str, str],
) -> dict[str, object]:
    """The part of adapter_config.json that is known before the fit."""
    unsaid = {"device", "characteristic", "encoder"}  # of this machine, or kept in a form of its own
    settings = {key: value for key, value in asdict(config).items() if value not in (None, 0) and key not in unsaid}
    # Keys that say where or by which release a config was written describe the file, not the model.
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "model_type"}
    changed = {
        key: value
        for key, value in fine_tune.config.items()
        if key not in ignored and base.config.get(key) != value and base.config
    }
    ends = end_tokens(fine_tune)
    return {
        **({EOS_KEY: ends} if ends and set(ends) != set(end_tokens(base)) else {}),
        "base_model_name_or_path": str(config.reference or base_model),
        "base_nbytes": base_nbytes,
        "compression": settings,
        "tied": dict(tied),
        "model_config": json.loads(json.dumps(changed)),
        "versions": {"dts_fast": __version__, "torch": str(torch.__version__)},
    }
