"""Where the time of each head strategy goes on a CPU: `python -m benchmarks.profile [--set ci]`.

One step in the profiler, the median of several, split into the matrix products, our kernels and the rest by name.
Writes benchmarks/results/profile-cpu.json; `python -m benchmarks.plot` makes the table of docs/performance.md from it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cpo_kernels.bench.families import HEAD_IMPLEMENTATIONS
from cpo_kernels.bench.head import Batch
from cpo_kernels.bench.sets import TINY
from cpo_kernels.bench.workload import Head, head
from cpo_kernels.environment import describe, processor

RESULTS = Path(__file__).parent / "results" / "profile-cpu.json"
# strategy -> (implementation, mode)
STRATEGIES = {
    "forward": ("ours", "forward"),
    "frozen": ("ours", "frozen"),
    "pairs": ("ours", "trainable"),
    "two_pass": ("ours_two_pass", "trainable"),
    "kept": ("ours_token_logps", "trainable"),
}
PARTS = {  # part -> what the names of its operators begin with
    "products": ("aten::mm", "aten::addmm", "aten::mv"),
    "token kernels": ("cpo_kernels::token_logps_",),
    "loss kernels": ("cpo_kernels::preference", "cpo_kernels::sequence_sum"),
}


def part_of(name: str) -> str:
    inner = name not in ("cpo_kernels::preference_loss", "cpo_kernels::token_logps_backward")  # these call kernels
    return next((part for part, begins in PARTS.items() if inner and name.startswith(begins)), "rest")


def shares(step: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by part, and the five longest operators of the rest."""
    step()
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        seen.append({e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages()})
    median = {name: statistics.median(s.get(name, 0.0) for s in seen) for name in seen[0]}
    parts = dict.fromkeys([*PARTS, "rest"], 0.0)
    for name, ms in median.items():
        parts[part_of(name)] += ms
    rest = sorted((item for item in median.items() if part_of(item[0]) == "rest"), key=lambda item: -item[1])
    return {"ms": parts, "longest_of_the_rest": dict(rest[:5])}


def measure(workload: Head, rounds: int) -> list[dict[str, Any]]:
    device, rows = torch.device("cpu"), []
    for strategy, (implementation, mode) in STRATEGIES.items():
        batch = Batch(replace(workload, mode=mode), device)
        rows.append({"strategy": strategy, **shares(HEAD_IMPLEMENTATIONS[implementation].build(batch).run, rounds)})
    return rows


def table(content: dict[str, Any]) -> str:
    w = content["workload"]
    lines = [
        f"{w['head']} ({w['hidden']} × {w['vocab']}), {w['groups']} groups of {w['responses']} × {w['length']} tokens, "
        f"{w['prompt']} of them prompt, {w['dtype']}; "
        f"{processor(content['environment'])}; `{content['command']}`.",
        "",
        "| strategy | " + " | ".join([*PARTS, "rest"]) + " | longest of the rest |",
        "|---" * (len(PARTS) + 3) + "|",
    ]
    for row in content["strategies"]:
        total = sum(row["ms"].values())
        cells = [f"{ms:.0f} ms, {ms / total:.0%}" for ms in row["ms"].values()]
        longest = ", ".join(f"`{name}` {ms:.0f} ms" for name, ms in row["longest_of_the_rest"].items() if ms >= 1)
        lines.append(f"| `{row['strategy']}` | " + " | ".join(cells) + f" | {longest} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("ci", "default"), default="default", help="ci: a tiny head, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    workload = TINY if args.set == "ci" else head("qwen2.5-0.5b")
    content = {
        "environment": describe(torch.device("cpu")),
        "command": " ".join(["python -m benchmarks.profile", *(argv if argv is not None else sys.argv[1:])]).strip(),
        "workload": vars(workload),
        "strategies": measure(workload, args.rounds),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
