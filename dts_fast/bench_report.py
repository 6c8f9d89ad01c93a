"""What `dts-fast bench` shows of its rows: a table, a plot, and the comparison with an earlier run."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .atomic import check_file
from .errors import DTSError

Row = Mapping[str, object]

# What makes a row of one run that of another.
_KEY = (
    "model", "layer", "n", "k", "m", "dtype", "rank", "adapters", "composition", "device", "candidate",
)  # fmt: skip


def table(rows: Sequence[Row], before: Mapping[tuple, Row] | None = None):
    """A `rich.table.Table`: times, over the bare linear's, and of the roofline; beside an earlier run's if given."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for name in ("layer", "N x K", "rows", "candidate"):
        out.add_column(name)
    for name in ("ms", "over F.linear", "quartiles", "of the floor"):
        out.add_column(name, justify="right")
    if before is not None:
        out.add_column("ratio before", justify="right")
        out.add_column("now / before", justify="right")
    last = None
    for row in rows:
        place = f"{row['model']} {row['layer']}", f"{row['n']} x {row['k']}", str(row["m"])
        if last is not None and place != last:
            out.add_section()
        cells = [*(place if place != last else ("", "", "")), str(row["candidate"])]
        cells += [f"{row['ms']:.4f}", f"{row['ratio']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}"]
        cells.append(f"{row['of_floor']:.0%} ({row['bound']})")
        if before is not None:
            old = before.get(key_of(row))
            cells += ["-", "-"] if old is None else [f"{old['ratio']:.2f}", f"{row['ratio'] / old['ratio']:.2f}"]
        strong = str(row["candidate"]).startswith("DTSLinear")
        out.add_row(*cells, style="bold" if strong else None)
        last = place
    return out


def key_of(row: Row) -> tuple:
    return tuple(row.get(name) for name in _KEY)


def read_rows(path: str | Path) -> tuple[Row, dict[tuple, Row]]:
    """The header and the rows of an earlier run's JSON lines.

    Raises:
        DTSError: not such a file.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        header = lines[0]["header"]
        rows = {key_of(row): row for row in lines[1:] if "ratio" in row and "candidate" in row}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DTSError(
            f"{path}: expected the JSON lines of an earlier run (dts-fast bench --out {path}), got {error!r}."
        ) from error
    if not rows:
        raise DTSError(f"{path}: holds no timings. Write some with dts-fast bench --out {path}.")
    return header, rows


def summary_of_change(rows: Sequence[Row], before: Mapping[tuple, Row]) -> str:
    """How the ratios of this run compare with an earlier one's, one line for each candidate."""
    lines = []
    for candidate in dict.fromkeys(str(row["candidate"]) for row in rows):
        pairs = [(row, before.get(key_of(row))) for row in rows if row["candidate"] == candidate]
        changes = [row["ratio"] / old["ratio"] for row, old in pairs if old is not None]
        if changes and candidate != "F.linear":
            mean = math.exp(sum(map(math.log, changes)) / len(changes))
            lines.append(f"{candidate}: {mean:.3f} x its earlier ratio (geometric mean of {len(changes)} points)")
    return "\n".join(lines) or "no point of this run is in the earlier one"


PLOTS = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """Refuse a plot that cannot be written, before anything is timed.

    Raises:
        DTSError: another ending than one of `PLOTS`, or see `check_file`.
    """
    if Path(path).suffix not in PLOTS:
        raise DTSError(f"{path}: expected a plot's file to end in {', '.join(PLOTS)}, got {Path(path).suffix!r}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise DTSError("a plot needs matplotlib: pip install 'dts_fast[bench]'.")
    check_file(path)


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Ratios to the bare linear over the rows of a batch, a line for each candidate: the geometric mean over layers.

    Raises:
        DTSError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    batches = sorted({int(row["m"]) for row in rows})
    for candidate in dict.fromkeys(str(row["candidate"]) for row in rows):
        points = []
        for m in batches:
            ratios = [row["ratio"] for row in rows if row["candidate"] == candidate and row["m"] == m]
            points.append(math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan)
        own = candidate.startswith("DTSLinear")
        axes.plot(batches, points, marker="o", label=candidate, linewidth=2.5 if own else 1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(m) for m in batches])
    axes.set_xlabel("rows of a batch")
    axes.set_ylabel("time over F.linear")
    axes.axhline(1, color="0.7", linewidth=1, zorder=0)
    axes.legend(fontsize="small", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DTSError(f"{path}: cannot be written ({error}).") from error
    finally:
        pyplot.close(figure)
