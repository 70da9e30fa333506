"""Where the time of each head strategy goes: `python -m benchmarks.profile [--set ci] [--device cuda]`.

One step in the profiler, the median of several, split into the matrix products, our kernels and the rest by name. On a
GPU this is time of its kernels, by the operator that started them; beside it the time of a step without the profiler,
which is more where the GPU waits for the host, and how many kernels a step starts.
Writes benchmarks/results/profile-DEVICE.json; `python -m benchmarks.plot` makes the table of docs/performance.md
from that of a CPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cpo_kernels.bench.families import HEAD_IMPLEMENTATIONS
from cpo_kernels.bench.head import Batch
from cpo_kernels.bench.sets import TINY
from cpo_kernels.bench.workload import Head, head
from cpo_kernels.environment import describe, processor

RESULTS = Path(__file__).parent / "results"
WORKLOADS = {
    ("cpu", "default"): head("qwen2.5-0.5b"),
    ("cuda", "default"): head("llama-3-8b", groups=8, length=1024, prompt=512),
}
# strategy -> (implementation, mode)
STRATEGIES = {
    "forward": ("ours", "forward"),
    "frozen": ("ours", "frozen"),
    "pairs": ("ours", "trainable"),
    "two_pass": ("ours_two_pass", "trainable"),
    "kept": ("ours_token_logps", "trainable"),
}
PARTS = {  # part -> what the names of its operators begin with
    "products": (
        "aten::mm",
        "aten::addmm",
        "aten::mv",
        "cpo_kernels::logits_",
        "cpo_kernels::add_product_",
        "cpo_kernels::linear_token_logps_fwd",
    ),
    "token kernels": ("cpo_kernels::token_logps_",),
    "loss kernels": ("cpo_kernels::preference", "cpo_kernels::sequence_sum"),
}


def part_of(name: str) -> str:
    inner = name not in ("cpo_kernels::preference_loss", "cpo_kernels::token_logps_backward")  # these call kernels
    return next((part for part, begins in PARTS.items() if inner and name.startswith(begins)), "rest")


def spent(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Milliseconds by operator; what an operator starts on a GPU counts there, not the time of starting it."""
    own = [e for e in events if e.device_type == DeviceType.CPU]
    return {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3 for e in own}


def launches(events: Iterable[Any]) -> int:
    return sum(e.count for e in events if e.device_type == DeviceType.CUDA)


def shares(step: Callable[[], Any], rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step by part, and the five longest operators of the rest."""
    step()
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seen: list[dict[str, float]] = []
    counts, whole = [], []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        step()
        wait()
        whole.append(1e3 * (time.perf_counter() - start))
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            step()
            wait()
        events = profiler.key_averages()
        seen.append(spent(events, on_gpu))
        counts.append(launches(events))
    median = {name: statistics.median(s.get(name, 0.0) for s in seen) for name in seen[0]}
    parts = dict.fromkeys([*PARTS, "rest"], 0.0)
    for name, ms in median.items():
        parts[part_of(name)] += ms
    rest = sorted((item for item in median.items() if part_of(item[0]) == "rest"), key=lambda item: -item[1])
    of_gpu = {"launches": statistics.median(counts)} if on_gpu else {}
    return {"ms": parts, "longest_of_the_rest": dict(rest[:5]), "step_ms": statistics.median(whole), **of_gpu}


def measure(workload: Head, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for strategy, (implementation, mode) in STRATEGIES.items():
        batch = Batch(replace(workload, mode=mode), device)
        step = HEAD_IMPLEMENTATIONS[implementation].build(batch).run
        rows.append({"strategy": strategy, **shares(step, rounds, device)})
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
        total, digits = sum(row["ms"].values()), 1 if "launches" in row else 0
        cells = [f"{ms:.{digits}f} ms, {ms / total:.0%}" for ms in row["ms"].values()]
        named = row["longest_of_the_rest"].items()
        longest = ", ".join(f"`{name}` {ms:.{digits}f} ms" for name, ms in named if ms >= 10**-digits)
        if digits:
            longest += f"; a step takes {row['step_ms']:.1f} ms and {row['launches']:.0f} launches"
        lines.append(f"| `{row['strategy']}` | " + " | ".join(cells) + f" | {longest} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("ci", "default"), default="default", help="ci: a tiny head, in seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/profile-DEVICE.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    workload, device = WORKLOADS.get((args.device, args.set), TINY), torch.device(args.device)
    args.out = args.out or RESULTS / f"profile-{args.device}.json"
    content = {
        "environment": describe(device),
        "command": " ".join(["python -m benchmarks.profile", *(argv if argv is not None else sys.argv[1:])]).strip(),
        "workload": vars(workload),
        "strategies": measure(workload, args.rounds, device),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
