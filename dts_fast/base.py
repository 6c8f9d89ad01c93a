"""A base model from its files, as adapters want it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from .checkpoint import Checkpoint, hub_id
from .endings import EOS_KEY, as_ends, end_tokens
from .errors import CheckpointError, DTSError

# Settings of a model that a fine-tune may change, while the base that it is served from keeps its own.
_OF_THE_BASE = ("tie_word_embeddings", "vocab_size", "scale_decoder_outputs")


def _changed(own: Mapping[str, object], changed: Mapping[str, object]) -> dict[str, object]:
    """The base's settings with those of the fine-tune that go with its class; also within nested ones (a text model's
    within those of a model for images and text)."""
    settings = {**own, **changed}
    for key in _OF_THE_BASE:
        settings.pop(key, None)
        if key in own:
            settings[key] = own[key]
    tokens, padding = settings.get("vocab_size"), settings.get("pad_token_id")
    if isinstance(tokens, int) and isinstance(padding, int) and padding >= tokens:
        settings["pad_token_id"] = own.get("pad_token_id")  # one that was added, which no table of the base has
    for key, value in changed.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            settings[key] = _changed(own[key], value)
    return settings


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


def load_base(base_model: str | Path, changed: Mapping[str, object], model_kwargs: dict) -> nn.Module:
    """The base's weights in the model class of the fine-tune.

    Args:
        base_model: directory, ``.safetensors`` file or hub id (``org/name`` or ``org/name@revision``).
        changed: the settings that the fine-tune has changed (``model_config`` of its adapter).
        model_kwargs: for the ``from_pretrained`` of transformers.

    Raises:
        CheckpointError: it cannot be read, or has no config.json.
        DTSError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise DTSError(
            "loading a base model by its path needs transformers: pip install 'dts_fast[hf]', or pass a loaded model."
        ) from error
    revision = model_kwargs.pop("revision", None)
    if revision is not None:
        base_model = f"{base_model}@{revision}"
    checkpoint = Checkpoint.open(base_model)
    # A base that ties its head stays tied: an untied head of the fine-tune comes whole with the adapter.
    # Nor has it more tokens than it has: those that a fine-tune has added come with the adapter, too.
    settings = _changed(checkpoint.config, changed)
    if not checkpoint.config:
        raise CheckpointError(f"{base_model}: expected a config.json beside the weights, found none.")
    architecture = (settings.get("architectures") or [None])[0]
    model_class = getattr(transformers, str(architecture), transformers.AutoModel)
    config = transformers.AutoConfig.for_model(**settings)
    path = Path(base_model)
    if path.is_file():
        weights = checkpoint.as_stored()
        if model_class is transformers.AutoModel:
            model_class = type(model_class.from_config(config))
        model = model_class.from_pretrained(None, config=config, state_dict=weights, **model_kwargs).eval()
        return _as_used(model, checkpoint, changed)
    repo_id, revision = (str(base_model), None) if path.is_dir() else hub_id(base_model)
    if revision is not None:
        model_kwargs["revision"] = revision
    model = model_class.from_pretrained(repo_id, config=config, **model_kwargs).eval()
    return _as_used(model, checkpoint, changed)
