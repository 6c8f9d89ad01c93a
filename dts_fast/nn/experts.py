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
from .module import DTSModule, Parameter, is_changed, is_hooked, is_plain


class DTSExperts(DTSModule):
    """Experts whose matrices are stacks ``gate_up_proj [E, 2 I, H]`` (or ``up_proj [E, I, H]``) and ``down_proj
    [E, H, I]``, and whose adapters have a delta for each expert's projections, as checkpoints do.

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
        self.parts = _stacks(base_layer) | dict(parts or {})
        for name, count in self.parts.items():
            stack = base_layer.get_parameter(name)
            for part in range(count):
                key = Piece(name, 0, part, count).bank
                self.layouts[key] = PageLayout(stack.shape[1] // count, stack.shape[2])
                self.banks[key] = Bank(
                    self.layouts[key].nbytes, self.slots.capacity, parts=self.num_experts,
                    arena=(arenas or {}).get(key), device=stack.device,
                )  # fmt: skip
        # Slot -> the pieces that it changes; a slot that is not here costs the layer nothing.
        self.loaded: dict[int, frozenset[str]] = {}

    # What a slot holds: in the banks, or (whole tensors, deltas of whole stacks) as `DTSModule` does.

    def _by_bank(self, parameters: Mapping[str, Parameter]) -> dict[str, dict[int, Parameter]] | None:
        """Bank -> expert -> delta; None where a parameter is none that a bank holds."""
        found: dict[str, dict[int, Parameter]] = {}
        for name, parameter in parameters.items():
            piece = Piece.named(name)
            if piece is None or isinstance(parameter, Tensor) or not is_matrix(parameter):
                return None
            if piece.bank not in self.banks:
                return None
            found.setdefault(piece.bank, {})[piece.expert] = parameter
        return found

    def load_slot(self, slot: int, parameters: Mapping[str, Parameter]) -> None:
        by_bank = self._by_bank(parameters)
        if by_bank is None:
            return super().load_slot(slot, parameters)
        for key, deltas in by_bank.items():
            self.banks[key].load_deltas(slot, deltas)
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
            piece = Piece.named(name)
            pages, weights = self.banks[piece.bank].listed(slot, piece.expert)
            if len(pages):
                found[name] = from_pages(self.layouts[piece.bank], pages, weights)
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

    def clear_slot(self, slot: int) -> None:
        super().clear_slot(slot)
        self.loaded.pop(slot, None)
        for bank in self.banks.values():
            bank.evict(slot)

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
        own = own[token]
        ids = torch.where(own >= 0, own * self.num_experts + experts, -1).int()
        x = hidden_states[token]
        rows = self._rows_of(experts, x)
        up, gated = ("gate_up_proj", True) if layer.has_gate else ("up_proj", False)
        y = rows(x, up, ids)
        y = layer._apply_gate(y) if gated else layer.act_fn(y)
        y = rows(y, "down_proj", ids)
        y = y * top_k_weights.reshape(-1)[order, None]
        # Back in the tokens' order, and each token's sum in that of its choices, whoever else is in the batch.
        y = y[order.argsort()].view(tokens, choices, y.shape[1])
        return y.sum(1).to(hidden_states.dtype)

    def _rows_of(self, experts: Tensor, x: Tensor) -> Callable[[Tensor, str, Tensor], Tensor]:
        """A function that multiplies rows, sorted by expert, with a stack of the base's and the adapters' deltas."""
        counts = torch.zeros(self.num_experts, dtype=torch.long, device=x.device)
        counts = counts.index_add(0, experts, torch.ones_like(experts))
        product = _grouped_product(x, self.base_layer.down_proj)
        if product is not None:
            ends = counts.cumsum(0).int()  # nothing waits for numbers, and a graph serves every choice of experts
            return lambda x, name, ids: self._grouped(product, x, name, ids, ends)
        first, spans = 0, []
        for expert, count in enumerate(counts.tolist()):
            if count:
                spans.append((expert, first, first + count))
            first += count
        return lambda x, name, ids: self._one_by_one(x, name, ids, spans)

    def _grouped(self, product: Callable[..., Tensor], x: Tensor, name: str, ids: Tensor, ends: Tensor) -> Tensor:
        stack = self.base_layer.get_parameter(name)
        y = product(x.to(stack.dtype), stack.transpose(1, 2), offs=ends)
        deltas = []
        for key in self._keys_of(name):
            deltas.append(torch.zeros(len(y), self.layouts[key].n, dtype=y.dtype, device=y.device))
            ops.add_delta_(deltas[-1], x.to(y.dtype), *self.banks[key].tensors, ids)
        return y + torch.cat(deltas, 1)

    def _one_by_one(self, x: Tensor, name: str, ids: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
        stack = self.base_layer._parameters[name]
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else stack.dtype
        x, results = x.to(dtype), [x.new_zeros(0, stack.shape[1], dtype=dtype)]
        banks = [self.banks[key].tensors for key in self._keys_of(name)]
        for expert, first, last in spans:
            weights = stack[expert].to(dtype).chunk(len(banks))
            mine, own = x[first:last], ids[first:last]
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


def why_not_experts(layer: nn.Module) -> str | None:
    """Why `DTSExperts` cannot serve a module; None if it can."""
    expected = {
        "is_transposed": False, "is_concatenated": True, "has_bias": False, "has_post_expert_norm": False,
        "_is_expert_parallel": False,
    }  # fmt: skip
    if not isinstance(getattr(layer, "num_experts", None), int) or not hasattr(layer, "has_gate"):
        return "it is no experts module of transformers 5"
    other = [name for name, value in expected.items() if getattr(layer, name, value) != value]
    if other:
        return f"its experts are kept in another way ({', '.join(other)})"
    stacks = {name: p for name, p in layer._parameters.items() if p is not None}
    if stacks.keys() != _stacks(layer).keys() or not all(is_plain(p) and p.dim() == 3 for p in stacks.values()):
        return "it has other parameters than stacks of up and down projections"
    return None


def _stacks(layer: nn.Module) -> dict[str, int]:
    """The parameters of an experts module, and how many matrices of a checkpoint an expert has in each."""
    return {"gate_up_proj": 2, "down_proj": 1} if layer.has_gate else {"up_proj": 1, "down_proj": 1}


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
