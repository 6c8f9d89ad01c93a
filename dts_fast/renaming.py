"""What a checkpoint calls a parameter, and what the model in memory calls it.

The two differ where transformers renames on loading (ViT's ``encoder.layer.0.attention...query`` is
``layers.0.attention.q_proj`` in memory); it can tell what saving would turn a state dict into.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .checkpoint import Checkpoint, common_prefix


def names_in_checkpoint(model: nn.Module) -> dict[str, str]:
    """The name each parameter has in a checkpoint of this model, to its name in the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name: name for name in parameters}
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # no transformers, or a release that does not rename
        return names
    if not isinstance(model, PreTrainedModel):
        return names
    # Tied parameters are one tensor under several names; a view of each keeps the names apart.
    views = {name: parameter.detach() for name, parameter in parameters.items()}
    own_name = {id(view): name for name, view in views.items()}
    for name, view in revert_weight_conversion(model, views).items():
        if id(view) in own_name:  # a tensor that saving would split or fuse has no single name
            names.pop(own_name[id(view)], None)
            names[name] = own_name[id(view)]
    return names


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
