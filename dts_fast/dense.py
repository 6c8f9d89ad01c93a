"""Dense checkpoints that are written like another one: same files, same names, same dtypes, one file in memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import Marker, staged_directory
from .checkpoint import Checkpoint, encode_numbers
from .errors import CheckpointError, DTSError
from .pieces import Piece
from .settings import put_in

# What stands beside the weights of a model: tokenizer, processor, generation settings.
_COMPANION = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|special_tokens_map|added_tokens|vocab"
    r"|tokenizer.*|chat_template.*)\.json|merges\.txt|vocab\.txt|.*\.(model|tiktoken|jinja)"
)


def write_like(
    like: Checkpoint,
    out_path: str | Path,
    tensor_of: Callable[[str], Tensor],
    *,
    added: Mapping[str, Tensor] | None = None,
    config: Mapping[str, object] | None = None,
    generation: Mapping[str, object] | None = None,
    overwrite: bool = False,
    read: Sequence[Checkpoint] = (),
) -> None:
    """Write a checkpoint directory with the files of ``like``.

    Args:
        tensor_of: the tensor to write under each of ``like``'s names.
        added: tensors beyond those, written to the last file.
        config: keys of ``config.json`` that differ from ``like``'s.
        generation: keys of ``generation_config.json`` that do, if there is one.
        read: what is read besides, and so cannot be the target.

    Raises:
        DTSError: the target exists or cannot be written.
    """
    files: dict[Path, list[str]] = {}
    for name, info in like.tensors.items():
        files.setdefault(info.file, []).append(name)
    single = len(files) == 1
    marker = "model.safetensors" if single else "model.safetensors.index.json"
    weight_map, total = {}, 0
    if Path(out_path).resolve() in {checkpoint.folder.resolve() for checkpoint in (like, *read)}:
        raise DTSError(f"{out_path} is what is read; nothing was changed. Choose another path.")
    with staged_directory(Path(out_path), overwrite=overwrite, marker=Marker(marker)) as staging:
        for number, (file, names) in enumerate(files.items(), start=1):
            target = "model.safetensors" if single else file.name
            tensors = {name: tensor_of(name) for name in names}
            if number == len(files):
                tensors |= added or {}
            tensors = _stacked(tensors)
            weight_map |= dict.fromkeys(tensors, target)
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, staging / target, metadata={"format": "pt"})
        if not single:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (staging / marker).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for companion in next(iter(files)).parent.iterdir():
            if companion.is_file() and _COMPANION.fullmatch(companion.name):
                shutil.copyfile(companion, staging / companion.name)
        for_config = dict(config or {})
        settings = staging / "generation_config.json"
        if generation and settings.is_file():
            _merge_into(settings, generation)
        elif generation:  # transformers then takes them from there
            for_config |= generation
        if like.config:
            merged = put_in(like.config, for_config)
            text = json.dumps(encode_numbers(merged), indent=2, sort_keys=True)
            (staging / "config.json").write_text(text, encoding="utf-8")


def _merge_into(file: Path, settings: Mapping[str, object]) -> None:
    """Settings in the place of those of a JSON file; one that holds no object stays as it is."""
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    if isinstance(own, Mapping):
        file.write_text(json.dumps({**own, **settings}, indent=2, sort_keys=True), encoding="utf-8")


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file has them: experts that were read from stacks go back into them."""
    stacks: dict[str, dict[int, Tensor]] = {}
    plain = {}
    for name, tensor in tensors.items():
        piece = Piece.named(name)
        if piece is None:
            plain[name] = tensor
        else:
            stacks.setdefault(piece.parameter, {})[piece.expert] = tensor
    for name, own in stacks.items():
        missing = sorted(set(range(max(own) + 1)) - own.keys())
        if missing:
            raise DTSError(
                f"the stack {name!r} is neither in the base nor whole in the adapter, which lacks expert {missing[0]}: "
                "it cannot be written. Compress with all experts or none (--exclude)."
            )
    return plain | {name: torch.stack([own[i] for i in range(len(own))]) for name, own in stacks.items()}


def average(models: Sequence[str | Path], out_path: str | Path, *, overwrite: bool = False) -> None:
    """Write the mean of several checkpoints: the merged model from which the paper's DTS-D takes its deltas.

    Args:
        models: two or more ``.safetensors`` files, directories or hub ids with equal names and shapes. Files, dtypes
            and integer tensors are the first one's.

    Raises:
        CheckpointError: fewer than two, or names or shapes that differ.
        DTSError: the target exists or cannot be written.
    """
    checkpoints = [Checkpoint.open(model) for model in models]
    if len(checkpoints) < 2:
        raise CheckpointError(f"an average takes two or more checkpoints, got {len(checkpoints)}.")
    first = checkpoints[0]
    shapes = {name: info.shape for name, info in first.tensors.items()}
    for other in checkpoints[1:]:
        theirs = {name: info.shape for name, info in other.tensors.items()}
        if theirs != shapes:
            differing = sorted(n for n in shapes.keys() | theirs.keys() if shapes.get(n) != theirs.get(n))
            raise CheckpointError(
                f"{other.source} differs from {first.source} in {len(differing)} tensors (first: {differing[0]}, "
                f"{shapes.get(differing[0])} and {theirs.get(differing[0])}); expected equal names and shapes."
            )

    def mean(name: str) -> Tensor:
        tensor = first.get(name)
        if not tensor.is_floating_point():
            return tensor
        total = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for other in checkpoints[1:]:
            total = total + other.get(name)
        return (total / len(checkpoints)).to(tensor.dtype)

    write_like(first, out_path, mean, overwrite=overwrite, read=checkpoints)
