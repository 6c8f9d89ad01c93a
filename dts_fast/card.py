"""The adapter card (README.md of an adapter directory)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

_USE = """```python
from dts_fast import DTSModel

model = DTSModel.from_pretrained({base!r}, "path/to/this/adapter", adapter_name="{name}")
model.generate(**inputs, adapter_names=["{name}", "__base__"])  # one name per row
```
"""


def render_card(name: str, config: Mapping[str, object], parameters: Mapping[str, object]) -> str:
    """Markdown with the base, the method, and what each parameter cost and lost.

    Args:
        config: ``adapter_config.json``; its errors are in the order of the sorted names, None where not known.
        parameters: deltas and whole tensors by name.
    """
    # A hub id is worth more to a reader than a path of the machine that wrote the card.
    base = str(config["base_model_name_or_path"])
    base = base if base.count("/") <= 1 and not base.startswith(("/", ".")) else PurePath(base).name
    if config.get("members"):
        members = ", ".join(f"{weight:.4g} x {member}" for member, weight in config["members"])
        made = f"A mixture of adapters of `{base}` (DTS, arXiv 2512.01461, the variant for unseen tasks): {members}."
    else:
        settings = ", ".join(f"{key} {value}" for key, value in config["compression"].items() if value is not None)
        made = f"A fine-tune of `{base}`, compressed to 2-bit low-rank deltas (DTS, arXiv 2512.01461): {settings}."
    lines = [
        "---",
        "library_name: dts_fast",
        "tags: [dts, adapter]",
        "---",
        f"# {name}",
        "",
        made,
        "",
        _USE.format(base=base, name=name),
        "| parameter | shape | rank | bytes | error |",
        "|---|---|---|---|---|",
    ]
    for (param, parameter), error in zip(sorted(parameters.items()), config["errors"], strict=True):
        shape, rank = "x".join(map(str, parameter.shape)), getattr(parameter, "rank", 0) or ""
        lines.append(f"|{param}|{shape}|{rank}|{parameter.nbytes}|{'' if error is None else f'{error:.4f}'}|")
    lines += ["", "error: Frobenius norm of what is lost over that of the delta."]
    return "\n".join(lines) + "\n"
