"""Ways out: the dense checkpoint that a base and an adapter stand for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapter_file import Adapter, load_adapter
from .atomic import staged_directory
from .checkpoint import Checkpoint
from .errors import BaseMismatchError
from .fingerprint import check_fingerprint

# Beside the weights: tokenizer, generation settings, vocabulary. Other weights and indexes are not copied.
_COMPANION = re.compile(r"(?!.*\.index\.json$).*\.(json|txt|model|jinja)$")


def export_full(
    adapter_path: str | Path, base_model: str | Path, out_path: str | Path, *, overwrite: bool = False
) -> int:
    """Write base plus adapter as a dense Hugging Face checkpoint, file by file like the base's, in the base's dtypes.

    Args:
        adapter_path: adapter directory or hub id.
        base_model: ``.safetensors`` file, directory or hub id.
        out_path: directory to write.

    Returns:
        How many tensors differ from the base's.

    Raises:
        AdapterFormatError, CheckpointError: an input cannot be read.
        BaseMismatchError: the adapter was made for another base.
        DTSError: the target exists or cannot be written.
    """
    adapter, base = load_adapter(adapter_path), Checkpoint.open(base_model)
    check_base(adapter, base)
    files: dict[Path, list[str]] = {}
    for name, info in base.tensors.items():
        files.setdefault(info.file, []).append(name)
    added = [name for name in adapter.parameters if name not in base.tensors]
    changed, weight_map, total = 0, {}, 0
    with staged_directory(Path(out_path), overwrite=overwrite, marker="config.json") as staging:
        for number, (file, names) in enumerate(files.items(), start=1):
            target = file.name if len(files) > 1 else "model.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = _personalised(adapter, base, name)
                changed += tensors[name] is not None
                tensors[name] = base.get(name) if tensors[name] is None else tensors[name]
            if number == len(files):
                tensors |= {name: adapter.parameters[name] for name in added}
            weight_map |= dict.fromkeys(tensors, target)
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, staging / target, metadata={"format": "pt"})
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        for companion in next(iter(files)).parent.iterdir():
            if companion.is_file() and _COMPANION.match(companion.name):
                shutil.copyfile(companion, staging / companion.name)
        if base.config:
            config = {**base.config, **adapter.config["model_config"]}
            (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return changed + len(added)


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse a checkpoint that is not the adapter's base.

    Raises:
        BaseMismatchError: tensors are missing, have other shapes or hold other weights.
    """
    expected = str(adapter.config["base_model_name_or_path"])
    for name, parameter in adapter.deltas.items():
        info = base.tensors.get(name)
        if info is None or info.shape != tuple(parameter.shape):
            raise BaseMismatchError(
                f"{base.source} is not the adapter's base {expected}: tensor {name!r} of shape "
                f"{list(parameter.shape)} expected, got {list(info.shape) if info else 'none'}."
            )
    fingerprint = str(adapter.config["base_fingerprint"])
    check_fingerprint(fingerprint, {name: base.get(name) for name in adapter.deltas}, expected)


def _personalised(adapter: Adapter, base: Checkpoint, name: str) -> Tensor | None:
    """A base tensor with the adapter's delta, in the base's dtype; None where the adapter leaves it as it is."""
    parameter = adapter.parameters.get(name)
    if parameter is None:
        parameter = adapter.parameters.get(adapter.config["tied"].get(name, ""))
    if parameter is None:
        return None
    if isinstance(parameter, Tensor):
        return parameter.clone()  # a tied tensor is written under two names, which must not share memory
    before = base.get(name)
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    return (before.to(wide) + parameter.dequantize(wide)).to(before.dtype)
