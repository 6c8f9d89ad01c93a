"""The adapter card (README.md of an adapter directory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

_USE = """```python
from dts_fast import DTSModel

model = DTSModel.from_pretrained({base!r}, "path/to/this/adapter", adapter_name="{name}")
model.generate(**inputs, adapter_names=["{name}", "__base__"])  # one name per row
```
"""


def render_card(name: str, config: Mapping[str, object], rows: Sequence[tuple[str, str, int, int, float]]) -> str:
    """Markdown with the base, the method, and what each parameter cost and lost.

    Args:
        rows: (parameter, shape, rank, bytes, relative error of the delta); rank 0 for parameters without one.
    """
    # A hub id is worth more to a reader than a path of the machine that wrote the card.
    base = str(config["base_model_name_or_path"])
    base = base if base.count("/") <= 1 and not base.startswith(("/", ".")) else PurePath(base).name
    compression = config["compression"]
    settings = ", ".join(f"{key} {value}" for key, value in compression.items() if value is not None)
    lines = [
        "---",
        "library_name: dts_fast",
        "tags: [dts, adapter]",
        "---",
        f"# {name}",
        "",
        f"A fine-tune of `{base}`, compressed to 2-bit low-rank deltas (DTS, arXiv 2512.01461): {settings}.",
        "",
        _USE.format(base=base, name=name),
        "| parameter | shape | rank | bytes | error |",
        "|---|---|---|---|---|",
    ]
    lines += [f"|{param}|{shape}|{rank or ''}|{size}|{error:.4f}|" for param, shape, rank, size, error in rows]
    lines += ["", "error: Frobenius norm of what is lost over that of the delta."]
    return "\n".join(lines) + "\n"
