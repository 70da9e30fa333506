"""Writes README's table from the results file: `python -m benchmarks.readme`; with --check it only compares."""

import json
import sys
from pathlib import Path

from benchmarks.subjects import PEER_PACKAGES

ROOT = Path(__file__).parent.parent
START, END = "<!-- table: benchmarks/results/cpu.json -->", "<!-- end of table -->"
NAMES = {
    "products": "bare matrix products (the floor)",
    "ours": "**cpo-kernels**",
    "cce": "Cut Cross Entropy, torch_compile form",
    "naive_unmasked": "naive PyTorch, labelled rows only",
    "naive": "naive PyTorch, every position",
    "liger": "Liger fused linear DPO, compiled",
    "trl": "TRL chunked head",
}


def cell(row: dict) -> str:
    if "why" in row:
        return "not measured"
    return f"{row['ratio_to_products']:.2f}× · {row['peak_bytes'] / 2**20:.0f} MiB"


def table(report: dict) -> str:
    loads, env = report["workloads"], report["environment"]
    heads = [f"{w['dtype']}, {'frozen' if w['frozen'] else 'trainable'}" for w in loads]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, label in NAMES.items():
        if name not in loads[0]["subjects"]:
            continue
        lines.append(f"| {label} | " + " | ".join(cell(w["subjects"][name]) for w in loads) + " |")
    first = loads[0]
    shown = {"torch", *(package for peer, package in PEER_PACKAGES.items() if peer in first["subjects"])}
    floors = ", ".join(f"{w['subjects']['products']['median_s'] * 1e3:.0f} ms" for w in loads)
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if name in shown)
    lines += [
        "",
        f"Head {first['head']} ({first['hidden']} × {first['vocab']}), {first['pairs']} pairs of {first['length']} "
        f"tokens of which {first['prompt']} are prompt, forward and backward: time as a multiple of the bare products "
        f"({floors}), then peak memory beyond inputs, gradients included. {env['cpu']}, {env['threads']} threads, "
        f"Python {env['python']}, {versions}; {env['date']}, commit {env['commit']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    report = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    new = f"{before}{START}\n{table(report)}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit("README's table differs from the results: run python -m benchmarks.readme" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
