"""What a fine-tune has changed in its model's configuration, and which of it a model can serve beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Of which a model that is loaded for a fine-tune keeps the base's: heads, tokens and their ties come with adapters, and
# training scripts switch off caches.
OF_THE_BASE = ("tie_word_embeddings", "vocab_size", "scale_decoder_outputs", "use_cache")

# What changes nothing that is computed for given inputs without dropout, what each row has of its own, and what
# describes a file.
_FREE = {
    "architectures", "attn_implementation", "auto_map", "cache_implementation", "chunk_size_feed_forward", "dtype",
    "finetuning_task", "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "label2id",
    "max_position_embeddings", "model_type", "num_labels", "output_attentions", "output_hidden_states",
    "output_router_logits", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "task_specific_params", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "use_return_dict", "vocab_size",
    # of generation, in configurations of old
    "bad_words_ids", "diversity_penalty", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "prefix", "remove_invalid_values",
    "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
_FREE_ENDINGS = ("_token_id", "_pdrop", "_drop", "layerdrop")


class Conflict(NamedTuple):
    """A setting (``rope_parameters.rope_theta``), as a model has it and as an adapter wants it."""

    key: str
    have: object
    wanted: object


def as_served(own: Mapping[str, object], changed: Mapping[str, object]) -> dict[str, object]:
    """The base's settings with those of the fine-tune that go with its class; also within nested ones (a text model's
    within those of a model for images and text)."""
    settings = {**own, **changed}
    for key in OF_THE_BASE:
        settings.pop(key, None)
        if key in own:
            settings[key] = own[key]
    tokens, padding = settings.get("vocab_size"), settings.get("pad_token_id")
    if isinstance(tokens, int) and isinstance(padding, int) and padding >= tokens:
        settings["pad_token_id"] = own.get("pad_token_id")  # one that was added, which no table of the base has
    for key, value in changed.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            settings[key] = as_served(own[key], value)
    return settings


def conflicts(
    config: object, wanted: Mapping[str, object], otherwise: Mapping[str, object] | None = None
) -> list[Conflict]:
    """Settings of a model's configuration that rows of one call share, where an adapter wants others.

    Args:
        config: the model's, of transformers.
        wanted: as in a config.json.
        otherwise: what is wanted of settings that are not among these, by the keys of `Conflict`.
    """
    found = []
    for key, value in {**_flat(otherwise or {}), **_flat(wanted)}.items():
        have = _looked_up(config, key)
        if have is _UNKNOWN or (value is None and not isinstance(have, (int, float, str))):
            continue
        if _plain(have) != _plain(value):
            found.append(Conflict(key, have, value))
    return found


_UNKNOWN = object()


def _flat(settings: Mapping[str, object], before: str = "") -> dict[str, object]:
    """By dotted keys; those of older releases of transformers as newer ones have them."""
    flat = {}
    for key, value in settings.items():
        if key.startswith("_") or key in _FREE or "dropout" in key or key.endswith(_FREE_ENDINGS):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif key == "rope_theta" and not before.endswith("rope_parameters."):
            flat[f"{before}rope_parameters.rope_theta"] = value
        else:
            flat[before + key] = value
    return flat


def _looked_up(config: object, key: str) -> object:
    """A setting by its dotted key, also where an older release of transformers keeps it elsewhere; `_UNKNOWN` where the
    model has none such, and so does nothing with it."""
    for place in (key, key.replace("rope_parameters.rope_theta", "rope_theta")):
        found = config
        for part in place.split("."):
            found = found.get(part, _UNKNOWN) if isinstance(found, Mapping) else getattr(found, part, _UNKNOWN)
        if found is not _UNKNOWN:
            return found
    return _UNKNOWN


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def other_head(model: object, settings: Mapping[str, object]) -> str | None:
    """The class of a fine-tune, where it has another kind of head than a model; None where it has not, or where
    either has none."""
    wanted = str((settings.get("architectures") or [""])[0])
    kind = type(model)
    if (
        not wanted
        or any(wanted == each.__name__ for each in kind.__mro__)
        or getattr(model, "base_model", None) is model
    ):
        return None
    ours, theirs = (name.partition("For")[2] for name in (kind.__name__, wanted))
    return wanted if ours and theirs and ours != theirs else None
