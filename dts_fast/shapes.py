"""The linear layers of a model, by a name, a configuration or a checkpoint: what `dts-fast bench` times."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, is_embedding
from .errors import CheckpointError, DTSError
from .pieces import Piece

Shapes = dict[str, tuple[int, int]]  # names of layers, joined, to [N, K]


def layers_of(model: str, known: dict[str, Shapes]) -> Shapes:
    """The distinct shapes of a model's linear layers.

    Args:
        model: a key of ``known``; a ``config.json`` or a directory with one; a checkpoint; or a hub id, of which only
            the configuration is fetched.

    Returns:
        Layers of one shape together: ``{"q_proj,o_proj": (4096, 4096), ...}``.

    Raises:
        DTSError: nothing of all that, or no linear layers.
    """
    if model in known:
        return known[model]
    path = Path(model)
    config = path if path.name.endswith(".json") else path / "config.json"
    if config.is_file() or not path.exists():
        found = _of_config(model, config if config.is_file() else None, sorted(known))
    else:
        try:
            tensors = Checkpoint.open(model).tensors
        except CheckpointError as error:
            raise DTSError(f"--model {model}: expected config.json or a checkpoint ({error})") from error
        matrices = [(n, info.shape) for n, info in tensors.items() if len(info.shape) == 2]
        stacks = {n: piece.parameter for n, _ in matrices if (piece := Piece.named(n)) is not None}
        found = [(stacks.get(n, n).removesuffix(".weight"), s) for n, s in matrices if not is_embedding(n, s)]
    if not found:
        raise DTSError(f"--model {model}: no linear layers found in it.")
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in found:
        names = by_shape.setdefault((shape[0], shape[1]), [])
        leaf = name.rpartition(".")[2]
        if leaf not in names:
            names.append(leaf)
    return {",".join(names): shape for shape, names in by_shape.items()}


def _of_config(model: str, file: Path | None, known: list[str]) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of the linear layers that a configuration describes; nothing is allocated."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DTSError(
            f"--model {model}: shapes of any other model than {', '.join(known)} need transformers: pip install "
            "'dts_fast[hf]'."
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(file or model))
        with torch.device("meta"):
            built = transformers.AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DTSError(
            f"--model {model}: expected one of {', '.join(known)}, a config.json, a checkpoint or a hub id ({reason})."
        ) from error
    found = []
    for name, module in built.named_modules():
        if isinstance(module, torch.nn.Linear):
            found.append((name, (module.out_features, module.in_features)))
        elif type(module).__name__ == "Conv1D":
            found.append((name, tuple(reversed(module.weight.shape))))
    return found
