"""Distillation: change an adapter's codes and scales until the base with it predicts as its fine-tune does.

`compress` sees weights alone and takes every error in them for equally bad. The fine-tune's own predictions on some
inputs tell which errors matter: the factors keep their levels and their size, and learn which level each element takes
and how much each component counts, by the gradient of the difference between the two models' predictions. (BitDelta,
arXiv 2402.10193, section 3.1, learns the scales of one-bit deltas so; elements learn through their rounding as in
quantisation-aware training.) No labels are needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapter_file import MARKER, Adapter, Parameter, directory_size, load_adapter, save_adapter, total_size
from .atomic import check_target
from .attach import Owned
from .base import load_base
from .checkpoint import HUB_KEYS, Checkpoint, common_prefix
from .codes import LowRankDelta
from .divergence import Batch, Loss, default_loss
from .errors import AdapterFormatError, CheckpointError, DTSError
from .export import check_base
from .fit import relative_error
from .growth import grown_parameter
from .lora import LoraCheckpoint, open_fine_tune
from .model import DTSModel
from .nn import DTSEmbedding, DTSLinear
from .plan import assemble
from .trainable import TrainableDelta

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DistillConfig:
    """How to distill.

    Attributes:
        steps: of the optimiser (Adam), each on one batch; batches are taken again, in another order, when all are used.
        learning_rate: of factor elements, in units of the root mean square of their factor's levels; falls to 0.
        scale_learning_rate: of the components' scales, relative to them; falls to 0.
        held_out: share of the batches (one at least) that is not learned from, and tells what was gained.
        seed: of the batches' order.
        device, dtype: of both models, ``dtype`` as torch names it.
        model_kwargs: for the ``from_pretrained`` of transformers, of both.

    Raises:
        DTSError: a value out of range, a device that is not there.
    """

    steps: int = 200
    learning_rate: float = 0.03
    scale_learning_rate: float = 0.05
    held_out: float = 0.1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    model_kwargs: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "seed"):
            if type(getattr(self, name)) is not int:
                raise DTSError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        if self.steps < 1:
            raise DTSError(f"steps must be 1 or more, got {self.steps}.")
        for name in ("learning_rate", "scale_learning_rate", "held_out"):
            if not isinstance(getattr(self, name), Real) or isinstance(getattr(self, name), bool):
                raise DTSError(f"{name} must be a number, got {getattr(self, name)!r}.")
        for name in ("learning_rate", "scale_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DTSError(f"{name} must be finite and not negative, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise DTSError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        if self.dtype not in _DTYPES:
            raise DTSError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise DTSError(f"device {self.device!r} cannot be used here ({error}).") from error


@dataclass(frozen=True)
class DistillReport:
    """What `distill` did.

    Attributes:
        path: of the new adapter.
        nbytes: bytes of its files.
        before, after: loss on the batches that were held out, of the old and the new file as they are served: the
            divergence (nats) of predictions from the fine-tune's, unless the models give none
            (`divergence.default_loss`).
        trained: parameters whose codes or scales have changed.
        kept: those that are as they were: vectors, convolutions, stacked experts, what is stored whole.
    """

    path: Path
    nbytes: int
    before: float
    after: float
    trained: list[str]
    kept: list[str]


def distill(
    adapter: str | Path,
    base_model: str | Path,
    model: str | Path,
    batches: Sequence[Batch] | Callable[[nn.Module], Sequence[Batch]],
    out_path: str | Path,
    config: DistillConfig | None = None,
    *,
    loss: Loss | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> DistillReport:
    """Make an adapter's predictions those of its fine-tune, at the same size; the format stays.

    Args:
        adapter: its directory or hub id.
        base_model: the base, as for `DTSModel.from_pretrained`: what the adapter is added to.
        model: the fine-tune that the adapter was made from; both are loaded by transformers.
        batches: keyword arguments of the model, tensors on any device: inputs like those that the adapter will see,
            two batches at least (`texts.text_batches` makes them of texts). Some hundred rows of a few hundred tokens
            do. Or what makes them of the fine-tune: with `generated_batches` a language model writes them itself.
        out_path: the directory to write; it must not exist unless ``overwrite``.
        loss: of the outputs of the model with the adapter, of the fine-tune, and of the batch: a mean that takes
            gradients, and how many positions or rows it is of; `divergence.default_loss` if not given.
        progress: called as ``progress(what, done, total)``.

    Memory: both models, activations of one batch, and for each element of the factors 16 bytes beside what a step
    computes of it.

    Raises:
        AdapterFormatError, BaseMismatchError, CheckpointError: the three do not belong together, or cannot be read.
        DTSError: the models do not take the batches; nothing can be trained; it got no better; a target that exists.
            Nothing is written.
    """
    for name, path in (("adapter", adapter), ("base_model", base_model), ("model", model), ("out_path", out_path)):
        if not isinstance(path, (str, Path)):
            raise DTSError(f"{name}: expected a path or a hub id, got {type(path).__name__}.")
    if not isinstance(config, DistillConfig | None):
        raise DTSError(f"config: expected a DistillConfig, got {type(config).__name__}.")
    config, out_path = config or DistillConfig(), Path(out_path)
    batches = batches if callable(batches) else _checked(batches)
    check_target(out_path, overwrite=overwrite, marker=MARKER)
    source = load_adapter(adapter)
    if None in source.config["errors"]:
        raise AdapterFormatError(f"{adapter} is a mixture of adapters: there is no fine-tune to learn from.")
    hub = {key: config.model_kwargs[key] for key in HUB_KEYS if key in config.model_kwargs}
    checkpoints = Checkpoint.open(base_model, **hub), open_fine_tune(model, base_model, **hub)
    if isinstance(checkpoints[1], LoraCheckpoint):
        raise DTSError(f"{model} is a PEFT LoRA; expected a whole model. Merge it into its base (merge_and_unload).")
    check_base(source, checkpoints[0])
    _check_fine_tune(source, *checkpoints)
    _finished(out_path.name, source, config, source.parameters, dict.fromkeys(source.parameters, 8.8888))
    kwargs = {"dtype": getattr(torch, config.dtype), **config.model_kwargs}
    teacher, _ = load_base(model, {}, kwargs)
    student = DTSModel.from_pretrained(base_model, adapter, _NAME, max_adapters=1, **kwargs)
    for each in (teacher, student):
        each.requires_grad_(False)
        if "device_map" not in kwargs:
            each.to(config.device)
    if callable(batches):
        batches = _checked(batches(teacher))
    if loss is None:
        loss = partial(default_loss, problem_type=getattr(teacher.config, "problem_type", None))
    order = random.Random(config.seed)
    order.shuffle(batches)
    count = min(len(batches) - 1, max(1, round(config.held_out * len(batches))))
    held_out, learned = batches[:count], batches[count:]
    run = _Run(teacher, student, loss)
    before = run.mean(held_out)
    with _trainable(student, source, run, held_out[0], before) as deltas:
        run.learn(deltas, learned, config, order, progress)
        new = {name: delta.coded() for name, delta in deltas.items()}
    _put(student, source, new)
    after = run.mean(held_out)
    if not after < before:
        raise DTSError(
            f"distillation brought {adapter} no nearer to {model}: {before:.4g} became {after:.4g} on batches that "
            "were held out. Give it more data, or a smaller learning rate. Nothing was written."
        )
    errors = dict(zip(sorted(source.parameters), source.config["errors"], strict=True)) | _errors(new, *checkpoints)
    finished = _finished(out_path.name, source, config, {**source.parameters, **new}, errors)
    save_adapter(out_path, *finished, overwrite=overwrite)
    trained = sorted(name for name, delta in new.items() if not _same(delta, source.parameters[name]))
    kept = sorted(source.parameters.keys() - set(trained))
    return DistillReport(out_path, directory_size(out_path), before, after, trained, kept)


_NAME = "distilled"


def _checked(batches: Sequence[Batch]) -> list[Batch]:
    found = [batches] if isinstance(batches, (Mapping, Tensor, str)) else list(batches)
    for batch in found:
        if not isinstance(batch, Mapping):
            raise DTSError(
                "batches: expected a list of the model's keyword arguments, {'input_ids': ..., 'attention_mask': ...}, "
                f"got a {type(batch).__name__}."
            )
    if len(found) < 2:
        raise DTSError(
            f"distill takes two batches or more, one to learn from and one to measure, got {len(found)}. Give it more "
            "data, or make batches smaller (--batch-size, --max-length)."
        )
    return found


class _Run:
    """Two models on batches."""

    def __init__(self, teacher: nn.Module, student: DTSModel, loss: Loss) -> None:
        self.teacher, self.student, self.loss = teacher, student, loss

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        try:
            with torch.no_grad():
                wanted = self.teacher(**self._moved(batch, self.teacher))
            batch = self._moved(batch, self.student)
            ours = self.student(**batch)
        except DTSError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            shapes = ", ".join(f"{name} {list(getattr(value, 'shape', ()))}" for name, value in batch.items())
            raise DTSError(f"the models do not take a batch of {shapes}: {error} (Nothing was written.)") from error
        found = self.loss(ours, wanted, batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            raise DTSError(f"loss: expected (mean, count), a tensor and a number, got {type(found).__name__}.")
        return found

    @torch.no_grad()
    def outputs(self, batch: Batch) -> object:
        return self.student(**self._moved(batch, self.student))

    def is_like(self, intact: object, batch: Batch, before: float) -> bool:
        """Whether the student's outputs are what they were, but for rounding: as near as a small share of what
        separates it from the teacher."""
        batch = self._moved(batch, self.student)
        with torch.no_grad():
            now, none = (float(self.loss(o, intact, batch)[0]) for o in (self.student(**batch), intact))
        rounding = 1e-6 if self.student.dtype == torch.float32 else 1e-3
        return abs(now - none) <= 0.02 * before + rounding

    def _moved(self, batch: Batch, model: nn.Module) -> dict[str, object]:
        return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @torch.no_grad()
    def mean(self, batches: Sequence[Batch]) -> float:
        found = [self(batch) for batch in batches]
        total = sum(count for _, count in found)
        if not total:
            raise DTSError("no position of the batches that are held out counts (attention_mask, labels of -100).")
        return sum(float(value) * count for value, count in found) / total

    def learn(
        self,
        deltas: Mapping[str, TrainableDelta],
        batches: list[Batch],
        config: DistillConfig,
        order: random.Random,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        factors = [factor for delta in deltas.values() for factor in delta.factors]
        groups = [
            {"params": [factor.values for factor in factors], "lr": config.learning_rate},
            {"params": [delta.change for delta in deltas.values()], "lr": config.scale_learning_rate},
        ]
        # Short memory of squares: a run of some hundred steps has none to spare for a slow start.
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
        queue: list[Batch] = []
        for step in range(config.steps):
            if not queue:
                queue = order.sample(batches, len(batches))
            value, count = self(queue.pop())
            if not count:
                continue
            now = float(value.detach())
            if not math.isfinite(now):
                raise DTSError(f"the loss is {now} at step {step}; nothing was written. Try dtype float32.")
            if progress is not None:
                progress(f"loss {now:.4g}", step, config.steps)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            for factor in factors:
                factor.confine_()


@contextmanager
def _trainable(
    student: DTSModel, source: Adapter, run: _Run, batch: Batch, before: float
) -> Iterator[dict[str, TrainableDelta]]:
    """Deltas of linear layers and embeddings, which the student takes from there instead of its bank meanwhile.

    Raises:
        DTSError: there are none.
    """
    owned, _ = student._live.owners(source)
    places = _places(student, source, owned)
    if not places:
        raise DTSError("nothing to distill: the adapter has no delta of a linear layer or an embedding.")
    deltas = {name: TrainableDelta(source.parameters[name]) for name in places}
    intact = run.outputs(batch)
    with ExitStack() as stack:
        called: set[str] = set()
        hooks: dict[str, list[RemovableHandle]] = {}
        for name, paths in places.items():
            for path in paths:
                wrapper = student._wrappers[path]
                deltas[name].to(wrapper.bank.pages.device)
                _load(student, path, {leaf: p for leaf, p in owned[path].items() if leaf != "weight"})
                hook = wrapper.register_forward_hook(_adding(deltas[name], path, called), with_kwargs=True)
                stack.callback(hook.remove)
                hooks.setdefault(name, []).append(hook)
        run.outputs(batch)
        # Some models read a layer's weight and do not call it, and of experts a batch may call few: theirs stay.
        for name, paths in places.items():
            if not called.issuperset(paths):
                for hook, path in zip(hooks[name], paths, strict=True):
                    hook.remove()
                    _load(student, path, owned[path])
                del deltas[name]
        if not deltas or not run.is_like(intact, batch, before):
            raise DTSError(f"distill does not know how {type(student.model).__name__} uses its layers.")
        yield deltas


def _load(student: DTSModel, path: str, parameters: Mapping[str, Parameter]) -> None:
    """Give a layer other parameters of the adapter."""
    slot = student.slots.slot(_NAME)
    student._wrappers[path].clear_slot(slot)
    if parameters:
        student._wrappers[path].load_slot(slot, parameters)


def _put(student: DTSModel, source: Adapter, new: Mapping[str, LowRankDelta]) -> None:
    """Serve new deltas in the places of the adapter's."""
    changed = Adapter(source.config, {**source.parameters, **new})
    owned, _ = student._live.owners(changed)
    ours = {id(delta) for delta in new.values()}
    for path, parameters in owned.items():
        if any(id(parameter) in ours for parameter in parameters.values()):
            _load(student, path, parameters)


def _same(one: LowRankDelta, other: LowRankDelta) -> bool:
    return torch.equal(one.s, other.s) and all(
        torch.equal(a.dequantize(), b.dequantize()) for a, b in ((one.u, other.u), (one.v, other.v))
    )


def _places(student: DTSModel, source: Adapter, owned: Owned) -> dict[str, list[str]]:
    """Names of the deltas that can be trained, with the paths of the layers that they belong to: several where weights
    are tied."""
    names = {id(parameter): name for name, parameter in source.parameters.items()}
    places: dict[str, list[str]] = {}
    fixed = set()
    for path, parameters in owned.items():
        wrapper = student._wrappers[path]
        grown = any(grown_parameter(leaf) for leaf in parameters)
        can_train = isinstance(wrapper, (DTSLinear, DTSEmbedding)) and not (grown or wrapper.stored)
        for leaf, parameter in parameters.items():
            name = names[id(parameter)]
            places.setdefault(name, []).append(path)
            if not (can_train and leaf == "weight" and isinstance(parameter, LowRankDelta)):
                fixed.add(name)  # in all its places
    return {name: places[name] for name in sorted(places.keys() - fixed)}


def _adding(delta: TrainableDelta, path: str, called: set[str]) -> Callable[..., Tensor]:
    def add(wrapper: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        called.add(path)
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(wrapper, DTSEmbedding):
            return output + delta.rows(x, output.dtype)
        return output + delta.times(x.to(output.dtype), wrapper.transposed)

    return add


def _finished(
    name: str,
    source: Adapter,
    config: DistillConfig,
    parameters: Mapping[str, Parameter],
    errors: Mapping[str, float],
) -> tuple[Adapter, str]:
    """The new adapter and its card, with a note of what was done where the budget has room for it.

    Raises:
        DTSError: the budget has no room for its name.
    """
    settings, fingerprint = source.config["compression"], str(source.config["base_fingerprint"])
    for noted in ({"distilled": config.steps}, {}):
        described = {**source.config, "compression": settings | noted}
        adapter, card = assemble(name, described, parameters, errors, fingerprint)
        budget = settings.get("budget")
        if budget is None or total_size(adapter, card) <= int(budget * source.config["base_nbytes"]):
            return adapter, card
    raise DTSError(f"the adapter's budget has no room for the name {name!r} in its card. Choose a shorter --out-path.")


def _check_fine_tune(source: Adapter, base: Checkpoint, fine_tune: Checkpoint) -> None:
    """Refuse another fine-tune than the adapter's, by the errors of its smallest matrices.

    Raises:
        CheckpointError: it is another, or lacks parameters.
    """
    recorded = dict(zip(sorted(source.parameters), source.config["errors"], strict=True))
    matrices = {name: delta for name, delta in source.deltas.items() if isinstance(delta, LowRankDelta)}
    few = dict(sorted(matrices.items(), key=lambda item: item[1].nbytes)[:4])
    for name, error in _errors(few, base, fine_tune).items():
        if abs(error - recorded[name]) > 0.02:  # a merge in 16 bits moves it by less, another fine-tune by 1
            raise CheckpointError(
                f"not the fine-tune that the adapter was made from: the error of {name} is {error}, recorded is "
                f"{recorded[name]}."
            )


def _errors(deltas: Mapping[str, LowRankDelta], base: Checkpoint, fine_tune: Checkpoint) -> dict[str, float]:
    """Relative errors of deltas, as `compress` records them."""
    strip, add = common_prefix(fine_tune.tensors, base.tensors)
    theirs = {add + name.removeprefix(strip): name for name in fine_tune.tensors}
    errors = {}
    for name, delta in deltas.items():
        if name not in theirs:
            raise CheckpointError(f"the fine-tune has no {name}, which the adapter changes.")
        before, after = base.get(name).double(), fine_tune.get(theirs[name]).double()
        errors[name] = round(relative_error(after[: len(before)] - before, delta), 4)
    return errors
