"""`DTSExperts`: a mixture's experts, as transformers stacks them, each token with its row's adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..bank import Arena, Bank, page_count
from ..codes import PageLayout, from_pages, is_matrix
from ..pieces import Piece
from ..routing import Slots, all_base, slot_ids
from ..slots import SlotTable
from ..writes import Writes
from .module import DTSModule, Parameter, is_changed, is_hooked, is_plain


class DTSExperts(DTSModule):
    """Experts whose matrices are stacks ``gate_up_proj [E, 2 I, H]`` (or ``up_proj [E, I, H]``) and ``down_proj
    [E, H, I]``, or transposed, perhaps with ``..._bias [E, N]``; their adapters have a delta for each expert's matrix.

    To a bank an expert's matrix is a slot of its own, so that the rows of a call may differ in adapter and expert.

    Args:
        base_layer: an experts module of transformers 5; see `why_not_experts`.
        max_adapters, slots: see `DTSModule`.
        parts: of how many blocks of rows, each with a delta of its own, an expert's matrix in a stack consists, where
            that is not as most checkpoints have it (gate and up projection apart).
        arenas: fixed capacities of the banks, by `Piece.bank`.

    Input ``hidden_states [T, H]`` (T tokens, those of a row beside each other), ``top_k_index [T, k]`` and
    ``top_k_weights [T, k]``; output ``[T, H]``.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        max_adapters: int = 8,
        *,
        slots: SlotTable | None = None,
        parts: Mapping[str, int] | None = None,
        arenas: Mapping[str, Arena] | None = None,
    ) -> None:
        super().__init__(base_layer, max_adapters, slots=slots)
        self.num_experts = base_layer.num_experts
        self.layouts: dict[str, PageLayout] = {}
        self.banks = nn.ModuleDict()
        self.transposed = base_layer.is_transposed
        self.parts = _stacks(base_layer) | dict(parts or {})
        matrices: dict[str, int] = {}  # of each bank
        for name, count in self.parts.items():
            _, n, k = base_layer.get_parameter(name).shape
            n, k = (k, n) if self.transposed else (n // count, k)
            for key in self._keys_of(name):
                self.layouts[key], matrices[key] = PageLayout(n, k), self.num_experts
        for name in _biases(base_layer):
            self.layouts[name], matrices[name] = PageLayout(*base_layer.get_parameter(name).shape), 1
        device = base_layer.down_proj.device
        for key, layout in self.layouts.items():
            self.banks[key] = Bank(
                layout.nbytes, self.slots.capacity, parts=matrices[key], arena=(arenas or {}).get(key), device=device
            )
        # Slot -> the pieces that it changes; a slot that is not here costs the layer nothing.
        self.loaded: dict[int, frozenset[str]] = {}

    # What a slot holds: in the banks, or (whole tensors, deltas of whole stacks) as `DTSModule` does.

    def _by_bank(self, parameters: Mapping[str, Parameter]) -> dict[str, dict[int, Parameter]] | None:
        """Bank -> expert -> delta; None where a parameter is none that a bank holds."""
        found: dict[str, dict[int, Parameter]] = {}
        for name, parameter in parameters.items():
            key, expert = _place(name)
            if key not in self.banks or isinstance(parameter, Tensor) or not is_matrix(parameter):
                return None
            found.setdefault(key, {})[expert] = parameter
        return found

    def _oriented(self, key: str, matrix):
        """Between a parameter's orientation and its bank's ``[N, K]``; its own inverse."""
        return matrix.transpose() if self.transposed and not key.endswith("_bias") else matrix

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter], writes: Writes | None = None) -> None:
        by_bank = self._by_bank(parameters)
        if by_bank is None:
            return super().load_slot(slot, parameters, writes)
        for key, deltas in by_bank.items():
            oriented = {expert: self._oriented(key, delta) for expert, delta in deltas.items()}
            self.banks[key].load_deltas(slot, oriented, writes)
        self.loaded[slot] = frozenset(parameters)
        return None

    def fits(self, parameters: Mapping[str, Parameter], without: Collection[int] = ()) -> bool:
        by_bank = self._by_bank(parameters) or {}
        return all(
            self.banks[key].fits([page_count(delta) for delta in deltas.values()], without)
            for key, deltas in by_bank.items()
        )

    def has_fast_path(self, parameters: Mapping[str, Parameter]) -> bool:
        return self._by_bank(parameters) is not None

    def changes(self, slot: int, name: str) -> bool:
        return is_changed(name, self.loaded.get(slot, ())) or super().changes(slot, name)

    def parameters_of(self, slot: int) -> Mapping[str, Parameter]:
        found = dict(super().parameters_of(slot))
        for name in self.loaded.get(slot, ()):
            key, expert = _place(name)
            pages, weights = self.banks[key].listed(slot, expert)
            if len(pages):
                found[name] = self._oriented(key, from_pages(self.layouts[key], pages, weights))
        return found

    def mix_slots(self, slot: int, members: Sequence[tuple[int, float]]) -> None:
        if any(member in self.stored for member, _ in members):
            return super().mix_slots(slot, members)
        present = [(member, weight) for member, weight in members if member in self.loaded and weight != 0]
        if present:
            for bank in self.banks.values():
                bank.share(slot, present)
            self.loaded[slot] = frozenset().union(*(self.loaded[member] for member, _ in present))
        return None

    def clear_slot(self, slot: int, writes: Writes | None = None) -> None:
        super().clear_slot(slot, writes)
        self.loaded.pop(slot, None)
        for bank in self.banks.values():
            bank.evict(slot, writes)

    def runs_alone(self, slot: int) -> bool:
        # A layer with hooks (a user's, or accelerate's) must run itself, or they do not.
        return super().runs_alone(slot) or (slot in self.loaded and is_hooked(self.base_layer))

    # The computation.

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inputs = hidden_states, top_k_index, top_k_weights
        if all_base():
            return self._base(*inputs)
        if self.stored or is_hooked(self.base_layer):
            return super().forward(*inputs)
        return self.forward_fast(self.traceable_slots(hidden_states.shape), *inputs)

    def forward_fast(self, slots: Slots, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not self._touched(slots):
            return self._base(hidden_states, top_k_index, top_k_weights)
        layer, (tokens, choices) = self.base_layer, top_k_index.shape
        own = slot_ids(slots, tokens, hidden_states.device).long()
        # A token and one of its experts are a row. Those of an expert side by side: its weights are read once.
        experts, order = top_k_index.reshape(-1).long().sort(stable=True)
        token = order // choices
        rows = _Rows(experts, own[token], self.num_experts)
        up, gated = ("gate_up_proj", True) if layer.has_gate else ("up_proj", False)
        y = self._project(rows, hidden_states[token], up)
        y = layer._apply_gate(y) if gated else layer.act_fn(y)
        y = self._project(rows, y, "down_proj")
        y = y * top_k_weights.reshape(-1)[order, None]
        # Back in the tokens' order, and each token's sum in that of its choices, whoever else is in the batch.
        y = y[order.argsort()].view(tokens, choices, y.shape[1])
        return y.sum(1).to(hidden_states.dtype)

    def _project(self, rows: _Rows, x: Tensor, name: str) -> Tensor:
        """Rows times the base's and the adapters' matrices of their experts, and biases."""
        stack, bias = self.base_layer._parameters[name], self.base_layer._parameters.get(f"{name}_bias")
        product = _grouped_product(x, stack)
        y = self._one_by_one(rows, x, name, bias) if product is None else self._grouped(product, rows, x, name)
        if product is not None and bias is not None:
            y = y + bias[rows.experts].to(y.dtype)
        key = f"{name}_bias"
        if key in self.banks and self.banks[key].slot_pages.shape[1]:
            delta = ops.embedding_delta(rows.experts, self.layouts[key], *self.banks[key].tensors, rows.slots.int())
            y = (y + delta).to(y.dtype)
        return y

    def _grouped(self, product: Callable[..., Tensor], rows: _Rows, x: Tensor, name: str) -> Tensor:
        stack = self.base_layer._parameters[name]
        y = product(x.to(stack.dtype), stack if self.transposed else stack.transpose(1, 2), offs=rows.ends())
        deltas = []
        for key in self._keys_of(name):
            deltas.append(torch.zeros(len(y), self.layouts[key].n, dtype=y.dtype, device=y.device))
            ops.add_delta_(deltas[-1], x.to(y.dtype), *self.banks[key].tensors, rows.matrices)
        return y + torch.cat(deltas, 1)

    def _one_by_one(self, rows: _Rows, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        stack = self.base_layer._parameters[name]
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else stack.dtype
        banks = [self.banks[key].tensors for key in self._keys_of(name)]
        x, results = x.to(dtype), [x.new_zeros(0, sum(self.layouts[key].n for key in self._keys_of(name)), dtype=dtype)]
        for expert, first, last in rows.spans():
            mine, own = x[first:last], rows.matrices[first:last]
            offset = None if bias is None else bias[expert].to(dtype)
            if self.transposed or offset is not None:
                weight = stack[expert].to(dtype)
                y = nn.functional.linear(mine, weight.t() if self.transposed else weight, offset)
                columns = y.shape[1] // len(banks)
                for i, bank in enumerate(banks):
                    ops.add_delta_(y.narrow(1, i * columns, columns), mine, *bank, own)
                results.append(y)
            else:
                weights = stack[expert].to(dtype).chunk(len(banks))
                parts = [ops.linear(mine, w, None, *bank, own) for w, bank in zip(weights, banks, strict=True)]
                results.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return torch.cat(results)

    def _keys_of(self, name: str) -> list[str]:
        """The banks of a stack, in the order of the rows."""
        return [Piece(name, 0, part, self.parts[name]).bank for part in range(self.parts[name])]

    def _touched(self, slots: Slots) -> bool:
        if isinstance(slots, Tensor):
            return True
        return any(slot in self.loaded for slot in ([slots] if isinstance(slots, int) else set(slots)))


class _Rows:
    """Tokens and their experts, sorted by expert.

    Attributes:
        experts: int64 ``[R]``.
        slots: int64 ``[R]``; -1 for the base.
        matrices: int32 ``[R]``, the number that a slot's expert has in a bank; -1 for the base.
    """

    def __init__(self, experts: Tensor, slots: Tensor, count: int) -> None:
        self.experts, self.slots, self.count = experts, slots, count
        self.matrices = torch.where(slots >= 0, slots * count + experts, -1).int()
        self._spans: list[tuple[int, int, int]] | None = None

    def ends(self) -> Tensor:
        """Where each expert's rows end: nothing waits for it, and a graph serves every choice of experts."""
        counts = torch.zeros(self.count, dtype=torch.long, device=self.experts.device)
        return counts.index_add(0, self.experts, torch.ones_like(self.experts)).cumsum(0).int()

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of those that have any."""
        if self._spans is None:
            ends = self.ends().tolist()
            firsts = [0, *ends[:-1]]
            self._spans = [
                (e, first, last) for e, (first, last) in enumerate(zip(firsts, ends, strict=True)) if first < last
            ]
        return self._spans


def why_not_experts(layer: nn.Module) -> str | None:
    """Why `DTSExperts` cannot serve a module; None if it can."""
    interface = ("has_gate", "is_transposed", "is_concatenated", "has_bias")
    if not isinstance(getattr(layer, "num_experts", None), int) or not all(hasattr(layer, name) for name in interface):
        return "it is no experts module of transformers 5"
    if getattr(layer, "has_post_expert_norm", False) or getattr(layer, "_is_expert_parallel", False):
        return "its experts do more than multiply, or lie on several devices"
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    dims = dict.fromkeys(_stacks(layer), 3) | dict.fromkeys(_biases(layer), 2)
    if own.keys() != dims.keys() or not all(is_plain(p) and p.dim() == dims[name] for name, p in own.items()):
        return "it has other parameters than stacks of up and down projections, and their biases"
    return None


def _stacks(layer: nn.Module) -> dict[str, int]:
    """The stacks of an experts module, and how many matrices of a checkpoint an expert has in each."""
    apart = not layer.is_transposed and layer.is_concatenated
    return {"gate_up_proj": 2 if apart else 1, "down_proj": 1} if layer.has_gate else {"up_proj": 1, "down_proj": 1}


def _biases(layer: nn.Module) -> list[str]:
    return [f"{name}_bias" for name in _stacks(layer)] if layer.has_bias else []


def _place(name: str) -> tuple[str, int]:
    """The bank of a parameter or piece, and which of its matrices it is."""
    piece = Piece.named(name)
    return (name, 0) if piece is None else (piece.bank, piece.expert)


def _grouped_product(x: Tensor, stack: Tensor) -> Callable[..., Tensor] | None:
    """What multiplies groups of rows, each with its own matrix, without waiting for how many there are: on GPUs, and in
    graphs. None where experts are to be taken one by one."""
    if not (x.is_cuda or torch.compiler.is_compiling()):
        return None
    capable = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    if capable and stack.dtype == torch.bfloat16 and hasattr(nn.functional, "grouped_mm"):
        return nn.functional.grouped_mm
    if torch.compiler.is_compiling():  # the op that transformers' own experts use then
        return getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return None
