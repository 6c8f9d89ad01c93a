"""The file format: exact bytes, every kind of damage, and writes that happen whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dts_fast.adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    directory_size,
    load_adapter,
    save_adapter,
    tensors_of,
    total_size,
)
from dts_fast.codes import CodedMatrix, CodedVector, DeltaSum, LowRankDelta, pack
from dts_fast.errors import AdapterFormatError, DTSError
from dts_fast.fit import fit, fit_vector

CONFIG = {
    "base_model_name_or_path": "org/base",
    "base_fingerprint": "",
    "base_nbytes": 1000,
    "compression": {"method": "paper", "density": 0.5},
    "errors": [0.5, 0.25, 0.0],
    "model_config": {},
    "tied": {},
}


def small_adapter() -> Adapter:
    """A [5, 8] matrix of rank 1, a vector of 4 and a whole tensor, all by hand."""
    u = CodedMatrix(pack(torch.tensor([[0, 1, 2, 3, 0]], dtype=torch.uint8)), torch.tensor([4.0, 1, -1, -4]), 5)
    v = CodedMatrix(
        pack(torch.tensor([[3, 3, 3, 3, 0, 0, 0, 0]], dtype=torch.uint8)), torch.tensor([2.0, 1, -1, -2]), 8
    )
    vector = CodedVector(
        pack(torch.tensor([0, 1, 2, 3], dtype=torch.uint8)), torch.tensor([0.5, 0.25, -0.25, -0.5]), (4,)
    )
    whole = torch.tensor([1.0, 2.0], dtype=torch.float16)
    return Adapter(CONFIG, {"a.weight": LowRankDelta(u, torch.tensor([1.5]), v, (5, 8)), "b": vector, "head": whole})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", small_adapter(), "card\n")
    return tmp_path / "adapter"


def rewrite(folder: Path, change) -> None:
    """Change the weights' tensors and keep the checksum right, so that only the change itself can be refused."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    set_config(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest())


def set_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


def test_exact_bytes_of_the_weights(saved):
    """The whole file, written out by hand from the format's description."""
    data = (saved / WEIGHTS_NAME).read_bytes()
    floats = [
        ("a.weight.s", [1.5]),
        ("a.weight.u_levels", [4, 1, -1, -4]),
        ("a.weight.v_levels", [2, 1, -1, -2]),
        ("b.levels", [0.5, 0.25, -0.25, -0.5]),
    ]
    codes = [
        ("a.weight.u_codes", [1, 2], [0b11100100, 0]),
        ("a.weight.v_codes", [1, 2], [0b11111111, 0]),
        ("b.codes", [1], [0b11100100]),
    ]
    header, payload = {"__metadata__": {"format": "pt"}}, b""
    for name, values in floats:
        body = struct.pack(f"<{len(values)}f", *values)
        header[name] = {
            "dtype": "F32",
            "shape": [len(values)],
            "data_offsets": [len(payload), len(payload) + len(body)],
        }
        payload += body
    half = struct.pack("<2e", 1.0, 2.0)
    header["head"] = {"dtype": "F16", "shape": [2], "data_offsets": [len(payload), len(payload) + len(half)]}
    payload += half
    for name, shape, values in codes:
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [len(payload), len(payload) + len(values)]}
        payload += bytes(values)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert data == struct.pack("<Q", len(text)) + text + payload


def test_exact_bytes_of_the_config(saved):
    checksum = hashlib.sha256((saved / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert (saved / CONFIG_NAME).read_text() == (
        '{\n  "base_fingerprint": "",\n  "base_model_name_or_path": "org/base",\n  "base_nbytes": 1000,\n'
        '  "compression": {"density": 0.5, "method": "paper"},\n  "errors": [0.5, 0.25, 0.0],\n'
        '  "format_version": 1,\n  "inference_mode": true,\n  "model_config": {},\n  "peft_type": "DTS",\n'
        '  "shapes": {"a.weight": [5, 8]},\n  "task_type": null,\n  "tied": {},\n'
        f'  "weights_sha256": "{checksum}"\n}}\n'
    )


def test_round_trip(saved):
    before, after = small_adapter().parameters, load_adapter(saved).parameters
    assert list(before) == list(after)
    for name, parameter in before.items():
        assert type(after[name]) is type(parameter)
        assert tuple(after[name].shape) == tuple(parameter.shape)
        for part, tensor in tensors_of(name, parameter).items():
            assert torch.equal(tensors_of(name, after[name])[part], tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool], ids=str
)
def test_whole_tensors_of_any_dtype(tmp_path, dtype):
    adapter = small_adapter()
    head = torch.tensor([[1.0, 0.0], [2.0, 4.0]]).to(dtype)
    save_adapter(tmp_path / "a", Adapter(CONFIG, {**adapter.parameters, "head": head}), "card")
    read = load_adapter(tmp_path / "a").parameters["head"]
    assert read.dtype == dtype
    assert torch.equal(read.float(), head.float())


def test_round_trip_of_all_kinds_of_shapes(tmp_path):
    parameters = {
        "conv": fit(torch.randn(6, 3, 3, 3), rank=2),
        "empty": fit(torch.randn(8, 12), rank=0),
        "odd": fit(torch.randn(7, 9), rank=7),
        "scalar_like": fit_vector(torch.randn(1)),
        "token": fit_vector(torch.randn(1, 1, 10)),
        "whole.bf16": torch.randn(3, 2).bfloat16(),
        "whole.f64": torch.randn(3, dtype=torch.float64),
    }
    adapter = Adapter(CONFIG | {"errors": [0.0] * len(parameters)}, parameters)
    save_adapter(tmp_path / "a", adapter, "")
    loaded = load_adapter(tmp_path / "a").parameters
    for name, parameter in parameters.items():
        if isinstance(parameter, torch.Tensor):
            assert torch.equal(loaded[name], parameter)
        else:
            assert torch.equal(loaded[name].dequantize(), parameter.dequantize())
    assert total_size(adapter, "") == directory_size(tmp_path / "a")


@pytest.mark.parametrize("file", [CONFIG_NAME, WEIGHTS_NAME])
def test_truncation_anywhere_is_refused(saved, file):
    data = (saved / file).read_bytes()
    for length in range(0, len(data) - 2, 7):
        (saved / file).write_bytes(data[:length])
        with pytest.raises(AdapterFormatError):
            load_adapter(saved)


def test_every_flipped_byte_of_the_weights_is_refused(saved):
    data = (saved / WEIGHTS_NAME).read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        (saved / WEIGHTS_NAME).write_bytes(flipped)
        with pytest.raises(AdapterFormatError):
            load_adapter(saved)


def drop(name):
    return lambda t: t.pop(name)


def put(name, tensor):
    return lambda t: t.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("a.weight.s"), "'a.weight.s' is missing"),
        (drop("a.weight.u_codes"), "without the other parts"),
        (drop("b.levels"), "without the other parts"),
        (put("a.weight.s", torch.zeros(2)), "inconsistent parts"),
        (put("a.weight.u_codes", torch.zeros(1, 3, dtype=torch.uint8)), "inconsistent parts"),
        (put("a.weight.u_codes", torch.zeros(1, 2)), "expected U8"),
        (put("a.weight.v_levels", torch.zeros(5)), "inconsistent parts"),
        (put("a.weight.v_levels", torch.zeros(4, dtype=torch.float64)), "expected F32"),
        (put("b.codes", torch.zeros(2, 1, dtype=torch.uint8)), "1 dimensions"),
        (put("b", torch.zeros(3)), "both whole and as a delta"),
        (put("a.weight.s", torch.tensor([float("nan")])), "NaN or Inf"),
        (put("b.levels", torch.tensor([0, 0, 0, float("inf")])), "NaN or Inf"),
        (put("extra", torch.zeros(3)), "errors for 4 parameters"),
    ],
)
def test_inconsistent_weights_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(AdapterFormatError, match=message):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "unknown format_version 2; this release reads 1"),
        ({"peft_type": "LORA"}, "expected peft_type 'DTS', got 'LORA'"),
        ({"shapes": {"a.weight": [9, 8]}}, "inconsistent parts"),
        ({"shapes": {"a.weight": [5, -8]}}, "positive integers"),
        ({"shapes": {"a.weight": "5x8"}}, "positive integers"),
        ({"shapes": {"a.weight": [5, 8], "ghost": [1]}}, "'ghost', which is not in the file"),
        ({"shapes": None}, "expected 'shapes' of type dict"),
        ({"weights_sha256": "0" * 64}, "SHA-256"),
    ],
)
def test_wrong_configs_are_refused(saved, changes, message):
    set_config(saved, **changes)
    with pytest.raises(AdapterFormatError, match=message):
        load_adapter(saved)


def test_a_layout_that_is_known_is_another_one_with_another_config(saved):
    """What equal headers share is checked once; the shapes that a config declares belong to it."""
    adapter = load_adapter(saved)
    assert {n: p.shape for n, p in load_adapter(saved).deltas.items()} == {
        n: p.shape for n, p in adapter.deltas.items()
    }
    shapes = json.loads((saved / CONFIG_NAME).read_text())["shapes"]
    set_config(saved, shapes=shapes | {name: [50, 50] for name in shapes})
    with pytest.raises(AdapterFormatError, match="inconsistent"):
        load_adapter(saved)
    set_config(saved, shapes=shapes)
    assert load_adapter(saved).deltas.keys() == adapter.deltas.keys()


def test_a_known_header_of_a_file_that_ends_too_soon(saved):
    load_adapter(saved)
    weights = saved / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterFormatError, match="damaged"):
        load_adapter(saved, verify_checksum=False)


def test_a_header_that_lies_about_its_size_allocates_nothing(saved):
    text = b'{"a.u_codes":{"dtype":"U8","shape":[1099511627776,4],"data_offsets":[0,4398046511104]}}'
    (saved / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(AdapterFormatError, match="damaged"):
        load_adapter(saved)


@pytest.mark.parametrize("missing", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_files_are_named(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(AdapterFormatError, match=missing):
        load_adapter(saved)


def test_the_same_adapter_gives_the_same_bytes(tmp_path, saved):
    save_adapter(tmp_path / "again", small_adapter(), "card\n")
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_existing_target_is_kept(saved):
    with pytest.raises(DTSError, match="exists already"):
        save_adapter(saved, small_adapter(), "other")
    assert (saved / "README.md").read_text() == "card\n"
    save_adapter(saved, small_adapter(), "other", overwrite=True)
    assert (saved / "README.md").read_text() == "other"
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_directory_that_is_no_adapter_is_never_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(DTSError, match="not overwritten"):
        save_adapter(tmp_path / "photos", small_adapter(), "", overwrite=True)


def test_what_is_of_another_kind_or_holds_directories_is_kept(tmp_path):
    saved = tmp_path / "adapter"
    save_adapter(saved, small_adapter(), "")
    (saved / "checkpoint-500").mkdir()
    with pytest.raises(DTSError, match="holds directories, which would be lost"):
        save_adapter(saved, small_adapter(), "", overwrite=True)
    (saved / "checkpoint-500").rmdir()
    config = saved / "adapter_config.json"
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(DTSError, match=r"holds no adapter_config\.json of peft_type DTS"):
        save_adapter(saved, small_adapter(), "", overwrite=True)
    assert config.read_text() == '{"peft_type": "LORA"}'
    config.write_text("{")  # damaged
    save_adapter(saved, small_adapter(), "", overwrite=True)
    load_adapter(saved)


SAVE = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
from test_adapter_file import small_adapter
from dts_fast import save_adapter
{setup}
save_adapter({target!r}, small_adapter(), "new", overwrite=True)
"""


def run_save(target: Path, setup: str) -> subprocess.CompletedProcess:
    code = SAVE.format(tests=str(Path(__file__).parent), setup=setup, target=str(target))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_writer_leaves_no_half_adapter(tmp_path, existing):
    target = tmp_path / "adapter"
    if existing:
        save_adapter(target, small_adapter(), "old")
    killed = run_save(target, "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == existing
    if existing:
        assert (target / "README.md").read_text() == "old"
        load_adapter(target)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    save_adapter(tmp_path / "adapter", small_adapter(), "old")
    # The kernel refuses to write past this size, as it does on a full disk.
    failed = run_save(tmp_path / "adapter", "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))")
    assert "cannot be written" in failed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "README.md").read_text() == "old"


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DTSError, match="not writable"):
        save_adapter(tmp_path / "file" / "adapter", small_adapter(), "")
    if Path("/proc").is_dir():
        with pytest.raises(DTSError, match="not writable"):
            save_adapter(Path("/proc") / "adapter", small_adapter(), "")


def test_written_files_are_readable_by_others(saved):
    assert os.stat(saved).st_mode & 0o777 == 0o755


def test_codes_for_a_parameter_without_matrix_structure(tmp_path, saved):
    def change(tensors):
        tensors |= {f"p.{part}": torch.zeros(1, 0, dtype=torch.uint8) for part in ("u_codes", "v_codes")}
        tensors["p.s"], tensors["p.u_levels"], tensors["p.v_levels"] = torch.ones(1), torch.ones(4), torch.ones(4)

    rewrite(saved, change)
    set_config(saved, shapes={"a.weight": [5, 8], "p": [5]}, errors=[0.5, 0.25, 0.0, 0.0])
    with pytest.raises(AdapterFormatError, match=r"'p' of shape \[5\] has inconsistent parts"):
        load_adapter(saved)


def test_terms_under_names_with_a_newline(saved):
    def change(tensors):
        for part in ("codes", "levels"):
            tensors |= {f"b\n{name}.{part}": tensors[f"b.{part}"].clone() for name in ("c", "c+1")}

    rewrite(saved, change)
    set_config(saved, errors=[0.5, 0.25, 0.25, 0.0])
    assert isinstance(load_adapter(saved).parameters["b\nc"], DeltaSum)


@pytest.mark.parametrize("errors", [[float("nan"), 0.25, 0.0], [10**400, 0.25, 0.0], [-1.0, 0.25, 0.0]])
def test_errors_that_are_no_errors(saved, errors):
    set_config(saved, errors=errors)
    with pytest.raises(AdapterFormatError, match="'errors' a list of finite numbers"):
        load_adapter(saved)


def test_files_of_other_writers_with_any_order_of_tensors(tmp_path):
    """The format of safetensors knows no order of dtypes and no alignment."""
    parameters = {"w": fit(torch.randn(9, 7), rank=3), "v": fit_vector(torch.randn(5)), "h": torch.randn(3)}
    save_adapter(tmp_path / "a", Adapter(made_up_config(len(parameters)), parameters), "card")
    weights = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    (size,) = struct.unpack("<Q", weights[:8])
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    # Bytes and floats in turns, so that floats begin at odd offsets.
    names = [n for pair in zip(sorted(names, reverse=True), sorted(names), strict=True) for n in pair]
    shuffled, out = {}, b""
    for name in dict.fromkeys(names):
        first, last = header[name]["data_offsets"]
        shuffled[name] = header[name] | {"data_offsets": [len(out), len(out) + last - first]}
        out += data[first:last]
    text = json.dumps(shuffled).encode()
    weights = struct.pack("<Q", len(text)) + text + out
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(weights)
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (tmp_path / "a" / CONFIG_NAME).write_text(json.dumps(config))
    for mapped in (False, True):
        read = load_adapter(tmp_path / "a", mapped=mapped).parameters
        assert torch.equal(read["w"].dequantize(), parameters["w"].dequantize())
        assert torch.equal(read["v"].dequantize(), parameters["v"].dequantize())
        assert torch.equal(read["h"], parameters["h"])


def test_an_adapter_whose_parameters_share_memory_is_written(tmp_path):
    vector = fit_vector(torch.randn(5))
    save_adapter(tmp_path / "a", Adapter(made_up_config(2), {"v": vector, "w": vector}), "card")
    read = load_adapter(tmp_path / "a").parameters
    assert torch.equal(read["v"].dequantize(), read["w"].dequantize())


def made_up_config(parameters: int) -> dict[str, object]:
    return {
        "base_model_name_or_path": "base", "base_nbytes": 1000, "base_fingerprint": "", "compression": {},
        "errors": [0.5] * parameters, "model_config": {}, "tied": {}, "versions": {},
    }  # fmt: skip
