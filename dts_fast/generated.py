"""Text that a fine-tune writes itself: what to distill with where there is no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .endings import as_ends
from .errors import DTSError

_MOST_ROWS, _MOST_TOKENS = 64, 16384  # written together, unless a batch has more: the cache has to hold them


def generated_batches(
    rows: int = 1600, *, batch_size: int = 16, max_length: int = 128, prefix: Sequence[int] = (), seed: int = 0
) -> Callable[[nn.Module], list[dict[str, Tensor]]]:
    """What `distill` takes as its ``batches``: a function that lets the fine-tune write them.

    Tokens are drawn from the model's own distribution (temperature 1, none left out), as data-free distillation does
    (LLM-QAT, arXiv 2305.17888, section 3.1). Such text is like what the fine-tune was trained on, and unlike what a
    prompt would ask of it: a chat model wants a ``prefix``, and real texts are better where there are some.

    Args:
        rows: to write; each ends at an end token, or after ``max_length`` tokens.
        batch_size: rows of a batch.
        max_length: tokens of a row, those of the prefix included.
        prefix: token ids that each row begins with, such as a chat template's before a user's words; the token that
            the model begins texts with if empty.
        seed: of the draws.

    Returns:
        A function of a causal language model that returns batches of ``input_ids`` and ``attention_mask``, int64
        ``[batch_size, <= max_length]``. It raises `DTSError` for a model that writes no text, or has no first token.

    Raises:
        DTSError: sizes below 1, fewer rows than two batches, or a prefix that leaves no room.
    """
    if batch_size < 1 or rows <= batch_size or max_length <= max(1, len(prefix)):
        raise DTSError(
            "expected batch_size of 1 or more, rows for two batches, and max_length above 1 and the prefix's "
            f"{len(prefix)}; got {batch_size}, {rows} and {max_length}."
        )

    # Whole batches, some of which a step of a generation takes as long for as for one.
    at_once = max(1, min(_MOST_ROWS, _MOST_TOKENS // max_length) // batch_size) * batch_size

    def write(model: nn.Module) -> list[dict[str, Tensor]]:
        config = getattr(model, "config", None)
        if not callable(getattr(model, "can_generate", None)) or not model.can_generate() or config.is_encoder_decoder:
            raise DTSError(
                f"{type(model).__name__} writes no text by itself. Give distill() inputs (--data, a file of texts)."
            )
        settings = model.generation_config
        ends = as_ends(settings.eos_token_id)
        begins = settings.bos_token_id, getattr(config, "bos_token_id", None), *ends
        first = list(prefix) or [token for token in begins if token is not None][:1]
        if not first:
            raise DTSError(f"{type(model).__name__} has no token that texts begin with. Give a prefix.")
        padding = settings.pad_token_id if settings.pad_token_id is not None else (ends or first)[0]
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            parts = [
                _written(model, min(at_once, rows - done), first, max_length, ends, padding)
                for done in range(0, rows, at_once)
            ]
        return [
            {"input_ids": ids, "attention_mask": mask}
            for all_ids, all_mask in parts
            for ids, mask in zip(all_ids.split(batch_size), all_mask.split(batch_size), strict=True)
        ]

    return write


@torch.no_grad()
def _written(
    model: nn.Module, rows: int, first: list[int], length: int, ends: Sequence[int], padding: int
) -> tuple[Tensor, Tensor]:
    from transformers import GenerationConfig

    start = torch.tensor(first, device=model.device).repeat(rows, 1)
    # Made anew, and in the place of the model's own, from which generate() would take what is not said: nothing is left
    # out or penalised.
    drawn = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - len(first),
        eos_token_id=list(ends) or None, pad_token_id=padding,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, drawn
    try:
        ids = model.generate(start, attention_mask=torch.ones_like(start))
    finally:
        model.generation_config = own
    ended = torch.isin(ids[:, len(first) :], torch.tensor(ends, dtype=ids.dtype, device=ids.device)).int()
    before = ended.cumsum(1) - ended  # ends before this token
    mask = torch.cat([torch.ones_like(start), (before == 0).long()], 1)
    return ids.cpu(), mask.cpu()
