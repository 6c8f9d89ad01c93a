"""How far the outputs of one model are from another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, logsigmoid

from .errors import DTSError

Batch = Mapping[str, object]
# Of the outputs of student and teacher for a batch: a mean, and how many positions it is of.
Loss = Callable[[object, object, Batch], tuple[Tensor, int]]


def default_loss(student: object, teacher: object, batch: Batch, problem_type: str | None = None) -> tuple[Tensor, int]:
    """How far the student's outputs are from the teacher's on the mean, and the number of positions.

    Of models with ``logits [..., C]``: the Kullback-Leibler divergence ``KL(teacher || student)`` in nats; for one
    class (a regression) the squared error. Of those without: the squared error of ``last_hidden_state`` over the
    teacher's square. Positions that ``attention_mask [B, T]`` leaves out, or ``labels [B, T]`` of -100 where there are
    labels, do not count; of an encoder-decoder its ``decoder_attention_mask`` takes the place of the former.

    Args:
        problem_type: of the model's configuration: ``"regression"`` makes it the squared error, and
            ``"multi_label_classification"`` a divergence for each class, which are added up.

    Raises:
        DTSError: the outputs have neither, or of different shapes, or logits of a kind that is not known here.
    """
    ours, theirs = getattr(student, "logits", None), getattr(teacher, "logits", None)
    hidden = not (isinstance(ours, Tensor) and isinstance(theirs, Tensor))
    if hidden:
        ours, theirs = (getattr(output, "last_hidden_state", None) for output in (student, teacher))
        if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
            raise DTSError(
                f"{type(teacher).__name__} has neither logits nor last_hidden_state to compare. Give distill() a loss."
            )
    if ours.shape != theirs.shape or ours.dim() > 3:
        raise DTSError(
            f"expected outputs [..., C] of up to three dimensions, alike in both models; got {list(ours.shape)} and "
            f"{list(theirs.shape)}. Give distill() a loss."
        )
    shifted = "CausalLM" in type(teacher).__name__
    ours, theirs = (_counted(t, batch, shifted) for t in (ours, theirs.to(ours.device)))
    count = len(theirs)
    if not count:
        return ours.sum(), 0
    if hidden:
        return (ours - theirs).square().sum() / theirs.square().sum(), count
    if problem_type == "regression" or theirs.shape[-1] == 1:
        return (ours - theirs).square().mean(), count
    if problem_type == "multi_label_classification":
        p = theirs.sigmoid()
        gains = p * (logsigmoid(theirs) - logsigmoid(ours)) + (1 - p) * (logsigmoid(-theirs) - logsigmoid(-ours))
        return gains.sum(-1).mean(), count
    return divergence(ours, theirs), count


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """``KL(theirs || ours)`` in nats of logits ``[n, C]``, the mean over n."""
    return kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="batchmean")


def _counted(outputs: Tensor, batch: Batch, shifted: bool) -> Tensor:
    """``[..., C]`` as float32 ``[positions, C]``, of the positions that count.

    Args:
        shifted: whether a position's output is for the label of the next.
    """
    positions = outputs.shape[:2]
    decodes = batch.get("decoder_input_ids") is not None
    mask, labels = batch.get("decoder_attention_mask" if decodes else "attention_mask"), batch.get("labels")
    if isinstance(labels, Tensor) and outputs.dim() == 3 and labels.shape == positions:
        mask = labels != -100
        if shifted:
            mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    if isinstance(mask, Tensor) and outputs.dim() == 3 and mask.shape == positions:
        return outputs[mask.to(outputs.device).bool()].float()
    return outputs.flatten(0, -2).float()
