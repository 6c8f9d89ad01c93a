"""Fill the tables of README.md from committed results; with --check, fail where they differ.

python bench/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def hardware(header: dict) -> str:
    return f"{header['cpu']}, {header['threads']} threads, torch {header['torch']}, commit {header['commit']}"


def demo() -> str:
    """The demo's table, transposed to fit a page, and its mixed batch."""
    results = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    variants = results["variants"]
    budgets = list(variants[0]["adapters"])
    lines = [
        "| variant | base | average of the fine-tunes | fine-tune |"
        + "".join(f" adapter {budget} | gain kept |" for budget in budgets),
        "|---" * (4 + 2 * len(budgets)) + "|",
    ]
    for v in variants:
        bits = v["bits_per_byte"]
        cells = [v["kind"], *(f"{bits[key]:.3f}" for key in ("base", "average", "fine_tune"))]
        for budget in budgets:
            adapter = v["adapters"][budget]
            cells += [f"{adapter['bits_per_byte']:.3f}", f"{adapter['gain_kept']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = ", ".join(f"{max(v['adapters'][budget]['nbytes'] for v in variants):,} at {budget}" for budget in budgets)
    lines += [
        "",
        "Bits per byte of held-out text of the variant's kind; *gain kept* is the share of the fine-tune's gain over "
        f"the base. A variant is {variants[0]['dense_nbytes']:,} bytes dense; adapters, all files counted, are at most "
        f"{sizes} of the base's bytes. ({hardware(results['header'])}; "
        "[bench/results/demo.json](bench/results/demo.json))",
        "",
        "One prompt, one mixed batch, adapters at " + budgets[-1] + ":",
        "",
        "```",
    ]
    for name, text in results["texts"].items():
        shown = [line for line in text.splitlines() if line.strip()]
        lines += [f"--- {name}", *shown[:5]]
    return "\n".join([*lines, "```"])


def fidelity() -> str:
    """KL of the refined method and of the exact SVD over the paper's, at equal bytes."""
    lines = (RESULTS / "fidelity.jsonl").read_text(encoding="utf-8").splitlines()
    head, rows = json.loads(lines[0])["header"], [json.loads(line) for line in lines[1:]]
    out = [
        "| fine-tune | bytes of what is covered | paper: KL | refined / paper | exact SVD, same rank / paper |",
        "|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        for density in dict.fromkeys(row.get("density") for row in rows if row["task"] == task):
            at = {row["method"]: row for row in rows if row["task"] == task and row.get("density") == density}
            if density is None:
                continue
            paper = at["paper"]
            ratio = {name: at[name]["kl"] / paper["kl"] for name in ("refined", "exact SVD, equal rank")}
            out.append(
                f"| {task} | {paper['share_of_covered']:.2%} | {paper['kl']:.4f} | {ratio['refined']:.2f} | "
                f"{ratio['exact SVD, equal rank']:.2f} |"
            )
    out += [
        "",
        "KL: divergence (nats) of the compressed model's predictions from the fine-tune's, held-out inputs. *section* "
        "and *interface* are full fine-tunes of all-MiniLM-L6-v2 (embeddings left at the base), the others the demo's "
        "language models. The exact SVD keeps its factors in float32, at 16 times the bytes. "
        f"({hardware(head)}; [bench/results/fidelity.jsonl](bench/results/fidelity.jsonl))",
        "",
        "![KL against bytes](bench/results/fidelity.png)",
    ]
    return "\n".join(out)


BLOCKS = {"demo": demo, "fidelity": fidelity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = old = readme.read_text(encoding="utf-8")
    for name, render in BLOCKS.items():
        block = f"<!-- {name} -->\n{render()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    if check and text != old:
        sys.exit("README.md differs from the committed results; run python bench/readme.py")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
