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
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.hooks import RemovableHandle

from .adapter_file import CONFIG_NAME, Adapter, Parameter, directory_size, load_adapter, save_adapter, total_size
from .atomic import check_target
from .attach import Owned
from .base import load_base
from .checkpoint import Checkpoint, common_prefix
from .codes import LowRankDelta
from .errors import AdapterFormatError, DTSError
from .fit import relative_error
from .growth import grown_parameter
from .lora import is_lora, open_fine_tune
from .model import DTSModel
from .nn import DTSEmbedding, DTSLinear
from .plan import assemble
from .trainable import TrainableDelta

Batch = Mapping[str, object]
# Of the outputs of student and teacher for a batch: a mean, and how many it is of.
Loss = Callable[[object, object, Batch], tuple[Tensor, int]]


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
        DTSError: a value out of range.
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
        if self.steps < 1:
            raise DTSError(f"steps must be 1 or more, got {self.steps}.")
        for name in ("learning_rate", "scale_learning_rate"):
            if not getattr(self, name) >= 0:
                raise DTSError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise DTSError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise DTSError(f"dtype: expected the name of a torch dtype such as bfloat16, got {self.dtype!r}.")


@dataclass(frozen=True)
class DistillReport:
    """What `distill` did.

    Attributes:
        path: of the new adapter.
        nbytes: bytes of its files.
        before, after: loss on the batches that were held out: the divergence (nats) of its predictions from the
            fine-tune's, unless the models give none (`default_loss`).
        trained: parameters whose codes and scales were learned.
        kept: those that stay as they were: vectors, convolutions, stacked experts, what is stored whole.
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
    batches: Sequence[Batch],
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
            do.
        out_path: the directory to write; it must not exist unless ``overwrite``.
        loss: of the outputs of the model with the adapter, of the fine-tune, and of the batch: a mean that takes
            gradients, and how many positions or rows it is of; `default_loss` if not given.
        progress: called as ``progress(what, done, total)``.

    Memory: both models, activations of one batch, and some 30 bytes for each element of the factors.

    Raises:
        AdapterFormatError, BaseMismatchError, CheckpointError: the three do not belong together, or cannot be read.
        DTSError: nothing in it can be trained; it got no better; a target that exists. Nothing is written.
    """
    config, loss, out_path = config or DistillConfig(), loss or default_loss, Path(out_path)
    batches = list(batches)
    if len(batches) < 2:
        raise DTSError(f"distill takes two batches or more, one to learn from and one to measure, got {len(batches)}.")
    check_target(out_path, overwrite=overwrite, marker=CONFIG_NAME)
    source = load_adapter(adapter)
    if None in source.config["errors"]:
        raise AdapterFormatError(f"{adapter} is a mixture of adapters: there is no fine-tune to learn from.")
    if Path(model).is_dir() and is_lora(model):
        raise DTSError(f"{model} is a PEFT LoRA; expected a whole model. Merge it into its base (merge_and_unload).")
    kwargs = {"dtype": getattr(torch, config.dtype), **config.model_kwargs}
    teacher = load_base(model, {}, dict(kwargs))
    student = DTSModel.from_pretrained(base_model, adapter, _NAME, max_adapters=1, **kwargs)
    for each in (teacher, student):
        each.requires_grad_(False)
        if "device_map" not in kwargs:
            each.to(config.device)
    described = _described(out_path.name, source, config)
    order = random.Random(config.seed)
    order.shuffle(batches)
    count = min(len(batches) - 1, max(1, round(config.held_out * len(batches))))
    held_out, learned = batches[:count], batches[count:]
    run = _Run(teacher, student, loss, student.device)
    before = run.mean(held_out)
    with _trainable(student, source, run, held_out[0], before) as deltas:
        run.learn(deltas, learned, config, order, progress)
        after = run.mean(held_out)
    if not after < before:
        raise DTSError(
            f"distillation brought {adapter} no nearer to {model}: {before:.4g} became {after:.4g} on batches that "
            "were held out. Give it more data, or a smaller learning rate. Nothing was written."
        )
    new = {name: delta.coded() for name, delta in deltas.items()}
    errors = dict(zip(sorted(source.parameters), source.config["errors"], strict=True))
    errors |= _errors(new, Checkpoint.open(base_model), open_fine_tune(model, base_model))
    finished = _finished(out_path.name, described, {**source.parameters, **new}, errors)
    save_adapter(out_path, *finished, overwrite=overwrite)
    kept = sorted(source.parameters.keys() - new.keys())
    return DistillReport(out_path, directory_size(out_path), before, after, sorted(new), kept)


_NAME = "distilled"


def default_loss(student: object, teacher: object, batch: Batch) -> tuple[Tensor, int]:
    """How far the student's outputs are from the teacher's, and the number of positions.

    Of models with ``logits [..., C]``: the Kullback-Leibler divergence ``KL(teacher || student)`` in nats; for one
    class (a regression) the squared error. Of those without: the squared error of ``last_hidden_state`` over the
    teacher's square. Positions that ``attention_mask [B, T]`` (of a decoder: ``labels`` of -100) leaves out do not
    count.

    Raises:
        DTSError: the outputs have neither.
    """
    ours, theirs = getattr(student, "logits", None), getattr(teacher, "logits", None)
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        ours, theirs = (getattr(output, "last_hidden_state", None) for output in (student, teacher))
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            raise DTSError(
                f"{type(teacher).__name__} has neither logits nor last_hidden_state to compare. Give distill() a loss."
            )
        ours, theirs = (_counted(t, batch) for t in (ours, theirs))
        return (ours - theirs).square().sum() / theirs.square().sum(), len(theirs)
    ours, theirs = (_counted(t, batch) for t in (ours, theirs))
    if theirs.shape[-1] == 1:
        return (ours - theirs).square().mean(), len(theirs)
    return kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="batchmean"), len(theirs)


def _counted(outputs: Tensor, batch: Batch) -> Tensor:
    """``[..., C]`` as float32 ``[positions, C]``, of the positions that count."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and outputs.dim() == 3 and labels.shape == outputs.shape[:2]:
        mask = labels != -100
    if isinstance(mask, Tensor) and outputs.dim() == 3 and mask.shape == outputs.shape[:2]:
        return outputs[mask.to(outputs.device).bool()].float()
    return outputs.flatten(0, -2).float()


class _Run:
    """Two models on batches."""

    def __init__(self, teacher: nn.Module, student: nn.Module, loss: Loss, device: torch.device) -> None:
        self.teacher, self.student, self.loss, self.device = teacher, student, loss, device

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted = self.teacher(**self._moved(batch))
        return self.loss(self.outputs(batch), wanted, batch)

    def outputs(self, batch: Batch) -> object:
        return self.student(**self._moved(batch))

    @torch.no_grad()
    def is_like(self, intact: object, batch: Batch, before: float) -> bool:
        """Whether the student's outputs are what they were, as near as a small share of its loss tells."""
        return float(self.loss(self.outputs(batch), intact, batch)[0]) <= 0.05 * before + 1e-6

    def _moved(self, batch: Batch) -> dict[str, object]:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @torch.no_grad()
    def mean(self, batches: Sequence[Batch]) -> float:
        found = [self(batch) for batch in batches]
        return sum(float(value) * count for value, count in found) / sum(count for _, count in found)

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
            value, _ = self(queue.pop())
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
    slot = student.slots.slot(_NAME)
    owned, _ = student._live.owners(source)
    places = _places(student, source, owned)
    deltas = {name: TrainableDelta(source.parameters[name]) for name in places}
    with torch.no_grad():
        intact = run.outputs(batch)
    with ExitStack() as stack:
        called: set[str] = set()
        hooks: dict[str, list[RemovableHandle]] = {}
        stack.callback(lambda: [hook.remove() for some in hooks.values() for hook in some])
        for name, paths in places.items():
            for path in paths:
                wrapper = student._wrappers[path]
                deltas[name].to(wrapper.bank.pages.device)
                wrapper.clear_slot(slot)
                rest = {leaf: parameter for leaf, parameter in owned[path].items() if leaf != "weight"}
                if rest:
                    wrapper.load_slot(slot, rest)
                hook = wrapper.register_forward_hook(_adding(deltas[name], name, called), with_kwargs=True)
                hooks.setdefault(name, []).append(hook)
        if not run.is_like(intact, batch, before):
            # Some models read a layer's weight and do not call it: what they read stays as it was.
            for name in deltas.keys() - called:
                for hook, path in zip(hooks.pop(name), places[name], strict=True):
                    hook.remove()
                    student._wrappers[path].clear_slot(slot)
                    student._wrappers[path].load_slot(slot, owned[path])
                del deltas[name]
            if not run.is_like(intact, batch, before):
                raise DTSError(f"distill does not know how {type(student.model).__name__} uses its layers.")
        if not deltas:
            raise DTSError("nothing to distill: the adapter has no delta of a linear layer or an embedding.")
        yield deltas


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


def _adding(delta: TrainableDelta, name: str, called: set[str]) -> Callable[..., Tensor]:
    def add(wrapper: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        called.add(name)
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(wrapper, DTSEmbedding):
            return output + delta.rows(x, output.dtype)
        return output + delta.times(x.to(output.dtype), wrapper.transposed)

    return add


def _described(name: str, source: Adapter, config: DistillConfig) -> dict[str, object]:
    """The new adapter's config as far as it is known, with a note of what was done where the budget has room for it.

    Raises:
        DTSError: the budget has no room for its name.
    """
    described = dict(source.config)
    budget = described["compression"].get("budget")
    noted = described | {"compression": described["compression"] | {"distilled": config.steps}}
    errors = dict.fromkeys(source.parameters, 8.8888)
    for each in (noted, described):
        if budget is None or _size(name, each, source, errors) <= int(budget * described["base_nbytes"]):
            return each
    raise DTSError(f"the adapter's budget has no room for the name {name!r} in its card. Choose a shorter --out-path.")


def _size(name: str, described: Mapping[str, object], source: Adapter, errors: Mapping[str, float]) -> int:
    return total_size(*_finished(name, described, source.parameters, errors))


def _finished(
    name: str, described: Mapping[str, object], parameters: Mapping[str, Parameter], errors: Mapping[str, float]
) -> tuple[Adapter, str]:
    return assemble(name, described, parameters, errors, str(described["base_fingerprint"]))


def _errors(deltas: Mapping[str, LowRankDelta], base: Checkpoint, fine_tune: Checkpoint) -> dict[str, float]:
    """Relative errors of deltas, as `compress` records them."""
    strip, add = common_prefix(fine_tune.tensors, base.tensors)
    theirs = {add + name.removeprefix(strip): name for name in fine_tune.tensors}
    errors = {}
    for name, delta in deltas.items():
        before, after = base.get(name).double(), fine_tune.get(theirs[name]).double()
        errors[name] = round(relative_error(after[: len(before)] - before, delta), 4)
    return errors
