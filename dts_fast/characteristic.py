"""What a task is like, as a vector: given by hand, or the embedding of a description."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import AdapterFormatError, DTSError

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_SUFFIXES = (".npy", ".json", ".safetensors")
# What numpy, json and safetensors raise on damaged files.
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, AttributeError, OverflowError, RecursionError, SafetensorError)


def read_characteristic(source: str | Path, encoder: str | None = None) -> Tensor:
    """A task characteristic from a vector file or from a text.

    Args:
        source: a ``.npy`` file, a ``.json`` file with a list of numbers, or a ``.safetensors`` file with one tensor;
            anything else is a description of the task, which a sentence encoder embeds.
        encoder: name or path for sentence-transformers (optional extra ``text``); by default all-MiniLM-L6-v2.

    Returns:
        float32 ``[d]``.

    Raises:
        DTSError: a file that is missing or holds no vector, a text without the extra, an encoder that cannot be loaded.
    """
    path = Path(source)
    if path.suffix in _SUFFIXES:
        try:
            vector = _read_file(path)
        except _UNREADABLE as error:
            raise DTSError(
                f"{path}: expected a vector file ({', '.join(_SUFFIXES)}), could not read it: {error}."
            ) from (error)
    else:
        vector = _embed(str(source), encoder or DEFAULT_ENCODER)
    if vector.dim() != 1 or not vector.numel() or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise DTSError(f"{source}: expected a finite vector [d] that is not all zero, got shape {list(vector.shape)}.")
    return vector


def _read_file(path: Path) -> Tensor:
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"it holds {array.dtype}, expected real numbers")
        return torch.from_numpy(array.astype(np.float32))
    if path.suffix == ".json":
        return torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float32)
    tensors = list(load_file(path).values())
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors, expected one")
    return tensors[0].float()


def _embed(text: str, encoder: str) -> Tensor:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DTSError(
            f"{text!r} is not a vector file ({', '.join(_SUFFIXES)}); embedding a text needs sentence-transformers: "
            "pip install 'dts_fast[text]'."
        ) from error
    try:
        model = SentenceTransformer(encoder, device="cpu")
    except (OSError, ValueError) as error:
        raise DTSError(f"the sentence encoder {encoder!r} cannot be loaded ({error}).") from error
    return torch.as_tensor(model.encode(text), dtype=torch.float32)


def encode_characteristic(vector: Tensor) -> str:
    """Base64 of the direction in float16, little-endian: a kilobyte for 384 numbers."""
    vector = vector.double()
    return base64.b64encode((vector / torch.linalg.vector_norm(vector)).numpy().astype("<f2").tobytes()).decode("ascii")


def characteristic_of(config: Mapping[str, object], name: str) -> Tensor:
    """The characteristic ``[d]`` stored with an adapter, float32.

    Args:
        config: its ``adapter_config.json``.
        name: the adapter, for messages.

    Raises:
        DTSError: it has none.
        AdapterFormatError: what it has is damaged.
    """
    text = config.get("characteristic")
    if text is None:
        raise DTSError(f"adapter {name!r} has no characteristic; compress it with --characteristic, or give weights.")
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        raw = b""
    if not raw or len(raw) % 2:
        raise AdapterFormatError(f"adapter {name!r}: expected 'characteristic' to be base64 of float16 numbers.")
    return torch.from_numpy(np.frombuffer(raw, dtype="<f2").astype(np.float32))
