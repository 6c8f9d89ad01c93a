"""Language models with random weights and adapters of random codes for them: times do not depend on the values."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from dts_fast import Adapter, save_adapter
from dts_fast.benchmark import random_delta, rank_for_share
from dts_fast.codes import CodedVector, pack
from dts_fast.fingerprint import take_fingerprint
from dts_fast.pieces import Piece
from dts_fast.renaming import names_in_checkpoint

# As published; Llama-160M is JackFram/llama-160m. Of OLMoE-1B-7B a quarter of the layers, for memory's sake.
MODELS = {
    "Qwen2.5-0.5B": {
        "architecture": "Qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    },
    "Llama-160M": {
        "architecture": "Llama", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 1024,
    },
    "Llama-3.1-8B": {
        "architecture": "Llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
    },
    "OLMoE-1B-7B, 4 layers": {
        "architecture": "Olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
        "tie_word_embeddings": False, "max_position_embeddings": 1024,
    },
}  # fmt: skip
SCOPES = ("linear layers", "all parameters")


def base_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, distinct: int = 0) -> nn.Module:
    """A `transformers` model of these shapes.

    Args:
        distinct: how many layers have weights of their own (all if 0); the others have the memory of these, so that
            the shapes of a large model fit where nothing is timed that reads all weights.
    """
    import transformers

    torch.manual_seed(0)
    settings = dict(MODELS[name])
    kind = settings.pop("architecture")
    layers = settings["num_hidden_layers"]
    config = getattr(transformers, f"{kind}Config")(**(settings | {"num_hidden_layers": distinct or layers}))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    if distinct:
        own = model.model.layers
        own.extend(_on_the_memory_of(own[i % distinct]) for i in range(distinct, layers))
        model.config.num_hidden_layers = layers
    return model.eval().requires_grad_(False)


def _on_the_memory_of(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer, memo={id(p): nn.Parameter(p.data, requires_grad=False) for p in layer.parameters()})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name: what LoRAs are usually for."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def _as_stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as a checkpoint has them, each expert's matrices by themselves; views of the model's."""
    live, stored = dict(model.named_parameters()), {}
    for name, own in names_in_checkpoint(model).items():
        path, _, leaf = own.rpartition(".")
        piece = Piece.named(leaf)
        if piece is not None:
            stored[name] = piece.of(live[f"{path}.{piece.parameter}"])
        elif own in live and live[own].dim() <= 2:  # a tied one has one name among the parameters
            stored[name] = live[own]
    return stored


def write_adapter(folder: Path, model: nn.Module, scope: str, share: float, seed: int) -> int:
    """Write an adapter of random codes for a model that nothing has wrapped; returns the bytes of its files.

    Args:
        scope: ``"linear layers"`` (the weights of `linears`, and experts') or ``"all parameters"``.
        share: of the bytes of each matrix that its codes take.
    """
    torch.manual_seed(seed)
    own = {f"{name}.weight" for name in linears(model)}
    parameters, tensors = {}, _as_stored(model)
    for name, parameter in tensors.items():
        if scope == "linear layers" and name not in own and ".experts." not in name:
            continue
        if parameter.dim() == 2:
            n, k = parameter.shape
            parameters[name] = random_delta(n, k, rank_for_share(n, k, share))
        else:
            codes = pack(torch.randint(0, 4, (parameter.numel(),), dtype=torch.uint8))
            levels = torch.tensor([0.02, 0.01, -0.01, -0.02])
            parameters[name] = CodedVector(codes, levels, tuple(parameter.shape))
    config = {
        "base_model_name_or_path": "random weights",
        "base_nbytes": sum(p.nbytes for p in model.parameters()),
        "base_fingerprint": take_fingerprint(tensors.__getitem__, list(parameters)),
        "errors": [0.5] * len(parameters),
        "compression": {"share": share},
        "model_config": {},
        "tied": {},
        "versions": {},
    }
    save_adapter(folder, Adapter(config, parameters), "Random codes, for benches.\n", overwrite=True)
    return sum(file.stat().st_size for file in folder.iterdir())
