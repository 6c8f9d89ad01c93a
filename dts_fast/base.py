"""A base model from its files, as adapters want it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from .checkpoint import HUB_KEYS, Checkpoint, hub_id
from .endings import EOS_KEY, as_ends, end_tokens
from .errors import CheckpointError, DTSError
from .settings import BaseSettings, Conflict, as_served, differences


def _set_padding(config: object, changed: Mapping[str, object]) -> None:
    """What a loaded model is to know of padding: where sequences end."""
    if "pad_token_id" in changed:
        config.pad_token_id = changed["pad_token_id"]
    for key, value in changed.items():
        if isinstance(value, Mapping) and hasattr(getattr(config, key, None), "pad_token_id"):
            _set_padding(getattr(config, key), value)


def _as_used(model: nn.Module, checkpoint: Checkpoint, changed: Mapping[str, object]) -> nn.Module:
    _set_padding(model.config, changed)
    # Made from the configuration, which the fine-tune may have changed, where the base has no file for it.
    settings, ends = getattr(model, "generation_config", None), end_tokens(checkpoint)
    known = bool(ends) or (EOS_KEY in changed and EOS_KEY in checkpoint.config)
    if settings is not None and known and set(as_ends(settings.eos_token_id)) != set(ends):
        settings.eos_token_id = ends or None
    return model


def load_base(
    base_model: str | Path, changed: Mapping[str, object], model_kwargs: dict
) -> tuple[nn.Module, BaseSettings]:
    """The base's weights in the model class of the fine-tune, and with its settings.

    Args:
        base_model: directory, ``.safetensors`` file or hub id (``org/name`` or ``org/name@revision``).
        changed: the settings that the fine-tune has changed (``model_config`` of its adapter).
        model_kwargs: for the ``from_pretrained`` of transformers.

    Returns:
        The model, and what the base itself says. There is a warning where a fine-tune computes otherwise than that.

    Raises:
        CheckpointError: it cannot be read, has no config.json, or is of no class of transformers.
        DTSError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise DTSError(
            "loading a base model by its path needs transformers: pip install 'dts_fast[hf]', or pass a loaded model."
        ) from error
    model_kwargs = dict(model_kwargs)
    revision = model_kwargs.pop("revision", None)
    if revision is not None and not Path(base_model).exists():  # a directory has none
        base_model = f"{base_model}@{revision}"
    if "subfolder" in model_kwargs:
        raise DTSError("subfolder: a base is a whole directory or repository. Give the path of the directory.")
    checkpoint = Checkpoint.open(base_model, **{key: model_kwargs[key] for key in HUB_KEYS if key in model_kwargs})
    # A base that ties its head stays tied: an untied head of the fine-tune comes whole with the adapter.
    # Nor has it more tokens than it has: those that a fine-tune has added come with the adapter, too.
    settings = as_served(checkpoint.config, changed)
    if not checkpoint.config:
        raise CheckpointError(f"{base_model}: expected a config.json beside the weights, found none.")
    architecture = (settings.get("architectures") or [None])[0]
    found = getattr(transformers, str(architecture), None)
    model_class = found if isinstance(found, type) and hasattr(found, "from_pretrained") else transformers.AutoModel
    try:  # of copies: nested settings are changed in their place
        config = transformers.AutoConfig.for_model(**copy.deepcopy(settings))
        unchanged = transformers.AutoConfig.for_model(**copy.deepcopy(checkpoint.config))
    except (TypeError, ValueError) as error:
        kind = settings.get("model_type")
        raise CheckpointError(
            f"{base_model}: transformers has no models of type {kind!r}, or its config.json is not as expected "
            f"({str(error)[:200]}). Load it yourself, with trust_remote_code=True where it brings its own code, and "
            "pass the model: DTSModel.from_pretrained(model, adapter)."
        ) from error
    _warn_of_changes(differences(unchanged, config), base_model)
    own = BaseSettings(checkpoint.config, getattr(unchanged, "num_labels", None))
    path = Path(base_model)
    if path.is_file():
        weights = checkpoint.as_stored()
        if model_class is transformers.AutoModel:
            model_class = type(model_class.from_config(config))
        model = model_class.from_pretrained(None, config=config, state_dict=weights, **model_kwargs).eval()
        return _as_used(model, checkpoint, changed), own
    repo_id, revision = (str(base_model), None) if path.is_dir() else hub_id(base_model)
    if revision is not None:
        model_kwargs["revision"] = revision
    model = model_class.from_pretrained(repo_id, config=config, **model_kwargs).eval()
    return _as_used(model, checkpoint, changed), own


def _warn_of_changes(found: Sequence[Conflict], base_model: str | Path) -> None:
    if found:
        said = ", ".join(f"{c.key} = {c.wanted} (the base: {c.have})" for c in found)
        warnings.warn(
            f"{base_model} is loaded with settings of the fine-tune, {said}: they hold for all rows, so that those of "
            "'__base__' are not the base's. Adapters of fine-tunes with other settings are refused.",
            stacklevel=4,
        )
