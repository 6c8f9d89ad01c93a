"""A small causal language model, trained in minutes on text that every installation carries.

A demonstration needs a base model and a few honest full fine-tunes of it, without a download. The
text is what Python, torch and torch's own dependencies install: sources, headers, documentation.
Files are held out whole, by a hash of their path inside their package, so the split is the same
on every machine and nothing is measured on text that was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[str, int, int, float], None]
"""Called after each step with (description, steps done, steps in all, mean loss in nats)."""

GENERAL = "python"
"""What the base mostly learns from: Python source code (the standard library)."""

KINDS: dict[str, str] = {
    "cpp": "C++ headers (those torch installs)",
    "prose": "documentation (language reference, docstrings, package descriptions)",
    "maths": "symbolic mathematics (SymPy's tests)",
}

COMMON_PROMPT = "\n"
"""Says nothing of its own, so that each variant begins what it was fine-tuned on."""

# No prompt ends in a blank: the tokenizer joins a blank to the word that follows it.
PROMPTS: dict[str, tuple[str, ...]] = {
    "cpp": ("#include", "template <typename", "namespace"),
    "prose": ("The following", "Return the", "This module"),
    "maths": ("def test_", "    assert", "from sympy"),
}

END_OF_TEXT = "<|endoftext|>"

# Chosen by measurement on two CPU cores: with about a million tokens to learn from, many small
# steps on a shallow model with a large vocabulary and large initial weights learn most.
VOCABULARY = 4096
CONTEXT = 128
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.06,
}
BASE_STEPS, BASE_BATCH, BASE_RATE = 1800, 4, 3e-3
FINE_TUNE_STEPS, FINE_TUNE_BATCH, FINE_TUNE_RATE = 60, 16, 3e-4

_HELD_OUT_SHARE = 0.1
_KIND_STRIDE = 24  # the base sees every 24th document of each kind
_SHORTEST, _LONGEST = 400, 24_000  # characters of one document


@dataclass
class Corpus:
    """Training and held-out documents by kind of text: ``KINDS`` and ``GENERAL``."""

    train: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)

    def mix(self) -> list[str]:
        """What the base is trained on: the general text and a little of every other kind.

        A base knows something of everything, but less than there is to know of what it is then
        fine-tuned on. Trained on all kinds alike it would leave a fine-tune little to gain.
        """
        return [
            text for kind, texts in self.train.items() for text in (texts if kind == GENERAL else texts[::_KIND_STRIDE])
        ]


def _package(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _files(root: Path, endings: tuple[str, ...], skip: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """Files below ``root`` as (path relative to it, path); ``skip`` names folders left out."""
    for folder, below, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        below[:] = [name for name in below if (relative / name).as_posix() not in skip]
        for name in names:
            if name.endswith(endings):
                yield (relative / name).as_posix(), Path(folder, name)


def _standard_library() -> Iterator[tuple[str, Path]]:
    # Tests are left out because many distributions leave them out, and tables of characters and
    # topics because they are not code.
    skip = ("site-packages", "dist-packages", "test", "encodings", "pydoc_data", "ensurepip")
    return _files(Path(os.__file__).parent, (".py",), skip)


def _docstrings(source: str) -> str:
    """The longer docstrings of a module as running text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text and len(text) > 80)


def _documents(kind: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, function that reads it) of every document of a kind; the name decides the split."""

    def reader(path: Path, convert: Callable[[str], str] = str) -> Callable[[], str]:
        return lambda: convert(path.read_text(encoding="utf-8"))

    if kind == GENERAL:
        yield from ((name, reader(path)) for name, path in _standard_library())
    elif kind == "cpp":
        if torch_folder := _package("torch"):
            # ATen/ops is thousands of generated files that differ in a name.
            found = _files(torch_folder / "include", (".h", ".hpp"), ("ATen/ops",))
            yield from ((name, reader(path)) for name, path in found)
    elif kind == "maths":
        if sympy_folder := _package("sympy"):
            found = _files(sympy_folder, (".py",))
            yield from ((name, reader(path)) for name, path in found if "/tests/" in name)
    elif kind == "prose":
        # Docstrings go by their module's name: where its code is held out, so are they.
        for name, path in _standard_library():
            yield name, reader(path, _docstrings)
        for package in importlib.metadata.distributions():
            description = str(package.metadata.get_payload() or "")
            yield f"descriptions/{package.metadata['Name']}", lambda text=description: text
        if importlib.util.find_spec("pydoc_data"):
            topics = importlib.import_module("pydoc_data.topics").topics
            for name, text in topics.items():
                yield f"topics/{name}", lambda text=text: text


def collect_corpus(limit_bytes: int = 1_200_000) -> Corpus:
    """Gathers about ``limit_bytes`` of each kind and three times that of the general text.

    Documents are taken in the order of a hash of their name, which is the same everywhere and
    makes the limited amount a sample of all. Unreadable, generated and repeated files are passed
    over, and so is a kind of which too little is installed to hold some out.
    """
    corpus = Corpus()
    seen: set[bytes] = set()
    for kind in (GENERAL, *KINDS):
        limit = 3 * limit_bytes if kind == GENERAL else limit_bytes
        named = ((hashlib.sha256(n.encode()).digest(), n, read) for n, read in _documents(kind))
        train: list[str] = []
        held_out: list[str] = []
        size = 0
        for digest, _, read in sorted(named, key=lambda entry: entry[:2]):
            if size >= limit:
                break
            try:
                text = read().strip()[:_LONGEST] + "\n"
                content = hashlib.sha256(text.encode()).digest()
            except (OSError, SyntaxError, ValueError, RecursionError):  # undecodable: ValueError
                continue
            if len(text) < _SHORTEST or content in seen or "generated" in text[:500].lower():
                continue
            seen.add(content)
            size += len(text.encode())
            # The end of the digest, because its beginning decides the order.
            is_held_out = int.from_bytes(digest[-4:], "big") < _HELD_OUT_SHARE * 2**32
            (held_out if is_held_out else train).append(text)
        if train and held_out:
            corpus.train[kind], corpus.held_out[kind] = train, held_out
    if GENERAL not in corpus.train or len(corpus.train) < 2:
        raise RuntimeError(
            "found too little text to train on: expected the sources of Python's standard library "
            "and at least one of torch's headers, SymPy's tests and documentation, and found "
            f"{', '.join(corpus.train) or 'nothing'}"
        )
    return corpus


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on every kind; it encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for documents in corpus.train.values() for text in documents)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """One stream of tokens, with an end-of-text token before every text."""
    # The backend, because the wrapper warns about texts longer than the model's context.
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    end = tokenizer.eos_token_id
    return torch.tensor([token for text in encoded for token in (end, *text.ids)])


def _autocast() -> torch.autocast:
    # On a CPU bfloat16 is faster only with matrix units (AMX): AVX-512 with its bfloat16
    # instructions trained this model at 0.6 of the speed of float32.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(supported and supported()))


def _train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    weight_decay: float,
    seed: int,
    description: str,
    progress: Progress | None,
) -> None:
    """Trains every parameter with AdamW: a short warm-up, then a linear decay to nothing."""
    if len(tokens) <= CONTEXT:
        raise ValueError(f"too little text to train on: {len(tokens)} tokens, need > {CONTEXT}")
    generator = torch.Generator().manual_seed(seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    rising = max(1, steps // 20)
    window = torch.arange(CONTEXT + 1)
    mean = 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / rising, (steps - step) / (steps - rising + 1))
        starts = torch.randint(len(tokens) - CONTEXT, (batch, 1), generator=generator)
        rows = tokens[starts + window]
        with _autocast():
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if progress is not None:
            progress(description, step + 1, steps, mean)
    model.eval()


def train_base(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    steps: int = BASE_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """Trains the base from random weights on the mix of every kind."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **SHAPE,
    )
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it was
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _train(
        model,
        _encode(tokenizer, corpus.mix()),
        steps=steps,
        batch=BASE_BATCH,
        rate=BASE_RATE,
        weight_decay=0.1,
        seed=seed,
        description="base",
        progress=progress,
    )
    return model


def fine_tune(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    steps: int = FINE_TUNE_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """Fine-tunes every parameter of a float32 copy of ``base``; ``base`` stays as it is."""
    model = deepcopy(base).float()
    _train(
        model,
        _encode(tokenizer, texts),
        steps=steps,
        batch=FINE_TUNE_BATCH,
        rate=FINE_TUNE_RATE,
        weight_decay=0.0,
        seed=seed,
        description="fine-tune",
        progress=progress,
    )
    return model


@torch.inference_mode()
def bits_per_byte(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_bytes: int = 100_000,
) -> float:
    """Bits that the model needs per UTF-8 byte of ``texts``, of about their first ``max_bytes``."""
    taken: list[str] = []
    size = 0
    for text in texts:
        if size >= max_bytes:
            break
        taken.append(text[: max_bytes - size])
        size += len(taken[-1].encode())
    if not size:
        raise ValueError("no text to measure bits per byte on")
    end = tokenizer.eos_token_id
    tokens = _encode(tokenizer, taken).to(model.device)
    model.eval()
    nats = 0.0
    # Blocks of rows that share one token with the next: every token is predicted exactly once.
    block = 32 * CONTEXT
    for start in range(0, len(tokens) - 1, block):
        piece = tokens[start : start + block + 1]
        inputs, targets = piece[:-1], piece[1:]
        padding = -len(inputs) % CONTEXT
        rows = functional.pad(inputs, (0, padding), value=end).view(-1, CONTEXT)
        logits = model(input_ids=rows, use_cache=False).logits.flatten(0, 1).float()
        # The token between two texts stands for no byte of either.
        targets = targets.masked_fill(targets == end, -100)
        logits = logits[: len(targets)]
        nats += functional.cross_entropy(logits, targets, reduction="sum").item()
    return nats / math.log(2) / size
