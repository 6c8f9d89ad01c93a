"""Between adapters and PEFT's LoRA: `export_lora` writes one, `LoraCheckpoint` lets `compress` read one.

A delta of rank r is a LoRA of rank r whose factors are full precision: ``B A`` with ``A = V^T`` and ``B = U diag(s)``.
What LoRA has no factors for (norms, heads) PEFT stores whole, as ``modules_to_save``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapter_file import Adapter, load_adapter
from .atomic import Marker, staged_directory
from .checkpoint import Checkpoint, TensorInfo, common_prefix, fetch_from_hub, hub_id, is_embedding
from .codes import DeltaSum, LowRankDelta, is_matrix, terms_of
from .errors import CheckpointError, DTSError
from .export import check_base
from .renaming import live_names

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Model types whose linear layers keep their weight as [in, out] (Conv1D of transformers), and those layers.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


def factors(delta: LowRankDelta | DeltaSum) -> tuple[Tensor, Tensor]:
    """``(left [N, r], right [K, r])`` in float32 with ``delta = left right^T``; the terms of a sum side by side."""
    terms = terms_of(delta)
    left = torch.cat([(term.u.dequantize() * term.s) for term in terms], dim=1)
    return left, torch.cat([term.v.dequantize() for term in terms], dim=1)


def export_lora(
    adapter_path: str | Path,
    base_model: str | Path,
    out_path: str | Path,
    *,
    drop: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write an adapter as a PEFT LoRA of equal rank, which ``PeftModel.from_pretrained`` loads.

    Args:
        adapter_path: adapter directory or hub id.
        base_model: ``.safetensors`` file, directory or hub id.
        out_path: directory to write.
        drop: leave out what PEFT cannot hold (tables that belong to no module, or that a head is tied to), instead of
            refusing.

    Returns:
        The parameters that were left out.

    Raises:
        AdapterFormatError, CheckpointError: an input cannot be read.
        BaseMismatchError: the adapter was made for another base.
        DTSError: the adapter changes parameters that PEFT cannot hold; the target exists or cannot be written.
    """
    adapter, base = load_adapter(adapter_path), Checkpoint.open(base_model)
    check_base(adapter, base)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole: dict[str, set[str]] = {}  # module -> its parameters that are stored whole, by their names in the adapter
    biases: list[str] = []
    left_out: list[str] = []
    live = live_names(base)  # PEFT looks for modules of the model in memory
    for name, parameter in adapter.parameters.items():
        module, _, leaf = live.get(name, name).rpartition(".")
        # A convolution of one output is decomposed along another dimension: it is stored whole.
        if leaf == "weight" and _is_low_rank(parameter) and terms_of(parameter)[0].u.n == parameter.shape[0]:
            if _has_tied_head(adapter, base, name):
                left_out.append(name)
                continue
            transposed = _keeps_transposed(base, name)
            table = is_embedding(name, tuple(parameter.shape))
            tensors |= _module_tensors(module, parameter, transposed, table)
            ranks[module] = sum(term.rank for term in terms_of(parameter))
        elif leaf in _OF_MODULES:
            whole.setdefault(module, set()).add(name)
        else:
            left_out.append(name)
    for module, names in whole.items():
        if module in ranks:
            biases += names
    if left_out and not drop:
        raise DTSError(
            f"PEFT's LoRA cannot hold {len(left_out)} parameters of this adapter ({', '.join(left_out[:5])}): they are "
            "no weight or bias of a module, or a table whose head is tied to it, which PEFT would leave as it was. "
            "Leave them out with --drop, or use export full."
        )
    saved = [module for module in whole if module not in ranks]
    for module in saved:
        # All of the module's parameters: PEFT puts a copy of the module in its place.
        for name in {*base.tensors, *adapter.parameters}:
            own = live.get(name, name)
            if own.rpartition(".")[0] == module:
                tensors[f"{_PREFIX}{own}"] = _personalised(adapter.parameters.get(name), base, name)
    for name in biases:
        module, _, leaf = live.get(name, name).rpartition(".")
        tensors[f"{_PREFIX}{module}.base_layer.{leaf}"] = _personalised(adapter.parameters[name], base, name)
    if not ranks:
        raise DTSError("the adapter changes no matrix; there is nothing that a LoRA could hold.")
    common = Counter(ranks.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.config["base_model_name_or_path"],
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {f"^{re.escape(m)}": rank for m, rank in ranks.items() if rank != common},
        "alpha_pattern": {f"^{re.escape(m)}": rank for m, rank in ranks.items() if rank != common},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "bias": "all" if biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": base.config.get("model_type") in _CONV1D_MODELS,
        "inference_mode": True,
        "task_type": None,
    }
    with staged_directory(Path(out_path), overwrite=overwrite, marker=Marker(CONFIG_NAME, "LORA")) as staging:
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return left_out


# What PEFT has a place for: in a LoRA's own layers, or in copies of modules with running statistics, too.
_OF_MODULES = ("weight", "bias", "running_mean", "running_var")


def _is_low_rank(parameter: object) -> bool:
    return isinstance(parameter, (LowRankDelta, DeltaSum)) and is_matrix(parameter)


def _has_tied_head(adapter: Adapter, base: Checkpoint, name: str) -> bool:
    """Whether a language model's head shares this table: written twice, or left out of the checkpoint."""
    return name in adapter.config["tied"].values() or _is_tied_table(base, name)


def _is_tied_table(base: Checkpoint, name: str) -> bool:
    shape = base.tensors[name].shape
    if shape[0] != base.config.get("vocab_size") or base.config.get("tie_word_embeddings") is False:
        return False
    kinds = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
    has_head = any(str(kind).endswith(kinds) for kind in base.config.get("architectures") or ())
    return has_head and not any(info.shape == shape for other, info in base.tensors.items() if other != name)


def _keeps_transposed(base: Checkpoint, name: str) -> bool:
    """Whether a parameter is the weight ``[in, out]`` of a Conv1D."""
    return base.config.get("model_type") in _CONV1D_MODELS and _CONV1D.search(name) is not None


def _module_tensors(module: str, delta: LowRankDelta | DeltaSum, transposed: bool, table: bool) -> dict[str, Tensor]:
    """PEFT's tensors of one module."""
    left, right = factors(delta)
    name = _PREFIX + module
    if table:  # [num, dim] + (B A)^T
        return {f"{name}.lora_embedding_A": left.t(), f"{name}.lora_embedding_B": right}
    if transposed:
        left, right = right, left
    shape = tuple(delta.shape)
    if len(shape) > 2:  # a convolution, then one of size 1
        ones = (1,) * (len(shape) - 2)
        a = right.t().reshape(-1, *shape[1:])
        return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": left.reshape(*left.shape, *ones)}
    return {f"{name}.lora_A.weight": right.t(), f"{name}.lora_B.weight": left}


def _personalised(parameter: object, base: Checkpoint, name: str) -> Tensor:
    if parameter is None:
        return base.get(name)
    if isinstance(parameter, Tensor):
        return parameter
    before = base.get(name)
    return (before.float() + parameter.dequantize()).to(before.dtype)


def is_lora(source: str | Path) -> bool:
    """Whether a path is a PEFT LoRA directory."""
    return _peft_type(source) == "LORA"


def _peft_type(source: str | Path) -> str | None:
    """The kind of adapter that a directory holds, if it does."""
    config = Path(source) / CONFIG_NAME
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("peft_type") if config.is_file() else None
    except (ValueError, AttributeError, OSError):
        return None
    return None if kind is None else str(kind)


def open_fine_tune(model: str | Path, base_model: str | Path, **hub: object) -> Checkpoint:
    """A fine-tune's checkpoint, or what a PEFT LoRA of a base makes of that.

    Args:
        hub: of `checkpoint.HUB_KEYS`, for repositories.

    Raises:
        CheckpointError: it cannot be read, or is no LoRA of this base.
    """
    if not Path(model).exists() and hub_id(model) is not None:
        model = fetch_from_hub(str(model), **hub)
    kind = _peft_type(model)
    if kind not in (None, "LORA"):
        raise CheckpointError(f"{model} is a PEFT adapter of type {kind}; expected a whole model, or a LoRA.")
    return LoraCheckpoint.of(model, Checkpoint.open(base_model, **hub)) if kind else Checkpoint.open(model)


@dataclass(frozen=True)
class LoraCheckpoint(Checkpoint):
    """A base with a PEFT LoRA merged into it, one tensor at a time and in float32: what `compress` takes as the
    fine-tune. Tensors stand under the base's names."""

    base: Checkpoint | None = None
    # Base name to (names of the LoRA's factors, scaling), or to the name of a tensor that PEFT stored whole.
    low_rank: Mapping[str, tuple[str, str, float]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    lora: Checkpoint | None = None

    @classmethod
    def of(cls, path: str | Path, base: Checkpoint) -> LoraCheckpoint:
        """Read the headers of a PEFT LoRA directory.

        Raises:
            CheckpointError: it is damaged, of a kind that is not a low-rank sum (DoRA), or not of this base.
        """
        config = json.loads((Path(path) / CONFIG_NAME).read_text(encoding="utf-8"))
        lora = Checkpoint.open(Path(path) / WEIGHTS_NAME, stacks=True)
        pairs, whole = {}, {}
        for key in lora.tensors:
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if ".original_module." in name:  # the base's own, beside what takes its place
                continue
            match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
            if match is None and (".lora_" in name or ".token_adapter." in name):
                raise CheckpointError(
                    f"{path}: {key!r} is of a kind of LoRA that is no low-rank sum (DoRA, trainable tokens). Merge it "
                    "into the base (merge_and_unload of PEFT), and compress that."
                )
            if match:
                pairs.setdefault(match[1], {})[match[3]] = key
            else:
                whole[name] = key
        incomplete = [module for module, pair in pairs.items() if pair.keys() != {"A", "B"}]
        if incomplete or not pairs:
            found = f"not so {incomplete[0]!r}" if incomplete else "found none"
            raise CheckpointError(f"{path}: expected lora_A and lora_B of each module, {found}.")
        names = {f"{module}.weight" for module in pairs} | set(whole)
        # By the names in memory, or as older releases of transformers had them: as the checkpoint has them.
        in_base = {name: name for name in base.tensors} | {live: name for name, live in live_names(base).items()}
        strip, add = common_prefix(names, in_base)

        def of_base(name: str) -> str:
            return in_base.get(add + name.removeprefix(strip), add + name.removeprefix(strip))

        tables = [name for name in base.tensors if _is_tied_table(base, name)]
        tied = bool(config.get("ensure_weight_tying"))
        low_rank = {}
        for module, pair in pairs.items():
            name = of_base(f"{module}.weight")
            if name not in base.tensors:
                if _is_like(tables, base, (lora.tensors[pair["B"]].shape[0], lora.tensors[pair["A"]].shape[-1])):
                    if not tied:
                        raise _untied(path, module)
                    whole.pop(f"{module}.weight", None)
                    continue  # the table's own, once more
                raise CheckpointError(
                    f"{path}: module {module!r} is not in the base {base.source} (no {name!r}). Give the base that the "
                    "LoRA was trained on."
                )
            low_rank[name] = pair["A"], pair["B"], _scaling(config, module, lora.tensors[pair["A"]].shape)
        whole = {of_base(name): key for name, key in whole.items()}
        # PEFT writes both whole where a vocabulary was resized; and a classifier has no head of this kind.
        heads = (lora.tensors[key].shape for name, key in whole.items() if name not in base.tensors)
        with_head = any(_is_like(tables, base, shape) for shape in heads)
        alone = [t for t in tables if t in low_rank or (t in whole and not with_head)]
        if alone and not tied and config.get("task_type") not in _WITHOUT_HEAD:
            raise _untied(path, alone[0])
        tensors = {**base.tensors, **{name: lora.tensors[key] for name, key in whole.items()}}
        # Their file is the LoRA's: what was made of it is made again when that changes.
        tensors |= {
            name: TensorInfo(lora.tensors[pair[0]].file, tensors[name].shape, torch.float32)
            for name, pair in low_rank.items()
        }
        return cls(
            source=str(path),
            tensors=tensors,
            nbytes=base.nbytes,
            config=base.config,
            folder=base.folder,
            base=base,
            low_rank=low_rank,
            whole=whole,
            lora=lora,
        )

    def get(self, name: str) -> Tensor:
        # Of a table that was resized the LoRA's file has the rows that its factors are added to, too.
        before = self.lora.get(self.whole[name]) if name in self.whole else self.base.get(name)
        if name not in self.low_rank:
            return before
        a_name, b_name, scaling = self.low_rank[name]
        a, b = self.lora.get(a_name).float(), self.lora.get(b_name).float()
        delta = scaling * (b.flatten(1) @ a.flatten(1))
        if "lora_embedding" in a_name or _keeps_transposed(self.base, name):
            delta = delta.t()
        if delta.numel() != before.numel() or delta.shape[0] != before.shape[0]:
            raise CheckpointError(
                f"{self.source}: the LoRA of {name!r} has shape {list(delta.shape)}, what it is added to "
                f"{list(before.shape)}."
            )
        return before.to(torch.promote_types(before.dtype, torch.float32)) + delta.reshape(before.shape)


def _is_like(tables: Sequence[str], base: Checkpoint, shape: tuple[int, ...]) -> bool:
    """Whether a weight ``[out, in]`` may be of a head that the checkpoint leaves out, as a table (or a resized one) is
    its own."""
    shapes = [base.tensors[table].shape for table in tables]
    return any(len(shape) == 2 and own[0] <= shape[0] and own[1] == shape[1] for own in shapes)


_WITHOUT_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # tasks of PEFT


def _untied(path: str | Path, changed: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the LoRA changes {changed!r}, one of a table and a head that the base ties, and PEFT leaves the "
        "other as it was: the base's checkpoint has no place for that. Merge it into a copy of the base whose head is "
        "untied (tie_word_embeddings=False), and compress that."
    )


def _scaling(config: Mapping[str, object], module: str, shape: tuple[int, ...]) -> float:
    """What PEFT multiplies ``B A`` with: alpha / r, or alpha / sqrt(r) with rank-stabilised scaling."""
    patterns = config.get("alpha_pattern") or {}
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
    alpha = patterns[key] if key is not None else config.get("lora_alpha", 8)
    return alpha / math.sqrt(shape[0]) if config.get("use_rslora") else alpha / shape[0]
