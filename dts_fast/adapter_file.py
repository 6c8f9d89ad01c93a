"""The adapter directory: read, check, write. The format is specified in docs/format.md.

my_adapter/
  adapter_config.json          what the adapter is and which base it belongs to
  adapter_model.safetensors    codes, levels and scales
  README.md                    the card
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import Marker, staged_directory
from .checkpoint import fetch_from_hub, hub_id
from .codes import CodedMatrix, CodedVector, Delta, DeltaSum, LowRankDelta, matrix_shape, packed_size, terms_of
from .errors import AdapterFormatError, DTSError

FORMAT_VERSION = 1
PEFT_TYPE = "DTS"
CONFIG_NAME = "adapter_config.json"
MARKER = Marker(CONFIG_NAME, PEFT_TYPE)
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

_MATRIX_PARTS = ("u_codes", "u_levels", "s", "v_codes", "v_levels")
_VECTOR_PARTS = ("codes", "levels")
_METADATA = {"format": "pt"}

# In the order in which the safetensors writer lays dtypes out.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}

_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()} | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip

Parameter = Delta | Tensor

# The second, third, ... term of a delta that is a sum.
_FURTHER_TERM = re.compile(r"(.+)\+[1-9][0-9]*", re.DOTALL)


@dataclass(frozen=True)
class Adapter:
    """One compressed fine-tune in memory.

    Attributes:
        config: contents of ``adapter_config.json``.
        parameters: the base's parameter name to its delta; a plain tensor is a parameter stored whole.
    """

    config: Mapping[str, object]
    parameters: Mapping[str, Parameter]

    @property
    def deltas(self) -> dict[str, Delta]:
        """The parameters that are deltas of the base's, without those stored whole."""
        return {name: p for name, p in self.parameters.items() if not isinstance(p, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, levels, scales and whole tensors, without headers."""
        return sum(p.nbytes for p in self.parameters.values())


def tensors_of(name: str, parameter: Parameter) -> dict[str, Tensor]:
    """The file's tensors for one parameter."""
    if isinstance(parameter, DeltaSum):
        tensors = {}
        for number, term in enumerate(parameter.terms):
            tensors |= tensors_of(f"{name}+{number}" if number else name, term)
        return tensors
    if isinstance(parameter, LowRankDelta):
        u, v = parameter.u, parameter.v
        parts = dict(zip(_MATRIX_PARTS, (u.codes, u.levels, parameter.s, v.codes, v.levels), strict=True))
    elif isinstance(parameter, CodedVector):
        parts = dict(zip(_VECTOR_PARTS, (parameter.codes, parameter.levels), strict=True))
    else:
        return {name: parameter}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def save_adapter(path: str | Path, adapter: Adapter, card: str, *, overwrite: bool = False) -> None:
    """Write an adapter directory, whole or not at all.

    Raises:
        DTSError: the target exists (and ``overwrite`` is false), or the disk is full or not writable.
    """
    tensors = {}
    for name, parameter in adapter.parameters.items():
        if isinstance(parameter, Tensor) and name.rpartition(".")[2] in {*_MATRIX_PARTS, *_VECTOR_PARTS} - {"s"}:
            raise DTSError(f"{name!r} cannot be stored whole: the format reserves names that end so for codes.")
        if _FURTHER_TERM.fullmatch(name):
            raise DTSError(f"{name!r} cannot be stored: the format reserves names that end so for terms of a sum.")
        tensors.update(tensors_of(name, parameter))
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        # The library refuses tensors that share memory, as a mixture of an adapter with itself has them.
        tensors[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    weights = save(tensors, metadata=_METADATA)
    config = finish_config(adapter, hashlib.sha256(weights).hexdigest())
    with staged_directory(Path(path), overwrite=overwrite, marker=MARKER) as staging:
        (staging / WEIGHTS_NAME).write_bytes(weights)
        (staging / CONFIG_NAME).write_bytes(encode_config(config))
        (staging / CARD_NAME).write_text(card, encoding="utf-8")


def finish_config(adapter: Adapter, weights_sha256: str) -> dict[str, object]:
    """The configuration as written: with the format, the checksum, and the shapes that the codes do not tell."""
    shapes = {
        name: list(parameter.shape)
        for name, parameter in adapter.deltas.items()
        if tuple(parameter.shape) != _shape_from_codes(terms_of(parameter)[0])
    }
    fixed = {"peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION, "inference_mode": True, "task_type": None}
    return {**adapter.config, **fixed, "shapes": shapes, "weights_sha256": weights_sha256}


def encode_config(config: Mapping[str, object]) -> bytes:
    # One line for each key, lists and maps within a line: diffable, and no byte spent on indentation.
    lines = (f"  {json.dumps(k)}: {json.dumps(config[k], sort_keys=True)}" for k in sorted(config))
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8")


def total_size(adapter: Adapter, card: str) -> int:
    """Bytes of the three files that `save_adapter` would write; the tensors' data is not looked at."""
    tensors = {}
    for name, parameter in adapter.parameters.items():
        tensors.update(tensors_of(name, parameter))
    config = encode_config(finish_config(adapter, "0" * 64))
    return weights_size(tensors) + len(config) + len(card.encode("utf-8"))


def weights_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors, header included, without building it."""
    order = list(_DTYPE_NAMES)
    offset, header = 0, {"__metadata__": _METADATA}
    # In the writer's order, because the offsets' digits are part of the header.
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return 8 + -(-len(text) // 8) * 8 + offset


def directory_size(path: str | Path) -> int:
    """Bytes of all files of an adapter directory."""
    return sum(file.stat().st_size for file in Path(path).iterdir())


def load_adapter(path: str | Path, *, verify_checksum: bool = True, mapped: bool = False) -> Adapter:
    """Read an adapter directory or hub id after checking all of it.

    Names, shapes, dtypes and the format version are checked from the headers before any tensor is allocated.

    Args:
        verify_checksum: compare the weights with the SHA-256 in the config; turn it off only where the same file
            was verified before.
        mapped: leave the codes of matrices in the file, memory-mapped, for a caller that soon drops them: they change
            with the file.

    Raises:
        AdapterFormatError: anything missing, damaged, inconsistent or of an unknown version.
        CheckpointError: a hub id that the hub does not give.
    """
    adapter, verify = open_adapter(path, verify_checksum=verify_checksum, mapped=mapped)
    verify()
    return adapter


def open_adapter(
    path: str | Path, *, verify_checksum: bool = True, mapped: bool = True
) -> tuple[Adapter, Callable[[], None]]:
    """`load_adapter`, for a caller that has something to do while the checksum is computed.

    Returns:
        The adapter, and what waits for the checksum and raises AdapterFormatError where it is wrong: to be called
        before anything depends on the adapter.
    """
    folder = locate_adapter(path)
    config = read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise AdapterFormatError(f"{folder}: expected {WEIGHTS_NAME} beside {CONFIG_NAME}, found none.")
    try:
        data = _map(weights)
        verify = _verifier(weights, data, config["weights_sha256"]) if verify_checksum else lambda: None
        layout = _layout_of(weights, data, config["shapes"])
        stored = _Stored(data, layout, copies=not mapped)
        read = {name: _read(stored, name, kind, shape) for name, kind, shape in layout.parameters}
        parameters = _with_sums(weights, read)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(
            f"{weights}: damaged ({error}). It may be truncated; copy or download the adapter again."
        ) from error
    if len(config["errors"]) != len(parameters):
        raise AdapterFormatError(
            f"{folder}: the config records {len(config['errors'])} errors for {len(parameters)} parameters."
        )
    if not stored.known_finite():
        verify()  # what is damaged is to be called that
        _check_values(weights, parameters)
    return Adapter(config, parameters), verify


def _verifier(file: Path, data: mmap.mmap, expected: str) -> Callable[[], None]:
    """Computes the checksum beside all else, as it is as much work; what it returns waits for it.

    Raises (what it returns):
        AdapterFormatError: it is another one.
    """
    beside = ThreadPoolExecutor(1)
    digest = beside.submit(lambda: hashlib.sha256(data).hexdigest())
    beside.shutdown(wait=False)

    def verify() -> None:
        found = digest.result()
        if found != expected:
            raise AdapterFormatError(
                f"{file}: damaged: SHA-256 is {found[:16]}..., the config says {expected[:16]}.... Copy or download "
                "the adapter again."
            )

    return verify


def locate_adapter(path: str | Path) -> Path:
    """The directory of an adapter: the path itself, or where the hub's copy of it lies.

    Raises:
        AdapterFormatError: no such directory, and not a hub id.
        CheckpointError: a hub id that the hub does not give.
    """
    folder = Path(path)
    if folder.exists():
        return folder
    found = hub_id(path)
    if found is None or "/" not in found[0]:
        raise AdapterFormatError(f"{path}: no such directory; expected an adapter directory or a hub id.")
    return fetch_from_hub(str(path))


def read_config(folder: Path) -> dict[str, object]:
    """``adapter_config.json``, checked.

    Raises:
        AdapterFormatError: missing, not JSON, not a DTS adapter, an unknown version, or fields of wrong types.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        below = sorted(f.parent.name for f in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in directories below it: {', '.join(below[:5])}." if below else ""
        raise AdapterFormatError(f"{folder}: expected an adapter directory with {CONFIG_NAME}, found none.{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFormatError(f"{file}: not valid JSON ({error}). Copy or download the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterFormatError(f"{file}: expected peft_type {PEFT_TYPE!r}, got {found!r}; not a dts_fast adapter.")
    if config.get("format_version") != FORMAT_VERSION:
        raise AdapterFormatError(
            f"{file}: unknown format_version {config.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
            "Upgrade dts_fast."
        )
    kinds = {
        "shapes": dict,
        "weights_sha256": str,
        "base_fingerprint": str,
        "base_model_name_or_path": str,
        "errors": list,
        "base_nbytes": int,
        "model_config": dict,
        "tied": dict,
        "compression": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise AdapterFormatError(f"{file}: expected {key!r} of type {kind.__name__}, got {config.get(key)!r}.")
    ends = config.get("eos_token_id", [])
    if not isinstance(ends, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ends):
        raise AdapterFormatError(f"{file}: expected 'eos_token_id' a list of tokens, got {ends!r}.")
    if config["base_nbytes"] <= 0 or not all(
        error is None or (isinstance(error, (int, float)) and 0 <= error < 1e9) for error in config["errors"]
    ):
        raise AdapterFormatError(
            f"{file}: expected 'base_nbytes' above 0 and 'errors' a list of finite numbers or nulls."
        )
    return config


def _check_headers(
    file: Path, headers: Mapping[str, tuple[str, tuple[int, ...]]], shapes: Mapping[str, object]
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Group the file's tensors by parameter and check dtypes and shapes.

    Returns:
        parameter name to ("matrix" | "vector" | "whole", the parameter's shape).
    """
    layout: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    remaining, declared, shapes = set(headers), shapes, dict(shapes)

    def take(name: str, part: str, dtype: str, rank: int) -> tuple[int, ...]:
        full = f"{name}.{part}"
        if full not in headers:
            raise AdapterFormatError(f"{file}: parameter {name!r} is incomplete, {full!r} is missing.")
        found, shape = headers[full]
        if found != dtype or len(shape) != rank:
            raise AdapterFormatError(
                f"{file}: {full!r}: expected {dtype} with {rank} dimensions, got {found} {list(shape)}."
            )
        remaining.discard(full)
        return shape

    def further_term(name: str) -> re.Match[str] | None:
        return _FURTHER_TERM.fullmatch(name) if "+" in name else None  # asked of thousands

    # The first term of a sum declares the shape, and comes first in this order.
    for full in sorted(headers, key=lambda full: (further_term(full.rpartition(".")[0]) is not None, full)):
        name, _, part = full.rpartition(".")
        first = further_term(name)
        if first and part in ("u_codes", "codes") and first[1] in layout:
            shapes[name] = list(layout[first[1]][1] or ())
        if part == "u_codes":
            u, v = take(name, "u_codes", "U8", 2), take(name, "v_codes", "U8", 2)
            s = take(name, "s", "F32", 1)
            levels = take(name, "u_levels", "F32", 1), take(name, "v_levels", "F32", 1)
            shape = _declared_shape(file, name, shapes, (4 * u[1], 4 * v[1]))
            as_matrix = matrix_shape(shape)
            n, k = as_matrix or (0, 0)
            if as_matrix is None or not (
                u[0] == v[0] == s[0] and levels == ((4,), (4,)) and (packed_size(n), packed_size(k)) == (u[1], v[1])
            ):
                raise AdapterFormatError(
                    f"{file}: parameter {name!r} of shape {list(shape)} has inconsistent parts: u_codes {list(u)}, "
                    f"v_codes {list(v)}, s {list(s)}, levels {levels}; expected [r, {packed_size(n)}], "
                    f"[r, {packed_size(k)}], [r] and [4]."
                )
            layout[name] = ("matrix", shape)
        elif part == "codes" and f"{name}.levels" in headers:
            codes, levels = take(name, "codes", "U8", 1), take(name, "levels", "F32", 1)
            shape = _declared_shape(file, name, shapes, (4 * codes[0],))
            if levels != (4,) or packed_size(math.prod(shape)) != codes[0]:
                raise AdapterFormatError(
                    f"{file}: parameter {name!r} of shape {list(shape)} has inconsistent parts: codes {list(codes)}, "
                    f"levels {list(levels)}; expected [{packed_size(math.prod(shape))}] and [4]."
                )
            layout[name] = ("vector", shape)
    for full in sorted(remaining):
        name, _, part = full.rpartition(".")
        if part in ("u_levels", "v_codes", "v_levels", "codes", "levels"):
            raise AdapterFormatError(f"{file}: {full!r} stands without the other parts of parameter {name!r}.")
        if full in layout:
            raise AdapterFormatError(f"{file}: parameter {full!r} is stored both whole and as a delta.")
        layout[full] = ("whole", None)
        if headers[full][0] not in _DTYPES:
            raise AdapterFormatError(
                f"{file}: {full!r}: expected one of {', '.join(_DTYPES)}, got {headers[full][0]}, which this release "
                "does not read."
            )
    unknown = sorted(set(declared) - set(layout))
    if unknown:
        raise AdapterFormatError(f"{file}: the config gives a shape for {unknown[0]!r}, which is not in the file.")
    return layout


def _declared_shape(file: Path, name: str, shapes: Mapping[str, object], default: tuple[int, ...]) -> tuple[int, ...]:
    if name not in shapes:
        return default
    shape = shapes[name]
    if not isinstance(shape, list) or not all(type(d) is int and 0 < d < 2**40 for d in shape):
        raise AdapterFormatError(f"{file}: shape of {name!r}: expected a list of positive integers, got {shape!r}.")
    return tuple(shape)


def _map(file: Path) -> mmap.mmap:
    """A file in memory.

    Raises:
        SafetensorError: it is empty.
    """
    with file.open("rb") as handle:
        if not file.stat().st_size:
            raise SafetensorError("the file is empty")
        # Copy on write: torch wants writable memory, and the file is not to be written to.
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of a weights file are, and what they are of; checked.

    Attributes:
        begin: of the data in the file.
        entries: of the header: dtype, shape and bytes of each tensor.
        parameters: name, kind ("matrix", "vector" or "whole") and shape, in the order of names.
        parts: for each dtype whose tensors lie side by side, as most writers have them: the first and the last byte,
            the names in their order, and how many elements each has.
    """

    begin: int
    entries: Mapping[str, Mapping[str, object]]
    parameters: tuple[tuple[str, str, tuple[int, ...] | None], ...]
    parts: Mapping[str, tuple[int, int, list[str], list[int]]]


# By the header, the size of the file and the config's shapes; the latest last. Adapters of one base and equal ranks
# have the same, and one that was evicted has its own when it comes back.
_layouts: dict[bytes, _Layout] = {}
_MOST_LAYOUTS = 32


def _layout_of(file: Path, data: mmap.mmap, shapes: Mapping[str, object]) -> _Layout:
    """The layout of a mapped file.

    Raises:
        SafetensorError: a header that the library refuses.
        AdapterFormatError: tensors that are no adapter's.
    """
    (size,) = struct.unpack_from("<Q", data) if len(data) >= 8 else (len(data),)
    begin = min(8 + size, len(data))
    key = hashlib.sha256(data[:begin])
    key.update(json.dumps([len(data), shapes]).encode())
    layout = _layouts.pop(key.digest(), None)
    if layout is None:
        with safe_open(file, framework="pt"):  # the library checks sizes and offsets
            entries = json.loads(data[8:begin])
        entries.pop("__metadata__", None)
        headers = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        found = sorted(_check_headers(file, headers, shapes).items())
        layout = _Layout(begin, entries, tuple((name, *of) for name, of in found), _side_by_side(entries))
    _layouts[key.digest()] = layout
    for oldest in list(_layouts)[:-_MOST_LAYOUTS]:
        _layouts.pop(oldest, None)
    return layout


def _side_by_side(entries: Mapping[str, Mapping[str, object]]) -> dict[str, tuple[int, int, list[str], list[int]]]:
    of_dtype: dict[str, list[tuple[int, int, str]]] = {}
    for name, entry in entries.items():
        of_dtype.setdefault(entry["dtype"], []).append((*entry["data_offsets"], name))
    parts = {}
    for dtype, spans in of_dtype.items():
        spans.sort()
        first, last, sizes = spans[0][0], spans[-1][1], [end - begin for begin, end, _ in spans]
        if last - first == sum(sizes):
            item = _DTYPES[dtype].itemsize
            parts[dtype] = first, last, [name for *_, name in spans], [size // item for size in sizes]
    return parts


class _Stored:
    """The tensors of a mapped file as views of its data: the library's own `get_tensor` takes ten times as long, and an
    adapter has thousands of small ones.

    Args:
        mapping: the file.
        copies: whether bytes (codes) are copied, as all else is.
    """

    def __init__(self, mapping: mmap.mmap, layout: _Layout, copies: bool) -> None:
        self.entries = layout.entries
        self.data = torch.frombuffer(mapping, dtype=torch.uint8)[layout.begin :]
        self.parts: dict[str, Tensor] = {}
        self.views: dict[str, Tensor] = {}
        for dtype, (first, last, names, sizes) in layout.parts.items():
            part = self.data[first:last]  # copied at once, and divided in one call
            self.parts[dtype] = part if dtype == "U8" and not copies else part.clone().view(_DTYPES[dtype])
            self.views.update(zip(names, self.parts[dtype].split_with_sizes(sizes), strict=True))

    def get(self, name: str) -> Tensor:
        entry, view = self.entries[name], self.views.get(name)
        if view is None:
            first, last = entry["data_offsets"]
            view = self.data[first:last].clone().view(_DTYPES[entry["dtype"]])
        return view if len(entry["shape"]) == 1 else view.view(entry["shape"])

    def known_finite(self) -> bool:
        """Whether no number is NaN or Inf; False also where that would have to be asked tensor by tensor."""
        if len(self.views) < len(self.entries):
            return False
        floats = [part for part in self.parts.values() if part.is_floating_point()]
        # Types of one byte have few operations.
        return all(bool((p.float() if p.element_size() == 1 else p).isfinite().all()) for p in floats)


def _read(stored: _Stored, name: str, kind: str, shape: tuple[int, ...] | None) -> Parameter:
    if kind == "whole":
        return stored.get(name).clone()
    if kind == "vector":
        codes, levels = (stored.get(f"{name}.{part}").clone() for part in _VECTOR_PARTS)  # these are kept
        return CodedVector(codes, levels, shape)
    parts = {part: stored.get(f"{name}.{part}") for part in _MATRIX_PARTS}
    n, k = matrix_shape(shape)
    u = CodedMatrix(parts["u_codes"], parts["u_levels"], n)
    v = CodedMatrix(parts["v_codes"], parts["v_levels"], k)
    return LowRankDelta(u, parts["s"], v, shape)


def _with_sums(file: Path, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Terms ``P``, ``P+1``, ``P+2``, ... of a parameter P, together."""
    grouped: dict[str, list[Parameter]] = {}
    for name, parameter in parameters.items():
        if _FURTHER_TERM.fullmatch(name) is None:
            terms = [parameter]
            while (term := parameters.get(f"{name}+{len(terms)}")) is not None:
                terms.append(term)
            if len({type(term) for term in terms}) > 1 or (len(terms) > 1 and isinstance(parameter, Tensor)):
                raise AdapterFormatError(f"{file}: the terms of {name!r} are of different kinds, or whole tensors.")
            grouped[name] = terms
    known = sum(map(len, grouped.values()))
    if known != len(parameters):
        expected = {f"{name}+{i}" if i else name for name, terms in grouped.items() for i in range(len(terms))}
        stray = sorted(set(parameters) - expected)[0]
        raise AdapterFormatError(f"{file}: {stray!r} continues a sum whose earlier terms are missing.")
    return {name: DeltaSum(tuple(terms)) if len(terms) > 1 else terms[0] for name, terms in grouped.items()}


def _check_values(file: Path, parameters: Mapping[str, Parameter]) -> None:
    """Scales and levels must be finite; every code is valid by construction."""
    for name, parameter in parameters.items():
        for part, tensor in tensors_of(name, parameter).items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise AdapterFormatError(f"{file}: {part!r} holds NaN or Inf; expected finite values.")


def _shape_from_codes(parameter: LowRankDelta | CodedVector) -> tuple[int, ...]:
    """The shape a reader assumes when the config declares none."""
    if isinstance(parameter, CodedVector):
        return (4 * parameter.codes.shape[0],)
    return (4 * parameter.u.codes.shape[1], 4 * parameter.v.codes.shape[1])
