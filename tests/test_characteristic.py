from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dts_fast import read_characteristic
from dts_fast.characteristic import characteristic_of, encode_characteristic
from dts_fast.errors import AdapterFormatError, DTSError

VECTOR = torch.tensor([1.0, -2.0, 0.5])


def test_vector_files(tmp_path):
    np.save(tmp_path / "v.npy", VECTOR.double().numpy())
    (tmp_path / "v.json").write_text(json.dumps(VECTOR.tolist()))
    save_file({"v": VECTOR.half()}, tmp_path / "v.safetensors")
    for suffix in ("npy", "json", "safetensors"):
        assert torch.equal(read_characteristic(tmp_path / f"v.{suffix}"), VECTOR)


@pytest.mark.parametrize("content", [b"", b"not json", b'{"a": 1}', b"[[1, 2]]", b"[]", b"[0, 0]", b"[NaN]"])
def test_files_without_a_vector(tmp_path, content):
    file = tmp_path / "v.json"
    file.write_bytes(content)
    with pytest.raises(DTSError, match=r"v\.json: expected a"):
        read_characteristic(file)


def test_a_missing_file_is_not_taken_for_a_description(tmp_path):
    with pytest.raises(DTSError, match="could not read it"):
        read_characteristic(tmp_path / "missing.npy")


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "v.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DTSError, match="could not read it"):
        read_characteristic(tmp_path / "v.npy")


def test_a_description_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DTSError, match=r"pip install 'dts_fast\[text\]'"):
        read_characteristic("answers questions about law")


def test_a_description_is_embedded(monkeypatch):
    class Encoder:
        def __init__(self, name: str, device: str) -> None:
            if name != "org/encoder":
                raise OSError(f"{name} is not a local folder and is not a valid model identifier")

        def encode(self, text: str) -> np.ndarray:
            return np.array([len(text), 1.0], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Encoder))
    assert read_characteristic("law", "org/encoder").tolist() == [3.0, 1.0]
    with pytest.raises(DTSError, match="'org/other' cannot be loaded"):
        read_characteristic("law", "org/other")


def test_what_is_stored_keeps_the_direction():
    vector = torch.randn(384) * 1e-30  # beyond float16's range
    stored = characteristic_of({"characteristic": encode_characteristic(vector)}, "a")
    stored, vector = stored.double(), vector.double()
    similarity = float(stored @ vector / (stored.norm() * vector.norm()))
    assert similarity == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("damaged", ["", "?", "AAAA", 5, "AA=="])
def test_damaged_characteristics(damaged):
    with pytest.raises(AdapterFormatError, match="'a': expected 'characteristic'"):
        characteristic_of({"characteristic": damaged}, "a")
    with pytest.raises(DTSError, match="'a' has no characteristic"):
        characteristic_of({}, "a")
