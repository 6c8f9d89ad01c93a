"""What a checkpoint calls a parameter, and what the model in memory calls it.

The two differ where transformers renames on loading (ViT's ``encoder.layer.0.attention...query`` is
``layers.0.attention.q_proj`` in memory), or stacks what a checkpoint stores one by one (``experts.3.w1.weight`` is a
part of ``experts.gate_up_proj``, see `pieces`); it can tell what saving would turn a state dict into.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, common_prefix
from .nn.parameters import named_tensors
from .pieces import Piece


def names_in_checkpoint(model: nn.Module) -> dict[str, str]:
    """The name each parameter (and buffer, see `nn.parameters.named_tensors`) has in a checkpoint of this model, to its
    name in the model; where that is a piece of a parameter, the piece's."""
    parameters = named_tensors(model)
    names = {name: name for name in parameters}
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # no transformers, or a release that does not rename
        return names
    if not isinstance(model, PreTrainedModel):
        return names
    # One for each name, as tied parameters are one tensor under several; without memory, as saving copies what it
    # splits.
    views = {name: torch.empty(parameter.shape, device="meta") for name, parameter in parameters.items()}
    stacks = [name for name, parameter in parameters.items() if _is_stack(model, name, parameter)]
    views |= {name: _numbered(i, parameters[name].shape[0]) for i, name in enumerate(stacks)}
    own_name = {id(view): name for name, view in views.items()}
    for name, view in revert_weight_conversion(model, dict(views)).items():
        if id(view) in own_name:  # a tensor that saving would split or fuse has no single name
            names.pop(own_name[id(view)], None)
            names[name] = own_name[id(view)]
        elif not view.is_meta and (piece := _split_off(view, stacks)) is not None:
            names[name] = piece
    return names


def _is_stack(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter holds a matrix for each of its module's experts."""
    path, _, leaf = name.rpartition(".")
    experts = getattr(model.get_submodule(path), "num_experts", None)
    return parameter.dim() == 3 and (parameter.shape[0] == experts or leaf in ("gate_up_proj", "up_proj", "down_proj"))


_NUMBERS = 2**32  # for each stack; more than it has


def _numbered(index: int, experts: int) -> Tensor:
    """What is saved in place of a stack: small, and of numbers that tell what saving splits off."""
    return torch.arange(index * _NUMBERS, index * _NUMBERS + 4 * experts).view(experts, 2, 2)


def _split_off(view: Tensor, stacks: list[str]) -> str | None:
    """The name of what saving has split off a stack: an expert's matrix, or the upper or lower half of one."""
    index, number = divmod(int(view.flatten()[0]), _NUMBERS)
    path, _, leaf = stacks[index].rpartition(".")
    parts = 2 if view.numel() == 2 else 1
    piece = Piece(leaf, number // 4, number // 2 % 2 if parts == 2 else 0, parts)
    # Turned or interleaved, it is no block of rows.
    same = torch.equal(view, piece.of(_numbered(index, number // 4 + 1)))
    return f"{path}.{piece}" if same else None


def live_names(base: Checkpoint) -> dict[str, str]:
    """The names of a checkpoint's tensors, to those that the model has which its config names; its own where that is
    not known."""
    names = {name: name for name in base.tensors}
    model = _empty_model(base.config)
    if model is None:
        return names
    of_model = names_in_checkpoint(model)
    strip, add = common_prefix(of_model, base.tensors)
    renamed = {add + name.removeprefix(strip): live for name, live in of_model.items()}
    return names | {name: live for name, live in renamed.items() if name in names}


def _empty_model(config: Mapping[str, object]) -> nn.Module | None:
    """The model class of a config, without memory; None where it is not known here, or where the config could make it
    fetch something."""
    try:
        import transformers
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401 (without it nothing is renamed)
    except ImportError:
        return None
    model_class = getattr(transformers, str((config.get("architectures") or [None])[0]), None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known or _fetches(config):
        return None
    plain = {name: value for name, value in config.items() if name not in _NOT_NEEDED}
    try:
        with torch.device("meta"):
            return model_class(transformers.AutoConfig.for_model(**plain, attn_implementation="eager"))
    except Exception:  # a config that it does not take
        return None


# What makes a model load another one, or code.
_FETCHED = frozenset({"backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs", "auto_map"})
_NOT_NEEDED = frozenset({"attn_implementation", "_attn_implementation", "quantization_config"})


def _fetches(config: Mapping[str, object]) -> bool:
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    of_its_own = any(config.get(name) for name in _FETCHED) or any(_NOT_NEEDED & part.keys() for part in nested)
    return of_its_own or any(map(_fetches, nested))
