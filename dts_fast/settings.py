"""What a fine-tune has changed in its model's configuration, and which of it a model can serve beside others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from .errors import BaseMismatchError

# Of which a model that is loaded for a fine-tune keeps the base's: heads, tokens and their ties come with adapters, and
# training scripts switch off caches.
OF_THE_BASE = ("tie_word_embeddings", "vocab_size", "scale_decoder_outputs", "use_cache")

# What changes nothing that is computed for given inputs outside of training, what each row has of its own, and what
# describes a file.
_FREE = {
    "architectures", "attn_implementation", "auto_map", "cache_implementation", "chunk_size_feed_forward", "dtype",
    "finetuning_task", "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "init_std",
    "label2id", "max_position_embeddings", "model_type", "num_labels", "output_attentions", "output_hidden_states",
    "output_router_logits", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "task_specific_params", "tf_legacy_loss", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache", "use_return_dict", "vocab_size",
    # of generation, in configurations of old
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_decoder_ids", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    # of training: noise and losses
    "apply_spec_augment", "aux_loss_alpha", "drop_path_rate", "eos_coefficient", "jitter_noise",
    "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "semantic_loss_ignore_index", "seq_aux",
}  # fmt: skip
_FREE_BEGINNINGS = ("_", "ctc_", "mask_feature_", "mask_time_")
_FREE_ENDINGS = ("_token_id", "_pdrop", "_drop", "layerdrop", "_cost", "_loss_coefficient", "_loss_weight")

_ROPE, _ROPE_OF_OLD = "rope_parameters", ("rope_theta", "rope_scaling")  # before transformers 5


class Conflict(NamedTuple):
    """A setting (``rope_parameters.rope_theta``), as a model has it and as an adapter wants it."""

    key: str
    have: object
    wanted: object


class BaseSettings(NamedTuple):
    """A base's own settings, of a model that may have been loaded with a fine-tune's.

    Attributes:
        config: its config.json.
        classes: of a classifier.
    """

    config: Mapping[str, object]
    classes: int | None


def check_settings(model: object, base: BaseSettings | None, changed: Mapping[str, object]) -> None:
    """Rows of one call cannot differ in what the model's configuration says.

    Args:
        model: a bare model, of transformers or any other.
        base: its own settings, where it was loaded with a fine-tune's.
        changed: what the fine-tune of an adapter has changed (``model_config``).

    Raises:
        BaseMismatchError: the fine-tune has other settings, or another kind of head, than the model.
    """
    config, differ = getattr(model, "config", None), []
    if hasattr(config, "to_dict"):
        differ = conflicts(config, config.to_dict() if base is None else base.config, changed)
    kind = _other_head(model, changed)
    if kind is not None:
        differ.append(Conflict("its class", type(model).__name__, kind))
    # A classifier that decodes looks for the last token that is none.
    if type(model).__name__.endswith("ForSequenceClassification") and "pad_token_id" in changed:
        theirs, ours = changed["pad_token_id"], getattr(config, "pad_token_id", None)
        if theirs != ours and None not in (theirs, ours) and theirs < getattr(config, "vocab_size", 0):
            differ.append(Conflict("pad_token_id", ours, theirs))
    if differ:
        said = "; ".join(f"{c.key}: {c.wanted}, where the model has {c.have}" for c in differ)
        by_path = base is None and not any(c.key in OF_THE_BASE for c in differ)
        path = ", or in a DTSModel that is loaded for it by the base's path" if by_path else ""
        raise BaseMismatchError(
            f"the fine-tune differs from this model in what all rows of a call share ({said}): one model cannot do "
            f"both. Serve it as a dense model (dts-fast export full){path}."
        )


def put_in(own: Mapping[str, object], changed: Mapping[str, object]) -> dict[str, object]:
    """Settings with others in their place. Of positions, which releases of transformers write in two ways, none stays
    that the others stand for."""
    own = dict(own)
    if _ROPE in changed:
        for key in _ROPE_OF_OLD:
            own.pop(key, None)
    elif any(key in changed for key in _ROPE_OF_OLD):
        known = own.pop(_ROPE, None)
        if isinstance(known, Mapping) and "rope_theta" in known:
            own["rope_theta"] = known["rope_theta"]
    return {**own, **changed}


def with_changes(own: Mapping[str, object], changed: Mapping[str, object]) -> dict[str, object]:
    """`put_in`, also within nested ones (a text model's within those of a model for images and text)."""
    settings = put_in(own, changed)
    for key, value in changed.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping) and key not in (_ROPE, *_ROPE_OF_OLD):
            settings[key] = with_changes(own[key], value)
    return settings


def as_served(own: Mapping[str, object], changed: Mapping[str, object]) -> dict[str, object]:
    """The base's settings with those of the fine-tune that go with its class."""
    settings = with_changes(own, changed)
    for key in OF_THE_BASE:
        settings.pop(key, None)
        if key in own:
            settings[key] = own[key]
    tokens, padding = settings.get("vocab_size"), settings.get("pad_token_id")
    if isinstance(tokens, int) and isinstance(padding, int) and padding >= tokens:
        settings["pad_token_id"] = own.get("pad_token_id")  # one that was added, which no table of the base has
    for key, value in changed.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping) and key not in (_ROPE, *_ROPE_OF_OLD):
            settings[key] = as_served(own[key], value)
    return settings


def differences(config: object, other: object) -> list[Conflict]:
    """Where two configurations of transformers, of one class, compute otherwise for given inputs."""
    ours, theirs = _leaves(config), _leaves(other)
    return [
        Conflict(key, ours.get(key), theirs.get(key))
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key) and not (_is_idle(config, key) and _is_idle(other, key))
    ]


def conflicts(config: object, own: Mapping[str, object], changed: Mapping[str, object]) -> list[Conflict]:
    """Settings of a model's configuration that rows of one call share, where an adapter wants others.

    Args:
        config: the model's, of transformers.
        own: the base's settings, as in its config.json.
        changed: those that the adapter's fine-tune has changed.
    """
    try:
        meant = type(config).from_dict(copy.deepcopy(with_changes(own, changed)))
    except Exception:  # whatever a class makes of settings that are not for it
        ours = {key: (getattr(config, key, None), value) for key, value in changed.items() if not is_free(key)}
        return [Conflict(key, have, value) for key, (have, value) in ours.items() if have != value]
    return differences(config, meant)


def is_free(key: str) -> bool:
    return key in _FREE or "dropout" in key or key.startswith(_FREE_BEGINNINGS) or key.endswith(_FREE_ENDINGS)


@cache
def _known(kind: type) -> frozenset[str] | None:
    """What a class has settings for; configurations keep anything else that a config.json had, and read it never."""
    try:
        return frozenset(kind().to_dict())
    except Exception:  # one that cannot be made of nothing
        return None


def _leaves(config: object, before: str = "") -> dict[str, object]:
    """By dotted keys, as JSON has them; without those that are null."""
    known, leaves = _known(type(config)), {}
    for key, value in config.to_dict().items():
        if is_free(key) or (known is not None and key not in known):
            continue
        inner = getattr(config, key, None)
        if hasattr(inner, "to_dict"):
            leaves |= _leaves(inner, f"{before}{key}.")
        else:
            leaves |= _flat(value, before + key)
    return leaves


def _flat(value: object, key: str) -> dict[str, object]:
    if isinstance(value, Mapping):
        return {name: leaf for k, own in value.items() for name, leaf in _flat(own, f"{key}.{k}").items()}
    if isinstance(value, (list, tuple)):
        value = [list(each) if isinstance(each, tuple) else each for each in value]
    return {} if value is None else {key: value}


def _is_idle(config: object, key: str) -> bool:
    """Whether nothing reads a setting: of sliding windows, in a model that has none."""
    name = key.rpartition(".")[2]
    return name in ("max_window_layers", "sliding_window") and getattr(config, "use_sliding_window", None) is False


def _other_head(model: object, settings: Mapping[str, object]) -> str | None:
    """The class of a fine-tune, where it has another kind of head than a model; None where it has not, or where
    either has none."""
    wanted = str((settings.get("architectures") or [""])[0])
    kind = type(model)
    if any(wanted == each.__name__ for each in kind.__mro__):
        return None
    ours, theirs = (name.partition("For")[2] for name in (kind.__name__, wanted))
    return wanted if ours and theirs and ours != theirs else None
