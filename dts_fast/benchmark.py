"""The timing protocol, and the shapes, batches and rivals it is applied to; `dts-fast bench` and bench/ use it.

Candidates are checked against the float64 reference before they are timed, and timed in turns within one run
(timing.py): what counts is the ratio of neighbours, whose median is robust on a noisy machine. Layers are rotated past
the last-level cache, so that weights and codes come from memory as they do in a model.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from . import gpu, native, reference
from .codes import CODES_PER_BYTE, CodedMatrix, LowRankDelta, packed_size
from .errors import DTSError
from .nn import DTSLinear
from .routing import route
from .timing import Roofline, dtype_name, last_level_cache, time_in_turns

# Linear layers [N, K] of well-known models (queries and outputs, keys and values, gate and up, down).
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3.1-8B": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
    "Qwen2.5-0.5B": {"q,o": (896, 896), "k,v": (128, 896), "gate,up": (4864, 896), "down": (896, 4864)},
    "BERT-base": {"q,k,v,o": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    "ViT-B": {"q,k,v,o": (768, 768), "up": (3072, 768), "down": (768, 3072)},
}
COMPOSITIONS = ("identical", "uniform", "zipf", "distinct")
BASELINE = "F.linear"
# Beyond this it takes twice the linear's time, as everyone expects.
_MATERIALISED_ROWS = 32


@dataclass(frozen=True)
class Case:
    """One point of a bench.

    Attributes:
        n, k: the layer.
        m: rows.
        dtype: of weights and inputs.
        rank: of each adapter.
        adapters: how many are loaded.
        composition: how rows use them: ``"base"`` (none does), ``"identical"`` (all the first), ``"uniform"`` (at
            random), ``"zipf"`` (the i-th with probability ~ 1/i), ``"distinct"`` (row i the i-th, round and round).
        device: ``"cpu"`` or ``"cuda"``.
    """

    n: int
    k: int
    m: int
    dtype: torch.dtype
    rank: int
    adapters: int = 1
    composition: str = "identical"
    device: str = "cpu"

    def slots(self) -> list[int]:
        """The adapter of each row, -1 for the base; the same on every call."""
        generator = torch.Generator().manual_seed(0)
        if self.composition == "base":
            return [-1] * self.m
        if self.composition == "identical":
            return [0] * self.m
        if self.composition == "distinct":
            return [row % self.adapters for row in range(self.m)]
        weights = torch.ones(self.adapters)
        if self.composition == "zipf":
            weights = 1 / torch.arange(1, self.adapters + 1)
        return torch.multinomial(weights, self.m, replacement=True, generator=generator).tolist()

    @property
    def base_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize

    @property
    def adapter_bytes(self) -> int:
        """Codes and scales of one adapter, as stored."""
        return self.rank * (packed_size(self.n) + packed_size(self.k) + 4)

    @property
    def floor_bytes(self) -> int:
        """What one call must read: the base, and the codes of each distinct adapter."""
        return self.base_bytes + len(set(self.slots()) - {-1}) * self.adapter_bytes

    @property
    def floor_operations(self) -> int:
        """Floating-point operations of one call."""
        rows = sum(slot >= 0 for slot in self.slots())
        return 2 * self.m * self.n * self.k + 2 * rows * self.rank * (self.n + self.k)


def floor_seconds(case: Case, roofline: Roofline) -> float:
    """The least time of a case: the slower of reading and computing."""
    operations = case.floor_operations / roofline.flops[dtype_name(case.dtype)]
    return max(case.floor_bytes / roofline.bytes_per_s, operations)


def rank_for_share(n: int, k: int, share: float, itemsize: int = 2) -> int:
    """The rank at which an adapter takes a share of the base's bytes, to the nearest multiple of 16 (at least 16 where
    it is 8 or more, else 8)."""
    rank = share * n * k * itemsize / ((n + k) / 4 + 4)
    return max(round(rank / 16) * 16, 8)


class Layers:
    """The layers of a case and its candidates, on as many copies of the weights as exceed the last-level cache.

    Args:
        peers: whether to build what dts_fast is compared with, too; PEFT's only where it is installed.
    """

    def __init__(self, case: Case, peers: bool = True) -> None:
        self.case = case
        torch.manual_seed(0)
        # On a GPU whatever is beyond several times its cache; a graph of some hundred calls of a small layer is enough.
        # Layers that are smaller than a thousandth of a cache would take longer to make than to time.
        times = 4 if case.device == "cuda" else 1.25
        copies = max(2, -int(-times * last_level_cache(case.device) // case.floor_bytes))
        copies = min(copies, 256 if case.device == "cuda" else 2048)
        deltas = [random_delta(case.n, case.k, case.rank) for _ in range(case.adapters)]
        self.x = torch.randn(case.m, case.k).to(case.dtype).to(case.device)
        scale = case.k**-0.5
        self.bases = [self._linear(scale) for _ in range(copies)]
        self.names = ["__base__" if slot < 0 else str(slot) for slot in case.slots()]
        self.layers = [self._personalised(base, deltas) for base in self.bases]
        self.deltas = deltas
        self.candidates: dict[str, list[Callable[[], Tensor]]] = {
            BASELINE: [self._plain(base) for base in self.bases],
            "DTSLinear": [self._routed(layer) for layer in self.layers],
        }
        if native.MODULE is not None and case.device == "cpu":
            packed = [self._personalised(copy.deepcopy(base), deltas, prepack=True) for base in self.bases]
            self.candidates["DTSLinear, prepacked"] = [self._routed(layer) for layer in packed]
        if case.device == "cuda" and gpu.why_not_cuda() is None:
            self.candidates["DTSLinear, Triton"] = [_with_triton(run) for run in self.candidates["DTSLinear"]]
        if peers:
            self._add_peers()

    def _linear(self, scale: float) -> nn.Linear:
        layer = nn.Linear(self.case.k, self.case.n, bias=False, dtype=self.case.dtype, device=self.case.device)
        layer.weight.data.normal_(std=scale)
        return layer.requires_grad_(False)

    def _personalised(self, base: nn.Linear, deltas: list[LowRankDelta], prepack: bool = False) -> DTSLinear:
        layer = DTSLinear(base, max_adapters=len(deltas), prepack=prepack)
        for slot, delta in enumerate(deltas):
            layer.load_adapter(str(slot), delta)
        return layer

    def _plain(self, base: nn.Linear) -> Callable[[], Tensor]:
        return lambda: base(self.x)

    def _routed(self, layer: DTSLinear) -> Callable[[], Tensor]:
        if len(set(self.names)) == 1:
            layer.set_adapter(self.names[0])
            return lambda: layer(self.x)
        chosen = route(self.names)

        def run() -> Tensor:
            with chosen:
                return layer(self.x)

        return run

    def _add_peers(self) -> None:
        case, x = self.case, self.x
        if case.composition == "identical":
            delta = self.deltas[0]
            to = {"dtype": case.dtype, "device": case.device}
            u = [(delta.u.dequantize() * delta.s).to(**to).contiguous() for _ in self.bases]
            v = [delta.v.dequantize().t().to(**to).contiguous() for _ in self.bases]
            self.candidates["two products, factors in the base's dtype"] = [
                lambda b=b, u=u, v=v: b(x) + nn.functional.linear(nn.functional.linear(x, v), u)
                for b, u, v in zip(self.bases, u, v, strict=True)
            ]
            dense = [] if case.m > _MATERIALISED_ROWS else [delta.dequantize().to(**to) for _ in self.bases]
            if dense:
                self.candidates["delta materialised"] = [
                    lambda b=b, d=d: b(x) + nn.functional.linear(x, d) for b, d in zip(self.bases, dense, strict=True)
                ]
            packed = _prepacked(self.bases, x)
            if packed:
                self.candidates["prepacked oneDNN, base alone"] = packed
        for label, rank in (("equal rank", case.rank), ("equal bytes", max(1, case.rank // (4 * case.dtype.itemsize)))):
            runs = _peft_layers(self.bases, x, rank, case.adapters, self.names)
            if runs:
                self.candidates[f"PEFT LoRA, {label}"] = runs

    def check(self) -> None:
        """Compare what is timed with the float64 reference.

        Raises:
            DTSError: it differs by more than float32 sums and one rounding.
        """
        layer = self.layers[0]
        ids = torch.tensor(self.case.slots(), dtype=torch.int32, device=self.case.device)
        weight = layer.base_layer.weight.double()
        truth = reference.linear(self.x.double(), weight, None, *layer.bank.tensors, ids)
        # K products of size K^-1/2, each rounded to 2^-24 of a sum that grows to size 1, in any order.
        sums = 4e-7 * self.case.k**0.5
        allowed = 2 * torch.finfo(self.case.dtype).eps * truth.abs() + 1e-2 * (self.case.dtype.itemsize == 2) + sums
        for name in self.candidates:
            if name.startswith("DTSLinear"):
                error = (self.candidates[name][0]().double() - truth).abs()
                if not bool((error <= allowed).all()):
                    raise DTSError(f"the result of {name} in {self.case} is wrong by {error.max():.3g}.")


def _with_triton(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same without the CUDA C++ kernels."""

    def wrapped() -> Tensor:
        with gpu.at_best("triton"):
            return run()

    return wrapped


def random_delta(n: int, k: int, rank: int) -> LowRankDelta:
    """A delta of random codes whose result is a tenth of a unit for inputs of unit size."""

    def factor(size: int) -> CodedMatrix:
        levels = torch.tensor([1.5, 0.5, -0.5, -1.5])
        codes = torch.randint(0, 256, (rank, packed_size(size)), dtype=torch.uint8)  # four codes in each
        if size % CODES_PER_BYTE:
            codes[:, -1] &= (1 << 2 * (size % CODES_PER_BYTE)) - 1
        return CodedMatrix(codes, levels, size)

    return LowRankDelta(factor(n), torch.full((rank,), 0.1 / (rank * k) ** 0.5), factor(k), (n, k))


def _prepacked(bases: Sequence[nn.Linear], x: Tensor) -> list[Callable[[], Tensor]] | None:
    """What torch's inductor calls for frozen weights; None where this torch has no oneDNN."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(b.weight.data, x.shape[0]) for b in bases]
        torch.ops.mkldnn._linear_pointwise(x, packed[0], None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return [lambda w=w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in packed]


def _peft_layers(
    bases: Sequence[nn.Linear], x: Tensor, rank: int, adapters: int, names: list[str]
) -> list[Callable[[], Tensor]] | None:
    """PEFT's LoRA layers on the same weights; a mixed batch by its ``adapter_names``. None without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    runs = []
    mixed = len(set(names)) > 1
    for base in bases:
        own = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        own.weight = base.weight
        holder = nn.ModuleDict({"layer": own})
        for adapter in range(adapters):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
            inject_adapter_in_model(config, holder, adapter_name=str(adapter))
        holder.to(base.weight.device, base.weight.dtype).requires_grad_(False).eval()
        layer = holder["layer"]
        layer.set_adapter("0")
        runs.append((lambda layer=layer: layer(x, adapter_names=names)) if mixed else (lambda layer=layer: layer(x)))
    return runs


def run_case(case: Case, roofline: Roofline, *, peers: bool = True, rounds: int = 15) -> Iterator[dict[str, object]]:
    """Check and time a case; one JSON-ready row for each candidate.

    Raises:
        DTSError: the result is wrong.
    """
    gc.collect()  # the last case's layers, some of which refer to themselves: gigabytes
    layers = Layers(case, peers)
    layers.check()
    floor = 1e3 * floor_seconds(case, roofline)
    described = asdict(case) | {"dtype": dtype_name(case.dtype)}
    for timing in time_in_turns(layers.candidates, BASELINE, rounds, 3e-3, case.device):
        yield {
            **described,
            **{key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(timing).items()},
            "floor_ms": round(floor, 5),
            "of_floor": round(floor / timing.ms, 4),
            "bound": "memory" if case.floor_bytes / roofline.bytes_per_s * 1e3 >= floor else "compute",
        }
