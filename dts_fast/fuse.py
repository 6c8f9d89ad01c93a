"""Adapters mixed into one: the paper's variant for unseen tasks as a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .adapter_file import MARKER, Adapter, load_adapter, save_adapter
from .atomic import check_target
from .card import render_card
from .characteristic import characteristic_of
from .endings import EOS_KEY
from .errors import BaseMismatchError, DTSError, DTSWarning
from .fingerprint import merge_fingerprints
from .mixture import check_weights, mix, select, similarity_weights
from .settings import is_free
from .version import __version__


def fuse(
    adapters: Sequence[str | Path],
    out_path: str | Path,
    weights: Sequence[float] | None = None,
    *,
    characteristic: Tensor | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write the weighted sum of adapters of one base as an adapter. It is exact: the file lists the components of all
    members under weighted scales, and is as large as the members together.

    Args:
        adapters: adapter directories or hub ids.
        out_path: directory to write.
        weights: one for each adapter.
        characteristic: ``[d]`` of a task, in place of weights, see `mixture.similarity_weights`.

    Returns:
        The weights by adapter. Members of weight 0 are not in the file.

    Raises:
        AdapterFormatError: an adapter cannot be read.
        BaseMismatchError: adapters of different bases.
        DTSError: weights that do not fit, whole tensors that cannot be mixed, a target that exists.
    """
    names = [str(adapter) for adapter in adapters]
    check_target(Path(out_path), overwrite=overwrite, marker=MARKER)
    if (weights is None) == (characteristic is None):
        raise DTSError(
            "a mixture takes either weights (--weights, one for each adapter) or a characteristic (--characteristic)."
        )
    if weights is not None:
        weights = check_weights(names, weights)
    loaded = {name: load_adapter(name) for name in names}
    if weights is None:
        known = {name: characteristic_of(adapter.config, name) for name, adapter in loaded.items()}
        chosen = similarity_weights(characteristic, known)
    else:
        chosen = dict(zip(names, weights, strict=True))
    members = {name: adapter for name, adapter in loaded.items() if chosen[name] != 0}
    if not members:
        raise DTSError("all weights are 0: the mixture is the base itself.")
    mixed = {}
    for parameter in sorted({n for adapter in members.values() for n in adapter.parameters}):
        parts = [(chosen[name], adapter.parameters.get(parameter)) for name, adapter in members.items()]
        if len({isinstance(p, Tensor) for _, p in parts if p is not None}) > 1:
            raise DTSError(
                f"{parameter!r} is stored whole by some of the adapters and as a delta by others; that can be mixed "
                "in a DTSModel, where the base is, but not in a file. Compress all of them in one way."
            )
        mixed[parameter] = mix(parameter, parts)
    config = _config(members, chosen, len(mixed))
    save_adapter(out_path, Adapter(config, mixed), render_card(Path(out_path).name, config, mixed), overwrite=overwrite)
    return chosen


def _config(members: Mapping[str, Adapter], weights: Mapping[str, float], parameters: int) -> dict[str, object]:
    configs = [adapter.config for adapter in members.values()]
    first = configs[0]
    tied: dict[str, str] = {}
    for adapter in members.values():
        tied |= adapter.config["tied"]
    for name, adapter in members.items():
        theirs = adapter.config["tied"]
        if any(theirs.get(copy, target) != target or copy in adapter.parameters for copy, target in tied.items()):
            raise BaseMismatchError(
                f"{name} ties other tensors than {next(iter(members))}; expected adapters of one base."
            )
    fingerprint = merge_fingerprints([(str(a.config["base_fingerprint"]), a.deltas.keys()) for a in members.values()])
    shared = {
        key: value for key, value in first["model_config"].items()
        if all(config["model_config"].get(key) == value for config in configs)
    }  # fmt: skip
    computed = {key for config in configs for key in config["model_config"] if not is_free(key)} - shared.keys()
    if computed:
        warnings.warn(
            f"the members' fine-tunes differ in {', '.join(sorted(computed))}; the mixture has the base's.",
            DTSWarning,
            stacklevel=4,
        )
    ends = [set(config.get(EOS_KEY, ())) for config in configs]
    return {
        **({EOS_KEY: first[EOS_KEY]} if ends[0] and all(own == ends[0] for own in ends) else {}),
        "base_model_name_or_path": first["base_model_name_or_path"],
        "base_nbytes": first["base_nbytes"],
        "base_fingerprint": fingerprint,
        "compression": {"method": "mixture"},
        "members": [[Path(name).name, weights[name]] for name in members],
        "errors": [None] * parameters,
        "tied": tied,
        "model_config": shared,
        "versions": {"dts_fast": __version__},
    }


def nearest(adapters: Sequence[str | Path], characteristic: Tensor) -> tuple[str, float]:
    """The adapter directory (or hub id) whose characteristic is nearest by cosine similarity, with that similarity.

    Raises:
        DTSError: an adapter without characteristic, or lengths that differ.
    """
    known = {str(name): characteristic_of(load_adapter(name).config, str(name)) for name in adapters}
    return select(characteristic, known)
