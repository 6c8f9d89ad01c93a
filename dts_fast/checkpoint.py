"""Reads Hugging Face safetensors checkpoints lazily, and finds which tensors of two checkpoints belong together."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .errors import CheckpointError, DTSWarning
from .growth import grown_like, is_token_table
from .pieces import Piece

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
# Of a repository: what a model or an adapter is read from, and the tokenizer that goes with an exported model. Not its
# folders (other formats, training states), nor the second copy that some keep in one file.
_FROM_HUB = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_NOT_FROM_HUB = ["*/*", "consolidated*.safetensors"]

# Buffers that older library versions wrote beside the parameters: masks and tables, never trained.
_BUFFERS = re.compile(r"(\.attn\.masked_bias|rotary_emb\.inv_freq)$")

_EMBEDDING = re.compile(r"(^|\.)([^.]*embed[^.]*|[^.]*_emb|wte|wpe|shared)(\.weight)?$")

# A stack of experts, by the names that model families give it; others with three dimensions are convolutions, whose
# last one is small.
_STACK = re.compile(r"(^|[._])(experts?|moe)([._]|$)")
_LEAST_SIZE = 16

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; nothing of its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint: one file, or the shards of an index.

    Attributes:
        source: what the user named: a path or a hub id.
        tensors: name to `TensorInfo`; a stack of experts is not among them, but each of its matrices (`pieces.Piece`).
        nbytes: size of the checkpoint's safetensors files on disk.
        config: the ``config.json`` beside the files, or an empty dict.
        folder: where that would be.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    nbytes: int
    config: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def open(cls, source: str | Path, *, stacks: bool = False, **hub: object) -> Checkpoint:
        """Read the headers of a ``.safetensors`` file, a directory (single file or sharded) or a hub id.

        Args:
            stacks: leave stacks of experts as they are (of a file that is no model's).
            hub: of `HUB_KEYS`, for a repository.

        Raises:
            CheckpointError: nothing there, a pickle checkpoint, a damaged file, a shard missing.
        """
        files, folder = _locate(source, hub)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(file, stacks).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{source}: tensor {name!r} stands in both {tensors[name].file.name} and {file.name}. "
                        "Expected each tensor in one file of a checkpoint."
                    )
                tensors[name] = info
        config_file = folder / "config.json"
        config = {}
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"), object_hook=_number)
            except ValueError as error:
                raise CheckpointError(
                    f"{config_file}: not valid JSON ({error}). Copy or download the model again."
                ) from error
            if not isinstance(config, dict):
                raise CheckpointError(f"{config_file}: expected a JSON object, got a {type(config).__name__}.")
        size = sum(file.stat().st_size for file in files)
        return cls(source=str(source), tensors=tensors, nbytes=size, config=config, folder=folder)

    def get(self, name: str) -> Tensor:
        """Load one tensor. The file is mapped for this tensor only, so that nothing stays in memory behind it."""
        file, piece = self.tensors[name].file, Piece.named(name)
        try:
            with safe_open(file, framework="pt") as handle:
                if piece is not None and piece.parameter not in self.tensors:
                    return handle.get_slice(piece.parameter)[piece.expert : piece.expert + 1][0]
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error}).") from error

    def as_stored(self) -> dict[str, Tensor]:
        """All tensors by the names that the files have for them: stacks of experts whole."""
        tensors: dict[str, Tensor] = {}
        for file in sorted({info.file for info in self.tensors.values()}):
            try:
                tensors |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error}).") from error
        return tensors


def _locate(source: str | Path, hub: Mapping[str, object]) -> tuple[list[Path], Path]:
    """The safetensors files of a checkpoint, and the folder that holds its config."""
    path = Path(source)
    if path.is_file():
        if path.name.endswith(".safetensors.index.json"):
            return _shards(path), path.parent
        if path.suffix in _PICKLE_SUFFIXES:
            raise _pickle_error(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{source}: expected a .safetensors file, a directory or a hub id, got a {path.suffix or 'plain'} file."
            )
        return [path], path.parent
    if path.is_dir():
        return _files_of_directory(path), path
    if hub_id(source) is not None:
        folder = fetch_from_hub(str(source), **hub)
        return _files_of_directory(folder), folder
    raise CheckpointError(f"{source}: no such file or directory, and not a hub id either.")


def _files_of_directory(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        return [folder / "model.safetensors"]
    if len(files) == 1:
        return files
    if not files:
        for file in sorted(folder.iterdir()):
            if file.suffix in _PICKLE_SUFFIXES:
                raise _pickle_error(file)
        raise CheckpointError(f"{folder}: expected *.safetensors in this directory, found none.")
    raise CheckpointError(
        f"{folder}: found {len(files)} safetensors files and {len(indexes)} indexes; expected model.safetensors or "
        "one *.safetensors.index.json. Name the file you mean."
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("shard names must be strings")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a 'weight_map' ({error!r}).") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: the index names {len(names)} shards, missing: {', '.join(missing)}. Download them again."
        )
    return [index.parent / name for name in names]


def _read_header(file: Path, stacks: bool) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as handle:
            infos = {}
            for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{file}: tensor {name!r} has unsupported dtype {part.get_dtype()}.")
                info = TensorInfo(file, tuple(part.get_shape()), dtype)
                infos |= {name: info} if stacks else _matrices(name, info)
            return infos
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}). It may be truncated; copy or download it again."
        ) from error


def _matrices(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """A tensor by its name; a stack of experts by the names of its matrices."""
    is_stack = len(info.shape) == 3 and min(info.shape[1:]) >= _LEAST_SIZE and _STACK.search(name) is not None
    if not (is_stack and info.dtype.is_floating_point):
        return {name: info}
    matrix = TensorInfo(info.file, info.shape[1:], info.dtype)
    return {str(Piece(name, expert, 0, 1)): matrix for expert in range(info.shape[0])}


def _pickle_error(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: a pickle checkpoint can run code when it is read, so it is refused; expected safetensors. Convert it "
        "where you trust it: model = AutoModel.from_pretrained(SOURCE); model.save_pretrained(TARGET) of transformers "
        "writes safetensors, as does safetensors.torch.save_file(torch.load(FILE, weights_only=True), TARGET)."
    )


def hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Repository and revision of ``org/name`` or ``org/name@revision`` (a branch, tag or commit, as in the paths of
    huggingface_hub); None where a source is no such id."""
    match = None if str(source).startswith(".") else _HUB_ID.fullmatch(str(source))
    return match and (match[1], match[2])


# What huggingface_hub and the ``from_pretrained`` of transformers call alike.
HUB_KEYS = ("token", "cache_dir", "local_files_only")


def fetch_from_hub(source: str, **hub: object) -> Path:
    """Download (or find in the cache) the files of a hub repository that a model or an adapter is read from.

    Args:
        source: see `hub_id`.
        hub: of `HUB_KEYS`.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import snapshot_download

    repo_id, revision = hub_id(source) or (source, None)
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=_FROM_HUB, ignore_patterns=_NOT_FROM_HUB, **hub
        )
    except Exception as error:  # the hub raises many unrelated types: HTTP, validation, cache and OS errors
        raise CheckpointError(
            f"{source}: no such local path, and the hub did not give it ({type(error).__name__}: {error})."
        ) from error
    return Path(folder)


def _number(value: dict[str, object]) -> object:
    """Numbers that JSON has none for, as transformers writes them."""
    return float(str(value["__float__"])) if value.keys() == {"__float__"} else value


def encode_numbers(value: object) -> object:
    """`_number`, the other way."""
    if isinstance(value, Mapping):
        return {name: encode_numbers(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_numbers(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def common_prefix(names: Iterable[str], base_names: Iterable[str]) -> tuple[str, str]:
    """How two sets of tensor names differ by a leading prefix.

    Returns:
        ``(strip, add)``: remove ``strip`` from the front of a name, or put ``add`` before it, to get the name the
        base uses; at most one of them is not empty. Chosen to match as many names as possible, none on a tie.
    """
    names, base_names = set(names), set(base_names)

    def candidates(of: set[str]) -> list[str]:
        heads = Counter()
        for name in of:
            parts = name.split(".")
            heads.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 4)))
        return sorted(heads, key=lambda head: (-heads[head], head))

    best = (len(names & base_names), "", "")
    for head in candidates(names):
        count = sum(name[len(head) :] in base_names for name in names if name.startswith(head))
        if count > best[0]:
            best = (count, head, "")
    for head in candidates(base_names):
        count = sum(head + name in base_names for name in names)
        if count > best[0]:
            best = (count, "", head)
    return best[1:]


@dataclass(frozen=True)
class Pairing:
    """Which tensors of a fine-tune stand against which of its base. Keys are the base's names, sorted.

    Attributes:
        pairs: base name to fine-tune name; floating point and of equal shape, apart from rows that were added.
        added: name to fine-tune name, for tensors that are stored whole: those the base does not have (new heads),
            running variances, and BART's bias of logits where tokens were added.
        tied: base name of a tensor that both checkpoints hold as a copy of another, to that other's name.
        skipped: name to reason, for everything that takes no part.
        grown: those of the pairs to which the fine-tune has added rows: tables and heads with more tokens.
    """

    pairs: Mapping[str, str]
    added: Mapping[str, str]
    tied: Mapping[str, str]
    skipped: Mapping[str, str]
    grown: frozenset[str]


def pair_tensors(
    base: Checkpoint,
    model: Checkpoint,
    *,
    include: str | None = None,
    exclude: str | None = None,
    whole: str | None = None,
) -> Pairing:
    """Match a fine-tune's tensors with its base's, through differing prefixes and tied weights.

    Args:
        include, exclude: regular expressions (``re.search``) on the base's names; what they leave out is skipped.
        whole: regular expression of tensors to be stored whole; these may differ in shape from the base's.

    Raises:
        CheckpointError: base tensors missing from the fine-tune, or shapes that differ; all of them are listed. Or
            ``include`` or ``whole`` match nothing (``exclude``: a warning).
    """
    strip, add = common_prefix(model.tensors, base.tensors)
    model_name = {add + name.removeprefix(strip): name for name in model.tensors}
    for option, pattern in (("include", include), ("exclude", exclude), ("whole", whole)):
        if pattern and not any(re.search(pattern, name) for name in base.tensors.keys() | model_name.keys()):
            said = (
                f"--{option} {pattern!r} matches no tensor of {base.source}; its names are like "
                f"{_listing(sorted(base.tensors)[:3])}."
            )
            if option != "exclude":
                raise CheckpointError(said)
            warnings.warn(said, DTSWarning, stacklevel=4)  # one pattern may be for many models
    pairs, added, tied, skipped, grown, missing, shapes = {}, {}, {}, {}, set(), [], []
    both = {n: (base.tensors[n].shape, model.tensors[t].shape) for n, t in model_name.items() if n in base.tensors}
    tables = [own for name, own in both.items() if is_embedding(name, own[0]) and is_token_table(name)]
    for name in sorted(base.tensors.keys() | model_name.keys()):
        ours, theirs = base.tensors.get(name), model.tensors.get(model_name.get(name, ""))
        present = theirs or ours
        if (include and not re.search(include, name)) or (exclude and re.search(exclude, name)):
            skipped[name] = "excluded"
        elif _is_buffer(name, present):
            skipped[name] = "buffer"
        elif not present.dtype.is_floating_point:
            skipped[name] = "integer"
        elif 0 in present.shape:
            skipped[name] = "empty"
        elif theirs is None:
            twin = _tied_twin(base, name, model_name)
            if twin is None:
                missing.append(name)
            else:
                tied[name] = twin
        elif whole and re.search(whole, name):
            added[name] = model_name[name]
        elif ours is None:
            twin = _tied_twin(model, model_name[name], [model_name[n] for n in base.tensors if n in model_name])
            if twin is None:
                added[name] = model_name[name]
            else:
                tied[name] = add + twin.removeprefix(strip)
        elif ours.shape != theirs.shape and grown_like(tables, ours.shape, theirs.shape):
            pairs[name] = model_name[name]
            grown.add(name)
        elif name.endswith("final_logits_bias") and grown_like(tables, ours.shape[::-1], theirs.shape[::-1]):
            added[name] = model_name[name]  # BART's, one for each token
        elif ours.shape != theirs.shape:
            shapes.append(f"{name}: base {list(ours.shape)}, fine-tune {list(theirs.shape)}")
        elif name.endswith("running_var") and not torch.equal(
            base.get(name).double(), model.get(model_name[name]).double()
        ):
            added[name] = model_name[name]  # a variance plus an approximate delta may be negative
        else:
            pairs[name] = model_name[name]
    if not pairs and not (include or exclude or missing or shapes):
        missing = sorted(base.tensors)
    if missing:
        raise CheckpointError(
            f"{model.source} lacks {len(missing)} tensors of the base {base.source}: {_listing(missing)}. Expected a "
            "fine-tune of this base; leave base-only tensors out with --exclude REGEX."
        )
    if shapes:
        raise CheckpointError(
            f"{len(shapes)} tensors of {model.source} differ in shape from the base {base.source}. Expected a "
            "fine-tune of this base; store tensors that it has resized whole with --whole REGEX, or leave them out "
            f"with --exclude REGEX. They are {_listing(shapes, limit=3)}."
        )
    for name, twin in _tied_pairs(base, model, pairs):
        del pairs[name]
        tied[name] = twin
    skipped |= {name: f"tied to {twin}" for name, twin in tied.items()}
    return Pairing(pairs, added, tied, skipped, frozenset(grown & pairs.keys()))


def is_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a token, position or type table, by the names that model families give them."""
    return len(shape) >= 2 and _EMBEDDING.search(name) is not None


def _is_buffer(name: str, info: TensorInfo) -> bool:
    # GPT-2's causal mask is called attn.bias; no trained bias has four dimensions.
    return _BUFFERS.search(name) is not None or (name.endswith(".attn.bias") and len(info.shape) == 4)


def _tied_pairs(base: Checkpoint, model: Checkpoint, pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs ``(name, twin)`` that both checkpoints write twice: a head tied to an embedding."""
    tied = []
    tables = [name for name in pairs if is_embedding(name, base.tensors[name].shape)]
    for table in tables:
        for name in pairs:
            # Between two tables the one that sorts first is kept.
            if (name in tables and name <= table) or base.tensors[name].shape != base.tensors[table].shape:
                continue
            in_both = _tied_twin(base, name, [table]) and _tied_twin(model, pairs[name], [pairs[table]])
            if in_both and name not in dict(tied):
                tied.append((name, table))
    return tied


def _tied_twin(checkpoint: Checkpoint, name: str, others: Iterable[str]) -> str | None:
    """Another tensor of the same checkpoint with the same content (tied weights written twice)."""
    info = checkpoint.tensors[name]
    if len(info.shape) < 2:
        return None
    content = None
    for other in others:
        twin = checkpoint.tensors.get(other)
        if other != name and twin is not None and (twin.shape, twin.dtype) == (info.shape, info.dtype):
            content = checkpoint.get(name) if content is None else content
            if torch.equal(content, checkpoint.get(other)):
                return other
    return None


def _listing(items: list[str], limit: int = 20) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
