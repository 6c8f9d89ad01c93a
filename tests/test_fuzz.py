"""Hostile adapter files: whatever is in them, loading ends soon with an adapter or with a message, and takes no memory
that the file does not have.

`make test` tries some hundreds of files, `make fuzz` tens of thousands (DTS_FAST_FUZZ=40000 pytest tests/test_fuzz.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import struct
import time

import pytest
import torch

from dts_fast import Adapter, CodedVector, DeltaSum, fit, fit_vector, load_adapter, save_adapter
from dts_fast.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from dts_fast.bank import Bank
from dts_fast.codes import PageLayout
from dts_fast.errors import DTSError

CASES = int(os.environ.get("DTS_FAST_FUZZ", "600"))
CHUNK = 200
SECONDS, MEGABYTES = 5.0, 256

# What headers and configurations are made to say.
NUMBERS = [0, 1, 3, -1, 15, 2**31, 2**32 + 1, 2**40, 2**62, 2**63, 2**64, 10**30, 0.5, 1e308]
TEXTS = ["", "x", "../../etc/passwd", "/tmp/x", "a/../b", "\x00", "é" * 40, "U8", "F32", "BF16", "F8_E4M3", "F4", "nan"]
VALUES = [
    *NUMBERS,
    *TEXTS,
    None,
    True,
    [],
    {},
    [[]],
    [0, 2**62],
    [5, 3],
    float("inf"),
    float("nan"),
    ["F32"],
    [1] * 2000,
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[dict[str, object], bytes]:
    """The configuration and the weights of an adapter with every kind of parameter."""
    torch.manual_seed(0)
    matrix, vector = fit(torch.randn(10, 14), rank=3), fit_vector(torch.randn(9))
    parameters = {
        "a.weight": matrix,
        "b.weight": DeltaSum((fit(torch.randn(8, 8), rank=2), fit(torch.randn(8, 8), rank=1))),
        "b.bias": DeltaSum((vector, CodedVector(vector.codes, vector.levels, vector.shape))),
        "conv.weight": fit(torch.randn(4, 2, 3, 3), rank=2),
        "norm.weight": vector,
        "head.weight": torch.randn(3, 5),
        "head.half": torch.randn(7).bfloat16(),
    }
    config = {
        "base_model_name_or_path": "base", "base_nbytes": 1000, "base_fingerprint": "", "compression": {},
        "errors": [0.5] * len(parameters), "model_config": {}, "tied": {}, "versions": {},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("sound") / "adapter"
    save_adapter(path, Adapter(config, parameters), "card")
    return json.loads((path / CONFIG_NAME).read_text()), (path / WEIGHTS_NAME).read_bytes()


def parts_of(weights: bytes) -> tuple[dict[str, object], bytes]:
    (size,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def put_together(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_somewhere(value: object, rng: random.Random) -> object:
    """A copy of JSON data with one thing in it replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        out = dict(value)
        what = rng.random()
        if what < 0.6:
            out[key] = changed_somewhere(value[key], rng)
        elif what < 0.7:
            del out[key]
        elif what < 0.85:
            out[rng.choice([*TEXTS, key + ".u_codes", key + "+1", key + "+0", key.partition(".")[0]])] = out.pop(key)
        else:
            out[rng.choice([*TEXTS, key + "+1", key + "+2", key + ".codes", key + ".levels"])] = value[key]
        return out
    if isinstance(value, list) and value and rng.random() < 0.6:
        out = list(value)
        at = rng.randrange(len(out))
        if rng.random() < 0.7:
            out[at] = changed_somewhere(out[at], rng)
        elif rng.random() < 0.5:
            del out[at]
        else:
            out.insert(at, rng.choice(VALUES))
        return out
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-8, -4, -1, 1, 4, 8])
    return rng.choice(VALUES)


def with_bytes_changed(data: bytes, rng: random.Random) -> bytes:
    what = rng.randrange(5)
    at = rng.randrange(len(data) + 1)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + rng.randbytes(rng.choice([1, 3, 8, 100])) + data[at:]
    if what == 2:
        return data[:at] + data[min(len(data), at + rng.choice([1, 8, 64])) :]
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 16])):
        where = rng.randrange(len(out)) if what == 3 else rng.randrange(min(len(out), 64))
        out[where] = rng.randrange(256)
    return bytes(out)


def hostile(sound: tuple[dict[str, object], bytes], rng: random.Random) -> tuple[bytes, bytes]:
    """A configuration and weights, both or one of them wrong."""
    config, weights = json.loads(json.dumps(sound[0])), sound[1]
    kinds = rng.sample(("bytes of weights", "header", "two of header", "values", "config", "bytes of config"), 1)
    kind = kinds[0]
    if kind == "bytes of weights":
        weights = with_bytes_changed(weights, rng)
    elif kind in ("header", "two of header"):
        header, data = parts_of(weights)
        for _ in range(1 if kind == "header" else 3):
            header = changed_somewhere(header, rng)
        weights = put_together(header, data)
    elif kind == "values":
        header, data = parts_of(weights)
        weights = put_together(header, with_bytes_changed(data, rng)[: len(data)].ljust(len(data), b"\xff"))
    elif kind == "config":
        config = changed_somewhere(config, rng)
    # Half of them know how to count: the checksum does not save us.
    if isinstance(config, dict) and rng.random() < 0.8 and "weights_sha256" in config:
        config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(config).encode()
    return (with_bytes_changed(text, rng) if kind == "bytes of config" else text), weights


@pytest.mark.parametrize("chunk", range(-(-CASES // CHUNK)))
def test_hostile_files_are_refused_or_read(sound, tmp_path, chunk):
    rng = random.Random(chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for case in range(min(CHUNK, CASES - chunk * CHUNK)):
        config, weights = hostile(sound, rng)
        (tmp_path / CONFIG_NAME).write_bytes(config)
        # A new file each time: the old one may still be mapped.
        (tmp_path / WEIGHTS_NAME).unlink(missing_ok=True)
        (tmp_path / WEIGHTS_NAME).write_bytes(weights)
        begin = time.monotonic()
        try:
            adapter = load_adapter(tmp_path, mapped=bool(case % 2))
            for parameter in adapter.parameters.values():
                # What was let through can be used: every byte that it speaks of is there.
                if isinstance(parameter, torch.Tensor):
                    parameter.sum()
                elif hasattr(parameter, "u") and parameter.u.n * parameter.v.n < 1 << 20:
                    Bank(PageLayout(parameter.u.n, parameter.v.n).nbytes, 1).load_deltas(0, {0: parameter})
                    parameter.dequantize()
            outcomes["read"] += 1
        except DTSError:
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"case {case} of chunk {chunk}: config {config[:3000]!r}, weights {weights[:6000]!r}")
            raise
        assert time.monotonic() - begin < SECONDS, f"case {case} of chunk {chunk} takes too long"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MiB were taken for files of a few kilobytes"
    assert outcomes["refused"] > outcomes["read"] > 0, "the fuzzer changes what matters, and not all of it"


def test_the_sound_adapter_is_read(sound, tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps(sound[0]))
    (tmp_path / WEIGHTS_NAME).write_bytes(sound[1])
    assert len(load_adapter(tmp_path).parameters) == 7
